"""The worker with a fake job's process: what its lines become, and what happens when things die."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from shoal_controller import job_events, optimizations, registry, sources
from shoal_controller.store.tables import (
    Event,
    Measurement,
    Model,
    Optimization,
    Release,
    Trial,
    Variant,
    Version,
)
from shoal_controller.worker import Worker
from shoal_protos.errors import Conflict
from shoal_protos.v1 import telemetry_pb2
from tests.controller.world import World, profile, source_tar

ROOT = Path(__file__).parents[2]
COMMAND = (sys.executable, "-u", "-m", "tests.controller.fakejob")


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    paths = [str(ROOT), *(str(ROOT / p) for p in ("protos", "agent", "optimizer", "controller"))]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    made = World(tmp_path)
    yield made
    made.close()


def worker(world: World) -> Worker:
    return Worker(
        world.store,
        world.blobs,
        world.services.settings.jobs_dir,
        clock=world.clock,
        machine=profile("onnxruntime", "openvino"),
        command=COMMAND,
        threads=1,
    )


def push(world: World, text: str = "ok", name: str = "digits") -> tuple[str, str]:
    """A pushed version and its ingest."""
    path = world.path / "push.tar"
    path.write_bytes(source_tar(f"# {text} {world.now}\n"))
    digest, size = world.blobs.store(path)
    with world.store.write() as session:
        version, job = registry.push_version(
            session,
            world.blobs,
            world.clock,
            model=name,
            source=sources.inspect(path),
            digest=digest,
            size=size,
            actor="t",
        )
        return version.id, job.id


def optimize(world: World, version: str, text_minutes: float = 1.0, **spec: Any) -> str:
    with world.store.write() as session:
        row = session.get(Version, version)
        assert row is not None
        job = optimizations.enqueue(
            session,
            world.clock,
            kind="optimize",
            version=row,
            actor="t",
            spec={"minutes": text_minutes, **spec},
        )
        return job.id


def job(world: World, key: str) -> Optimization:
    row: Optimization = world.row(Optimization, key)
    return row


def all_of(world: World, table: Any) -> list[Any]:
    with world.store.read() as session:
        return list(session.scalars(select(table)))


def test_ingest_brings_version_variants_and_the_plain_release(world: World) -> None:
    first, second = world.add_device("cam"), world.add_device("box", "openvino")
    version, key = push(world)
    assert worker(world).work_once()
    row = world.row(Version, version)
    assert (row.state, row.metric, row.baseline["value"]) == ("ready", "accuracy", 0.99)
    assert world.blobs.read(row.weights_blob) == b"weights"
    done = job(world, key)
    assert done.state == "done" and done.progress["steps"][0]["step"] == "analyse"
    assert world.blobs.read(done.result["report"]["html"]) == b"<h1>report</h1>"
    (release,) = all_of(world, Release)
    assert set(release.fronts) == {world.class_of(first), world.class_of(second)}
    assert release.note == "plain" and done.result["release"] == release.id
    for variant in all_of(world, Variant):
        world.blobs.bundle(variant.bundle)  # opens
    assert not (world.services.settings.jobs_dir / key).exists()


def test_optimization_makes_the_release_with_its_fronts(world: World) -> None:
    device = world.add_device("cam")
    version, _ = push(world)
    worker(world).work_once()
    key = optimize(world, version)
    worker(world).work_once()
    release = world.row(Release, job(world, key).result["release"])
    names = [world.row(Variant, v).name for v in release.fronts[world.class_of(device)]]
    assert names == ["pruned-onnxruntime", "int8-onnxruntime"]  # as the job ordered them
    latest = {
        m.kind: m
        for m in all_of(world, Measurement)
        if m.variant == release.fronts[world.class_of(device)][0]
    }
    assert latest["latency"].figures["p95_ms"] == 1.0 and latest["accuracy"].source == "local"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("fail", "Mend model()"),
        ("crash", "signal 11"),
        ("garbage", "Not a job's output line"),
        ("escape", "not in its directory"),
    ],
)
def test_a_job_that_ends_badly_says_why(world: World, text: str, expected: str) -> None:
    world.add_device("cam")
    version, key = push(world, text)
    worker(world).work_once()
    row = job(world, key)
    assert row.state == "failed" and expected in row.error
    assert world.row(Version, version).state == "failed"
    if text == "crash":
        assert "Segmentation something" in row.error
    with pytest.raises(Conflict):
        optimize(world, version)


def test_the_child_sees_neither_keys_nor_settings(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOAL_HOME", "/secret")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    world.add_device("cam")
    _, key = push(world, "leak")
    worker(world).work_once()
    error = job(world, key).error
    assert "PATH" in error and "SHOAL" not in error and "AWS" not in error


def test_waits_for_trials_and_goes_on_with_their_answers(world: World) -> None:
    devices = [world.add_device("cam"), world.add_device("box", "openvino")]
    version, _ = push(world, "trial")
    worker(world).work_once()
    key = optimize(world, version)
    worker(world).work_once()
    assert job(world, key).state == "waiting"
    trials = {t.profile_class: t for t in all_of(world, Trial)}
    assert {t.state for t in trials.values()} == {"pending"}
    world.trials.tick()
    trials = {t.profile_class: t for t in all_of(world, Trial)}
    first = trials[world.class_of(devices[0])]
    assert first.device == devices[0]
    assert [t.id for t in world.desired(devices[0]).trials] == [first.id]
    answer(world, devices[0], first.id)
    world.trials.tick()
    assert job(world, key).state == "waiting"  # the other device has not answered
    world.now += (job_events.TRIAL_SECONDS + 1) * 1000
    world.trials.tick()
    assert job(world, key).state == "queued"
    worker(world).work_once()
    row = job(world, key)
    assert row.state == "done"
    told = next(s for s in row.progress["steps"] if s["step"] == "answers")["message"]
    assert json.loads(told) == {"t0": True, "t1": False}
    measured = [m for m in all_of(world, Measurement) if m.source == "trial"]
    assert measured[0].device == devices[0] and measured[0].figures["p95_ms"] == 0.7


def answer(world: World, device: str, trial: str) -> None:
    result = telemetry_pb2.TrialResult(trial=trial, ok=True, context={"governor": "performance"})
    result.timing.candidate.p95_ms, result.timing.candidate.p50_ms, result.timing.candidate.runs = (
        0.7,
        0.5,
        300,
    )
    result.timing.int8_share = float("nan")
    from shoal_controller.store.tables import Device
    from shoal_controller.trials import note_result

    with world.store.write() as session:
        row = session.get(Device, device)
        assert row is not None
        world.services.intake._trial(session, row, result)
        note_result(session, world.clock, row, result)


def test_classes_that_the_ingest_missed_are_converted_and_joined(world: World) -> None:
    world.add_device("cam")
    version, _ = push(world)
    worker(world).work_once()
    late = world.add_device("box", "openvino")
    optimize(world, version, 0.0, classes=[world.class_of(late)])
    worker(world).work_once()
    fronts = all_of(world, Release)[-1].fronts
    assert len(fronts) == 2 and world.class_of(late) in fronts


def test_cancelling_ends_the_child(world: World) -> None:
    world.add_device("cam")
    _, key = push(world, "sleep")
    made = worker(world)
    thread = threading.Thread(target=made.work_once)
    thread.start()
    wait(lambda: job(world, key).progress.get("step") == "train")
    pid = int((world.services.settings.jobs_dir / key / "child.pid").read_text())
    with world.store.write() as session:
        row = session.get(Optimization, key)
        assert row is not None
        optimizations.cancel(session, row, world.clock, actor="person:anna")
    thread.join(30)
    assert not thread.is_alive() and not alive(pid)
    assert job(world, key).state == "cancelled"


def test_stopping_gives_the_work_back(world: World) -> None:
    world.add_device("cam")
    _, key = push(world, "sleep")
    made = worker(world)
    thread = threading.Thread(target=made.serve)
    thread.start()
    wait(lambda: job(world, key).progress.get("step") == "train")
    made.stop()
    thread.join(30)
    assert job(world, key).state == "queued"
    assert worker(world).work_once()
    assert job(world, key).state == "done"


def test_killed_worker_is_taken_over_and_nothing_is_applied_twice(world: World) -> None:
    world.add_device("cam")
    version, key = push(world, "sleep")
    home = world.services.settings.home
    code = (
        "import sys; from shoal_controller import worker; w = worker.Worker; init = w.__init__\n"
        f"def patched(self, *a, **k): init(self, *a, command={list(COMMAND)!r}, **k)\n"
        "w.__init__ = patched; sys.exit(worker.main(sys.argv[1:]))"
    )
    process = subprocess.Popen([sys.executable, "-c", code, "--home", str(home)], cwd=ROOT)
    try:
        wait(lambda: job(world, key).progress.get("step") == "train", 60)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    child = int((home / "jobs" / key / "child.pid").read_text())
    assert alive(child) and job(world, key).state == "running"
    assert worker(world).work_once()
    assert not alive(child)
    assert job(world, key).state == "done" and world.row(Version, version).state == "ready"
    assert len(all_of(world, Release)) == 1 and len(all_of(world, Model)) == 1
    with world.store.read() as session:
        ready = session.scalars(select(Event).where(Event.kind == "version", Event.verb == "ready")).all()
    assert len(ready) == 1


def test_work_that_kills_its_worker_again_and_again_is_given_up(world: World) -> None:
    world.add_device("cam")
    _, key = push(world)
    for _ in range(7):
        worker(world)._lease()  # takes it, and is never heard of again
        world.now += 60_000
    assert job(world, key).state == "failed" and "died" in job(world, key).error


def wait(condition: Any, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("it did not happen in time")


def alive(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
