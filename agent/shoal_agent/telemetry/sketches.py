"""Mergeable sketches of inputs and outputs: fixed-bin histograms and moments of fixed statistics.

Two sketches of one kind have the same bins on every device, so their counts add; the same code
makes the reference inside a bundle and the windows that devices send.
"""

from __future__ import annotations

import math

import numpy as np

from shoal_agent.telemetry.boxes import classes_of
from shoal_agent.telemetry.statistics import (
    BINS,
    MAX_CLASS_BINS,
    SCORE_THRESHOLD,
    Array,
    as_images,
    ranges_of,
    series_and_spectrum,
    statistics,
)
from shoal_protos.errors import InvalidInput
from shoal_protos.v1.telemetry_pb2 import Sketch, SketchSet

__all__ = ["RULE_VERSION", "Sketcher", "merge", "sketch", "statistics"]

RULE_VERSION = 1
CLASS_SHARE = "class_share"
_MAX_SKETCHES = 256  # of a set that was received


class _Accumulator:
    """One statistic: counts of its fixed bins, and moments."""

    __slots__ = ("count", "counts", "high", "low", "max", "min", "sum", "sum_squares", "width")

    def __init__(self, low: float, width: float, bins: int) -> None:
        self.low, self.width = low, width
        self.counts = np.zeros(bins, np.int64)
        self.count = 0
        self.sum = self.sum_squares = 0.0
        self.min, self.max = math.inf, -math.inf

    def add(self, values: Array) -> None:
        places = ((values - self.low) / self.width).astype(np.int64)
        np.clip(places, 0, len(self.counts) - 1, out=places)
        self.counts += np.bincount(places, minlength=len(self.counts))
        self.count += len(values)
        self.sum += float(values.sum())
        self.sum_squares += float(np.dot(values, values))
        self.min = min(self.min, float(values.min()))
        self.max = max(self.max, float(values.max()))

    def to_proto(self, name: str) -> Sketch:
        return Sketch(
            name=name,
            low=self.low,
            width=self.width,
            counts=self.counts.tolist(),
            count=self.count,
            sum=self.sum,
            sum_squares=self.sum_squares,
            min=self.min,
            max=self.max,
        )


class Sketcher:
    """Sketches batches of one input or output.

    Args:
        kind: "image", "series", "audio", "tensor"; "logits", "values", "boxes".
        low, high: the signature's declared range, None or `high <= low` = not declared.
        threshold: of the signature's box rule; matters to boxes only.
    """

    def __init__(
        self,
        kind: str,
        low: float | None = None,
        high: float | None = None,
        *,
        threshold: float = SCORE_THRESHOLD,
    ) -> None:
        self.kind, self.threshold = kind, threshold
        self.low = math.nan if low is None else float(low)
        self.high = math.nan if high is None else float(high)
        ranges_of(kind, self.low, self.high)  # an unknown kind fails here, not under traffic
        self.reset()

    def reset(self) -> None:
        self.count = 0
        self._parts: dict[str, _Accumulator] = {}
        self._spectrum: Array | None = None

    def update(self, batch: Array) -> None:
        """Adds a batch [N, ...] of any numeric dtype.

        Raises:
            InvalidInput: a shape that the kind does not have; nothing was added then.
        """
        if len(batch) == 0:
            return
        spectrum = None
        channels = 1
        if self.kind in ("series", "audio"):
            values, spectrum = series_and_spectrum(batch, self.low, self.high)
        else:
            values = statistics(self.kind, batch, self.low, self.high, threshold=self.threshold)
            if self.kind == "image":
                channels = as_images(batch).shape[-1]
        if not self._parts:
            self._open(channels, batch.shape)
        for name, part in self._parts.items():
            column = values["class" if name == CLASS_SHARE else name]
            part.add(np.asarray(column, np.float64))
        if spectrum is not None:
            total = spectrum.sum(axis=0, dtype=np.float64)
            if self._spectrum is None or len(self._spectrum) != len(total):
                self._spectrum = np.zeros(len(total))
            self._spectrum += total
        self.count += len(batch)

    def _open(self, channels: int, shape: tuple[int, ...]) -> None:
        for name, (low, high) in ranges_of(self.kind, self.low, self.high, channels).items():
            self._parts[name] = _Accumulator(low, (high - low) / BINS, BINS)
        if self.kind in ("logits", "boxes"):
            # The last of a detector's is for "nothing found".
            size = classes_of(shape) + 1 if self.kind == "boxes" else int(np.prod(shape[1:]))
            # Many classes share a bin, by the number of classes alone.
            width = math.ceil(size / MAX_CLASS_BINS)
            self._parts[CLASS_SHARE] = _Accumulator(0.0, float(width), math.ceil(size / width))

    def to_proto(self) -> SketchSet:
        """The set so far; without sketches when nothing was added."""
        result = SketchSet(kind=self.kind, rule_version=RULE_VERSION, count=self.count)
        result.sketches.extend(part.to_proto(name) for name, part in self._parts.items())
        if self._spectrum is not None:
            result.mean_log_spectrum.extend(self._spectrum.tolist())
        return result


