"""How far a window of items is from a bundle's reference, from sketches alone.

The distances say nothing by themselves: what is far depends on the window's size, so a threshold
comes from held-out clean windows of that size (`Reference.thresholds` of the bundle).
"""

from __future__ import annotations

import numpy as np

from shoal_agent.telemetry.sketches import check_comparable, same_bins
from shoal_agent.telemetry.statistics import Array
from shoal_protos.errors import InvalidInput
from shoal_protos.v1.telemetry_pb2 import Sketch, SketchSet

GROUPS = 10
_PRIOR = 0.5  # pseudo-count of each group: no empty group makes the distance infinite


def psi(reference: Sketch, window: Sketch) -> float:
    """Population stability index over groups of bins that each hold about a tenth of the reference.

    Returns 0.0 when either sketch is empty. Raises InvalidInput on different bins.
    """
    return float(psi_of_counts(*_counts(reference, window)))


def ks(reference: Sketch, window: Sketch) -> float:
    """Kolmogorov-Smirnov distance on the fixed bins, 0..1; 0.0 when either sketch is empty.

    Raises InvalidInput on different bins.
    """
    return float(ks_of_counts(*_counts(reference, window)))


def psi_of_counts(expected: Array, seen: Array) -> Array:
    """`psi` of bin counts: `expected` [bins], `seen` [..., bins], one distance for each of `seen`."""
    if expected.sum() == 0:
        return np.zeros(seen.shape[:-1])
    starts = _decile_starts(expected)
    p, q = (
        (grouped + _PRIOR) / (grouped.sum(axis=-1, keepdims=True) + _PRIOR * grouped.shape[-1])
        for grouped in (np.add.reduceat(expected, starts), np.add.reduceat(seen, starts, axis=-1))
    )
    distance: Array = ((q - p) * np.log(q / p)).sum(axis=-1)
    return np.where(seen.sum(axis=-1) == 0, 0.0, distance)


def ks_of_counts(expected: Array, seen: Array) -> Array:
    """`ks` of bin counts: `expected` [bins], `seen` [..., bins], one distance for each of `seen`."""
    if expected.sum() == 0:
        return np.zeros(seen.shape[:-1])
    total = seen.sum(axis=-1, keepdims=True)
    shares = np.cumsum(seen, axis=-1) / np.maximum(total, 1)
    distance: Array = np.abs(np.cumsum(expected) / expected.sum() - shares).max(axis=-1)
    return np.where(total[..., 0] == 0, 0.0, distance)


def largest(reference: SketchSet, window: SketchSet) -> dict[str, tuple[float, str]]:
    """The largest distance over all statistics: {"psi": (value, statistic), "ks": (value, statistic)}.

    A statistic that only one side has is left out; (0.0, "") when there is nothing to compare.

    Raises:
        InvalidInput: different kinds, rule versions or bins.
    """
    result = {"psi": (0.0, ""), "ks": (0.0, "")}
    for name, values in each(reference, window).items():
        for measure, value in values.items():
            if value > result[measure][0]:
                result[measure] = (value, name)
    return result


def each(reference: SketchSet, window: SketchSet) -> dict[str, dict[str, float]]:
    """Statistic -> {"psi": value, "ks": value} for all statistics that both sides have."""
    if reference.count == 0 or window.count == 0:
        return {}
    check_comparable(reference, window)
    expected = {part.name: part for part in reference.sketches}
    return {
        part.name: {"psi": psi(expected[part.name], part), "ks": ks(expected[part.name], part)}
        for part in window.sketches
        if part.name in expected
    }


def _counts(reference: Sketch, window: Sketch) -> tuple[Array, Array]:
    if not same_bins(reference, window):
        raise InvalidInput(f"The sketches of '{reference.name}' have different bins.")
    return np.asarray(reference.counts, np.float64), np.asarray(window.counts, np.float64)


def _decile_starts(expected: Array) -> Array:
    """First bin of each group; a group ends once the reference's mass passed the next tenth."""
    reached = np.floor(np.cumsum(expected) / expected.sum() * GROUPS * (1 + 1e-12))
    reached = np.minimum(reached, GROUPS - 1)  # the last bins stay in the last group
    starts = np.flatnonzero(np.diff(reached) > 0) + 1
    return np.concatenate([[0], starts]).astype(np.int64)
