"""Dominance and the front hold under noise, for any figures."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from shoal_optimizer.objective import parse
from shoal_optimizer.search import frontier
from shoal_optimizer.search.frontier import Estimate, Point

values = st.floats(0.0, 10.0, allow_nan=False).map(lambda v: round(v, 2))
errors = st.sampled_from([0.0, 0.0, 0.1, 0.5, 2.0])
estimates = st.one_of(st.none(), st.builds(Estimate, values, errors))
figures = st.fixed_dictionaries(dict.fromkeys(frontier.METRICS, estimates))


@st.composite
def pools(draw: st.DrawFn) -> list[Point]:
    drawn = draw(st.lists(figures, min_size=1, max_size=8))
    return [Point(f"p{i}", f) for i, f in enumerate(drawn)]


def point(key: str, accuracy: float, latency: float, size: float = 1.0, error: float = 0.0) -> Point:
    return Point(
        key,
        {
            frontier.ACCURACY: Estimate(accuracy, 0.0),
            frontier.LATENCY: Estimate(latency, error),
            frontier.SIZE: Estimate(size),
            frontier.MEMORY: None,
        },
    )


@given(pools())
def test_front_is_never_empty_and_holds_no_dominated_point(pool: list[Point]) -> None:
    kept = frontier.front(pool)
    assert kept
    for candidate in pool:
        dominated = any(frontier.dominates(other, candidate) for other in pool if other is not candidate)
        assert (candidate in kept) is not dominated


@given(pools())
def test_dominance_has_no_cycles(pool: list[Point]) -> None:
    edges = {p.key: [q.key for q in pool if q is not p and frontier.dominates(p, q)] for p in pool}
    finished: set[str] = set()

    def visit(key: str, path: frozenset[str]) -> None:
        assert key not in path
        if key not in finished:
            for following in edges[key]:
                visit(following, path | {key})
            finished.add(key)

    for key in edges:
        visit(key, frozenset())


@given(pools(), st.permutations(range(8)))
def test_front_does_not_depend_on_the_order(pool: list[Point], order: list[int]) -> None:
    shuffled = [pool[i] for i in order if i < len(pool)]
    assert {p.key for p in frontier.front(pool)} == {p.key for p in frontier.front(shuffled)}


@given(pools())
def test_without_noise_nothing_is_undecided(pool: list[Point]) -> None:
    exact = [Point(p.key, {m: f and Estimate(f.value) for m, f in p.figures.items()}) for p in pool]
    assert frontier.undecided(exact) == []


@given(pools())
def test_more_noise_never_removes_a_point(pool: list[Point]) -> None:
    noisy = [
        Point(p.key, {m: f and Estimate(f.value, f.error + 1) for m, f in p.figures.items()}) for p in pool
    ]
    assert {p.key for p in frontier.front(pool)} <= {p.key for p in frontier.front(noisy)}


def test_a_slower_point_within_noise_stays() -> None:
    fast, slow = point("fast", 0.99, 1.0, error=0.2), point("slow", 0.99, 1.3, error=0.2)
    assert [p.key for p in frontier.front([fast, slow])] == ["fast", "slow"]
    assert [p.key for p in frontier.undecided([fast, slow])] == ["fast", "slow"]


def test_a_point_worse_beyond_noise_goes() -> None:
    fast, slow = point("fast", 0.99, 1.0, error=0.1), point("slow", 0.99, 2.0, error=0.1)
    assert [p.key for p in frontier.front([slow, fast])] == ["fast"]
    assert frontier.undecided([fast, slow]) == []


def test_an_unmeasured_metric_neither_dominates_nor_saves() -> None:
    measured = point("measured", 0.99, 1.0)
    blind = Point("blind", {frontier.ACCURACY: Estimate(0.98), frontier.SIZE: Estimate(1.0)})
    assert frontier.dominates(measured, blind)
    assert not frontier.dominates(Point("b", {frontier.SIZE: Estimate(0.1)}), measured)


def test_order_and_choice_agree() -> None:
    pool = [point("a", 0.9, 3.0), point("b", 0.8, 1.0), point("c", 0.9, 2.0)]
    objective = parse("accuracy>=0.85; minimise latency_p95")
    assert [p.key for p in frontier.ordered(pool, objective)] == ["c", "a", "b"]
    assert objective.choose(map(frontier.as_objective_point, pool)).key == "c"


def test_progress_is_a_new_point_on_the_front() -> None:
    first = [point("a", 0.9, 2.0)]
    assert frontier.progressed(first, [*first, point("b", 0.95, 3.0)])
    assert not frontier.progressed(first, [*first, point("b", 0.8, 3.0)])
