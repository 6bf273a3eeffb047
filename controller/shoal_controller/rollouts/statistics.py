"""Effects of a change, paired within devices and clustered by device. Pure.

An effect compares the same devices before and after; devices, not requests, are the unit of
chance, since requests of one device share its temperature, its load and its camera. Intervals
have the confidence that the caller asks for: `verdict` looks often with a strict one and once,
at the end, with 95 % (Haybittle-Peto), so that looking costs next to no false alarms.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from scipy import stats

from shoal_agent.telemetry import histograms
from shoal_agent.telemetry.intervals import wilson
from shoal_protos.v1 import telemetry_pb2 as pb

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A value with its interval; `n` is what it rests on (requests, labels or devices)."""

    value: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Period:
    """What one device did under one bundle over some time."""

    requests: int = 0
    errors: int = 0
    labelled: int = 0
    correct: int = 0
    latency: pb.Histogram | None = None  # microseconds

    @property
    def error_share(self) -> float:
        return self.errors / self.requests if self.requests else 0.0


@dataclass(frozen=True)
class Pair:
    """One device before and after."""

    before: Period
    after: Period


# ------------------------------------------------------------------ histograms


def merge_histograms(parts: Iterable[pb.Histogram]) -> pb.Histogram | None:
    """The histogram of all values; None when there are none."""
    merged = histograms.merge_all(parts)
    return merged if merged.count else None


def _value_at(histogram: pb.Histogram, rank: float) -> float:
    """The value at a rank (0 = smallest, count = largest), interpolated inside its bucket, microseconds."""
    seen = float(histogram.zero_count)
    if rank <= seen:
        return max(0.0, histogram.min)
    base = math.pow(2.0, math.pow(2.0, -histogram.scale))
    for position, count in enumerate(histogram.counts):
        if count and rank <= seen + count:
            value = math.pow(base, histogram.offset + position + (rank - seen) / count)
            return min(max(value, histogram.min), histogram.max)
        seen += count
    return float(histogram.max)


def quantile(histogram: pb.Histogram, q: float, confidence: float = CONFIDENCE) -> Estimate | None:
    """A quantile in milliseconds with the interval of its order statistics; None when empty."""
    n = int(histogram.count)
    if n == 0:
        return None
    low, high = stats.binom.interval(confidence, n, q)
    return Estimate(
        _value_at(histogram, q * n) / 1000,
        _value_at(histogram, float(low)) / 1000,
        _value_at(histogram, min(float(high) + 1, n)) / 1000,
        n,
    )


# ------------------------------------------------------------------ shares


def _z(confidence: float) -> float:
    """Standard normal quantile of a two-sided interval."""
    return float(stats.norm.ppf(0.5 + confidence / 2))


def share(successes: int, n: int, confidence: float = CONFIDENCE) -> Estimate | None:
    """A share with its Wilson interval; None without observations."""
    if n <= 0:
        return None
    low, high = wilson(successes, n, _z(confidence))
    return Estimate(successes / n, low, high, n)


def _design_effect(counts: Sequence[tuple[int, int]]) -> float:
    """How much more a share varies between devices than independent requests would: at least 1."""
    used = [(hits, n) for hits, n in counts if n]
    total = sum(n for _, n in used)
    hits = sum(h for h, _ in used)
    if len(used) < 2 or hits in (0, total):
        return 1.0
    p = hits / total
    chi = sum((h - n * p) ** 2 / (n * p * (1 - p)) for h, n in used)
    return float(max(1.0, chi / (len(used) - 1)))


def share_difference(
    before: Sequence[tuple[int, int]], after: Sequence[tuple[int, int]], confidence: float = CONFIDENCE
) -> Estimate | None:
    """Share after minus share before from (hits, n) per device: Newcombe's interval on sample
    sizes reduced by the design effect between devices. None when one side has no observations."""
    sides = []
    for counts in (before, after):
        n = sum(total for _, total in counts)
        if n == 0:
            return None
        p = sum(hits for hits, _ in counts) / n
        independent = n / _design_effect(counts)
        low, high = wilson(p * independent, independent, _z(confidence))
        sides.append((p, low, high, n))
    (p0, low0, high0, n0), (p1, low1, high1, n1) = sides
    return Estimate(
        p1 - p0,
        p1 - p0 - math.hypot(p1 - low1, high0 - p0),
        p1 - p0 + math.hypot(high1 - p1, p0 - low0),
        min(n0, n1),
    )


# ------------------------------------------------------------------ effects


def latency_change(
    pairs: Iterable[Pair], *, q: float = 0.95, min_requests: int = 1, confidence: float = CONFIDENCE
) -> Estimate | None:
    """Relative change of a latency quantile, 0.1 = ten per cent slower, over devices that have at
    least `min_requests` on both sides.

    Random effects over devices: each contributes the logarithm of after / before with the error of
    its own order statistics, and the spread between devices widens the interval.
    `n` is the number of devices. None when no device qualifies.
    """
    logs, variances = [], []
    for pair in pairs:
        before, after = (
            quantile(p.latency, q) if p.latency is not None and p.requests >= min_requests else None
            for p in (pair.before, pair.after)
        )
        if before and after and before.value > 0 and after.value > 0:
            logs.append(math.log(after.value / before.value))
            variances.append(_log_variance(before) + _log_variance(after))
    if not logs:
        return None
    mean, error = _random_effects(logs, variances)
    z = _z(confidence)
    return Estimate(
        math.exp(mean) - 1, math.exp(mean - z * error) - 1, math.exp(mean + z * error) - 1, len(logs)
    )


def _log_variance(estimate: Estimate) -> float:
    """Variance of the logarithm, from a 95 % interval. Buckets are finite, so it is never 0."""
    low = max(estimate.low, 1e-9)
    half = math.log(max(estimate.high, low) / low) / (2 * 1.96)
    return max(half, 0.01) ** 2


def _random_effects(values: Sequence[float], variances: Sequence[float]) -> tuple[float, float]:
    """DerSimonian-Laird mean and its standard error."""
    weights = [1 / v for v in variances]
    total = sum(weights)
    mean = sum(w * y for w, y in zip(weights, values, strict=True)) / total
    if len(values) == 1:
        return mean, math.sqrt(variances[0])
    spread = sum(w * (y - mean) ** 2 for w, y in zip(weights, values, strict=True))
    scale = total - sum(w * w for w in weights) / total
    between = max(0.0, (spread - (len(values) - 1)) / scale) if scale > 0 else 0.0
    weights = [1 / (v + between) for v in variances]
    total = sum(weights)
    return sum(w * y for w, y in zip(weights, values, strict=True)) / total, math.sqrt(1 / total)


def error_change(pairs: Sequence[Pair], confidence: float = CONFIDENCE) -> Estimate | None:
    """Error share after minus before."""
    return share_difference(
        [(p.before.errors, p.before.requests) for p in pairs],
        [(p.after.errors, p.after.requests) for p in pairs],
        confidence,
    )


def accuracy_change(pairs: Sequence[Pair], confidence: float = CONFIDENCE) -> Estimate | None:
    """Accuracy on posted labels, after minus before."""
    return share_difference(
        [(p.before.correct, p.before.labelled) for p in pairs],
        [(p.after.correct, p.after.labelled) for p in pairs],
        confidence,
    )
