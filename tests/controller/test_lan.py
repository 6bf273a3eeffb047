"""Addresses are hints: which are handed out, what opens to the network, how devices follow a move."""

from __future__ import annotations

import asyncio
import json
import os
import platform
import re
import signal
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from shoal_controller import addresses, installer
from shoal_controller.app import Controller
from shoal_controller.cli import up
from shoal_controller.desired_inputs import PublishedSettings
from shoal_controller.settings import Settings
from shoal_protos import tokens
from shoal_protos.errors import InvalidInput

from . import tiny
from .conftest import FakeAgent

FLAGS = ("--http-port", "0", "--grpc-port", "0", "--metrics-port", "0")


class TestOrder:
    def test_the_default_routes_address_comes_first_loopback_last(self) -> None:
        found = [
            ("lo", "127.0.0.1"),
            ("eth0", "192.168.1.7"),
            ("wlan0", "192.168.1.9"),
            ("docker0", "172.17.0.1"),
            ("br-1f", "172.18.0.1"),
            ("veth12", "172.19.0.1"),
            ("eth1", "169.254.3.4"),
        ]
        assert addresses.order(found, "192.168.1.9", "Laptop.lan") == (
            "192.168.1.9",
            "192.168.1.7",
            "laptop.local",
            "127.0.0.1",
        )

    def test_without_a_network_the_machine_is_reached_by_itself(self) -> None:
        assert addresses.order([("lo", "127.0.0.1")], "", "localhost") == ("127.0.0.1",)
        assert addresses.order([], "10.0.0.1", "bad name!") == ("127.0.0.1",)

    def test_the_list_stays_short(self) -> None:
        found = [(f"eth{number}", f"10.0.0.{number}") for number in range(1, 60)]
        hosts = addresses.order(found, "10.0.0.9", "laptop")
        assert len(hosts) == addresses.MAX_HOSTS and hosts[0] == "10.0.0.9"

    def test_this_machine_has_at_least_one(self) -> None:
        assert addresses.of_this_machine()[-1] == "127.0.0.1"


class TestSettings:
    @pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.4", "::", "example.org"])
    def test_api_and_dashboard_stay_on_loopback(self, home: Path, host: str) -> None:
        with pytest.raises(InvalidInput, match=r"no sign-in yet.*--lan"):
            Settings.load({"home": home, "host": host}, {})

    @pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "::1", "localhost"])
    def test_loopback_addresses_are_free_to_choose(self, home: Path, host: str) -> None:
        assert Settings.load({"home": home, "host": host}, {}).doors_host == host

    def test_lan_opens_the_doors_and_a_wrong_advertised_host_is_refused(self, home: Path) -> None:
        found = Settings.load({"home": home, "lan": True, "advertise": "fleet.example.org, 10.1.1.1"}, {})
        assert found.doors_host == "0.0.0.0" and found.extra_hosts == ("fleet.example.org", "10.1.1.1")
        with pytest.raises(InvalidInput, match="advertise"):
            Settings.load({"home": home, "advertise": "a b"}, {})


@pytest.fixture
def hosts() -> list[str]:
    """What the machine says its addresses are; tests change it."""
    return ["127.0.0.1", "board-house.local"]


@pytest.fixture
async def controller(settings: Settings, hosts: list[str]) -> AsyncIterator[Controller]:
    started = Controller(replace(settings, lan=True, installer_port=0), hosts=lambda: tuple(hosts))
    await started.start()
    yield started
    await started.stop()


def reachable(host: str, port: int) -> bool:
    try:
        with socket.create_connection((host, port), 5):
            return True
    except OSError:
        return False


