"""From a detector's candidates to boxes, and how good the boxes are. Needs numpy only.

The one implementation of non-maximum suppression: the client, the evaluation of variants and the
examples all call it, so that an application sees the accuracy that was measured.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from shoal_protos.bundle import BoxRule
from shoal_protos.errors import InvalidInput

Array = np.ndarray[Any, Any]

RECALLS = np.linspace(0.0, 1.0, 101)  # where COCO reads the precision
_FEW = 24  # up to so many boxes plain numbers are faster than arrays
_GRID = 256  # up to so many boxes every pair is compared at once, beyond it row by row


@dataclass(frozen=True, eq=False)
class Detections:
    """What was found in one picture, best first.

    boxes: float32 [k, 4], x1, y1, x2, y2 as shares of the input tensor's width and height.
    scores: float32 [k]. classes: int64 [k], places in the signature's labels.
    """

    boxes: Array
    scores: Array
    classes: Array

    def __len__(self) -> int:
        return len(self.scores)

    def __repr__(self) -> str:
        return f"Detections({len(self)} boxes)"


def suppress(candidates: Array, rule: BoxRule) -> Detections:
    """Keeps the best of each bunch of overlapping candidates.

    A candidate counts for its best class only (the first of equal ones) and is dropped below the
    threshold. Then, from the best score down (the earlier candidate first where scores are equal),
    a box goes if it overlaps a kept box of its class by more than the rule allows. A candidate with
    a coordinate or score that is not a number is dropped.

    Args:
        candidates: float [n, 4 + classes], one picture's output of kind "boxes".

    Raises:
        InvalidInput: the array has another form.
    """
    if candidates.ndim != 2 or candidates.shape[1] < 5:
        raise InvalidInput(
            f"Candidates are [n, 4 + classes], not {list(candidates.shape)}.",
            "Pass one picture's candidates at a time.",
        )
    places = _over(candidates, rule.score_threshold)
    if not places.size:
        return _NOTHING
    chosen = candidates[places].astype(np.float32, copy=False)
    if len(places) <= _FEW:
        return _few(chosen, rule)
    scores = chosen[:, 4:]
    classes = scores.argmax(axis=1)
    best = scores.max(axis=1)  # not a number where one of them is not
    order = np.argsort(-best, kind="stable")
    sound = np.isfinite(chosen[:, :4]).all(axis=1) & ~np.isnan(best)
    order = order[sound[order]]
    boxes, best, classes = chosen[order, :4], best[order], classes[order]
    kept = _greedy(boxes.astype(np.float64), classes, rule)
    return Detections(boxes[kept], best[kept], classes[kept])


def _over(candidates: Array, threshold: float) -> Array:
    """Rows with a score of at least the threshold. One comparison of everything is several times as
    fast as each row's highest score."""
    over = candidates >= threshold
    over[:, :4] = False
    rows: Array = np.flatnonzero(over) // candidates.shape[1]
    different: Array = rows[np.append(True, rows[1:] != rows[:-1])[: len(rows)]]
    return different


def _few(chosen: Array, rule: BoxRule) -> Detections:
    """The rule for a few rows, in plain numbers: some forty calls of numpy cost more than they spare.
    The same double precision arithmetic as `_greedy`, so the same boxes."""
    rows: list[tuple[float, int, int, list[float]]] = []
    for place, row in enumerate(chosen.tolist()):
        scores = row[4:]
        if not all(map(math.isfinite, row[:4])) or any(map(math.isnan, scores)):
            continue
        best = max(scores)
        rows.append((best, scores.index(best), place, row))
    rows.sort(key=lambda part: -part[0])
    kept: list[tuple[float, int, int, list[float]]] = []
    for part in rows:
        if len(kept) >= rule.max_boxes:
            break
        if not any(part[1] == k[1] and _share(k[3], part[3]) > rule.iou_threshold for k in kept):
            kept.append(part)
    if not kept:
        return _NOTHING
    best_of, classes, places, _ = zip(*kept, strict=True)
    return Detections(
        chosen[list(places), :4], np.asarray(best_of, np.float32), np.asarray(classes, np.int64)
    )


