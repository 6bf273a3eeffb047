from __future__ import annotations

import asyncio
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from shoal_agent.fs import Fs, RealFs
from shoal_agent.trust import PinnedTrust
from shoal_agent.update.executor import Updates
from shoal_agent.update.store import BundleStore
from shoal_protos import signing
from shoal_protos.errors import InvalidInput
from shoal_protos.v1 import agents_pb2, desired_pb2, profile_pb2, telemetry_pb2
from tests.agent.fakes import FakeClock, FakeProber, FakeServer, FullFs, MemorySource, make_bundle
from tests.agent.update.power import RecordingFs, replay

KEY = Ed25519PrivateKey.from_private_bytes(b"k" * 32)
PROFILE = profile_pb2.Profile(runtimes=[profile_pb2.Runtime(name="onnxruntime", version="1.32.0")])
SETTLE = desired_pb2.Settle(seconds=5, max_error_share=0.1, max_latency_ratio=2, min_requests=10)
DONE = (agents_pb2.STEP_COMMIT, agents_pb2.STEP_ROLLED_BACK, agents_pb2.STEP_FAILED)


@dataclass
class Rig:
    """One device with everything around the updates faked; `restart` is a kill -9 and a new start."""

    root: Path
    source: MemorySource
    fs: Fs = field(default_factory=RealFs)
    clock: FakeClock = field(default_factory=lambda: FakeClock(1_790_000_000_000))
    server: FakeServer = field(default_factory=FakeServer)
    prober: FakeProber = field(default_factory=FakeProber)
    traffic: list[telemetry_pb2.PlacementWindow] = field(default_factory=list)
    memory: int = 1 << 40
    generation: int = 0
    bugs: list[BaseException] = field(default_factory=list)

    def start(self) -> None:
        for room in ("trust", "state", "store"):
            (self.root / room).mkdir(parents=True, exist_ok=True)
        self.trust = PinnedTrust(
            self.root / "trust" / "desired.bin",
            fleet="f", device="d", keys=[signing.public_bytes(KEY)], clock=self.clock, fs=self.fs,
        )  # fmt: skip
        self.trust.load()
        self.store = BundleStore(self.root / "store", fs=self.fs)
        self.updates = Updates(
            self.root / "state" / "placements.json",
            trust=self.trust,
            store=self.store,
            source=self.source,
            server=self.server,
            prober=self.prober,
            profile=lambda: PROFILE,
            pull=self.pull,
            clock=self.clock,
            fs=self.fs,
            failure_logs=lambda: b"the logs",
            memory_available=lambda: self.memory,
            on_bug=self.bugs.append,
        )
        self.updates.start()
        if self.trust.state is not None:
            self.updates.apply(self.trust.state)
        self.server.loaded.clear()
        self.updates.server_up()

    async def pull(self) -> None:
        self.updates.observe(self.traffic)

    async def restart(self) -> None:
        await self.updates.stop()
        self.start()

    def want(self, *bundles: str, attempt: int = 1, endpoint: str = "e", **fields: Any) -> None:
        self.generation += 1
        settings = desired_pb2.PlacementSettings(settle=SETTLE)
        state = desired_pb2.DesiredState(
            schema=1, fleet="f", device="d", epoch=1, generation=self.generation,
            issued_at_ms=self.clock.wall, not_after_ms=self.clock.wall + 10**9,
            placements=[
                desired_pb2.Placement(
                    endpoint=endpoint, bundle=bundle, role=desired_pb2.ROLE_PRIMARY,
                    attempt=attempt, settings=settings,
                )
                for bundle in bundles
            ],
        )  # fmt: skip
        for name, value in fields.items():
            setattr(state, name, value)
        self.updates.apply(self.trust.admit(signing.sign(state.SerializeToString(), KEY)))

    def status(self) -> agents_pb2.PlacementStatus:
        (status,) = self.updates.statuses()
        return status

    async def finished(self) -> agents_pb2.PlacementStatus:
        for _ in range(5000):
            statuses = self.updates.statuses()
            done = statuses and all(item.step in DONE for item in statuses)
            if done and (not self.server.up or self._all_serve()):
                break
            await asyncio.sleep(0.001)
        if self.bugs:
            raise self.bugs[0]
        return self.status()

    def _all_serve(self) -> bool:
        """Whether everything that has something to go back to answers."""
        has_base = any(state.base for state in self.updates._states.values())
        return not has_base or all(item.serving for item in self.updates.statuses())

    def make(self, name: str) -> str:
        digest = make_bundle(self.root.parent / f"made-{name}", name.encode() * 900, name)
        self.source.add(self.root.parent / f"made-{name}")
        return digest


@pytest.fixture
async def rig(tmp_path: Path) -> Any:
    rig = Rig(tmp_path / "device", MemorySource())
    rig.start()
    yield rig
    await rig.updates.stop()
    assert not rig.bugs


