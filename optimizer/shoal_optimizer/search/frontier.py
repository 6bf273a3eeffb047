"""Which points of a search are worth keeping, and which of them are still uncertain.

Pure: functions over frozen values, no IO, no clock, no randomness. A point is dominated only
beyond the noise of its measurements, so a noisy figure never throws a candidate away, and the
relation has no cycles: a dominating point is also at least as good by value in every metric.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from shoal_optimizer import objective as objectives
from shoal_optimizer.objective import Objective

Z95 = 1.959963984540054  # two-sided 95 %

ACCURACY = "accuracy"
LATENCY = "latency_p95"
SIZE = "size"
WIRE = "wire"  # bytes compressed for sending: only where the objective asks for them
MEMORY = "memory"
METRICS = (ACCURACY, LATENCY, SIZE, MEMORY)
NOISY = (LATENCY, MEMORY)  # measuring again narrows these; accuracy is bound by the data there is


@dataclass(frozen=True)
class Estimate:
    """A figure with its standard error; `error` 0 means exact (a file's size)."""

    value: float
    error: float = 0.0

    @classmethod
    def from_interval(cls, value: float, low: float, high: float) -> Estimate:
        """From a 95 % interval; its half width is read as 1.96 standard errors."""
        return cls(value, max(high - low, 0.0) / (2 * Z95))


@dataclass(frozen=True)
class Point:
    """One candidate for one class. `None` = unmeasured: such a metric never dominates and never
    saves a point from being dominated in the others."""

    key: str
    figures: Mapping[str, Estimate | None]

    def get(self, metric: str) -> Estimate | None:
        return self.figures.get(metric)


def gain(metric: str, a: Estimate, b: Estimate) -> tuple[float, float]:
    """How much better `a` is than `b` (positive = better), and the standard error of that."""
    difference = a.value - b.value
    return difference if objectives.is_share(metric) else -difference, math.hypot(a.error, b.error)


def dominates(a: Point, b: Point, *, z: float = Z95, metrics: Sequence[str] = METRICS) -> bool:
    """True if `a` is at least as good as `b` by value in every metric and better beyond the noise
    (`z` standard errors of the difference) in at least one.

    A metric that either lacks is skipped, unless only `b` has it: `a` can't be shown to be as
    good there, so `a` doesn't dominate.
    """
    clearly_better = False
    for metric in metrics:
        mine, other = a.get(metric), b.get(metric)
        if mine is None:
            if other is not None:
                return False
            continue
        if other is None:
            continue
        better, error = gain(metric, mine, other)
        if better < 0:
            return False
        clearly_better = clearly_better or better > z * error
    return clearly_better


def front(points: Iterable[Point], *, z: float = Z95, metrics: Sequence[str] = METRICS) -> list[Point]:
    """The points that no other one dominates, in the order given; never empty for a non-empty input."""
    pool = list(points)
    return [p for p in pool if not any(dominates(q, p, z=z, metrics=metrics) for q in pool if q is not p)]


def _settled(point: Point, z: float, noisy: Sequence[str]) -> Point:
    """The point as exact measuring could find it: each noisy figure `z` standard errors better
    (worse for z < 0) and without error."""
    figures = dict(point.figures)
    for metric in noisy:
        figure = figures.get(metric)
        if figure is not None:
            sign = 1.0 if objectives.is_share(metric) else -1.0
            figures[metric] = Estimate(figure.value + sign * z * figure.error)
    return replace(point, figures=figures)


def undecided(
    points: Iterable[Point],
    *,
    z: float = Z95,
    metrics: Sequence[str] = METRICS,
    noisy: Sequence[str] = NOISY,
) -> list[Point]:
    """The points whose place on or off the front could still change by measuring `noisy` again.

    A point on the front is undecided if, at its worst and a rival's best, the rival would dominate
    it; a dominated one if, at its best and every rival's worst, nobody would. Points come in the
    order given; without errors there are none.
    """
    pool = list(points)
    best = [_settled(p, z, noisy) for p in pool]
    worst = [_settled(p, -z, noisy) for p in pool]
    result = []
    for i, point in enumerate(pool):
        rivals = [j for j in range(len(pool)) if j != i]
        if any(dominates(pool[j], point, z=z, metrics=metrics) for j in rivals):
            changes = not any(dominates(worst[j], best[i], z=z, metrics=metrics) for j in rivals)
        else:
            changes = any(dominates(best[j], worst[i], z=z, metrics=metrics) for j in rivals)
        if changes:
            result.append(point)
    return result


def metrics_for(objective: Objective) -> tuple[str, ...]:
    """What makes one point better than another under an objective."""
    wire = (WIRE,) if objective.names(WIRE) else ()
    return (*METRICS, *wire, *map(objectives.recall_metric, objective.labels))


def ordered(points: Iterable[Point], objective: Objective) -> list[Point]:
    """The points best first by an objective's own ranking, so that order and choice can't disagree."""
    pool = {p.key: p for p in points}
    return [pool[ranked.key] for ranked in objective.rank(map(as_objective_point, pool.values()))]


def as_objective_point(point: Point) -> objectives.Point:
    """The point's values without their errors, as an objective reads them."""
    return objectives.Point(point.key, {m: f.value for m, f in point.figures.items() if f is not None})


def progressed(
    before: Sequence[Point],
    after: Sequence[Point],
    *,
    z: float = Z95,
    metrics: Sequence[str] = METRICS,
) -> bool:
    """True if the front of `after` holds a point that the front of `before` did not."""
    known = {p.key for p in front(before, z=z, metrics=metrics)}
    return any(p.key not in known for p in front(after, z=z, metrics=metrics))