def _share(one: Sequence[float], other: Sequence[float]) -> float:
    """`_overlap` of two boxes."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    common = max(width, 0.0) * max(height, 0.0)
    areas = max(one[2] - one[0], 0.0) * max(one[3] - one[1], 0.0)
    union = areas + max(other[2] - other[0], 0.0) * max(other[3] - other[1], 0.0) - common
    return common / union if union > 0 else 0.0


def _greedy(boxes: Array, classes: Array, rule: BoxRule) -> list[int]:
    """Places of the boxes that stay; boxes come best first, in double precision."""
    kept: list[int] = []
    alive = np.ones(len(boxes), np.bool_)
    areas = _areas(boxes)
    clashes = None
    if len(boxes) <= _GRID:
        clashes = _overlap(boxes[:, None], areas[:, None], boxes, areas) > rule.iou_threshold
        clashes &= classes[:, None] == classes
    place = 0
    while len(kept) < rule.max_boxes:
        place += int(alive[place:].argmax()) if place < len(boxes) else 0
        if place >= len(boxes) or not alive[place]:
            break
        kept.append(place)
        if clashes is not None:
            alive[place:] &= ~clashes[place, place:]
        else:
            rest = slice(place, None)
            overlap = _overlap(boxes[place], areas[place], boxes[rest], areas[rest])
            alive[rest] &= ~((overlap > rule.iou_threshold) & (classes[rest] == classes[place]))
        alive[place] = False
        place += 1
    return kept


def _areas(boxes: Array) -> Array:
    sides = np.maximum(boxes[..., 2:] - boxes[..., :2], 0)
    areas: Array = sides[..., 0] * sides[..., 1]
    return areas


def _overlap(one: Array, one_area: Array, other: Array, other_area: Array) -> Array:
    """Intersection over union, broadcast; 0 where both boxes are empty."""
    width = np.minimum(one[..., 2], other[..., 2]) - np.maximum(one[..., 0], other[..., 0])
    height = np.minimum(one[..., 3], other[..., 3]) - np.maximum(one[..., 1], other[..., 1])
    common = np.maximum(width, 0) * np.maximum(height, 0)
    union = one_area + other_area - common
    shares: Array = np.divide(common, union, out=np.zeros_like(common), where=union > 0)
    return shares


def overlaps(one: Array, other: Array) -> Array:
    """Intersection over union of every pair: float [n, 4] and [m, 4] -> float [n, m]."""
    return _overlap(one[:, None], _areas(one)[:, None], other, _areas(other))


_NOTHING = Detections(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int64))


# ---------------------------------------------------------------------------- how good


@dataclass(frozen=True, eq=False)
class Matched:
    """One picture's boxes held against its truth; independent of other pictures, so made once.

    classes, scores, hits: int64, float32 and bool [k], one an answered box.
    truths: int64 [t], the class of each true box.
    """

    classes: Array
    scores: Array
    hits: Array
    truths: Array


def match(found: Detections, target: Array, iou: float = 0.5) -> Matched:
    """Holds one picture's boxes against its truth, as COCO does: from the best score down, each box
    takes the free true box of its class that it overlaps most, and at least by `iou`.

    Args:
        target: float [m, 5], x1, y1, x2, y2 as shares, class; rows with class -1 are padding.

    Raises:
        InvalidInput: the target has another form.
    """
    if target.ndim != 2 or target.shape[1] != 5:
        raise InvalidInput(f"A picture's target is [boxes, 5], not {list(target.shape)}.")
    target = target[target[:, 4] >= 0]
    truths = target[:, 4].astype(np.int64)
    hits = np.zeros(len(found), np.bool_)
    if len(truths) and len(found):
        shares = overlaps(found.boxes.astype(np.float64), target[:, :4].astype(np.float64))
        shares[found.classes[:, None] != truths] = -1.0
        for row in np.argsort(-found.scores, kind="stable").tolist():
            column = int(shares[row].argmax())
            if shares[row, column] >= iou:
                hits[row] = True
                shares[:, column] = -1.0
    return Matched(found.classes, found.scores, hits, truths)


def average_precision(
    predictions: Sequence[Detections], targets: Sequence[Array] | Array, iou: float = 0.5
) -> float:
    """Mean average precision from 0 to 1: COCO's 101 points, the mean over the classes in `targets`.

    Args:
        predictions: one a picture, as `suppress` gives them.
        targets: float [n, max_boxes, 5] or one [m, 5] a picture: x1, y1, x2, y2 as shares, class;
            rows with class -1 are padding.
        iou: the least overlap of a hit.

    Raises:
        InvalidInput: the numbers of pictures differ, or no target holds a box.
    """
    if len(predictions) != len(targets):
        raise InvalidInput(f"There are {len(predictions)} predictions, but {len(targets)} targets.")
    return mean_precision(
        [match(found, target, iou) for found, target in zip(predictions, targets, strict=True)]
    )


def mean_precision(matched: Sequence[Matched]) -> float:
    """`average_precision` of pictures matched before: what a bootstrap calls again and again.

    Raises:
        InvalidInput: no picture has a true box.
    """
    truths = np.bincount(_joined([part.truths for part in matched], np.int64))
    present = np.flatnonzero(truths)
    if not present.size:
        raise InvalidInput("No target holds a box.", "Evaluate on pictures with boxes.")
    classes = _joined([part.classes for part in matched], np.int64)
    scores = _joined([part.scores for part in matched], np.float32)
    hits = _joined([part.hits for part in matched], np.bool_)
    order = np.argsort(-scores, kind="stable")
    classes, hits = classes[order], hits[order]
    return float(np.mean([_precision(hits[classes == kind], int(truths[kind])) for kind in present]))


def _precision(hits: Array, truths: int) -> float:
    """Average precision of one class; hits from the best score down."""
    if not hits.size:
        return 0.0
    right = np.cumsum(hits)
    precision = right / np.arange(1, len(hits) + 1)
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    places = np.searchsorted(right / truths, RECALLS, side="left")
    reached = places < len(hits)
    return float(envelope[places[reached]].sum() / len(RECALLS))


def _joined(parts: Sequence[Array], dtype: Any) -> Array:
    return np.concatenate(parts) if parts else np.zeros(0, dtype)
