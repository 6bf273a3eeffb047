"""What every link must do, run over every carrier (gRPC now)."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import AsyncIterator, Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from shoal_agent import vault
from shoal_agent.clock import SystemClock
from shoal_agent.files import FileContent
from shoal_agent.fs import RealFs
from shoal_agent.identity import Identity, IdentityStore
from shoal_agent.link import enrolment
from shoal_agent.link.base import Backoff
from shoal_agent.link.grpc import GrpcLink
from shoal_agent.telemetry.spool import Spool
from shoal_protos.bundle import digest_of
from shoal_protos.errors import NotFound, ShoalError, Unavailable
from shoal_protos.v1 import agents_pb2, desired_pb2, profile_pb2, telemetry_pb2
from tests.agent.fake_controller import Device, FakeController


class Listener:
    """Collects what a link delivers."""

    def __init__(self) -> None:
        self.welcomes: list[agents_pb2.Welcome] = []
        self.desired: list[desired_pb2.Signed] = []
        self.replies: list[agents_pb2.HeartbeatReply] = []
        self.lost: list[ShoalError] = []
        self.beats = 0

    def hello(self) -> agents_pb2.Hello:
        return agents_pb2.Hello(agent_version="test", boot_id="boot")

    def heartbeat(self) -> agents_pb2.Heartbeat:
        self.beats += 1
        return agents_pb2.Heartbeat(boot_id="boot", number=self.beats)

    async def on_welcome(self, welcome: agents_pb2.Welcome) -> None:
        self.welcomes.append(welcome)

    async def on_desired(self, signed: desired_pb2.Signed) -> None:
        self.desired.append(signed)

    async def on_heartbeat(self, reply: agents_pb2.HeartbeatReply) -> None:
        self.replies.append(reply)

    def on_lost(self, reason: ShoalError) -> None:
        self.lost.append(reason)


class Joined:
    """A controller, a device that joined it, and its running link."""

    def __init__(self, controller: FakeController, identities: IdentityStore, spool: Spool) -> None:
        self.controller, self.identities, self.spool = controller, identities, spool
        self.identity: Identity = identities.load()
        self.listener = Listener()
        self.device: Device = controller.devices[self.identity.device]
        self.tasks: list[asyncio.Task[None]] = []

    def link(self, *addresses: str, heartbeat_s: float = 0.1) -> GrpcLink:
        link = GrpcLink(
            self.identity,
            addresses or self.identity.agent_addresses,
            self.spool,
            heartbeat_s=heartbeat_s,
            backoff=Backoff(0.02, 0.2, random.Random(1)),
        )
        self.tasks.append(asyncio.ensure_future(link.run(self.listener)))
        return link

    async def until(self, condition: Callable[[], Any]) -> Any:
        return await self.controller.until(condition)


@pytest.fixture
async def joined(tmp_path: Path) -> AsyncIterator[Joined]:
    async with FakeController() as controller:
        (tmp_path / "identity").mkdir()
        identities = IdentityStore(tmp_path / "identity", RealFs())
        await enrolment.join(identities, controller.token(), profile_pb2.Profile(architecture="x86_64"), "n")
        rig = Joined(controller, identities, Spool(tmp_path / "spool", fs=RealFs(), clock=SystemClock()))
        yield rig
        for task in rig.tasks:
            task.cancel()
        await asyncio.gather(*rig.tasks, return_exceptions=True)


def result(name: str) -> telemetry_pb2.TrialResult:
    return telemetry_pb2.TrialResult(trial=name)


def names(device: Device) -> list[str]:
    return [item.trial for item in device.items("trial")]


async def test_hello_welcome_and_heartbeats(joined: Joined) -> None:
    link = joined.link()
    await joined.until(lambda: len(joined.listener.replies) >= 2)
    assert joined.device.hellos[0].agent_version == "test"
    assert joined.listener.welcomes[0].display_name == "n"
    assert link.connected and link.address == joined.controller.agents_address


async def test_desired_state_arrives_as_carried(joined: Joined) -> None:
    joined.link()
    await joined.until(lambda: joined.device.connected)
    joined.controller.publish(joined.identity.device)
    await joined.until(lambda: joined.listener.desired)
    assert joined.listener.desired[0] == joined.device.signed


async def test_latest_report_is_sent_on_every_connection(joined: Joined) -> None:
    link = joined.link()
    link.report(agents_pb2.Reported(generation=1))
    link.report(agents_pb2.Reported(generation=2))
    await joined.until(lambda: joined.device.reports)
    assert joined.device.reports[-1].generation == 2
    await joined.controller.stop()
    await joined.controller.start()
    seen = len(joined.device.reports)
    await joined.until(lambda: len(joined.device.reports) > seen)
    assert joined.device.reports[-1].generation == 2


async def test_nothing_is_lost_while_the_controller_comes_and_goes(joined: Joined) -> None:
    joined.link()
    expected = []
    for round_ in range(4):
        for number in range(10):
            expected.append(f"{round_}.{number}")
            joined.spool.add(result(expected[-1]))
            await asyncio.sleep(0.003)
        if round_ < 3:
            await joined.controller.stop()
            joined.spool.add(result(f"{round_}.off"))
            expected.append(f"{round_}.off")
            await asyncio.sleep(0.1)
            await joined.controller.start()
    await joined.until(lambda: joined.spool.waiting == 0)
    assert names(joined.device) == expected
    assert joined.listener.lost


async def test_unacknowledged_messages_are_sent_again(joined: Joined) -> None:
    joined.controller.acknowledge = False
    joined.link()
    joined.spool.add(result("a"))
    await asyncio.sleep(0.3)
    assert joined.spool.waiting == 1
    joined.controller.acknowledge = True
    await joined.controller.stop()
    await joined.controller.start()
    await joined.until(lambda: joined.spool.waiting == 0)
    assert names(joined.device) == ["a"]


async def test_addresses_are_tried_in_order(joined: Joined) -> None:
    joined.link("127.0.0.1:1", joined.controller.agents_address)
    await joined.until(lambda: joined.listener.replies)
    assert "127.0.0.1:1" in str(joined.listener.lost[0])
    assert "refused" in str(joined.listener.lost[0])


async def test_another_fleets_controller_is_not_spoken_to(joined: Joined) -> None:
    async with FakeController("test") as other:
        joined.link(other.agents_address)
        await joined.until(lambda: joined.listener.lost)
        assert "certificate" in str(joined.listener.lost[0])
        assert not joined.listener.welcomes


async def test_revoked_device_is_thrown_out_and_stays_out(joined: Joined) -> None:
    joined.link()
    await joined.until(lambda: joined.device.connected)
    joined.controller.revoke(joined.identity.device)
    await joined.until(lambda: len(joined.listener.lost) >= 2)
    assert {item.code for item in joined.listener.lost} == {"denied"}
    assert "revoked" in str(joined.listener.lost[-1])


async def test_a_silent_controller_is_left(joined: Joined, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shoal_agent.link.grpc.SILENT_EXTRA_S", 0.3)
    joined.controller.heartbeat_replies = False
    joined.link(heartbeat_s=0.05)
    await joined.until(lambda: joined.listener.lost)
    assert "silent" in str(joined.listener.lost[0])


async def collect(link: GrpcLink, digest: str, offset: int = 0, length: int = 0) -> bytes:
    data = b""
    async for part in link.fetch(digest, offset, length):
        assert part.offset == offset + len(data)
        data += part.data
    return data


async def test_fetches_ranges(joined: Joined) -> None:
    data = os.urandom(300_000)
    digest = joined.controller.add_blob(data)
    link = joined.link()
    with pytest.raises(Unavailable):
        await collect(link, digest)
    await joined.until(lambda: link.connected)
    assert await collect(link, digest) == data
    assert await collect(link, digest, 100_000) == data[100_000:]
    assert await collect(link, digest, 5, 10) == data[5:15]
    with pytest.raises(NotFound):
        await collect(link, digest_of(b"unknown"))


async def test_a_broken_transfer_is_unavailable_not_short(joined: Joined) -> None:
    digest = joined.controller.add_blob(os.urandom(500_000))
    link = joined.link()
    await joined.until(lambda: link.connected)
    joined.controller.cut_fetch_after = 100_000
    with pytest.raises(Unavailable):
        await collect(link, digest)
    slow = link.fetch(digest)
    await anext(slow)
    await joined.controller.stop()  # in mid transfer
    with pytest.raises(Unavailable):
        await rest(slow)


async def rest(parts: AsyncIterator[Any]) -> None:
    async for _ in parts:
        await asyncio.sleep(0.01)


async def test_pushes_and_resumes(joined: Joined, tmp_path: Path) -> None:
    path = tmp_path / "blob"
    path.write_bytes(os.urandom(400_000))
    content = FileContent(path)
    link = joined.link()
    with pytest.raises(Unavailable):
        await link.push(content, "samples")
    await joined.until(lambda: link.connected)
    joined.controller.pushed[content.digest] += path.read_bytes()[:150_000]  # an earlier attempt
    await link.push(content, "samples")
    assert joined.controller.blobs[content.digest] == path.read_bytes()
    await link.push(content, "samples")  # again: nothing to do


async def test_renewal_moves_without_missing_a_heartbeat(joined: Joined, tmp_path: Path) -> None:
    link = joined.link()
    await joined.until(lambda: len(joined.listener.replies) >= 2)
    renewed = await vault.renew(tmp_path / "identity")
    assert renewed.key_pem != joined.identity.key_pem
    link.set_identity(renewed)
    await joined.until(lambda: len(joined.device.hellos) == 2)
    seen = len(joined.listener.replies)
    await joined.until(lambda: len(joined.listener.replies) > seen + 2)
    assert not joined.listener.lost
    assert joined.identities.load() == renewed


async def test_an_expired_certificate_is_renewed_with_the_old_key(joined: Joined, tmp_path: Path) -> None:
    joined.controller.certificate_life = timedelta(seconds=0)
    expired = await vault.renew(tmp_path / "identity")
    assert expired.expires_ms <= SystemClock().wall_ms()
    joined.controller.certificate_life = timedelta(days=1)
    assert (await vault.renew(tmp_path / "identity")).expires_ms > SystemClock().wall_ms()


def test_backoff_is_jittered_bounded_and_reset() -> None:
    backoff = Backoff(1.0, 8.0, random.Random(4))
    waits = [backoff.next() for _ in range(200)]
    assert all(0 <= wait <= 8 for wait in waits)
    assert waits[0] <= 1 and max(waits) > 7 and min(waits[10:]) < 1
    backoff.reset()
    assert backoff.next() <= 1
