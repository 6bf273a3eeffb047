"""Rollouts end to end over the real store, with devices that are simulated at the message level."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from shoal_controller.rollouts import service
from shoal_controller.store.tables import Assignment, Endpoint, Event, Rollout, RolloutDevice
from shoal_protos.errors import Conflict
from tests.controller.world import World


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path)
    yield made
    made.close()


def serve_first(world: World, devices: int = 4, **profile: Any) -> tuple[str, list[str], str]:
    """An endpoint whose devices serve version 1; returns endpoint, devices, class."""
    names = [world.add_device(f"cam{i}", **profile) for i in range(devices)]
    name = world.class_of(names[0])
    first = world.version()
    world.variant(first, "plain", {name: (0.98, 2.0)})
    world.release(first)
    endpoint = world.endpoint()
    run_until(world, lambda: bool(world.current(endpoint)))
    return endpoint, names, name


def second(world: World, name: str, *, accuracy: float = 0.99) -> str:
    world.now += 1
    version = world.version(accuracy=accuracy)
    world.variant(version, "plain", {name: (accuracy, 1.0)})
    return world.release(version)


def run_until(world: World, done: Any, looks: int = 300, each: Any = None) -> int:
    for count in range(looks):
        world.look()
        if each is not None:
            each()
        if done():
            return count
    raise AssertionError("it did not happen in time")


def healthy(world: World, devices: list[str]) -> None:
    for device in devices:
        world.traffic(device, ms=1.0, labelled=10, correct=9)


def create(world: World, release: str = "", **kwargs: Any) -> str:
    with world.store.write() as session:
        row = service.create(
            session,
            world.blobs,
            world.clock,
            service.Request("digits", "person:anna", release, **kwargs),
            presence=world.services.connections,
            telemetry_s=2.0,
        )
        return row.id


def state(world: World, rollout: str) -> str:
    row: Rollout = world.row(Rollout, rollout)
    return row.state


def device_rows(world: World, rollout: str) -> dict[str, RolloutDevice]:
    with world.store.read() as session:
        rows = session.scalars(select(RolloutDevice).where(RolloutDevice.rollout == rollout))
        return {row.device: row for row in rows}


def bundle_of(world: World, assignment: str, name: str) -> str:
    from shoal_controller.store.tables import Variant

    row: Assignment = world.row(Assignment, assignment)
    variant: Variant = world.row(Variant, row.choice[name])
    return variant.bundle


def test_first_release_reaches_everybody_in_waves(world: World) -> None:
    endpoint, names, name = serve_first(world)
    rollout = world.row(Rollout, "r-0001")
    assert rollout.state == "promoted"
    assert [len(w["devices"]) for w in rollout.waves] == [1, 3]
    assert all(w["state"] == "passed" for w in rollout.waves)
    assert "no traffic" in rollout.waves[0]["verdict"]["sentence"]
    bundle = bundle_of(world, world.current(endpoint), name)
    assert {world.serving[d, "digits"] for d in names} == {bundle}
    assert world.row(Endpoint, endpoint).signature  # fixed by the first assignment


def test_healthy_rollout_is_promoted_with_evidence(world: World) -> None:
    endpoint, names, name = serve_first(world)
    for _ in range(5):
        world.look()
        for d in names:
            world.traffic(d, ms=2.0, labelled=10, correct=9)
    second(world, name)
    rollout = create(world)
    run_until(
        world,
        lambda: state(world, rollout) == "promoted",
        each=lambda: healthy(world, names),
    )
    row = world.row(Rollout, rollout)
    effects = {e["name"]: e for e in row.waves[-1]["verdict"]["effects"]}
    assert effects["latency_p95"]["value"] < -30
    assert effects["latency_p95"]["low"] <= effects["latency_p95"]["value"] <= effects["latency_p95"]["high"]
    assert effects["error_share"]["n"] > 50
    assert all(r.state == "switched" and r.probe["ok"] for r in device_rows(world, rollout).values())
    assert world.current(endpoint) == row.to_assignment


def test_a_failing_device_stops_the_rollout_and_all_go_back(world: World) -> None:
    endpoint, names, name = serve_first(world)
    old = bundle_of(world, world.current(endpoint), name)
    before = world.current(endpoint)
    second(world, name)
    rollout = create(world)
    target = world.row(Rollout, rollout).to_assignment
    bad = bundle_of(world, target, name)
    world.behaviours[world.row(Rollout, rollout).waves[1]["devices"][0]].fails[bad] = "probe: golden mismatch"
    run_until(world, lambda: state(world, rollout) == "rolled_back")
    row = world.row(Rollout, rollout)
    assert "golden mismatch" in row.verdict["sentence"]
    assert row.waves[0]["state"] == "passed" and row.waves[1]["state"] == "stopped"
    assert world.current(endpoint) == before
    assert {world.serving[d, "digits"] for d in names} == {old}
    failed = [r for r in device_rows(world, rollout).values() if r.reason]
    assert failed and failed[0].logs == b"last words"
    # Tried again, it gets a higher attempt, so that devices do not refuse it for its past.
    again = create(world)
    assert world.row(Rollout, again).attempt == 2


def test_slower_bundle_is_stopped_by_latency(world: World) -> None:
    _, names, name = serve_first(world)
    for _ in range(5):
        world.look()
        for d in names:
            world.traffic(d, ms=5.0)
    release = second(world, name)
    rollout = create(world, release)
    new = bundle_of(world, world.row(Rollout, rollout).to_assignment, name)

    def traffic() -> None:
        for d in names:
            world.traffic(d, ms=20.0 if world.serving.get((d, "digits")) == new else 5.0)

    run_until(world, lambda: state(world, rollout) == "rolled_back", each=traffic)
    assert "latency rose" in world.row(Rollout, rollout).verdict["sentence"]


def test_an_emulators_times_stop_nothing(world: World) -> None:
    _, names, name = serve_first(world, emulated=True)
    for _ in range(5):
        world.look()
        for d in names:
            world.traffic(d, ms=5.0)
    rollout = create(world, second(world, name))
    new = bundle_of(world, world.row(Rollout, rollout).to_assignment, name)

    def traffic() -> None:
        for d in names:
            world.traffic(d, ms=500.0 if world.serving.get((d, "digits")) == new else 5.0)

    run_until(world, lambda: state(world, rollout) == "promoted", each=traffic)
    assert "unmeasured (emulated)" in world.row(Rollout, rollout).verdict["sentence"]


def test_offline_device_is_carried_and_updates_when_it_returns(world: World) -> None:
    endpoint, names, name = serve_first(world)
    second(world, name)
    world.set_online(names[2], False)
    rollout = create(world)
    run_until(world, lambda: state(world, rollout) == "promoted")
    assert device_rows(world, rollout)[names[2]].state == "silent"
    world.set_online(names[2], True)
    run_until(world, lambda: device_rows(world, rollout)[names[2]].state == "switched", looks=10)
    assert world.serving[names[2], "digits"] == bundle_of(world, world.current(endpoint), name)


def test_device_that_falls_silent_with_the_new_bundle_stops_it(world: World) -> None:
    _, _names, name = serve_first(world)
    second(world, name)
    rollout = create(world)
    row = world.row(Rollout, rollout)
    victim = row.waves[0]["devices"][0]
    world.behaviours[victim].silent_after = bundle_of(world, row.to_assignment, name)
    run_until(world, lambda: state(world, rollout) == "rolled_back")
    assert "silent" in world.row(Rollout, rollout).verdict["sentence"]
    # It goes back when it returns, and this is stored.
    world.behaviours[victim].silent_after = ""
    world.set_online(victim, True)
    run_until(world, lambda: device_rows(world, rollout)[victim].state in ("rolled_back", "failed"), looks=10)
    assert world.serving[victim, "digits"] != bundle_of(world, row.to_assignment, name)


def test_killed_controller_resumes(world: World) -> None:
    _endpoint, names, name = serve_first(world)
    second(world, name)
    rollout = create(world)
    for _ in range(200):
        world.look()
        world.start_runners()  # nothing but the store survives
        if state(world, rollout) == "promoted":
            break
    assert state(world, rollout) == "promoted"
    assert len({world.serving[d, "digits"] for d in names}) == 1
    with world.store.read() as session:
        verbs = [
            e.verb for e in session.scalars(select(Event).where(Event.object == rollout).order_by(Event.id))
        ]
    assert verbs.count("promoted") == 1 and verbs.count("wave_started") == 2


def test_device_that_joins_gets_the_old_one_until_its_wave(world: World) -> None:
    endpoint, names, name = serve_first(world)
    old = bundle_of(world, world.current(endpoint), name)
    second(world, name)
    for d in names:
        world.behaviours[d].slow_steps = 4
    rollout = create(world)
    world.look()
    late = world.add_device("late")
    world.look()
    assert world.serving[late, "digits"] == old
    run_until(world, lambda: state(world, rollout) == "promoted")
    assert device_rows(world, rollout)[late].wave == 1
    assert world.serving[late, "digits"] != old


def test_pause_abort_and_conflicts(world: World) -> None:
    endpoint, _names, name = serve_first(world)
    before = world.current(endpoint)
    with pytest.raises(Conflict, match="serves just this"):
        create(world)
    second(world, name)
    rollout = create(world)
    with pytest.raises(Conflict, match="running"):
        create(world)
    with world.store.write() as session:
        service.pause(session, rollout, actor="person:anna", reason="lunch")
    for _ in range(20):
        world.look()
    assert world.row(Rollout, rollout).wave == 0 and state(world, rollout) == "paused"
    with world.store.write() as session:
        service.resume(session, rollout, actor="person:anna")
    world.look()
    world.look()
    with world.store.write() as session:
        service.abort(session, world.clock, rollout, actor="person:anna", reason="second thoughts")
    run_until(world, lambda: state(world, rollout) == "aborted")
    assert world.current(endpoint) == before
    assert "second thoughts" in world.row(Rollout, rollout).verdict["sentence"]
    with pytest.raises(Conflict, match="ended"), world.store.write() as session:
        service.promote(session, world.clock, rollout, actor="person:anna")


def test_promote_by_hand_reaches_the_rest(world: World) -> None:
    endpoint, names, name = serve_first(world)
    second(world, name)
    rollout = create(world)
    world.look()
    with world.store.write() as session:
        service.promote(session, world.clock, rollout, actor="person:anna", reason="urgent")
    world.look()
    world.look()
    assert {world.serving[d, "digits"] for d in names} == {bundle_of(world, world.current(endpoint), name)}


def test_both_sides_are_kept_on_disk_until_the_end(world: World) -> None:
    endpoint, names, name = serve_first(world)
    old = bundle_of(world, world.current(endpoint), name)
    second(world, name)
    rollout = create(world)
    world.look()
    world.look()
    new = bundle_of(world, world.row(Rollout, rollout).to_assignment, name)
    assert all({old, new} <= set(world.desired(d).keep) for d in names)
    run_until(world, lambda: state(world, rollout) == "promoted")
    world.look()
    assert all(old not in world.desired(d).keep for d in names)


def test_revoked_device_does_not_hang_a_wave(world: World) -> None:
    from shoal_controller import devices
    from shoal_controller.store.tables import Device

    _, _names, name = serve_first(world)
    second(world, name)
    rollout = create(world)
    first = world.row(Rollout, rollout).waves[0]["devices"][0]
    with world.store.write() as session:
        row = session.get(Device, first)
        assert row is not None
        devices.revoke(session, row, actor="test")
    world.set_online(first, False)
    run_until(world, lambda: state(world, rollout) == "promoted")
    assert world.row(Rollout, rollout).waves[0]["state"] == "carried"
