"""The agents' door over real TLS: greeting, spooling, desired states, revocation, hostile input."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from sqlalchemy import select

from shoal_controller import devices, identity
from shoal_controller.app import Controller
from shoal_controller.events import list_events
from shoal_controller.settings import Settings
from shoal_controller.store.tables import Desired, Device, Spool, Window
from shoal_protos.v1 import agents_pb2, agents_pb2_grpc, blobs_pb2, blobs_pb2_grpc, telemetry_pb2

BUNDLE = "sha256:" + "a" * 64


def window(agent: Any, start_s: float, end_s: float, requests: int = 0) -> telemetry_pb2.TelemetryWindow:
    message = telemetry_pb2.TelemetryWindow(
        boot_id=agent.boot_id,
        monotonic_start_ns=agent.monotonic_ns + int(start_s * 1e9),
        monotonic_end_ns=agent.monotonic_ns + int(end_s * 1e9),
        system=telemetry_pb2.System(cpu_share=0.5, temperature_celsius=float("nan")),
    )
    if requests:
        histogram = telemetry_pb2.Histogram(
            scale=4, offset=160, counts=[requests], count=requests, sum=1000.0 * requests, min=1000, max=1000
        )
        message.placements.add(endpoint="digits", bundle=BUNDLE, role=1, requests=requests, latency=histogram)
    return message


def spooled(spool: str, sequence: int, **item: Any) -> agents_pb2.Spooled:
    return agents_pb2.Spooled(spool_id=spool, sequence=sequence, **item)


async def test_a_device_is_greeted_and_gets_its_desired_state(
    agents: Any, eventually: Any, controller: Controller, device_row: Any
) -> None:
    agent = await agents("Cam One!")
    assert agent.welcome.display_name == "cam-one"
    assert agent.welcome.profile_class == "x86_64.avx2.2c+onnxruntime"
    await eventually(lambda: agent.desired)
    state = agent.desired[0]
    assert (state.device, state.fleet, state.generation) == (agent.joined.device, "test", 1)
    assert state.agent_settings.heartbeat_seconds == 2
    assert state.agent_settings.controllers[0].address == f"127.0.0.1:{controller.ports['agents']}"
    assert device_row(agent.joined.device).connected
    assert controller.connections.is_connected(agent.joined.device)


async def test_heartbeats_are_answered(agents: Any, eventually: Any) -> None:
    agent = await agents()
    for number in (1, 2, 3):
        beat = agents_pb2.Heartbeat(boot_id=agent.boot_id, monotonic_ns=agent.monotonic_ns, number=number)
        await agent.send(heartbeat=beat)
    await eventually(lambda: agent.heartbeats == [1, 2, 3])


async def test_spooled_windows_are_stored_once_and_acknowledged(
    agents: Any, eventually: Any, controller: Controller
) -> None:
    agent = await agents()
    for sequence in range(1, 31):
        item = window(agent, sequence - 60, sequence - 59, requests=10)
        await agent.send(spooled=spooled("spool-a", sequence, telemetry=item))
    await eventually(lambda: agent.acks.get("spool-a") == 30)
    # Sent again, as after a lost acknowledgement: acknowledged, not counted twice.
    for sequence in range(25, 31):
        item = window(agent, sequence - 60, sequence - 59, requests=10)
        await agent.send(spooled=spooled("spool-a", sequence, telemetry=item))
    await agent.send(
        spooled=spooled(
            "spool-a", 31, gap=telemetry_pb2.Gap(from_sequence=31, to_sequence=40, reason="disk full")
        )
    )
    await eventually(lambda: agent.acks.get("spool-a") == 40)
    with controller.store.read() as session:
        rows = session.scalars(select(Window).where(Window.endpoint == "digits")).all()
        spool = session.get(Spool, "spool-a")
    assert sum(row.requests for row in rows) == 300
    assert spool is not None and spool.gaps == [{"from": 31, "to": 40, "reason": "disk full"}]
    newest = max(row.end_ms for row in rows)
    # On the controller's clock: the newest window ended 29 s before the hello.
    assert abs(newest - (controller.clock() - 29_000)) < 20_000


async def test_a_malformed_window_is_acknowledged_and_noted(
    agents: Any, eventually: Any, controller: Controller
) -> None:
    agent = await agents()
    bad = window(agent, 0, 1)
    bad.placements.add(endpoint="digits", bundle="not a digest")
    await agent.send(spooled=spooled("spool-b", 1, telemetry=bad))
    await agent.send(spooled=spooled("spool-b", 2, telemetry=window(agent, -5, -4)))
    await eventually(lambda: agent.acks.get("spool-b") == 2)
    with controller.store.read() as session:
        spool = session.get(Spool, "spool-b")
    assert spool is not None and spool.gaps[0]["reason"].startswith("refused")


async def test_another_devices_spool_is_refused(agents: Any, eventually: Any) -> None:
    one, two = await agents("one"), await agents("two")
    await one.send(spooled=spooled("shared", 1, telemetry=window(one, -2, -1)))
    await eventually(lambda: one.acks.get("shared") == 1)
    await two.send(spooled=spooled("shared", 2, telemetry=window(two, -2, -1)))
    error = await eventually(lambda: two.ended)
    assert error.code() is grpc.StatusCode.PERMISSION_DENIED


async def test_a_revoked_device_loses_its_stream_and_its_channel(
    agents: Any, eventually: Any, controller: Controller
) -> None:
    agent, other = await agents("bad"), await agents("good")
    with controller.store.write() as session:
        row = session.get_one(Device, agent.joined.device)
        devices.revoke(session, row, actor="person:test")
    # Nobody tells the gateway: the event does, as for a revocation by another process.
    error = await eventually(lambda: agent.ended)
    assert error.code() is grpc.StatusCode.PERMISSION_DENIED
    with pytest.raises(grpc.aio.AioRpcError, match="revoked"):
        await agent.blobs().Stat(blobs_pb2.StatRequest(digest=BUNDLE))
    with pytest.raises(grpc.aio.AioRpcError, match="revoked"):
        await agent.connect()
    assert other.ended is None


async def test_a_certificate_of_another_fleet_is_refused(
    agents: Any, controller: Controller, tmp_path: Path
) -> None:
    agent = await agents(connect=False)
    stranger = tmp_path / "stranger"
    stranger.mkdir(mode=0o700)
    other = identity.init(stranger, "test")
    certificate = other.issue(_csr(agent), agent.joined.device, controller.clock(), 3600)
    agent.joined.reply.certificate_der = identity.der(certificate)
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await agent.connect()
    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE  # the handshake fails


async def test_a_certificate_for_another_name_is_refused(
    agents: Any, controller: Controller, eventually: Any
) -> None:
    """Signed by the right CA, but no device's: the door's own kind of certificate."""
    agent = await agents(connect=False)
    agent.joined.reply.certificate_der = identity.der(
        controller.keys.issue(_csr(agent), "d-unknown", controller.clock(), 3600)
    )
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await agent.connect()
    assert refused.value.code() is grpc.StatusCode.PERMISSION_DENIED
    assert "Join" in refused.value.details()


async def test_an_expired_certificate_is_refused(agents: Any, controller: Controller) -> None:
    agent = await agents(connect=False)
    past = controller.clock() - 10 * 86_400_000
    agent.joined.reply.certificate_der = identity.der(
        controller.keys.issue(_csr(agent), agent.joined.device, past, 3600)
    )
    with pytest.raises(grpc.aio.AioRpcError):
        await agent.connect()


async def test_a_call_on_an_open_channel_ends_with_the_certificate(
    settings: Settings, tmp_path: Path
) -> None:
    """gRPC lets an open channel live on after expiry; the interceptor does not."""
    from shoal_controller.gateway.admission import Admission
    from shoal_controller.gateway.connections import Connections
    from shoal_protos.errors import Denied

    keys = identity.init(settings.home, "test")
    key = ec.generate_private_key(ec.SECP256R1())
    from cryptography.hazmat.primitives import serialization

    from .conftest import START_MS, FakeClock, csr_of

    clock = FakeClock()
    pem = keys.issue(csr_of(key), "d-1", START_MS, 60).public_bytes(serialization.Encoding.PEM)

    class Context:
        def auth_context(self) -> dict[str, list[bytes]]:
            return {"x509_pem_cert": [pem]}

        def peer(self) -> str:
            return "ipv4:10.0.0.7:5000"

    admission = Admission("test", Connections(), clock)
    assert admission.peer(Context()).address == "10.0.0.7"
    clock.advance(61)
    with pytest.raises(Denied, match="expired"):
        admission.peer(Context())


async def test_without_a_certificate_the_door_stays_shut(
    controller: Controller, open_secure_channel: Any
) -> None:
    credentials = grpc.ssl_channel_credentials(controller.keys.ca_pem)
    async with open_secure_channel(controller.ports["agents"], credentials, "test") as channel:
        call = agents_pb2_grpc.AgentsStub(channel).Connect()  # type: ignore[no-untyped-call]
        with pytest.raises((grpc.aio.AioRpcError, asyncio.InvalidStateError)):  # noqa: PT012
            await call.write(agents_pb2.Up(hello=agents_pb2.Hello()))
            await call.read()
            raise grpc.aio.AioRpcError(await call.code(), None, None)


async def test_a_stream_that_begins_without_hello_is_refused(agents: Any) -> None:
    agent = await agents(connect=False)
    agent.channel = agent.open_channel()
    call = agents_pb2_grpc.AgentsStub(agent.channel).Connect()  # type: ignore[no-untyped-call]
    await call.write(agents_pb2.Up(heartbeat=agents_pb2.Heartbeat()))
    with pytest.raises(grpc.aio.AioRpcError, match="begins with a hello"):
        await call.read()
    assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_an_oversized_message_ends_the_stream_and_nothing_else(agents: Any, eventually: Any) -> None:
    agent = await agents()
    await agent.send(reported=agents_pb2.Reported(agent_version="x" * (8 << 20)))
    error = await eventually(lambda: agent.ended)
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    again = await agents("next")
    assert again.welcome is not None


async def test_a_newer_stream_replaces_the_older(
    agents: Any, eventually: Any, controller: Controller, device_row: Any
) -> None:
    agent = await agents()
    first_call, first_reader = agent.call, agent.reader
    await agent.connect()
    await asyncio.wait_for(first_reader, 10)
    assert await first_call.code() is grpc.StatusCode.UNAVAILABLE
    assert controller.connections.is_connected(agent.joined.device)
    assert device_row(agent.joined.device).connected


async def test_a_device_that_vanishes_is_disconnected_then_offline(
    agents: Any, eventually: Any, controller: Controller, device_row: Any
) -> None:
    agent = await agents()
    device = agent.joined.device
    await agent.close()
    await eventually(lambda: not device_row(device).connected)
    with controller.store.read() as session:
        view = devices.load_views(
            session,
            now_ms=controller.clock() + 60_000,
            settings=controller.settings,
            connections=controller.connections,
            only=device,
        )[0]
    assert view.status == "offline" and "nothing heard" in view.status_reason


async def test_a_device_with_a_newer_state_than_the_database_gets_a_new_epoch(
    agents: Any, eventually: Any, controller: Controller
) -> None:
    """As after a restored backup: the device would refuse any lower (epoch, generation)."""
    agent = await agents(connect=False)
    await agent.connect(epoch=1, generation=500)
    await eventually(lambda: agent.desired)
    await eventually(lambda: agent.desired[-1].epoch == 2)
    with controller.store.read() as session:
        row = session.get_one(Desired, agent.joined.device)
    assert row is not None and (row.epoch, row.generation) > (1, 500)


async def test_reports_become_events_only_when_something_changed(
    agents: Any, eventually: Any, controller: Controller
) -> None:
    from shoal_controller.events import list_events

    agent = await agents()

    def reports() -> list[Any]:
        with controller.store.read() as session:
            rows = list_events(session, kind="device", object=agent.joined.device)
        return [row for row in rows if row.verb == "reported"]

    status = agents_pb2.PlacementStatus(
        endpoint="digits", wanted=BUNDLE, step=agents_pb2.STEP_FETCH, progress=0.1
    )
    await agent.send(reported=agents_pb2.Reported(generation=1, placements=[status]))
    await eventually(lambda: len(reports()) == 1)
    status.progress = 0.7
    await agent.send(reported=agents_pb2.Reported(generation=1, placements=[status]))
    status.step = agents_pb2.STEP_COMMIT
    await agent.send(reported=agents_pb2.Reported(generation=1, placements=[status]))
    await eventually(lambda: len(reports()) == 2)


def _csr(agent: Any) -> bytes:
    from .conftest import csr_of

    return csr_of(agent.joined.key)


async def test_a_device_leaves_and_may_ask_again(
    agents: Any, eventually: Any, controller: Controller, device_row: Any
) -> None:
    agent = await agents()
    assert agent.welcome.class_reason.startswith(agent.welcome.profile_class)
    await eventually(lambda: agent.desired)
    stub = agents_pb2_grpc.AgentsStub(agent.channel)  # type: ignore[no-untyped-call]
    for _ in range(2):  # the answer to the first may be lost
        reply = await stub.Leave(agents_pb2.LeaveRequest(reason="moved out"))
        assert reply.device == agent.joined.device
    assert device_row(agent.joined.device).revoked
    await eventually(lambda: not controller.connections.is_connected(agent.joined.device))
    with controller.store.read() as session:
        (event,) = [e for e in list_events(session, kind="device", limit=50) if e.verb == "revoked"]
    assert (event.actor, event.object, event.reason) == (
        f"device:{agent.joined.device}", agent.joined.device, "moved out",
    )  # fmt: skip
    with pytest.raises(grpc.aio.AioRpcError) as refusal:  # nothing else is open to it
        await blobs_pb2_grpc.BlobsStub(agent.channel).Stat(blobs_pb2.StatRequest(digest=BUNDLE))  # type: ignore[no-untyped-call]
    assert refusal.value.code() is grpc.StatusCode.PERMISSION_DENIED
