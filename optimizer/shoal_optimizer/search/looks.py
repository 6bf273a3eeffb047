"""Which candidates are worth a look by a device: those that could still change the front. Pure.

A look is dear (a device's time), while accuracy and size of a made candidate are known and its latency is
predicted with an error. A candidate whose best case is behind what was already measured is never looked
at; of the others the one whose likely gain is largest goes first.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from shoal_optimizer.search import frontier
from shoal_optimizer.search.frontier import Estimate, Point

OPTIMISM = 1.0  # standard errors by which a prediction may be too slow
LEAST_GAIN = 0.002  # of the dominated volume: less is within the noise of measuring


@dataclass(frozen=True)
class Bounds:
    """The corner that gains are counted from: what nobody would want to be worse than.

    Accuracy counts linearly, latency and size by their logarithms, since ratios are what matters there.
    """

    accuracy: float
    latency: float  # ms
    size: float  # bytes

    def gains(self, accuracy: float, latency: float, size: float) -> tuple[float, float, float]:
        """How far a point is inside the corner along each axis; negative values are outside."""
        return accuracy - self.accuracy, math.log(self.latency / latency), math.log(self.size / size)


def volume(points: Sequence[tuple[float, float, float]]) -> float:
    """The volume that points dominate, from the origin; each coordinate is a gain, more is better.

    Slices along the first axis, each the area under a staircase; O(n^2 log n).
    """
    inside = np.asarray([p for p in points if min(p) > 0], np.float64).reshape(-1, 3)
    inside = inside[np.argsort(-inside[:, 0])]
    total = 0.0
    for place in range(len(inside)):
        below = inside[place + 1, 0] if place + 1 < len(inside) else 0.0
        thickness = inside[place, 0] - below
        if thickness > 0:
            total += thickness * _area(inside[: place + 1, 1:])
    return total


def _area(points: np.ndarray) -> float:
    """Area under the staircase of points [n, 2] with positive coordinates."""
    ordered = points[np.argsort(-points[:, 0])]
    heights = np.maximum.accumulate(ordered[:, 1])
    widths = ordered[:, 0] - np.append(ordered[1:, 0], 0.0)
    return float((widths * heights).sum())


def worth(
    seen: Sequence[Point],
    unseen: Sequence[Point],
    bounds: Bounds,
    *,
    optimism: float = OPTIMISM,
    least: float = LEAST_GAIN,
) -> list[Point]:
    """The candidates to look at, the likeliest gain first; those that cannot change the front are left out.

    Args:
        seen: measured points.
        unseen: points whose latency is a prediction; None = nothing is known of it, so it may be anything
            between the best seen one and the corner, and it comes first.
        least: share of the volume of all that was seen which a candidate must be able to add.
    """
    known = [gains for point in seen if (gains := _gains(point, bounds)) is not None]
    base = volume(known)
    unknown, ranked = [], []
    for point in unseen:
        if point.get(frontier.LATENCY) is None:
            unknown.append(point)
            continue
        hoped = _gains(_better(point, optimism), bounds)
        if hoped is None:
            continue
        gain = volume([*known, hoped]) - base
        if gain > least * base:
            likely = _gains(point, bounds)
            expected = 0.0 if likely is None else volume([*known, likely]) - base
            ranked.append((expected + 0.25 * gain, point))
    ranked.sort(key=lambda item: (-item[0], item[1].key))
    return [*unknown, *(point for _, point in ranked)]


def _better(point: Point, errors: float) -> Point:
    latency = point.get(frontier.LATENCY)
    assert latency is not None
    best = max(latency.value - errors * latency.error, 0.2 * latency.value)
    return replace(point, figures={**point.figures, frontier.LATENCY: Estimate(best)})


def _gains(point: Point, bounds: Bounds) -> tuple[float, float, float] | None:
    figures: Mapping[str, Estimate | None] = point.figures
    accuracy, latency, size = (figures.get(m) for m in (frontier.ACCURACY, frontier.LATENCY, frontier.SIZE))
    if accuracy is None or latency is None or size is None or latency.value <= 0:
        return None
    return bounds.gains(accuracy.value, latency.value, size.value)
