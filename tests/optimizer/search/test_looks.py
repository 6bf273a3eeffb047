"""What is worth a look: the volume, its bounds, and what can't change the front."""

from __future__ import annotations

import math
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal_optimizer.meter import Figure, Measurement
from shoal_optimizer.search import frontier, looking, looks
from shoal_optimizer.search.candidate import Candidate
from shoal_optimizer.search.frontier import Estimate, Point
from shoal_optimizer.search.looks import Bounds

BOUNDS = Bounds(accuracy=0.9, latency=10.0, size=1000.0)
grid = st.integers(0, 4)
points = st.lists(st.tuples(grid, grid, grid), max_size=6)


def point(key: str, accuracy: float, latency: float | None, size: float, error: float = 0.0) -> Point:
    found = None if latency is None else Estimate(latency, error)
    figures = {frontier.ACCURACY: Estimate(accuracy), frontier.LATENCY: found, frontier.SIZE: Estimate(size)}
    return Point(key, figures)


@given(points)
def test_the_volume_is_that_of_the_unit_cubes_inside(corners: list[tuple[int, int, int]]) -> None:
    cubes = sum(
        any(x < a and y < b and z < c for a, b, c in corners) for x, y, z in product(range(4), repeat=3)
    )
    assert looks.volume([(float(a), float(b), float(c)) for a, b, c in corners]) == pytest.approx(cubes)


def test_gains_are_ratios_where_ratios_matter() -> None:
    assert BOUNDS.gains(0.95, 5.0, 500.0) == pytest.approx((0.05, math.log(2), math.log(2)))


class TestWorth:
    seen = (point("seen", 0.95, 1.0, 100.0),)

    def test_what_is_surely_behind_is_not_looked_at(self) -> None:
        assert looks.worth(self.seen, [point("slow", 0.95, 3.0, 100.0, error=0.3)], BOUNDS) == []

    def test_a_doubtful_prediction_is(self) -> None:
        unseen = [point("may be", 0.95, 1.2, 100.0, error=0.5)]
        assert [p.key for p in looks.worth(self.seen, unseen, BOUNDS)] == ["may be"]

    def test_the_likeliest_gain_goes_first_and_the_unknown_before_it(self) -> None:
        unseen = [
            point("little", 0.95, 0.9, 99.0),
            point("much", 0.98, 0.5, 50.0),
            point("unknown", 0.91, None, 900.0),
        ]
        assert [p.key for p in looks.worth(self.seen, unseen, BOUNDS)] == ["unknown", "much", "little"]


def candidate(name: str, size: int, *, plain: bool = False, ms: float | None = None) -> Candidate:
    return Candidate(
        key=name, name=name, network="n", bundle=name, layout="", target="onnxruntime", precision="int8",
        recipe=(), classes=("c",), size_bytes=size, wire_bytes=size, plain=plain,
        accuracy=Figure(0.95, 0.94, 0.96, 100),
        predicted={} if ms is None else {"c": {"ms": ms, "relative_error": 0.05}},
    )  # fmt: skip


def test_counted_measurements_go_where_they_may_gain() -> None:
    plain, behind, ahead = (
        candidate("plain", 1000, plain=True),
        candidate("behind", 900, ms=9.99),
        candidate("ahead", 100, ms=1.0),
    )
    known = candidate("known", 300)
    times = {"plain": 10.0, "known": 2.0}

    def timed(found: Candidate) -> Measurement | None:
        ms = times.get(found.name)
        if ms is None:
            return None
        p50 = Figure(ms, ms, ms)
        return Measurement(found.bundle, "c", "timing", "measured", "local", latency_p50=p50)

    found = looking.worth([behind, ahead, plain], [plain, known, behind, ahead], timed)
    assert [c.name for c in found] == ["plain", "ahead"]
    assert looking.worth([behind, ahead], [behind, ahead], timed) == [behind, ahead]
