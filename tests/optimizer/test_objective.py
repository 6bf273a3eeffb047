from __future__ import annotations

import contextlib
import math
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal_optimizer.objective import METRICS, Constraint, Objective, Point, parse, show
from shoal_protos.errors import InvalidInput


def test_constraints_units_and_goal() -> None:
    objective = parse("accuracy>=97%, latency_p95 <= 500us, memory<=64MB, size<=1.5MiB; minimise size")
    bounds = {constraint.metric: constraint.bound for constraint in objective.constraints}
    assert bounds == {"accuracy": 0.97, "latency_p95": 0.5, "memory": 64e6, "size": 1.5 * 1024**2}
    assert objective.goals == ("size",)


@pytest.mark.parametrize(
    ("text", "goals"),
    [
        ("", ("latency_p95",)),
        ("accuracy>=0.9", ("latency_p95",)),
        ("maximise accuracy", ("accuracy",)),
        ("minimize latency_p50, size", ("latency_p50", "size")),
        ("accuracy>=0.9; minimise size; maximise accuracy", ("size", "accuracy")),
        ("latency_p95≤5ms\nmaximize accuracy", ("accuracy",)),
    ],
)
def test_goals(text: str, goals: tuple[str, ...]) -> None:
    assert parse(text).goals == goals


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("speed>=3", "metric"),
        ("accuracy<=0.9", "accuracy>="),
        ("latency_p95>=5ms", "latency_p95<="),
        ("latency_p95==5ms", "latency_p95<="),
        ("accuracy>=1.5", "perfect"),
        ("accuracy>=97", "97%"),
        ("latency_p95<=0ms", "above 0"),
        ("latency_p95<=5MB", "ms"),
        ("memory<=5ms", "MB"),
        ("accuracy>=0.9, accuracy>=0.8", "twice"),
        ("minimise accuracy", "maximise accuracy"),
        ("maximise size", "minimise size"),
        ("minimise size; minimise size", "twice"),
        ("accuracy", "accuracy>=0.97"),
        ("latency_p95<=fast", "number"),
        ("size<=1e400MB", "finite"),
        ("x" * 2000, "1000"),
        ("recall[stop]<=0.9", "recall[stop]>=0.9"),
        ("recall[stop]>=1.2", "perfect"),
        ("recall[]>=0.9", "metric"),
        ("maximise recall[stop]", "Bound it"),
        ("recall[a]>=0.9, recall[a]>=0.8", "'recall[a]>=0.9' and 'recall[a]>=0.8'"),
        ("accuracy>=0.97, accuracy<=0.9", "'accuracy>=0.97' and 'accuracy<=0.9' contradict"),
        ("minimise size; maximise size", "'minimise size' and 'maximise size' contradict"),
    ],
)
def test_what_cannot_be_met_or_read_is_refused_with_a_remedy(text: str, word: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        parse(text)
    assert word in str(caught.value)
    assert caught.value.remedy


@given(st.text(max_size=60))
def test_any_text_is_parsed_or_refused(text: str) -> None:
    with contextlib.suppress(InvalidInput):
        parse(text)


_bounds = st.floats(1e-6, 1e12, allow_nan=False).map(lambda value: float(f"{value:.6g}"))
_objectives = st.builds(
    lambda accuracy, ceilings, goals: Objective(
        tuple(Constraint("accuracy", accuracy) for _ in range(1))
        + tuple(Constraint(metric, bound) for metric, bound in ceilings.items()),
        tuple(goals),
    ),
    st.floats(0, 1),
    st.dictionaries(st.sampled_from(METRICS[1:]), _bounds),
    st.lists(st.sampled_from(METRICS), min_size=1, unique=True),
)


@given(_objectives)
def test_text_of_an_objective_parses_to_it_again(objective: Objective) -> None:
    again = parse(str(objective))
    assert again.goals == objective.goals
    for have, want in zip(again.constraints, objective.constraints, strict=True):
        assert have.metric == want.metric
        assert have.bound == pytest.approx(want.bound)


_values = st.one_of(st.none(), st.floats(1e-3, 1e9))
_points = st.lists(st.dictionaries(st.sampled_from(METRICS), _values).map(dict), min_size=1, max_size=8).map(
    lambda rows: [Point(f"v{i}", values) for i, values in enumerate(rows)]
)


@given(_objectives, _points)
def test_choice_is_feasible_whenever_a_point_is(objective: Objective, points: list[Point]) -> None:
    choice = objective.choose(points)
    assert choice.feasible == any(objective.feasible(point) for point in points)
    assert set(choice.ranked) == {point.key for point in points}
    assert choice.ranked[0] == choice.key
    assert choice.key in choice.sentence
    assert objective.choose(reversed(points)).key == choice.key  # the order given does not matter


def test_best_feasible_by_the_goals_in_order() -> None:
    objective = parse("accuracy>=0.9; minimise latency_p95, size")
    points = [
        Point("fast but wrong", {"accuracy": 0.8, "latency_p95": 1, "size": 1}),
        Point("large", {"accuracy": 0.95, "latency_p95": 2, "size": 20}),
        Point("small", {"accuracy": 0.91, "latency_p95": 2, "size": 10}),
        Point("slow", {"accuracy": 0.99, "latency_p95": 3, "size": 5}),
    ]
    choice = objective.choose(points)
    assert choice.ranked == ("small", "large", "slow", "fast but wrong")
    assert choice.feasible
    assert "2 ms" in choice.sentence


def test_nearest_infeasible_says_what_is_missed() -> None:
    objective = parse("latency_p95<=2ms; maximise accuracy")
    choice = objective.choose(
        [
            Point("far", {"accuracy": 1.0, "latency_p95": 9}),
            Point("near", {"accuracy": 0.5, "latency_p95": 3}),
        ]
    )
    assert (choice.key, choice.feasible) == ("near", False)
    assert choice.missed == {"latency_p95": pytest.approx(0.5)}
    assert choice.sentence == (
        "None of 2 meets the objective; closest: near, misses latency_p95 <= 2 ms by 1 ms (it is 3 ms)."
    )


def test_unmeasured_is_neither_met_nor_missed() -> None:
    objective = parse("latency_p95<=2ms; minimise size")
    unknown, slow = Point("unknown", {"size": 9}), Point("slow", {"latency_p95": 2.1, "size": 1})
    choice = objective.choose([slow, unknown])
    assert (choice.key, choice.feasible) == ("unknown", False)
    assert math.isnan(choice.missed["latency_p95"])
    assert "unmeasured" in choice.sentence
    met = Point("met", {"latency_p95": 2.0, "size": 99})
    assert objective.choose([slow, unknown, met]).key == "met"
    assert objective.distance(Point("nan", {"latency_p95": math.nan})) == 0.0


def test_recall_of_one_class_of_the_data() -> None:
    objective = parse("recall[Stop, all-way] >= 98%, size<=9B; minimise size")
    assert objective.labels == ("Stop, all-way",)
    assert objective == parse(str(objective))
    met = Point("met", {"recall[Stop, all-way]": 0.99, "size": 8})
    small = Point("small", {"recall[Stop, all-way]": 0.9, "size": 2})
    assert objective.choose([small, met]).key == "met"
    assert "misses recall[Stop, all-way] >= 0.98 by 0.08" in objective.choose([small]).sentence


def test_nothing_to_choose_from() -> None:
    with pytest.raises(InvalidInput):
        parse("").choose([])


@pytest.mark.parametrize(
    ("metric", "value", "text"),
    [
        ("accuracy", 0.97, "0.97"),
        ("latency_p95", 0.031, "31 µs"),
        ("latency_p50", 12.0, "12 ms"),
        ("size", 61217, "61.22 kB"),
        ("memory", 12, "12 B"),
        ("size", None, "unmeasured"),
    ],
)
def test_figures_are_shown_with_units(metric: str, value: float | None, text: str) -> None:
    assert show(metric, value) == text


def test_importing_the_objective_loads_no_torch() -> None:
    code = (
        "import sys, shoal_optimizer, shoal_optimizer.objective\n"
        "from shoal_optimizer import Task, load_task, Recipe\n"
        "assert not {'torch', 'onnx', 'onnxruntime', 'openvino'} & set(sys.modules), sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
