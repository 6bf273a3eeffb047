"""The loop over the real store: what it sees, what it does, and when it asks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from shoal_controller import endpoints, optimizations, story
from shoal_controller.store.tables import (
    Endpoint,
    Finding,
    Optimization,
    Rollout,
    Sample,
    Variant,
    Version,
)
from shoal_protos.v1 import telemetry_pb2
from tests.controller.world import World, images


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path)
    yield made
    made.close()


def until(world: World, done: Any, looks: int = 100, each: Any = None) -> None:
    for _ in range(looks):
        if each is not None:
            each()
        world.look()
        if done():
            return
    raise AssertionError("it did not happen in time")


def findings(world: World, kind: str = "") -> list[Finding]:
    with world.store.read() as session:
        rows = session.scalars(select(Finding).order_by(Finding.id))
        return [row for row in rows if not kind or row.kind == kind]


def serving(
    world: World,
    *,
    devices: int = 2,
    objective: str = "",
    drift: bool = True,
    automatic: bool = True,
    **profile: Any,
) -> tuple[str, list[str], str]:
    """(endpoint, devices, class) with a plain and a faster, less accurate variant."""
    names = [world.add_device(f"cam{i}", **profile) for i in range(devices)]
    name = world.class_of(names[0])
    version = world.version()
    slow = world.variant(version, "plain", {name: (0.99, 4.0)}, drift=drift)
    quick = world.variant(version, "pruned", {name: (0.97, 1.0)}, drift=drift)
    world.release(version, {name: [slow, quick]})
    endpoint = world.endpoint(automatic=automatic, objective=objective or "maximise accuracy")
    if automatic:
        until(world, lambda: bool(world.current(endpoint)))
    return endpoint, names, name


def finish(world: World, key: str, *, kept: bool = True, fails: bool = False) -> str:
    """What the worker does with an adaptation; returns the new version."""
    with world.store.write() as session:
        row = session.get(Optimization, key)
        assert row is not None
        if fails:
            optimizations.finish(session, row, world.clock, "failed", actor="worker", error="No data.")
            return ""
    if not kept:
        with world.store.write() as session:
            row = session.get(Optimization, key)
            assert row is not None
            row.result = {"kept": False, "sentence": "The adapted original was no better than the incumbent."}
            optimizations.finish(session, row, world.clock, "done", actor="worker")
        return ""
    world.now += 1
    version = world.version(accuracy=0.95)
    name = row.spec["classes"][0]
    variant = world.variant(version, "adapted", {name: (0.95, 2.0)})
    release = world.release(version, {name: [variant]})
    with world.store.write() as session:
        row = session.get(Optimization, key)
        assert row is not None
        row.result = {
            "kept": True,
            "version": version,
            "release": release,
            "sentence": "Adapted: 70 % to 95 %.",
        }
        optimizations.finish(session, row, world.clock, "done", actor="worker")
    return version


def drifted(world: World, devices: list[str], seed: list[int]) -> None:
    for device in devices:
        seed[0] += 1
        world.traffic(device, inputs=images(30, seed[0], contrast=0.6, noise=25))


def test_clean_inputs_are_no_drift(world: World) -> None:
    _, devices, _ = serving(world)
    for seed in range(30):
        for i, device in enumerate(devices):
            world.traffic(device, inputs=images(30, 1000 + 10 * seed + i))
        world.look()
    assert not findings(world)


def test_drift_is_adapted_rolled_out_and_told(world: World) -> None:
    endpoint, devices, name = serving(world)
    before = world.current(endpoint)
    seed = [5000]
    until(world, lambda: findings(world, "input_drift") != [], each=lambda: drifted(world, devices, seed))
    (finding,) = findings(world)
    assert "no accuracy alarm" in finding.sentence and finding.profile_class == name
    assert finding.evidence["psi"] > finding.evidence["psi_threshold"]
    until(world, lambda: findings(world)[0].state == "acting", each=lambda: drifted(world, devices, seed))
    (finding,) = findings(world)
    job: Optimization = world.row(Optimization, finding.action["optimization"])
    assert job.kind == "adapt" and job.spec["finding"] == finding.id
    field = telemetry_pb2.SketchSet.FromString(world.blobs.read(job.spec["field"]["inputs"]))
    assert field.kind == "image" and field.count >= 100
    version = finish(world, job.id)
    until(world, lambda: findings(world)[0].state == "resolved", each=lambda: drifted(world, devices, seed))
    assert world.current(endpoint) != before
    rollout: Rollout = world.row(Rollout, findings(world)[0].action["rollout"])
    assert (rollout.state, rollout.actor, rollout.finding) == ("promoted", "loop", finding.id)
    with world.store.read() as session:
        told = story.tell(session, session.get(Endpoint, endpoint))
        served = session.scalar(select(Variant.bundle).where(Variant.version == version))
    assert {world.serving[d, "digits"] for d in devices} == {served}
    kinds = [item.kind for item in told]
    tail = kinds[kinds.index("finding") :]
    assert tail.index("optimization") < tail.index("rollout") < tail.index("effect")
    # The old bundle's windows say nothing about the new one: the finding stays closed.
    for _ in range(5):
        world.look()
    assert len(findings(world)) == 1


def test_labels_are_waited_for_but_not_for_ever(world: World) -> None:
    _endpoint, devices, _ = serving(world)
    seed = [100]
    until(world, lambda: findings(world) != [], each=lambda: drifted(world, devices, seed))
    world.look()
    assert "labelled inputs so far" in findings(world)[0].action["sentence"]
    with world.store.write() as session:
        digest = world.blobs.put(session, b"npz", purpose="samples")
        session.add(
            Sample(
                id="s-1",
                device=devices[0],
                endpoint="digits",
                bundle="sha256:x",
                blob=digest,
                size=3,
                count=60,
                labelled=50,
                received_ms=world.now,
            )
        )
    world.look(0.5)
    finding = findings(world)[0]
    assert finding.state == "acting" and "50 labelled" in finding.action["sentence"]
    assert world.row(Optimization, finding.action["optimization"]).spec["field"]["samples"] == [digest]


@pytest.mark.parametrize(("how", "said"), [({"kept": False}, "no better"), ({"fails": True}, "No data")])
def test_an_adaptation_that_brings_nothing_asks_a_person(
    world: World, how: dict[str, bool], said: str
) -> None:
    endpoint, devices, _ = serving(world)
    before = world.current(endpoint)
    seed = [0]
    until(
        world,
        lambda: [f.state for f in findings(world)] == ["acting"],
        each=lambda: drifted(world, devices, seed),
    )
    finish(world, findings(world)[0].action["optimization"], **how)
    until(world, lambda: findings(world)[0].state == "open", each=lambda: drifted(world, devices, seed))
    finding = findings(world)[0]
    assert finding.action["policy"] == "ask" and said in finding.action["sentence"]
    for _ in range(10):
        drifted(world, devices, seed)
        world.look()
    assert world.current(endpoint) == before
    assert len([f for f in findings(world) if f.kind == "input_drift"]) == 1  # one at a time
    assert findings(world)[0].action["policy"] == "ask"  # and not started again and again


def test_drift_that_goes_away_closes_its_finding(world: World) -> None:
    endpoint, devices, _ = serving(world, automatic=True)
    with world.store.write() as session:
        row = session.get(Endpoint, endpoint)
        assert row is not None
        endpoints.change(session, row, actor="test", automatic=False)
    seed = [0]
    until(world, lambda: findings(world) != [], each=lambda: drifted(world, devices, seed))
    world.look()
    assert findings(world)[0].action["policy"] == "ask"

    def clean() -> None:
        for device in devices:
            seed[0] += 1
            world.traffic(device, inputs=images(30, 9000 + seed[0]))

    until(world, lambda: findings(world)[0].state == "resolved", each=clean)


def test_latency_breach_steps_along_the_front(world: World) -> None:
    endpoint, devices, name = serving(world, objective="latency_p95<=5ms; maximise accuracy")
    before = endpoints_choice(world, endpoint)

    def slow() -> None:
        for device in devices:
            fast = endpoints_choice(world, endpoint) != before and world.row(Rollout, "r-0001") is not None
            world.traffic(device, ms=1.0 if fast and bundle_is_quick(world, device) else 9.0)

    until(world, lambda: any(f.kind == "latency" for f in findings(world)), each=slow)
    finding = findings(world, "latency")[0]
    assert finding.evidence["low_ms"] > 5
    until(world, lambda: findings(world, "latency")[0].state == "resolved", each=slow)
    rollout: Rollout = world.row(Rollout, findings(world, "latency")[0].action["rollout"])
    assert rollout.state == "promoted" and "Step along the front" in rollout.reason
    after = endpoints_choice(world, endpoint)
    assert world.row(Variant, after[name]).name == "pruned" != world.row(Variant, before[name]).name
    with world.store.read() as session:
        assert not session.scalars(select(Optimization).where(Optimization.kind == "optimize")).all()


def test_an_emulators_times_breach_nothing(world: World) -> None:
    _, devices, _ = serving(world, objective="latency_p95<=5ms; maximise accuracy", emulated=True)
    for _ in range(8):
        for device in devices:
            world.traffic(device, ms=900.0)
        world.look()
    assert not findings(world, "latency")


def endpoints_choice(world: World, endpoint: str) -> dict[str, str]:
    from shoal_controller.store.tables import Assignment

    return dict(world.row(Assignment, world.current(endpoint)).choice)


def bundle_is_quick(world: World, device: str) -> bool:
    with world.store.read() as session:
        bundle = world.serving[device, "digits"]
        return session.scalar(select(Variant.name).where(Variant.bundle == bundle)) == "pruned"


def test_accuracy_drop_from_labels(world: World) -> None:
    _, devices, _ = serving(world, drift=False)
    for _ in range(3):
        for device in devices:
            world.traffic(device, labelled=20, correct=20)
        world.look()
    assert not findings(world)
    for _ in range(8):
        for device in devices:
            world.traffic(device, labelled=20, correct=14)
        world.look()
    (finding,) = findings(world)
    assert finding.kind == "accuracy_drop" and finding.evidence["high"] < finding.evidence["expected_low"]


def test_new_class_gets_a_fallback_then_its_own_variant(world: World) -> None:
    _endpoint, devices, _name = serving(world)
    newer = world.add_device("big", isa=("avx2", "avx512f", "avx512vl", "avx512_vnni"))
    new_class = world.class_of(newer)
    until(world, lambda: any(f.kind == "new_class" for f in findings(world)), looks=5)
    (finding,) = findings(world, "new_class")
    assert finding.profile_class == new_class and "nearest compatible" in finding.sentence
    world.look()
    assert world.serving[newer, "digits"] == world.serving[devices[0], "digits"]
    assert world.desired(newer).placements[0].settings.fallback
    until(world, lambda: findings(world, "new_class")[0].state == "acting", looks=5)
    job = world.row(Optimization, findings(world, "new_class")[0].action["optimization"])
    assert job.spec["minutes"] == 0 and job.spec["classes"] == [new_class]
    with world.store.read() as session:
        version = session.scalars(select(Version)).one().id
    variant = world.variant(version, "vnni", {new_class: (0.99, 0.5)})
    fronts = {**world.releases()[-1].fronts, new_class: [variant]}
    release = world.release(version, fronts)
    with world.store.write() as session:
        row = session.get(Optimization, job.id)
        assert row is not None
        row.result = {"release": release}
        optimizations.finish(session, row, world.clock, "done", actor="worker")
    until(world, lambda: findings(world, "new_class")[0].state == "resolved")
    assert world.serving[newer, "digits"] == world.row(Variant, variant).bundle
    rollout: Rollout = world.row(Rollout, findings(world, "new_class")[0].action["rollout"])
    assert [w["devices"] for w in rollout.waves] == [[newer]]  # nobody else was touched


def test_a_stopped_rollout_of_the_loop_asks(world: World) -> None:
    endpoint, devices, _ = serving(world)
    seed = [0]
    before = world.current(endpoint)
    until(
        world,
        lambda: [f.state for f in findings(world)] == ["acting"],
        each=lambda: drifted(world, devices, seed),
    )
    version = finish(world, findings(world)[0].action["optimization"])
    with world.store.read() as session:
        bundle = session.scalar(select(Variant.bundle).where(Variant.version == version))
    assert bundle is not None
    for device in devices:
        world.behaviours[device].fails[bundle] = "probe: too slow"
    until(world, lambda: findings(world)[0].state == "open", each=lambda: drifted(world, devices, seed))
    assert "went back" in findings(world)[0].action["sentence"] and world.current(endpoint) == before


def test_failing_device_outside_a_rollout(world: World) -> None:
    _, _devices, _ = serving(world)
    broken = world.add_device("broken")
    world.behaviours[broken].fails["*"] = "verify: disk full"
    until(world, lambda: any(f.kind == "device_failed" for f in findings(world)), looks=5)
    (finding,) = findings(world, "device_failed")
    assert "disk full" in finding.sentence and finding.subject == f"device:{broken}"
    world.behaviours[broken].fails.clear()
    until(world, lambda: findings(world, "device_failed")[0].state == "resolved", looks=5)


def test_budget_and_repeats() -> None:
    from shoal_controller.loop.policy import FindingView, Past, PolicySettings, Situation, decide

    day = 86_400_000
    finding = FindingView("f", "input_drift", "e", "c", 0)
    settings = PolicySettings()
    now = 10 * day
    often = Situation(past=tuple(Past("adapt", now - i * 3_600_000) for i in (3, 2, 1)))
    assert decide(finding, often, settings, now).act == "ask"
    later = decide(finding, often, settings, now + day)
    assert later.act == "adapt"
    busy = Situation(past=tuple(Past("optimize", now - 1000 * i) for i in range(1, 7)))
    assert "budget" in decide(finding, busy, settings, now).sentence
    cooling = Situation(past=(Past("adapt", now - 1000),))
    assert decide(finding, cooling, settings, now).act == "wait"
    running = Situation(rollout_running="r-1")
    assert decide(finding, running, settings, now).act == "wait"
    assert (
        decide(finding, Situation(optimization_active="o-1", optimization_kind="adapt"), settings, now).join
        == "o-1"
    )
    assert decide(finding, Situation(automatic=False), settings, now).act == "ask"


def test_two_classes_share_one_adaptation_and_one_rollout(world: World) -> None:
    one = [world.add_device(f"a{i}") for i in range(2)]
    two = [world.add_device("b0", "openvino")]
    names = [world.class_of(one[0]), world.class_of(two[0])]
    version = world.version()
    world.variant(version, "plain", {names[0]: (0.99, 4.0)}, drift=True)
    world.variant(version, "ov", {names[1]: (0.99, 4.0)}, runtime="openvino", drift=True)
    world.release(version)
    endpoint = world.endpoint()
    until(world, lambda: bool(world.current(endpoint)))
    seed = [300]
    until(
        world,
        lambda: [f.state for f in findings(world)] == ["acting", "acting"],
        each=lambda: drifted(world, one + two, seed),
    )
    jobs = {f.action["optimization"] for f in findings(world)}
    assert len(jobs) == 1
    job: Optimization = world.row(Optimization, jobs.pop())
    assert job.spec["classes"] == sorted(names)
    world.now += 1
    adapted = world.version(accuracy=0.95)
    world.variant(adapted, "adapted", {names[0]: (0.95, 2.0)})
    world.variant(adapted, "adapted-ov", {names[1]: (0.95, 2.0)}, runtime="openvino")
    release = world.release(adapted)
    with world.store.write() as session:
        row = session.get(Optimization, job.id)
        assert row is not None
        row.result = {"kept": True, "release": release, "version": adapted, "sentence": "Adapted."}
        optimizations.finish(session, row, world.clock, "done", actor="worker")
    until(world, lambda: {f.state for f in findings(world)} == {"resolved"})
    assert len({f.action["rollout"] for f in findings(world)}) == 1
    with world.store.read() as session:
        assert len(session.scalars(select(Rollout).where(Rollout.finding != "")).all()) == 1


def test_a_question_about_a_bundle_ends_with_the_bundle(world: World) -> None:
    endpoint, devices, name = serving(world)
    with world.store.write() as session:
        row = session.get(Endpoint, endpoint)
        assert row is not None
        endpoints.change(session, row, actor="test", automatic=False)
    seed = [600]
    until(world, lambda: findings(world) != [], each=lambda: drifted(world, devices, seed))
    world.now += 1
    version = world.version()
    world.variant(version, "plain", {name: (0.99, 4.0)})
    world.release(version)
    from shoal_controller.rollouts import service

    with world.store.write() as session:
        request = service.Request("digits", "person:anna")
        service.create(
            session, world.blobs, world.clock, request, presence=world.services.connections, telemetry_s=2.0
        )
    until(world, lambda: findings(world)[0].state == "resolved")
