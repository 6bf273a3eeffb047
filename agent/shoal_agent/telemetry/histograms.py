"""Mergeable latency histograms with exponential buckets; no numpy, the supervisor imports it.

The buckets are OpenTelemetry's exponential histogram's: bucket `i` at scale `s` counts values in
`(2**(i / 2**s), 2**((i + 1) / 2**s)]`. At the default scale 4 a bucket is 4.4 % wide, so a
quantile is off by at most 2.2 %. Two histograms of one scale merge without loss.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from shoal_protos.errors import InvalidInput
from shoal_protos.v1.telemetry_pb2 import Histogram

SCALE = 4
MIN_SCALE, MAX_SCALE = -4, 8
MAX_BUCKETS = 4096  # of a histogram that was received; ours stay below 1000
_SMALLEST = 1e-3  # microseconds; below it a value counts as zero
_PER_OCTAVE = float(1 << SCALE)


class ExponentialHistogram:
    """Counts values in microseconds at the fixed scale `SCALE`. Not thread-safe."""

    __slots__ = ("_buckets", "count", "max", "min", "total", "zero_count")

    def __init__(self) -> None:
        self._buckets: dict[int, int] = {}
        self.clear()

    def clear(self) -> None:
        self._buckets.clear()
        self.count = 0
        self.zero_count = 0
        self.total = 0.0
        self.min = math.inf
        self.max = -math.inf

    def record(self, us: float) -> None:
        """Counts one value. A value that is not positive (a clock that stood still) counts as zero."""
        if us < _SMALLEST:
            us = 0.0
            self.zero_count += 1
        else:
            index = math.ceil(math.log2(us) * _PER_OCTAVE) - 1
            self._buckets[index] = self._buckets.get(index, 0) + 1
        self.count += 1
        self.total += us
        if us < self.min:
            self.min = us
        if us > self.max:
            self.max = us

    def add(self, proto: Histogram) -> None:
        """Adds another histogram of the same scale. Raises InvalidInput on another scale."""
        if proto.count == 0:
            return
        if proto.scale != SCALE:
            raise InvalidInput(f"The histogram has scale {proto.scale}, not {SCALE}.")
        for position, count in enumerate(proto.counts):
            if count:
                index = proto.offset + position
                self._buckets[index] = self._buckets.get(index, 0) + count
        self.count += proto.count
        self.zero_count += proto.zero_count
        self.total += proto.sum
        self.min = min(self.min, proto.min)
        self.max = max(self.max, proto.max)

    def to_proto(self) -> Histogram:
        if self.count == 0:
            return Histogram(scale=SCALE)
        return _histogram(SCALE, self._buckets, self.count, self.total, self.min, self.max, self.zero_count)


def merge(first: Histogram, second: Histogram) -> Histogram:
    """The histogram of both sets of values; see `merge_all`."""
    return merge_all((first, second))


def merge_all(parts: Iterable[Histogram]) -> Histogram:
    """The histogram of all sets of values. Different scales meet at the coarsest one.

    Raises:
        InvalidInput: a scale or a number of buckets that no agent sends.
    """
    used = []
    for part in parts:
        check(part)
        if part.count:
            used.append(part)
    if not used:
        return Histogram(scale=SCALE)
    scale = min(part.scale for part in used)
    buckets: dict[int, int] = {}
    for part in used:
        shift = part.scale - scale
        for position, count in enumerate(part.counts):
            if count:
                index = (part.offset + position) >> shift
                buckets[index] = buckets.get(index, 0) + count
    return _histogram(
        scale,
        buckets,
        sum(part.count for part in used),
        sum(part.sum for part in used),
        min(part.min for part in used),
        max(part.max for part in used),
        sum(part.zero_count for part in used),
    )


def quantile(histogram: Histogram, q: float) -> float:
    """The `q`-quantile in microseconds, NaN when nothing was counted.

    The relative error is at most half a bucket: `2**(0.5 / 2**scale) - 1`.
    """
    if not 0.0 <= q <= 1.0:
        raise InvalidInput(f"A quantile lies between 0 and 1, not {q}.")
    if histogram.count == 0:
        return math.nan
    rank = max(1, math.ceil(q * histogram.count))
    if rank <= histogram.zero_count:
        return 0.0
    seen = histogram.zero_count
    value = histogram.max
    for position, count in enumerate(histogram.counts):
        seen += count
        if seen >= rank:
            value = 2.0 ** ((histogram.offset + position + 0.5) / 2.0**histogram.scale)
            break
    return min(max(value, histogram.min), histogram.max)


def bucket_bounds(histogram: Histogram) -> list[tuple[float, int]]:
    """(upper bound in microseconds, count) of each bucket, zeros first: what Prometheus shows."""
    bounds = [(0.0, histogram.zero_count)] if histogram.zero_count else []
    step = 2.0**histogram.scale
    bounds.extend(
        (2.0 ** ((histogram.offset + position + 1) / step), count)
        for position, count in enumerate(histogram.counts)
    )
    return bounds


def check(histogram: Histogram) -> None:
    """Refuses what would cost memory or overflow. Raises InvalidInput."""
    if not MIN_SCALE <= histogram.scale <= MAX_SCALE and histogram.count:
        raise InvalidInput(f"A histogram of scale {histogram.scale} is out of range.")
    if len(histogram.counts) > MAX_BUCKETS:
        raise InvalidInput(f"A histogram of {len(histogram.counts)} buckets is too large.")


def _histogram(
    scale: int,
    buckets: dict[int, int],
    count: int,
    total: float,
    low: float,
    high: float,
    zeros: int,
) -> Histogram:
    offset = min(buckets, default=0)
    counts = [buckets.get(i, 0) for i in range(offset, max(buckets) + 1)] if buckets else []
    return Histogram(
        scale=scale,
        offset=offset,
        counts=counts,
        count=count,
        sum=total,
        min=low,
        max=high,
        zero_count=zeros,
    )
