"""Statistics of a detector's answers, from all candidates above the threshold and before suppression:
that costs no loop, and what is counted twice is so in reference and window alike."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from shoal_protos.errors import InvalidInput

Array = np.ndarray[Any, Any]

_LEAST_SHARE = 1e-6  # of the picture's area
_MOST = 10.0  # pictures' sizes away from the picture: nothing is told apart beyond it
BOXES: Mapping[str, tuple[float, float]] = {
    "candidates": (0.0, 4.0),  # log10 of 1 + those above the threshold
    "best_score": (0.0, 1.0),  # of all candidates
    "mean_score": (0.0, 1.0),  # of those above the threshold, as all below; 0 without any
    "area": (-6.0, 0.5),  # log10 of the mean share of the picture
    "aspect": (-1.0, 1.0),  # log10 of width / height, both as shares
    "centre_x": (0.0, 1.0),
    "centre_y": (0.0, 1.0),
    "not_finite": (0.0, 1.0),
}


def classes_of(shape: tuple[int, ...]) -> int:
    """Classes of a batch [N, candidates, 4 + classes]. Raises InvalidInput for another form."""
    if len(shape) != 3 or shape[1] < 1 or shape[2] < 5:
        raise InvalidInput(f"Boxes are [N, candidates, 4 + classes], not {list(shape)}.")
    return shape[2] - 4


def box_statistics(batch: Array, threshold: float) -> dict[str, Array]:
    """Statistic -> float64 [N] of candidates [N, candidates, 4 + classes], and `class`: that of the best
    candidate, or the number of classes where none reaches `threshold`."""
    classes = classes_of(batch.shape)
    finite = np.isfinite(batch)
    values = np.clip(np.where(finite, batch, 0).astype(np.float64), -_MOST, _MOST)
    scores = values[..., 4:].max(axis=-1)
    scores[~finite.all(axis=-1)] = 0  # suppression drops those candidates too
    best = scores.argmax(axis=1)
    rows = np.arange(len(values))
    chosen = scores >= threshold
    count = chosen.sum(axis=1)
    some = count > 0

    def mean(column: Array, without: float) -> Array:
        total = np.where(chosen, column, 0).sum(axis=1)
        return np.where(some, total / np.maximum(count, 1), without)

    width = np.maximum(values[..., 2] - values[..., 0], 0)
    height = np.maximum(values[..., 3] - values[..., 1], 0)
    least = np.sqrt(_LEAST_SHARE)
    aspect = np.log10(np.maximum(width, least) / np.maximum(height, least))
    return {
        "candidates": np.log10(1.0 + count),
        "best_score": scores[rows, best],
        "mean_score": mean(scores, 0.0),
        "area": np.log10(np.maximum(mean(width * height, 0.0), _LEAST_SHARE)),
        "aspect": mean(aspect, 0.0),
        "centre_x": mean((values[..., 0] + values[..., 2]) / 2, 0.5),
        "centre_y": mean((values[..., 1] + values[..., 3]) / 2, 0.5),
        "not_finite": 1.0 - finite.reshape(len(values), -1).mean(axis=1),
        "class": np.where(some, values[rows, best, 4:].argmax(axis=1), classes),
    }
