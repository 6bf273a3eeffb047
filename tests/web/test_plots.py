"""Geometry: labels do not collide, everything stays inside, scales are shared."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from shoal_controller.api import schemas as s
from shoal_controller.web import plots

variants = st.lists(
    st.builds(
        plots.Point,
        name=st.sampled_from(["plain-fp32", "pruned50-int8-onnxruntime", "int8"]),
        href=st.just("#x"),
        x=st.floats(0.01, 5000),
        y=st.floats(0, 1),
        size=st.integers(1, 10**9),
        kind=st.sampled_from(["serving", "front", "plain", "other"]),
        on_front=st.booleans(),
    ),
    min_size=1,
    max_size=24,
)


def boxes(plot: plots.Pareto, width: float = 6.0, line: float = 12.0) -> list[plots.Box]:
    found = []
    for mark in plot.marks:
        if not mark.label:
            continue
        w = len(mark.label) * width
        left = mark.lx - {"start": 0, "end": w, "middle": w / 2}[mark.anchor]
        found.append((left, mark.ly - line, left + w, mark.ly))
    return found


@given(variants, st.sampled_from([360, 1120]))
def test_pareto_stays_inside_and_labels_barely_touch(points: list[plots.Point], width: int) -> None:
    plot = plots.pareto(points, width=width, limit_x=5.0, limit_y=0.9)
    for mark in plot.marks:
        assert 0 <= mark.cx <= plot.width
        assert 0 <= mark.cy <= plot.height
    labels = boxes(plot)
    for i, a in enumerate(labels):
        assert a[0] >= 0 and a[2] <= plot.width
        for b in labels[:i]:
            assert plots._overlap(a, b) < 60
    assert 1 <= len(plot.xticks) <= 12
    assert plot.limit_x is not None and plot.limit_y is not None


def test_serving_variant_keeps_its_label() -> None:
    crowd = [plots.Point("v" * 30, "#", 1.0 + i / 1000, 0.9, 10, "other") for i in range(20)]
    plot = plots.pareto([*crowd, plots.Point("mine", "#", 1.01, 0.9, 10, "serving", on_front=True)])
    assert next(m for m in plot.marks if m.point.name == "mine").label


def test_area_is_size() -> None:
    plot = plots.pareto(
        [plots.Point("a", "#", 1, 0.9, 400, "plain"), plots.Point("b", "#", 2, 0.8, 100, "plain")]
    )
    radius = {m.point.name: m.r for m in plot.marks}
    assert radius["a"] == 2 * radius["b"]


def _effect(value: float, low: float, high: float, gate: float) -> s.Effect:
    return s.Effect(name="latency_p95", value=value, low=low, high=high, gate=gate)


@given(st.floats(-1e6, 1e6), st.floats(0, 1e6), st.floats(-1e6, 1e6))
def test_forest_shares_its_scale(value: float, half: float, gate: float) -> None:
    drawn = plots.forest([_effect(value, value - half, value + half, gate), _effect(0, -1, 1, gate)], 200)
    assert drawn[0].zero == drawn[1].zero
    assert drawn[0].gate == drawn[1].gate
    for f in drawn:
        for x in (f.zero, f.gate, f.value, f.low, f.high):
            assert x is not None and 0 <= x <= 200


def test_beyond_the_gate_needs_the_whole_interval() -> None:
    assert plots.breaks(_effect(9, 6, 12, 5))
    assert not plots.breaks(_effect(9, 4, 12, 5))
    assert plots.breaks(_effect(-3, -4, -2, -1))
    assert not plots.breaks(_effect(-3, -4, -0.5, -1))


@given(st.lists(st.none() | st.floats(0, 1e9), max_size=80))
def test_spark(values: list[float | None]) -> None:
    drawn = plots.spark(values)
    known = [v for v in values if v is not None]
    if len(known) < 2:
        assert drawn is None
    else:
        assert drawn is not None and drawn[0].startswith("M") and "nan" not in drawn[0]
        assert 0 <= drawn[2] <= 240 and 0 <= drawn[3] <= 48


@given(st.floats(0.001, 1e5), st.floats(1.01, 1e4))
def test_ticks_are_inside(low: float, ratio: float) -> None:
    for found in (plots.nice_ticks(low, low * ratio), plots.log_ticks(low, low * ratio)):
        assert all(low * 0.998 <= t <= low * ratio * 1.002 for t in found)
        assert len(found) <= 30