async def committed(rig: Rig, name: str = "old") -> str:
    digest = rig.make(name)
    rig.want(digest)
    assert (await rig.finished()).step == agents_pb2.STEP_COMMIT
    return digest


async def test_first_bundle(rig: Rig) -> None:
    digest = await committed(rig)
    status = rig.status()
    assert status.serving == status.wanted == digest == rig.server.loaded["e", 1]
    assert status.probe.ok and status.attempt == 1


async def test_probe_refusal_keeps_the_old_and_carries_logs(rig: Rig) -> None:
    old, new = await committed(rig), rig.make("new")
    rig.prober.refuses[new] = "golden mismatch"
    rig.want(new)
    status = await rig.finished()
    assert (status.step, status.serving, status.reason) == (
        agents_pb2.STEP_ROLLED_BACK, old, "probe: golden mismatch",
    )  # fmt: skip
    assert status.logs == b"the logs"
    rig.want(new)  # a new generation, the same attempt: not tried again
    assert (await rig.finished()).step == agents_pb2.STEP_ROLLED_BACK
    assert rig.prober.probed.count(new) == 1
    rig.prober.refuses.clear()
    rig.want(new, attempt=2)
    assert (await rig.finished()).serving == new


async def test_load_refusal_rolls_back(rig: Rig) -> None:
    old, new = await committed(rig), rig.make("new")
    rig.server.refuses[new] = InvalidInput("no")
    rig.want(new)
    status = await rig.finished()
    assert (status.step, status.serving, status.reason) == (
        agents_pb2.STEP_ROLLED_BACK, old, "switch: invalid",
    )  # fmt: skip
    assert rig.server.loaded["e", 1] == old


async def test_errors_while_watched_roll_back(rig: Rig) -> None:
    old, new = await committed(rig), rig.make("new")
    rig.traffic = [telemetry_pb2.PlacementWindow(endpoint="e", role=1, bundle=new, requests=30, errors=9)]
    rig.want(new)
    status = await rig.finished()
    assert (status.step, status.serving, status.reason) == (
        agents_pb2.STEP_ROLLED_BACK, old, "settle: error share",
    )  # fmt: skip
    assert "of 30 requests failed" in status.detail


async def test_server_crash_while_watched_rolls_back(tmp_path: Path) -> None:
    rig = Rig(tmp_path / "device", MemorySource(), clock=FakeClock(1_790_000_000_000))
    rig.start()
    old, new = await committed(rig), rig.make("new")
    rig.clock._auto = False
    rig.want(new)
    await until(lambda: rig.status().step == agents_pb2.STEP_SETTLE)
    rig.server.up = False
    rig.server.loaded.clear()
    rig.updates.server_died()
    assert rig.status().serving == ""
    rig.clock._auto = True
    rig.server.up = True
    rig.updates.server_up()
    rig.clock.advance(100)
    status = await rig.finished()
    assert (status.step, status.serving, status.reason) == (
        agents_pb2.STEP_ROLLED_BACK, old, "settle: the server crashed",
    )  # fmt: skip
    await rig.updates.stop()


async def until(condition: Callable[[], Any]) -> None:
    for _ in range(3000):
        if condition():
            return
        await asyncio.sleep(0.001)
    raise AssertionError("did not happen")


async def test_one_reboot_while_watched_is_allowed_two_are_not(tmp_path: Path) -> None:
    rig = Rig(tmp_path / "device", MemorySource())
    rig.start()
    old, new = await committed(rig), rig.make("new")
    rig.clock._auto = False
    rig.want(new)
    await until(lambda: rig.status().step == agents_pb2.STEP_SETTLE)
    await rig.restart()
    await until(lambda: rig.status().step == agents_pb2.STEP_SETTLE)
    assert rig.server.loaded["e", 1] == new
    await rig.restart()
    await until(lambda: rig.status().step == agents_pb2.STEP_ROLLED_BACK)
    assert (rig.status().serving, rig.server.loaded["e", 1]) == (old, old)
    await rig.updates.stop()


async def test_offline_fetch_waits_and_goes_on(rig: Rig) -> None:
    old, new = await committed(rig), rig.make("new")
    rig.source.offline = True
    rig.want(new)
    await asyncio.sleep(0.05)
    assert (rig.status().step, rig.status().serving) == (agents_pb2.STEP_FETCH, old)
    rig.source.offline = False
    assert (await rig.finished()).serving == new


async def test_missing_blob_and_tampered_blob_fail(rig: Rig) -> None:
    old, new = await committed(rig), rig.make("new")
    saved = rig.source.blobs.pop(new)
    rig.want(new)
    assert (await rig.finished()).reason == "fetch: not found"
    rig.source.blobs[new] = saved[:-1] + b" "
    rig.want(new, attempt=2)
    status = await rig.finished()
    assert (status.reason, status.serving) == ("fetch: tampered", old)


