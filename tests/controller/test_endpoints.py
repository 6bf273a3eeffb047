"""Endpoints and assignments: one signature, the best variant per class, fallbacks."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest

from shoal_controller import classes, endpoints, registry, trials
from shoal_controller.store.tables import Assignment, Device, Endpoint, Release, Variant
from shoal_protos.bundle import RuntimeNeed, TensorSpec
from shoal_protos.errors import Conflict, InvalidInput
from shoal_protos.v1 import telemetry_pb2
from tests.controller.world import SIGNATURE, World, profile


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path)
    yield made
    made.close()


def assign(world: World, endpoint: str, release: str, choice: dict[str, str] | None = None) -> Assignment:
    with world.store.write() as session:
        row, made = session.get(Endpoint, endpoint), session.get(Release, release)
        assert row is not None and made is not None
        return endpoints.assign(session, world.blobs, world.clock, row, made, actor="t", choice=choice)


def test_each_class_gets_its_best_by_the_objective(world: World) -> None:
    one, two = (world.class_of(world.add_device(n, r)) for n, r in (("a", "onnxruntime"), ("b", "openvino")))
    version = world.version()
    accurate = world.variant(version, "plain", {one: (0.99, 4.0)})
    quick = world.variant(version, "pruned", {one: (0.96, 1.0)})
    other = world.variant(version, "ov", {two: (0.99, 2.0)}, runtime="openvino")
    release = world.release(version)
    endpoint = world.endpoint(objective="accuracy>=0.97; minimise latency_p95", automatic=False)
    assert assign(world, endpoint, release).choice == {one: accurate, two: other}
    with world.store.write() as session:
        row = session.get(Endpoint, endpoint)
        assert row is not None
        endpoints.change(session, row, actor="t", objective="minimise latency_p95")
    assert assign(world, endpoint, release).choice == {one: quick, two: other}
    assert assign(world, endpoint, release, {one: "plain"}).choice[one] == accurate
    with pytest.raises(InvalidInput, match="no class 'nope'"):
        assign(world, endpoint, release, {"nope": accurate})
    with pytest.raises(InvalidInput, match="no variant"):
        assign(world, endpoint, release, {one: "k-9999"})


def test_the_signature_is_fixed_by_the_first_assignment(world: World) -> None:
    name = world.class_of(world.add_device("a"))
    first = world.version()
    world.variant(first, "plain", {name: (0.99, 4.0)})
    endpoint = world.endpoint(automatic=False)
    assign(world, endpoint, world.release(first))
    assert world.row(Endpoint, endpoint).signature["inputs"][0]["name"] == "image"
    world.now += 1
    changed = dataclasses.replace(SIGNATURE, inputs=(TensorSpec("picture", "UINT8", (-1, 8, 8, 1)),))
    second = world.version(signature=changed)
    world.variant(second, "plain", {name: (0.99, 4.0)})
    with pytest.raises(Conflict, match="another signature"):
        assign(world, endpoint, world.release(second))


def test_a_variant_that_the_devices_cannot_run_is_never_chosen(world: World) -> None:
    device = world.add_device("a")
    name = world.class_of(device)
    version = world.version()
    world.variant(version, "vnni", {name: (0.99, 0.1)}, isa=("avx512_vnni",))
    plain = world.variant(version, "plain", {name: (0.99, 4.0)})
    endpoint = world.endpoint(automatic=False)
    assert assign(world, endpoint, world.release(version)).choice == {name: plain}


def test_what_nobody_has_judged_comes_after_the_plain_variant(world: World) -> None:
    name = world.class_of(world.add_device("pi", isa=("neon",), architecture="aarch64"))
    version = world.version()
    plain = world.variant(version, "plain", {name: (None, None)})
    small = world.variant(version, "plain-int8", {name: (None, None)}, size=100)
    endpoint = world.endpoint(automatic=False, objective="minimise size")
    release = world.release(version, {name: [small, plain]})
    assert assign(world, endpoint, release).choice == {name: plain}
    with world.store.write() as session:
        row = session.get_one(Variant, small)
        registry.add_measurement(
            session, row, name, "accuracy", {"value": 0.9}, world.clock, source="emulated"
        )
    assert assign(world, endpoint, release).choice == {name: small}


def test_fallback_is_what_the_desired_state_says(world: World) -> None:
    own = world.add_device("a")
    strong = world.add_device("b", isa=("avx2", "avx512f", "avx512vl", "avx512_vnni"))
    arm = world.add_device("c", isa=("neon",), architecture="aarch64")
    version = world.version()
    variant = world.variant(version, "plain", {world.class_of(own): (0.99, 4.0)})
    endpoint = world.endpoint(automatic=False)
    assignment = assign(world, endpoint, world.release(version))
    with world.store.read() as session:
        wanted = endpoints.Wanted(session, world.blobs, assignment)
        rows = {key: session.get(Device, key) for key in (own, strong, arm)}
        found = {key: wanted.of(row) for key, row in rows.items() if row is not None}
        bundle = session.get_one(Variant, variant).bundle
    shown = {key: None if hit is None else (hit[0].bundle, hit[1]) for key, hit in found.items()}
    assert shown == {own: (bundle, False), strong: (bundle, True), arm: None}


def test_needs_are_judged_by_runtime_range_and_isa() -> None:
    facts = classes.facts_of(profile("onnxruntime"), "x")
    assert classes.fits(RuntimeNeed("onnxruntime", "m"), facts)
    assert classes.fits(RuntimeNeed("onnxruntime", "m", "1.32", "2.0", ("avx2",)), facts)
    assert not classes.fits(RuntimeNeed("openvino", "m"), facts)
    assert not classes.fits(RuntimeNeed("onnxruntime", "m", "1.33"), facts)
    assert not classes.fits(RuntimeNeed("onnxruntime", "m", "", "1.32"), facts)
    assert not classes.fits(RuntimeNeed("onnxruntime", "m", isa=("avx512f",)), facts)
    assert classes.version_key("2026.4.1-20000") == (2026, 4, 1) and classes.version_key("1.9") < (1, 10)


def test_a_class_has_what_all_of_its_devices_have(world: World) -> None:
    world.add_device("a", isa=("avx2", "avx512f"))
    world.add_device("b", isa=("avx2",))
    with world.store.read() as session:
        facts = classes.class_facts(session.query(Device))
    (only,) = facts.values()
    assert only.isa == {"avx2"} and only.runtimes == {"onnxruntime": "1.32.0"} and not only.emulated


def test_a_class_is_emulated_when_all_of_its_devices_are(world: World) -> None:
    pi = world.add_device("pi", isa=("neon",), architecture="aarch64", emulated=True)
    with world.store.read() as session:
        assert classes.class_facts(session.query(Device))[world.class_of(pi)].emulated
    assert world.class_of(world.add_device("board", isa=("neon",), architecture="aarch64")) == world.class_of(
        pi
    )
    with world.store.read() as session:
        assert not classes.class_facts(session.query(Device))[world.class_of(pi)].emulated


def test_bad_endpoints_are_refused(world: World) -> None:
    version = world.version()
    assert version
    with pytest.raises(InvalidInput, match="not an endpoint's name"):
        world.endpoint("Digits!")
    with pytest.raises(InvalidInput):
        world.endpoint("a", objective="speed>3")
    with pytest.raises(InvalidInput, match="changes by itself"):
        world.endpoint("a", filter="p95>5")
    world.endpoint("a")
    with pytest.raises(Conflict, match="already"):
        world.endpoint("a")


def test_settings_keep_what_else_they_hold(world: World) -> None:
    world.version()
    key = world.endpoint()
    with world.store.write() as session:
        row = session.get(Endpoint, key)
        assert row is not None
        row.settings = {**row.settings, "policy": {"automatic": True, "label_wait_s": 5}}
        endpoints.change(session, row, actor="t", automatic=False, settle_s=7)
    settings = world.row(Endpoint, key).settings
    assert (
        settings["policy"] == {"automatic": False, "label_wait_s": 5} and settings["settle"]["seconds"] == 7
    )


# ------------------------------------------------------------------ trials


def test_the_device_with_the_least_to_do_is_picked() -> None:
    devices = [
        trials.Idle("a", "x", 2),
        trials.Idle("b", "x", 1),
        trials.Idle("c", "y", 0),
        trials.Idle("d", "x", 1),
    ]
    assert trials.pick(devices, "x") == "b"
    assert trials.pick(devices, "z") is None
    assert trials.pick([trials.Idle("a", "x", trials.MAX_A_DEVICE)], "x") is None


def test_real_devices_are_timed_and_emulated_ones_only_answer() -> None:
    real, emulated = trials.Idle("real", "x", 3), trials.Idle("a-emulated", "x", 0, emulated=True)
    for kind in ("timing", "outputs"):
        assert trials.pick([emulated, real], "x", kind, real=True) == "real"
    # The only real one is away or has enough to do: a timing waits for it, inputs are answered meanwhile.
    assert trials.pick([emulated], "x", "timing", real=True) is None
    assert trials.pick([emulated], "x", "outputs", real=True) == "a-emulated"
    # Nobody real: the emulated one says at once that it cannot time.
    assert trials.pick([emulated], "x", "timing", real=False) == "a-emulated"


def test_an_emulated_timing_is_no_figure() -> None:
    result = telemetry_pb2.TrialResult(trial="t", ok=True, context={"emulated": "yes"})
    result.timing.winner = "unmeasured"
    assert trials.figures_of(result) == {}


def test_figures_of_a_trial() -> None:
    result = telemetry_pb2.TrialResult(trial="t", ok=True)
    assert trials.figures_of(result) == {}
    result.timing.candidate.p95_ms = 2.0
    result.timing.candidate.runs = 40
    result.timing.candidate.rss_bytes = 1000
    result.timing.int8_share = float("nan")
    assert set(trials.figures_of(result)) == {"latency", "memory"}
    result.timing.int8_share = 0.9
    assert trials.figures_of(result)["int8_share"] == {"value": pytest.approx(0.9)}
