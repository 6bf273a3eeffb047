"""Detection in the optimizer: targets of boxes, and answers held against them.

A target is float32 [boxes, 5]: x1, y1, x2, y2 as shares, class; rows with class -1 are padding.
Suppression and average precision themselves are `shoal_agent.detection`: what clients use.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from shoal_agent.detection import Matched, match, suppress
from shoal_agent.imaging import Placed
from shoal_protos.bundle import BoxRule

NO_BOX = np.array([0, 0, 0, 0, -1], np.float32)


def matches(outputs: np.ndarray, targets: np.ndarray, rule: BoxRule) -> list[Matched]:
    """Each picture's answer by the rule held against its truth.

    Args:
        outputs: float [n, candidates, 4 + classes]. targets: float [n, max_boxes, 5].
    """
    return [
        match(suppress(candidates, rule), target) for candidates, target in zip(outputs, targets, strict=True)
    ]


def recalls(matched: Sequence[Matched], classes: int) -> dict[int, tuple[float, int]]:
    """class -> (share of its true boxes that were found, their number) of each class that occurs."""
    true, found = np.zeros(classes, np.int64), np.zeros(classes, np.int64)
    for part in matched:
        true += np.bincount(part.truths, minlength=classes)
        found += np.bincount(part.classes[part.hits], minlength=classes)
    return {int(kind): (float(found[kind] / true[kind]), int(true[kind])) for kind in np.flatnonzero(true)}


def same_size(targets: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Targets [n, boxes, 5] with different numbers of boxes, brought to the largest by rows of padding."""
    most = max([1, *(target.shape[1] for target in targets)])
    return [
        np.concatenate(
            [
                target.astype(np.float32),
                np.broadcast_to(NO_BOX, (len(target), most - target.shape[1], 5)),
            ],
            axis=1,
        )
        for target in targets
    ]


def moved(target: np.ndarray, placed: Placed) -> np.ndarray:
    """A target [boxes, 5] in shares of a picture as shares of the tensor that the picture was placed in.

    Boxes are cut at the tensor's edges; of those that lie outside it padding is left.
    """
    result = np.array(target, np.float32)
    real = result[:, 4] >= 0
    pixels = result[:, :4] * np.array(placed.size * 2, np.float64)
    shares = np.clip(placed.to_tensor(pixels), 0, 1)
    gone = (shares[:, 2:] <= shares[:, :2]).any(axis=1)
    result[:, :4] = np.where(real[:, None], shares, result[:, :4])
    result[real & gone] = NO_BOX
    return result
