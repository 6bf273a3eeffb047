"""Checks over windows whose truth is known, and the rule of one open finding a subject and kind."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal_agent.telemetry import sketches
from shoal_agent.telemetry.histograms import ExponentialHistogram
from shoal_controller.loop import drift, monitor
from shoal_controller.loop.monitor import MonitorSettings, OpenFinding, Served, Signal, Span
from shoal_controller.loop.policy import FrontPoint, next_faster
from shoal_protos.v1.telemetry_pb2 import SketchSet
from tests.controller.world import images, reference

NOW = 1_700_000_000_000
SETTINGS = MonitorSettings()


@pytest.fixture(scope="module")
def served() -> Served:
    data, thresholds = reference()
    return Served("e-1", "digits", "c", "sha256:b", (), SketchSet.FromString(data), thresholds)


def span(i: int, **kwargs: Any) -> Span:
    return Span(NOW - 100_000 + 1000 * i, **kwargs)


def inputs(seed: int, count: int = 25, **kwargs: float) -> SketchSet:
    return sketches.sketch("image", images(count, seed, **kwargs))


def checked(served: Served, spans: list[Span], **changes: Any) -> dict[str, Signal]:
    made = dataclasses.replace(served, spans=tuple(spans), **changes)
    return {signal.kind: signal for signal in monitor.evaluate(made, SETTINGS, NOW)}


def test_false_alarms_of_clean_windows_are_rare(served: Served) -> None:
    alarms = 0
    for run in range(60):
        spans = [span(i, inputs=inputs(20_000 + 100 * run + i)) for i in range(6)]
        found = checked(served, spans).get("input_drift")
        alarms += found is not None and found.over
    assert alarms <= 1


def test_a_real_shift_is_seen_within_a_hundred_inputs(served: Served) -> None:
    seen = 0
    for run in range(20):
        spans = [span(i, inputs=inputs(40_000 + 100 * run + i, contrast=0.6, noise=25)) for i in range(4)]
        found = checked(served, spans).get("input_drift")
        seen += found is not None and found.over
    assert seen >= 19


def test_one_odd_block_is_no_finding(served: Served) -> None:
    clean = [span(i, inputs=inputs(50 + i)) for i in range(8)]
    odd = [span(8 + i, inputs=inputs(60 + i, contrast=0.4, noise=40)) for i in range(2)]
    assert "input_drift" not in checked(served, clean + odd)
    assert (
        checked(served, clean + odd + [span(10 + i, inputs=inputs(90 + i)) for i in range(6)])[
            "input_drift"
        ].over
        is False
    )


def test_other_kinds_and_rules_are_not_compared(served: Served) -> None:
    odd = [span(i, inputs=sketches.sketch("tensor", np.ones((60, 4), np.float32))) for i in range(4)]
    assert "input_drift" not in checked(served, odd)
    newer = inputs(1, 60)
    newer.rule_version += 1
    assert "input_drift" not in checked(served, [span(i, inputs=newer) for i in range(4)])
    assert "input_drift" not in checked(served, [span(i, inputs=inputs(i)) for i in range(9)], thresholds={})


def test_the_nearest_threshold_is_never_of_a_larger_window() -> None:
    table = {str(n): {"psi": 1 / n} for n in (10, 50, 200)} | {"x": {"psi": 9.0}}
    for items, size in ((5, 10), (10, 10), (49, 10), (60, 50), (10_000, 200)):
        found = drift.nearest_threshold(table, items, 200)
        assert found is not None and found[0] == size
    assert drift.nearest_threshold(table, 500, 100) == (50, {"psi": 1 / 50})
    assert drift.nearest_threshold({}, 50, 200) is None


def latencies(ms: float, count: int = 60) -> Any:
    made = ExponentialHistogram()
    for value in np.random.default_rng(3).gamma(20, ms / 20, count):
        made.record(float(value) * 1000)
    return made.to_proto()


def test_latency_against_the_objective(served: Served) -> None:
    slow = [span(i, requests=60, latency=latencies(9.0)) for i in range(3)]
    found = checked(served, slow, latency_limit_ms=5.0)["latency"]
    assert found.over and found.evidence["low_ms"] > 5 and "above the objective's 5 ms" in found.sentence
    assert checked(served, slow, latency_limit_ms=50.0)["latency"].over is False
    assert "latency" not in checked(served, slow[:1], latency_limit_ms=5.0)  # too few requests
    assert "latency" not in checked(served, slow)  # nothing promised
    median = checked(served, slow, latency_limit_ms=9.5, latency_metric="latency_p50")
    assert median["latency"].over is False


def test_errors_and_accuracy(served: Served) -> None:
    failing = [span(i, requests=50, errors=10) for i in range(3)]
    assert checked(served, failing)["error_rate"].over
    assert checked(served, [span(0, requests=500, errors=1)])["error_rate"].over is False
    assert "error_rate" not in checked(served, [span(0, requests=9, errors=9)])
    promised = {"value": 0.98, "low": 0.96, "high": 0.99, "n": 400}
    worse = [span(i, requests=50, labelled=30, correct=20) for i in range(4)]
    found = checked(served, worse, accuracy=promised)["accuracy_drop"]
    assert found.over and found.evidence["expected"] == 0.98
    fine = [span(i, requests=50, labelled=30, correct=29) for i in range(4)]
    assert checked(served, fine, accuracy=promised)["accuracy_drop"].over is False
    assert "accuracy_drop" not in checked(served, worse, accuracy=None)
    assert "accuracy_drop" not in checked(served, [span(0, labelled=5, correct=0)], accuracy=promised)


def test_old_windows_say_nothing(served: Served) -> None:
    old = Span(NOW - 10_000_000, requests=500, errors=400)
    assert checked(served, [old]) == {}


# ------------------------------------------------------------------ one finding at a time

subjects, kinds = st.sampled_from("abc"), st.sampled_from(["latency", "input_drift"])
signals = st.lists(st.builds(Signal, kind=kinds, subject=subjects, over=st.booleans()), max_size=8)


@given(st.lists(st.tuples(signals, st.booleans()), max_size=20))
def test_one_open_finding_a_subject_and_kind(looks: list[tuple[list[Signal], bool]]) -> None:
    open_: dict[str, OpenFinding] = {}
    count = 0
    for found, acts in looks:
        changes = monitor.reconcile(found, list(open_.values()))
        for key, _ in changes.closed:
            assert open_.pop(key).state == "open"  # what is acted on is not closed behind its back
        for signal in changes.opened:
            count += 1
            open_[f"f{count}"] = OpenFinding(f"f{count}", signal.kind, signal.subject, "open")
        keys = [(f.subject, f.kind) for f in open_.values()]
        assert len(keys) == len(set(keys))
        if acts and open_:
            name = next(iter(open_))
            open_[name] = dataclasses.replace(open_[name], state="acting")


points = st.builds(
    FrontPoint,
    variant=st.uuids().map(str),
    name=st.just("v"),
    accuracy=st.none() | st.floats(0, 1),
    latency_p95_ms=st.none() | st.floats(0.1, 100),
    size_bytes=st.just(1),
)


@given(st.lists(points, min_size=1, max_size=8), st.none() | st.floats(0, 1))
def test_a_step_is_always_faster_and_keeps_the_floor(front: list[FrontPoint], floor: float | None) -> None:
    found = next_faster(front, front[0].variant, floor)
    if found is None:
        return
    assert found.latency_p95_ms is not None and front[0].latency_p95_ms is not None
    assert found.latency_p95_ms < front[0].latency_p95_ms
    assert floor is None or (found.accuracy is not None and found.accuracy >= floor)