class TestLan:
    async def test_only_the_doors_for_devices_are_open_beyond_loopback(self, controller: Controller) -> None:
        other = "127.0.0.2"  # stands for the network: what is bound to 127.0.0.1 alone does not answer
        ports = controller.ports
        assert {name for name, port in ports.items() if reachable(other, port)} == {
            "installer",
            "enrolment",
            "agents",
        }
        assert reachable("127.0.0.1", ports["http"])

    async def test_a_token_holds_every_address_and_the_line_the_best(self, controller: Controller) -> None:
        url = f"http://127.0.0.1:{controller.ports['http']}/api/v1"
        async with httpx.AsyncClient(base_url=url) as api:
            bare = (await api.post("/tokens", json={})).json()
            assert bare["join_line"] == "" and installer.FIRST_SET in bare["note"]
            assert "--lan" not in bare["note"] and bare["token"].startswith("shj_")
            controller.settings.wheels_dir.mkdir()
            tiny.installable(controller.settings.wheels_dir, platform=platform.machine())
            made = (await api.post("/tokens", json={})).json()
            (row,) = (await api.get("/wheels")).json()
        token = tokens.decode(made["token"])
        ports = controller.ports
        assert token.enrolment_addresses == (
            f"127.0.0.1:{ports['enrolment']}",
            f"board-house.local:{ports['enrolment']}",
        )
        assert token.agent_addresses[1] == f"board-house.local:{ports['agents']}"
        assert made["note"] == "" and made["installer_sha256"] in made["join_line"]
        assert made["join_line"].endswith(f"http://127.0.0.1:{ports['installer']}")
        assert made["token"] in made["join_line"] and row["platform"] == platform.machine()

    async def test_without_lan_the_note_says_what_to_start(self, settings: Settings) -> None:
        plain = Controller(settings)
        await plain.start()
        try:
            url = f"http://127.0.0.1:{plain.ports['http']}/api/v1"
            async with httpx.AsyncClient(base_url=url) as api:
                made = (await api.post("/tokens", json={})).json()
            assert made["join_line"] == "" and "shoal up --lan" in made["note"]
            assert "installer" not in plain.ports
        finally:
            await plain.stop()

    async def test_a_changed_address_is_published_once(
        self,
        controller: Controller,
        hosts: list[str],
        agents: Callable[..., Awaitable[FakeAgent]],
        eventually: Callable[..., Awaitable[Any]],
    ) -> None:
        agent = await agents()
        port = controller.ports["agents"]
        await eventually(lambda: agent.desired)
        keeper = addresses.AddressKeeper(controller.services, lambda: tuple(hosts))
        assert keeper.refresh() is False
        hosts[0] = "127.0.0.7"
        assert keeper.refresh() is True and keeper.refresh() is False

        def told() -> list[str]:
            return [item.address for item in agent.desired[-1].agent_settings.controllers]

        await eventually(lambda: told() == [f"127.0.0.7:{port}", f"board-house.local:{port}"])
        assert controller.services.addresses["agents"] == f"127.0.0.7:{port}"
        with controller.store.read() as session:
            assert PublishedSettings.load(session).telemetry_seconds == 2  # the rest stays


def test_up_says_which_doors_are_open(settings: Settings) -> None:
    ports = {"http": 1, "installer": 8441, "enrolment": 8442, "agents": 8443}
    closed = up.doors(settings, ports, ["127.0.0.1"])
    assert "127.0.0.1 only" in closed and "--lan" in closed
    opened = up.doors(replace(settings, lan=True), ports, ["10.0.0.4", "laptop.local", "127.0.0.1"])
    assert "10.0.0.4, laptop.local\n" in opened and "8441 (installer), 8442 (join), 8443 (agents)" in opened
    assert up.next_commands(replace(settings, lan=True))[0] == installer.FIRST_SET
    assert not any("wheels" in line for line in up.next_commands(settings))


# ---------------------------------------------------------------------------- real agents


class Agent:
    """A real agent process with a state directory of its own."""

    def __init__(self, state: Path) -> None:
        self.state = state
        self.process: asyncio.subprocess.Process | None = None

    async def call(self, *arguments: str) -> tuple[int, str]:
        process = await self._start(*arguments)
        output, _ = await asyncio.wait_for(process.communicate(), 60)
        return process.returncode or 0, output.decode()

    async def run(self) -> None:
        self.process = await self._start("run", *FLAGS)

    async def _start(self, *arguments: str) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "shoal_agent",
            *arguments,
            env={**os.environ, "SHOAL_AGENT_DIR": str(self.state)},
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )

    async def stop(self) -> None:
        if self.process is not None and self.process.returncode is None:
            self.process.send_signal(signal.SIGTERM)
            await asyncio.wait_for(self.process.communicate(), 60)

    @property
    def identity(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.state / "identity/join.json").read_text())
        return found


