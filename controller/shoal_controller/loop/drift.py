"""How far inputs are from a bundle's reference, from sketches alone. Pure.

What is far depends on the window's size, so each score is relative to what held-out clean windows of
that size reached when the bundle was made.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shoal_agent.telemetry import distances, sketches
from shoal_protos.v1 import telemetry_pb2 as pb


@dataclass(frozen=True)
class Block:
    """Consecutive windows merged until they hold enough items."""

    end_ms: int
    items: int
    inputs: pb.SketchSet


def blocks(
    inputs: Sequence[pb.SketchSet | None], ends_ms: Sequence[int], items: int, count: int
) -> list[Block]:
    """The newest `count` blocks of at least `items` inputs each, newest first."""
    found: list[Block] = []
    merged: pb.SketchSet | None = None
    end_ms = 0
    for part, at in zip(reversed(inputs), reversed(ends_ms), strict=True):
        if part is None or not part.count:
            continue
        if merged is None:
            merged, end_ms = part, at
        elif merged.kind == part.kind and merged.rule_version == part.rule_version:
            merged = sketches.merge(merged, part)
        if merged.count >= items:
            found.append(Block(end_ms, int(merged.count), merged))
            merged = None
            if len(found) == count:
                break
    return found


def nearest_threshold(
    thresholds: Mapping[str, Mapping[str, float]], items: int, cap: int
) -> tuple[int, Mapping[str, float]] | None:
    """The held-out thresholds of the largest window size that is not above `items` (nor above
    `cap`); the smallest known size if all are larger. None without thresholds."""
    sizes = sorted(int(size) for size in thresholds if size.isdigit())
    if not sizes:
        return None
    fitting = [size for size in sizes if size <= min(items, cap)]
    size = fitting[-1] if fitting else sizes[0]
    return size, thresholds[str(size)]


def score(
    reference: pb.SketchSet, block: Block, thresholds: Mapping[str, Mapping[str, float]], cap: int
) -> tuple[float, dict[str, Any]] | None:
    """How far a block lies outside what clean windows of its size reached: the geometric mean of
    each statistic over its own threshold, 1.0 = just there. None when it cannot be told.

    PSI sees a shift earlier, KS is fooled less by a few odd inputs: a block must be far in both,
    or very far in one.
    """
    nearest = nearest_threshold(thresholds, block.items, cap)
    same = reference.kind == block.inputs.kind and reference.rule_version == block.inputs.rule_version
    if nearest is None or not same:
        return None
    size, limits = nearest
    evidence: dict[str, Any] = {"n": block.items, "threshold_n": size, "end_ms": block.end_ms}
    ratios = []
    for name, (value, statistic) in distances.largest(reference, block.inputs).items():
        if limits.get(name, 0.0) > 0:
            ratios.append(value / limits[name])
            evidence |= {name: value, f"{name}_threshold": limits[name], f"{name}_statistic": statistic}
    if not ratios:
        return None
    evidence["score"] = math.prod(ratios) ** (1 / len(ratios))
    return evidence["score"], evidence
