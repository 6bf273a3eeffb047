"""A controller killed at any moment loses nothing that it acknowledged."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import grpc
from cryptography.hazmat.primitives.asymmetric import ec
from sqlalchemy import select

from shoal_controller import identity
from shoal_controller.settings import Settings
from shoal_controller.store.repositories import Store
from shoal_controller.store.tables import Device, Spool, Window
from shoal_protos import tokens
from shoal_protos.v1 import agents_pb2, agents_pb2_grpc, enrolment_pb2, enrolment_pb2_grpc, telemetry_pb2

from .conftest import Joined, csr_of, profile_of, secure_channel

BUNDLE = "sha256:" + "a" * 64
KILLS = 3
SENT = 400  # windows between two kills at most


class Process:
    """`python -m shoal_controller` on a directory."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.child: asyncio.subprocess.Process | None = None

    async def start(self) -> dict[str, int]:
        flags = ["--http-port", "0", "--enrolment-port", "0", "--agents-port", "0", "--fleet", "test"]
        self.child = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "shoal_controller",
            "--home",
            str(self.home),
            *flags,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            env={**os.environ, "SHOAL_UI": "false"},
        )
        assert self.child.stdout is not None
        line = await asyncio.wait_for(self.child.stdout.readline(), 60)
        assert line.startswith(b"http://"), line
        ports: dict[str, int] = json.loads((self.home / "run" / "ports.json").read_text())
        return ports

    async def end(self, number: int) -> int:
        assert self.child is not None
        self.child.send_signal(number)
        await self.child.communicate()
        assert self.child.returncode is not None
        return self.child.returncode


async def join(home: Path, ports: dict[str, int]) -> Joined:
    import httpx

    async with httpx.AsyncClient() as http:
        made = await http.post(f"http://127.0.0.1:{ports['http']}/api/v1/tokens", json={})
    token = tokens.decode(made.json()["token"])
    keys = identity.load(home)
    key = ec.generate_private_key(ec.SECP256R1())
    credentials = grpc.ssl_channel_credentials(keys.ca_pem)
    async with secure_channel(ports["enrolment"], credentials, "test") as channel:
        stub = enrolment_pb2_grpc.EnrolmentStub(channel)  # type: ignore[no-untyped-call]
        request = enrolment_pb2.EnrollRequest(
            token_secret=token.secret, csr_der=csr_of(key), profile=profile_of(), name="cam"
        )
        return Joined(key, await stub.Enroll(request))


def item(sequence: int) -> agents_pb2.Spooled:
    window = telemetry_pb2.TelemetryWindow(
        boot_id="boot",
        monotonic_start_ns=sequence * 1_000_000_000,
        monotonic_end_ns=(sequence + 1) * 1_000_000_000,
    )
    window.placements.add(endpoint="digits", bundle=BUNDLE, role=1, requests=1)
    return agents_pb2.Spooled(spool_id="spool", sequence=sequence, telemetry=window)


async def send_from(home: Path, joined: Joined, ports: dict[str, int], first: int, kill_at: int) -> int:
    """Sends windows from `first` on until `kill_at` is acknowledged; returns the highest acknowledged."""
    keys = identity.load(home)
    credentials = grpc.ssl_channel_credentials(keys.ca_pem, joined.key_pem, joined.certificate_pem)
    acknowledged = first - 1
    async with secure_channel(ports["agents"], credentials, "test") as channel:
        call: Any = agents_pb2_grpc.AgentsStub(channel).Connect()  # type: ignore[no-untyped-call]
        hello = agents_pb2.Hello(profile=profile_of(), boot_id="boot", monotonic_ns=10**15)
        await call.write(agents_pb2.Up(hello=hello))

        async def write() -> None:
            for sequence in range(first, first + SENT):
                await call.write(agents_pb2.Up(spooled=item(sequence)))

        writing = asyncio.create_task(write())
        while acknowledged < kill_at:
            message = await asyncio.wait_for(call.read(), 30)
            if message.WhichOneof("message") == "ack":
                acknowledged = max(acknowledged, message.ack.through)
        writing.cancel()
        await asyncio.gather(writing, return_exceptions=True)
        call.cancel()
    return acknowledged


async def test_kill_9_under_load_loses_nothing_acknowledged(home: Path) -> None:
    process = Process(home)
    ports = await process.start()
    joined = await join(home, ports)
    acknowledged = 0
    for _ in range(KILLS):
        acknowledged = await send_from(home, joined, ports, acknowledged + 1, acknowledged + 100)
        await process.end(signal.SIGKILL)
        store = Store.open(f"sqlite:///{home / 'shoal.db'}")
        with store.read() as session:
            through = session.get_one(Spool, "spool").through
            rows = session.scalars(select(Window).where(Window.endpoint == "digits")).all()
        store.close()
        assert through >= acknowledged
        assert sum(row.requests for row in rows) == through  # each exactly once
        assert await process.start() == ports  # where agents look for it
        # What it committed but could not acknowledge is acknowledged when it is sent again.
    assert await process.end(signal.SIGTERM) == 0
    store = Store.open(f"sqlite:///{home / 'shoal.db'}")
    with store.read() as session:
        assert not session.get_one(Device, joined.device).connected
    store.close()


async def test_sigterm_ends_within_seconds_also_with_open_streams(home: Path) -> None:
    process = Process(home)
    ports = await process.start()
    joined = await join(home, ports)
    keys = identity.load(home)
    credentials = grpc.ssl_channel_credentials(keys.ca_pem, joined.key_pem, joined.certificate_pem)
    async with secure_channel(ports["agents"], credentials, "test") as channel:
        call: Any = agents_pb2_grpc.AgentsStub(channel).Connect()  # type: ignore[no-untyped-call]
        await call.write(agents_pb2.Up(hello=agents_pb2.Hello(profile=profile_of(), boot_id="b")))
        assert (await call.read()).WhichOneof("message") == "welcome"
        assert await asyncio.wait_for(process.end(signal.SIGTERM), 60) == 0


async def test_a_second_process_on_the_directory_is_refused(home: Path) -> None:
    process = Process(home)
    await process.start()
    second = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "shoal_controller",
        "--home",
        str(home),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    _, errors = await asyncio.wait_for(second.communicate(), 60)
    assert process.child is not None
    assert second.returncode == 1
    assert f"Another controller (process {process.child.pid})".encode() in errors
    assert await process.end(signal.SIGTERM) == 0
    assert Settings.load({"home": home}, {}).ports_file.exists()
