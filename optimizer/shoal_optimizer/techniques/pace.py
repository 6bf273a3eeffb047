"""How long training may take: a one-cycle schedule that can be shortened, as pure decisions."""

from __future__ import annotations

import math
from dataclasses import dataclass

RISE = 0.3  # share of the steps in which the rate rises
FIRST, LAST = 1 / 25, 1 / 250_000  # of the peak, at the first and at the last step
MOMENTUM = (0.85, 0.95)  # at the peak, at the ends
MARGIN = 0.9  # of the time that is left is planned for: steps differ


def one_cycle(share: float) -> tuple[float, float]:
    """(learning rate as a share of its peak, momentum) when this share of the steps is done.

    The one-cycle policy of Smith and Topin, "Super-Convergence" (2018), with cosines between its ends:
    the rate rises over the first 0.3 and falls to almost nothing, the momentum does the opposite.
    """
    if share < RISE:
        low, height = FIRST, (1 - math.cos(math.pi * share / RISE)) / 2
    else:
        low, height = LAST, (1 + math.cos(math.pi * min(1.0, (share - RISE) / (1 - RISE)))) / 2
    return low + (1 - low) * height, MOMENTUM[1] + (MOMENTUM[0] - MOMENTUM[1]) * height


@dataclass(frozen=True)
class Length:
    """How many steps a training has: `epochs` of `batches` each, the last cut off at `steps`."""

    epochs: int
    batches: int
    steps: int  # at most epochs * batches

    @classmethod
    def of(cls, items: int, batch: int, epochs: int, most: int = 0) -> Length:
        """`most`: a cap on the steps; 0 = none. A last batch of one item is dropped: batch norm
        cannot learn from it."""
        batches = max(1, items // batch + (items % batch > 1))
        steps = min(epochs * batches, most) if most else epochs * batches
        return cls(-(-steps // batches), batches, steps)

    def within(self, seconds: float, step_seconds: float) -> Length:
        """Shortened to what fits into `seconds`: to whole epochs where one fits, else to steps.

        Whole epochs, so that the result is the one that a recipe with so many epochs gives anywhere.
        """
        fitting = max(1, int(MARGIN * seconds / max(step_seconds, 1e-9)))
        if fitting >= self.steps:
            return self
        epochs = fitting // self.batches
        if epochs >= 1:
            return Length(epochs, self.batches, epochs * self.batches)
        return Length(1, self.batches, fitting)


def steps_left(left: int, spent: float, seconds: float, step_seconds: float) -> int:
    """How many of the `left` steps still fit when `spent` of `seconds` are gone; one at least.

    The schedule then runs through its rest in fewer steps: it is never cut off at a high rate.
    """
    if spent + left * step_seconds <= seconds:
        return left
    return max(1, min(left, int((seconds - spent) / max(step_seconds, 1e-9))))