async def test_bundle_for_another_runtime_is_refused(rig: Rig) -> None:
    old = await committed(rig)
    other = make_bundle(rig.root.parent / "other", b"ir", "other", runtime="openvino")
    rig.source.add(rig.root.parent / "other")
    rig.want(other)
    status = await rig.finished()
    assert (status.reason, status.serving) == ("verify: unsupported", old)
    assert "openvino" in status.detail


async def test_expired_state_serves_on_and_installs_nothing(rig: Rig) -> None:
    old, new = await committed(rig), rig.make("new")
    rig.want(new, not_after_ms=rig.clock.wall - 1)
    await until(lambda: rig.status().step == agents_pb2.STEP_WAITING)
    assert rig.status().serving == old and "expired" in rig.status().detail
    rig.want(new)
    assert (await rig.finished()).serving == new


async def test_vanished_placement_is_unloaded_and_its_bundle_collected(rig: Rig) -> None:
    await committed(rig)
    rig.want()
    await until(lambda: not rig.updates.statuses())
    assert not rig.server.loaded
    await until(lambda: rig.store.bundles() == [])


async def test_kept_bundle_stays_on_disk_and_others_go(rig: Rig) -> None:
    old, new = await committed(rig), rig.make("new")
    rig.generation += 1
    state = desired_pb2.DesiredState()
    assert rig.trust.state is not None
    state.CopyFrom(rig.trust.state)
    state.generation, state.placements[0].bundle = rig.generation, new
    state.keep.append(old)
    rig.updates.apply(rig.trust.admit(signing.sign(state.SerializeToString(), KEY)))
    await rig.finished()
    assert rig.store.bundles() == sorted([old, new])
    rig.want(new)
    await until(lambda: rig.store.bundles() == [new])


async def test_damaged_base_is_repaired_from_the_controller(rig: Rig) -> None:
    old = await committed(rig)
    path = rig.store.path(rig.store.manifest(old).layers[0].digest)
    path.write_bytes(b"rot")
    await rig.restart()
    status = await rig.finished()
    assert (status.step, status.serving) == (agents_pb2.STEP_COMMIT, old)
    assert rig.store.verify(old)


async def test_too_little_memory_for_two_stops_the_old_one_first(rig: Rig) -> None:
    await committed(rig)
    new = rig.make("new")
    rig.memory = 1
    rig.want(new)
    status = await rig.finished()
    assert status.serving == new and "stopped first" in status.detail


async def test_full_disk_fails_the_update_and_not_the_service(tmp_path: Path) -> None:
    fs = FullFs()
    rig = Rig(tmp_path / "device", MemorySource(), fs=fs)
    rig.start()
    old, new = await committed(rig), rig.make("new")
    fs.free = 100
    rig.want(new)
    status = await rig.finished()
    assert (status.step, status.serving, status.reason) == (
        agents_pb2.STEP_ROLLED_BACK, old, "fetch: disk full",
    )  # fmt: skip
    await rig.updates.stop()


async def test_state_that_cannot_be_written_is_not_acted_on(tmp_path: Path) -> None:
    fs = FullFs()
    rig = Rig(tmp_path / "device", MemorySource(), fs=fs)
    rig.start()
    old, new = await committed(rig), rig.make("new")
    real = fs.write

    def refuse(path: Path, data: bytes) -> None:
        if path.name.startswith("placements"):
            raise OSError(28, "No space left on device")
        real(path, data)

    fs.write = refuse  # type: ignore[method-assign]
    rig.want(new)
    await asyncio.sleep(0.05)
    assert (rig.status().step, rig.status().wanted) == (agents_pb2.STEP_COMMIT, old)
    assert new not in rig.prober.probed
    await rig.updates.stop()


async def test_many_wishes_in_quick_succession_end_at_the_last(rig: Rig) -> None:
    bundles = [rig.make(f"b{number}") for number in range(4)]
    chance = random.Random(1)
    for _ in range(25):
        rig.want(chance.choice(bundles))
        await asyncio.sleep(chance.choice([0, 0.001, 0.004]))
    rig.want(bundles[2])
    status = await rig.finished()
    assert (status.step, status.serving) == (agents_pb2.STEP_COMMIT, bundles[2])
    assert rig.server.loaded == {("e", 1): bundles[2]}


# ---------------------------------------------------------------------------- crashes


class Killed(BaseException):
    """kill -9 at one file operation."""


