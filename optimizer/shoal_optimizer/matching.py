"""Which changes of the training data explain the field's sketches.

Only histograms of the field are needed, no recorded input: candidates of the kind's family change a
part of the training data, and those whose statistics lie nearest to the field's are kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from shoal_agent.telemetry import distances, sketches
from shoal_optimizer.corruptions import Corruption, Range, draw, family_of, near, smoothed
from shoal_protos.bundle import Signature
from shoal_protos.errors import InvalidInput
from shoal_protos.v1.telemetry_pb2 import SketchSet

CANDIDATES = 300
KEPT = 10
ITEMS = 300  # of the training data, changed by each candidate
MINIMUM_ITEMS = 10  # of the field: fewer say nothing about its statistics


@dataclass(frozen=True)
class Matched:
    """The kept changes, nearest first, and the mean PSI over statistics: of the clean training data
    to the field (`before`) and of each kept change (`distances`)."""

    corruptions: tuple[Corruption, ...]
    distances: tuple[float, ...]
    before: float

    @property
    def sentence(self) -> str:
        best = self.corruptions[0]
        return (
            f"The field looks like the training data with {best.sentence()} "
            f"(distance {self.before:.2f} before, {self.distances[0]:.2f} after)."
        )


def limits_of(signature: Signature, inputs: np.ndarray) -> Range:
    """The input's value range: declared, else that of the data (then nothing is clipped)."""
    spec = signature.inputs[0]
    whole = inputs.dtype.kind in "iu"
    if spec.low is not None and spec.high is not None and spec.high > spec.low:
        return Range(spec.low, spec.high, whole)
    low, high = float(inputs.min()), float(inputs.max())
    return Range(low, high if high > low else low + 1.0, whole, clip=False)


def match(
    field: SketchSet,
    inputs: np.ndarray,
    signature: Signature,
    *,
    seed: int = 0,
    candidates: int = CANDIDATES,
    kept: int = KEPT,
    progress: Callable[[float], None] = lambda share: None,
) -> Matched:
    """Finds the changes of `inputs` [n, ...] (clean endpoint inputs) that look most like `field`.

    Two thirds of the candidates are drawn from the whole family, the rest near the best of those.

    Raises:
        InvalidInput: the field's sketch is empty, or of another kind, rule or bins than this task's.
    """
    import torch

    if field.count < MINIMUM_ITEMS:
        raise InvalidInput(
            f"The field's sketch holds {field.count} inputs.",
            f"Wait until at least {MINIMUM_ITEMS} were served, then start the adaptation again.",
        )
    random = np.random.default_rng(seed)
    chosen = np.sort(random.permutation(len(inputs))[:ITEMS])
    clean = torch.from_numpy(np.ascontiguousarray(inputs[chosen])).float()
    limits = limits_of(signature, inputs)
    spec, kind = signature.inputs[0], signature.input_kind

    def distance(corruption: Corruption) -> float:
        generator = torch.Generator().manual_seed(seed)  # equal noise for all: fair comparison
        changed = corruption.apply(clean, limits, generator).numpy()
        return mean_distance(field, sketches.sketch(kind, changed, spec.low, spec.high))

    family = family_of(kind)
    spectrum = equaliser(field, sketches.sketch(kind, inputs[chosen], spec.low, spec.high))
    pool: list[tuple[float, Corruption]] = []
    coarse = max(candidates * 2 // 3, 1)
    for i in range(candidates):
        if i < coarse:
            corruption = draw(family, random, spectrum)
        else:
            if i == coarse or i % kept == 0:
                pool.sort(key=lambda entry: entry[0])
            corruption = near(pool[random.integers(min(kept, len(pool)))][1], random)
        pool.append((distance(corruption), corruption))
        progress((i + 1) / candidates)
    pool.sort(key=lambda entry: entry[0])
    best = pool[:kept]
    return Matched(tuple(c for _, c in best), tuple(d for d, _ in best), distance(Corruption(family)))


def mean_distance(field: SketchSet, window: SketchSet) -> float:
    """Mean PSI over the statistics, field as reference.

    Raises:
        InvalidInput: different kinds, rule versions or bins.
    """
    found = distances.each(field, window)
    if not found:
        raise InvalidInput(
            "The field's sketch has no statistics of this kind of input.", "Check the endpoint."
        )
    return float(np.mean([values["psi"] for values in found.values()]))


def equaliser(field: SketchSet, clean: SketchSet) -> tuple[float, ...]:
    """Log gain per frequency bin that brings the clean mean log spectrum to the field's; () if none.

    The overall level is left to `gain`.
    """
    if not field.mean_log_spectrum or len(field.mean_log_spectrum) != len(clean.mean_log_spectrum):
        return ()
    difference = smoothed(
        np.asarray(field.mean_log_spectrum) / field.count - np.asarray(clean.mean_log_spectrum) / clean.count
    )
    return tuple(float(v) for v in difference - difference.mean())
