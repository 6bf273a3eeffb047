"""What must not be chosen, and when the plain variant stays."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from shoal_optimizer.objective import parse
from shoal_optimizer.search.choosing import beats, choose, lost_class
from shoal_optimizer.search.frontier import Estimate, Point

LATENCY = parse("accuracy>=0.9; minimise latency_p95")


def point(key: str, ms: float, accuracy: float = 0.95, size: float = 100.0, error: float = 0.01) -> Point:
    figures = {
        "latency_p95": Estimate(ms, error * ms),
        "accuracy": Estimate(accuracy, 0.005),
        "size": Estimate(size),
    }
    return Point(key, figures)


PLAIN = frozenset({"plain"})


def test_the_plain_variant_stays_where_nothing_is_better_beyond_noise() -> None:
    plain = point("plain", 10.0)
    slower, alike = point("int8", 11.1, 0.94, 25), point("pruned50", 9.9, 0.94, 50)
    choice = choose([plain, slower, alike], PLAIN, LATENCY)
    assert (choice.key, choice.feasible) == ("plain", True)
    assert "plain stays as it is: nothing is better beyond noise" in choice.sentence
    assert "int8 was measured 0.9x as fast here" in choice.sentence
    assert choice.ranked[0] == "plain" and set(choice.ranked) == {"plain", "int8", "pruned50"}


def test_what_is_clearly_faster_is_chosen() -> None:
    choice = choose([point("plain", 10.0), point("int8", 5.0)], PLAIN, LATENCY)
    assert choice.key == "int8" and "lowest latency_p95" in choice.sentence


def test_alike_in_the_goal_but_better_elsewhere_and_worse_nowhere_is_chosen() -> None:
    assert choose([point("plain", 10.0), point("int8", 10.0, 0.95, 25)], PLAIN, LATENCY).key == "int8"


def test_a_certain_gain_goes_before_an_uncertain_larger_one() -> None:
    noisy, sure = point("noisy", 7.0, error=0.5), point("sure", 8.0)
    assert choose([point("plain", 10.0), noisy, sure], PLAIN, LATENCY).key == "sure"


def test_a_bound_that_only_another_meets_decides() -> None:
    objective = parse("latency_p95<=6ms; maximise accuracy")
    choice = choose([point("plain", 10.0, 0.99), point("int8", 5.0, 0.95)], PLAIN, objective)
    assert (choice.key, choice.feasible) == ("int8", True)
    unreachable = parse("latency_p95<=1ms; maximise accuracy")
    choice = choose([point("plain", 10.0), point("int8", 5.0)], PLAIN, unreachable)
    assert not choice.feasible and "closest: int8, misses latency_p95 <= 1 ms by 4 ms" in choice.sentence


def test_a_rival_that_misses_the_bound_says_so() -> None:
    choice = choose([point("plain", 10.0), point("int8", 5.0, 0.8)], PLAIN, LATENCY)
    assert choice.key == "plain" and "int8 misses accuracy >= 0.9 by 0.1" in choice.sentence


def test_what_forgets_a_class_of_the_data_is_named() -> None:
    choice = choose([point("plain", 10.0)], PLAIN, LATENCY, {"int8": "loses 20.0 points of recall on 'stop'"})
    assert choice.key == "plain" and "int8 loses 20.0 points of recall on 'stop'" in choice.sentence


def test_a_class_is_lost_beyond_three_points_and_beyond_chance() -> None:
    plain = {"stop": (0.95, 400), "yield": (0.9, 10)}
    said = lost_class({"stop": (0.85, 400), "yield": (0.9, 10)}, plain, LATENCY)
    assert said == "loses 10.0 points of recall on 'stop' (0.95 to 0.85, 400 items)"
    assert lost_class({"stop": (0.93, 400), "yield": (0.9, 10)}, plain, LATENCY) == ""  # two points
    assert lost_class({"stop": (0.95, 400), "yield": (0.7, 10)}, plain, LATENCY) == ""  # ten items
    own = parse("recall[stop]>=0.8; minimise size")
    assert lost_class({"stop": (0.85, 400)}, plain, own) == ""  # the objective says how much


@given(st.lists(st.tuples(st.floats(0.1, 50), st.floats(0.5, 1), st.floats(1, 200)), min_size=1, max_size=6))
def test_the_choice_is_never_clearly_worse_than_plain(values: list[tuple[float, float, float]]) -> None:
    points = [point("plain", 10.0)] + [point(f"c{number}", *figures) for number, figures in enumerate(values)]
    choice = choose(points, PLAIN, LATENCY)
    chosen = next(p for p in points if p.key == choice.key)
    assert not beats(points[0], chosen, LATENCY)
    assert set(choice.ranked) == {p.key for p in points} and choice.ranked[0] == choice.key