class KillingFs(RealFs):
    """Dies at the n-th operation and stays dead."""

    def __init__(self, at: int) -> None:
        self.left = at
        self.dead = False

    def _tick(self) -> None:
        self.left -= 1
        if self.dead or self.left < 0:
            self.dead = True
            raise Killed

    def write(self, path: Path, data: bytes) -> None:
        self._tick()
        super().write(path, data)

    def append(self, path: Path, data: bytes) -> None:
        self._tick()
        super().append(path, data[: len(data) // 2] if self.left == 0 else data)

    def fsync(self, path: Path) -> None:
        self._tick()
        super().fsync(path)

    def replace(self, source: Path, target: Path) -> None:
        self._tick()
        super().replace(source, target)

    def unlink(self, path: Path) -> None:
        self._tick()
        super().unlink(path)


async def settled_rig(folder: Path) -> tuple[Rig, str, str]:
    rig = Rig(folder / "device", MemorySource())
    rig.start()
    old, new = await committed(rig), rig.make("new")
    await rig.updates.stop()
    return rig, old, new


async def attempt_update(rig: Rig, new: str) -> bool:
    """The update under a file system that may die; False once it died."""
    try:
        rig.start()
        rig.want(new)
        await rig.finished()
    except Killed:
        return False
    finally:
        rig.bugs.clear()
        if hasattr(rig, "updates"):
            await rig.updates.stop()
    return True


async def test_kill_at_every_operation_serves_old_or_new_whole(tmp_path: Path) -> None:
    first, old, new = await settled_rig(tmp_path / "base")
    for at in range(200):
        device = tmp_path / f"kill-{at}" / "device"
        shutil.copytree(first.root, device)
        fs = KillingFs(at)
        rig = Rig(device, first.source, fs=fs, generation=first.generation)
        task = asyncio.ensure_future(attempt_update(rig, new))
        await until_killed(task, fs)
        survivor = Rig(device, first.source, generation=first.generation + 1)
        survivor.start()
        status = await survivor.finished()
        assert status.serving in (old, new), at
        assert survivor.server.loaded["e", 1] == status.serving, "the report is true"
        assert survivor.store.verify(status.serving)
        if at % 4 == 0:
            survivor.want(new)
            assert (await survivor.finished()).serving == new, at
        await survivor.updates.stop()
        shutil.rmtree(device.parent)
        if not fs.dead:
            return
    raise AssertionError("the update takes more operations than expected")


async def until_killed(task: asyncio.Future[bool], fs: KillingFs) -> None:
    while not task.done() and not fs.dead:
        await asyncio.sleep(0.001)
    task.cancel()
    try:
        await task
    except (asyncio.CancelledError, Killed):
        return


async def record(folder: Path) -> tuple[RecordingFs, MemorySource, list[str], int]:
    """Three updates in a row, every file operation noted, a mark where each was reported as done."""
    device = folder / "device"
    device.mkdir(parents=True)
    fs = RecordingFs(device)
    rig = Rig(device, MemorySource(chunk=900), fs=fs)
    rig.start()
    bundles = []
    for name in ("one", "two", "three"):
        bundles.append(await committed(rig, name))
        fs.ack(bundles[-1])
    await rig.updates.stop()
    return fs, rig.source, bundles, rig.generation


@pytest.mark.parametrize("model", ["journal", "any"])
async def test_power_cut_at_any_point_keeps_what_was_acknowledged(tmp_path: Path, model: str) -> None:
    fs, _, bundles, generation = await record(tmp_path / "recorded")
    chance = random.Random(7)
    points = range(1, len(fs.log) + 1, 1 if len(fs.log) < 150 else 2)
    for point in points:
        device = tmp_path / f"{model}-{point}"
        acks = replay(fs.log[:point], device, chance, model)
        offline = MemorySource()
        offline.offline = True
        rig = Rig(device, offline, generation=generation)
        rig.start()
        await until(rig._all_serve)
        serving = rig.server.loaded.get(("e", 1))
        if acks:
            assert serving is not None, f"nothing serves after {acks[-1][:19]} was acknowledged"
            assert bundles.index(serving) >= bundles.index(acks[-1])
        if serving is not None:
            assert rig.store.verify(serving)
        await rig.updates.stop()
        shutil.rmtree(device)


async def test_the_power_model_finds_a_missing_fsync(tmp_path: Path) -> None:
    """The replayer must be able to fail: without fsyncs, acknowledged bundles get lost."""
    fs, _, _, generation = await record(tmp_path / "recorded")
    log = [item for item in fs.log if not item[0].startswith("fsync")]
    chance = random.Random(3)
    lost = 0
    for attempt in range(20):
        device = tmp_path / f"mutant-{attempt}"
        replay(log, device, chance, "any")
        offline = MemorySource()
        offline.offline = True
        rig = Rig(device, offline, generation=generation)
        rig.start()
        await asyncio.sleep(0.02)
        lost += ("e", 1) not in rig.server.loaded
        await rig.updates.stop()
    assert lost
