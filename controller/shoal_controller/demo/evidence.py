"""From answers to figures: what share was right, and what a recovery is worth, with intervals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from shoal_agent.telemetry.intervals import wilson

Array = np.ndarray[Any, Any]

RESAMPLES = 2000
SEED = 11


@dataclass(frozen=True)
class Rights:
    """Which answers were right: `table` [agents, items] of 0 and 1. Agents see the same items."""

    table: Array

    @property
    def share(self) -> float:
        return float(self.table.mean())

    @property
    def n(self) -> int:
        return int(self.table.shape[1])

    @property
    def interval(self) -> tuple[float, float]:
        """95 %, counting items, not answers: the agents' answers to one item are hardly independent."""
        items = self.table.shape[1]
        return wilson(round(self.share * items), items)

    def text(self) -> str:
        low, high = self.interval
        return f"{100 * self.share:.1f} %  [{100 * low:.1f}, {100 * high:.1f}]"


def rights(outputs: Sequence[Array], targets: Array) -> Rights:
    """Classification: the largest output [n, classes] is the answer."""
    return Rights(np.stack([(found.argmax(axis=-1) == targets).astype(float) for found in outputs]))


def resampled(parts: Sequence[Rights], value: Callable[..., float]) -> tuple[float, float]:
    """The 95 % interval of `value(share, share, ...)` by resampling items, the same for all parts."""
    random = np.random.default_rng(SEED)
    items = parts[0].table.shape[1]
    by_item = [part.table.mean(axis=0) for part in parts]
    found = []
    for _ in range(RESAMPLES):
        chosen = random.integers(0, items, items)
        found.append(value(*(shares[chosen].mean() for shares in by_item)))
    low, high = np.nanpercentile(found, [2.5, 97.5])
    return float(low), float(high)


def recovered(before: float, during: float, after: float) -> float:
    """The share of the loss that came back; not a number when nothing was lost."""
    return (after - during) / (before - during) if before > during else float("nan")
