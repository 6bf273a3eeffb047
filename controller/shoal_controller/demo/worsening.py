"""How the demo's world gets worse: less contrast and more noise, in fixed steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from shoal_controller.demo.stage import BrokenPromise

Array = np.ndarray[Any, Any]

LEAST_POINTS, MOST_POINTS = 20.0, 30.0
NOISE_SEED = 20


@dataclass(frozen=True)
class Severity:
    """`contrast`: factor of the distance to the range's middle; `noise`: sigma as share of the spread."""

    contrast: float
    noise: float

    def __str__(self) -> str:
        return f"contrast {self.contrast:.2f}, noise {self.noise:.3f} of the inputs' spread"


# From hardly visible to hardly readable, in steps small enough that one of them costs 20 to 30 points.
SEVERITIES = tuple(Severity(1 - 0.01 * step, 0.003 * step) for step in range(8, 96))


def worsen(inputs: Array, severity: Severity, low: float, high: float, seed: int = NOISE_SEED) -> Array:
    """A changed copy of endpoint inputs [n, ...] in the same dtype, kept inside `low` .. `high`.

    The same item at the same place gets the same noise for one seed. Noise is relative to what the
    inputs use of their range, four standard deviations at most: a recording rarely fills its 16 bits.
    """
    middle, width = (low + high) / 2, min(high - low, 4 * float(inputs.std()))
    noise = np.random.default_rng(seed).normal(0.0, severity.noise * width, inputs.shape)
    changed = np.clip((inputs.astype(np.float64) - middle) * severity.contrast + middle + noise, low, high)
    return (np.rint(changed) if np.issubdtype(inputs.dtype, np.integer) else changed).astype(inputs.dtype)


def choose(falls: Callable[[Severity], float]) -> tuple[Severity, float]:
    """The first severity whose fall (in points, from `falls`) lies between 20 and 30.

    Raises:
        BrokenPromise: none does.
    """
    seen = []
    for severity in SEVERITIES:
        fall = falls(severity)
        if LEAST_POINTS <= fall <= MOST_POINTS:
            return severity, fall
        seen.append(f"{fall:.0f}")
        if fall > 2 * MOST_POINTS:
            break
    raise BrokenPromise("a severity costs 20 to 30 points", f"The first ones cost {', '.join(seen)} points.")


def value_range(signature_input: Any, inputs: Array) -> tuple[float, float]:
    """The declared range of an input, else the one that its data have."""
    low, high = getattr(signature_input, "low", None), getattr(signature_input, "high", None)
    if low is not None and high is not None:
        return float(low), float(high)
    return float(inputs.min()), float(inputs.max())