@pytest.fixture
async def agent(tmp_path: Path) -> AsyncIterator[Agent]:
    found = Agent(tmp_path / "agent")
    yield found
    await found.stop()


async def token_file(controller: Controller, path: Path) -> str:
    url = f"http://{controller.settings.host}:{controller.ports['http']}/api/v1"
    async with httpx.AsyncClient(base_url=url) as api:
        path.write_text((await api.post("/tokens", json={})).json()["token"])
    return str(path)


async def test_an_agent_follows_a_controller_that_moves(
    settings: Settings,
    agent: Agent,
    tmp_path: Path,
    eventually: Callable[..., Awaitable[Any]],
) -> None:
    here = ["127.0.0.1"]
    first = Controller(replace(settings, lan=True, installer_port=0), hosts=lambda: tuple(here))
    await first.start()
    try:
        code, output = await agent.call(
            "join", "--service", "none", "--token-file", await token_file(first, tmp_path / "token"), *FLAGS
        )
        assert code == 0, output
        await agent.run()
        device = agent.identity["device"]
        await eventually(lambda: first.connections.is_connected(device), 60)
        here[0] = "127.0.0.2"  # the network gives the machine another address, of which the agent is told
        assert addresses.AddressKeeper(first.services, lambda: tuple(here)).refresh()
        wanted = f"127.0.0.2:{first.ports['agents']}".encode()
        adopted = agent.state / "trust/desired.bin"
        await eventually(lambda: adopted.exists() and wanted in adopted.read_bytes(), 60)
        ports = dict(first.ports)
    finally:
        await first.stop()
    # From here on nobody answers at 127.0.0.1, the only address that the join token knew.
    moved = Controller(
        replace(settings, host="127.0.0.2", enrolment_port=ports["enrolment"], agents_port=ports["agents"])
    )
    await moved.start()
    try:
        await eventually(lambda: moved.connections.is_connected(device), 90)
    finally:
        await moved.stop()


async def test_joining_again_brings_back_a_device_whose_every_address_is_dead(
    settings: Settings,
    agent: Agent,
    tmp_path: Path,
    eventually: Callable[..., Awaitable[Any]],
) -> None:
    first = Controller(settings)
    await first.start()
    code, output = await agent.call(
        "join", "--service", "none", "--token-file", await token_file(first, tmp_path / "a"), *FLAGS
    )
    await first.stop()
    assert code == 0, output
    before = agent.identity
    # Another address and other ports, while the agent was away: it can never find out.
    (settings.ports_file).unlink()
    moved = Controller(replace(settings, host="127.0.0.2"))
    await moved.start()
    try:
        code, output = await agent.call(
            "join", "--service", "none", "--token-file", await token_file(moved, tmp_path / "b"), *FLAGS
        )
        assert code == 0, output
        after = agent.identity
        assert after["device"] == before["device"]  # the same key is the same device
        assert after["agent_addresses"] == [f"127.0.0.2:{moved.ports['agents']}"]
        await agent.run()
        await eventually(lambda: moved.connections.is_connected(after["device"]), 60)
    finally:
        await moved.stop()


def test_the_join_line_is_what_the_shell_runs(tmp_path: Path) -> None:
    """The line's own words: a wrong digest stops before anything runs."""
    source = tmp_path / "installer.py"
    source.write_text("print('ran')")
    line = installer.line("http://127.0.0.1:9", "0" * 64, "shj_x")
    fetch = re.compile(r"\(curl .*?\)")
    assert fetch.search(line)
    import subprocess

    done = subprocess.run(
        ["sh", "-c", fetch.sub(f"cp {source} $f", line)], capture_output=True, text=True, timeout=30
    )
    assert done.returncode != 0 and "ran" not in done.stdout