def sketch(
    kind: str,
    batch: Array,
    low: float | None = None,
    high: float | None = None,
    *,
    threshold: float = SCORE_THRESHOLD,
) -> SketchSet:
    """The sketch of one batch [N, ...]: what packing uses for a bundle's reference."""
    sketcher = Sketcher(kind, low, high, threshold=threshold)
    sketcher.update(batch)
    return sketcher.to_proto()


def merge(first: SketchSet, second: SketchSet) -> SketchSet:
    """The sketch of both sets of items. An empty set changes nothing.

    Raises:
        InvalidInput: the sets are of different kinds, rule versions or bins.
    """
    result = SketchSet()
    if first.count == 0 or second.count == 0:
        result.CopyFrom(second if first.count == 0 else first)
        return result
    check_comparable(first, second)
    result.kind, result.rule_version = first.kind, first.rule_version
    result.count = first.count + second.count
    others = {part.name: part for part in second.sketches}
    for part in first.sketches:
        other = others.pop(part.name, None)
        if other is None:
            raise InvalidInput(f"Only one of the sketches has '{part.name}'.")
        result.sketches.append(_merge_one(part, other))
    if others:
        raise InvalidInput(f"Only one of the sketches has '{next(iter(others))}'.")
    if len(first.mean_log_spectrum) != len(second.mean_log_spectrum):
        raise InvalidInput("The spectra of the sketches have different lengths.")
    result.mean_log_spectrum.extend(
        a + b for a, b in zip(first.mean_log_spectrum, second.mean_log_spectrum, strict=True)
    )
    return result


def check_comparable(first: SketchSet, second: SketchSet) -> None:
    """Raises InvalidInput unless both sets have one kind and one rule version, and sane sizes."""
    if (first.kind, first.rule_version) != (second.kind, second.rule_version):
        raise InvalidInput(
            f"A sketch of {first.kind} by rule {first.rule_version} cannot meet one of {second.kind} "
            f"by rule {second.rule_version}.",
            "Make the variant's reference again with the newer rule.",
        )
    if max(len(first.sketches), len(second.sketches)) > _MAX_SKETCHES:
        raise InvalidInput("A sketch set lists too many statistics.")


def same_bins(first: Sketch, second: Sketch) -> bool:
    return (first.low, first.width, len(first.counts)) == (second.low, second.width, len(second.counts))


def _merge_one(first: Sketch, second: Sketch) -> Sketch:
    if not same_bins(first, second):
        raise InvalidInput(f"The sketches of '{first.name}' have different bins.")
    return Sketch(
        name=first.name,
        low=first.low,
        width=first.width,
        counts=[a + b for a, b in zip(first.counts, second.counts, strict=True)],
        count=first.count + second.count,
        sum=first.sum + second.sum,
        sum_squares=first.sum_squares + second.sum_squares,
        min=min(first.min, second.min),
        max=max(first.max, second.max),
    )
