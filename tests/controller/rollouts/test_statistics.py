"""Intervals that hold what they promise, on data whose truth is known."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal_agent.telemetry.histograms import ExponentialHistogram
from shoal_controller.rollouts import statistics
from shoal_controller.rollouts.statistics import Pair, Period
from shoal_protos.v1.telemetry_pb2 import Histogram


def histogram(values_ms: np.ndarray) -> Histogram:  # type: ignore[type-arg]
    made = ExponentialHistogram()
    for value in values_ms:
        made.record(float(value) * 1000)
    return made.to_proto()


@given(st.lists(st.floats(0.01, 5000), min_size=1, max_size=300), st.sampled_from([0.5, 0.95]))
def test_quantiles_follow_the_data(values: list[float], q: float) -> None:
    found = statistics.quantile(histogram(np.array(values)), q)
    assert found is not None
    ordered = sorted(values)
    truth = ordered[min(len(ordered) - 1, max(0, int(np.ceil(q * len(ordered))) - 1))]
    assert found.low <= found.value * 1.0001 and found.value <= found.high * 1.0001
    assert found.value == pytest.approx(truth, rel=0.25, abs=0.02) or found.low <= truth <= found.high


@given(st.lists(st.lists(st.floats(0.01, 1000), max_size=40), min_size=1, max_size=6))
def test_merging_loses_nothing(parts: list[list[float]]) -> None:
    whole = statistics.merge_histograms(histogram(np.array(part)) for part in parts)
    values = [v for part in parts for v in part]
    if not values:
        assert whole is None
        return
    assert whole is not None
    assert whole.count == len(values) == sum(whole.counts) + whole.zero_count
    assert whole.max == pytest.approx(max(values) * 1000)


def test_merging_of_different_scales() -> None:
    fine = Histogram(scale=3, offset=80, counts=[1] * 16, count=16, sum=1, min=1000, max=4000)
    coarse = Histogram(scale=0, offset=10, counts=[4, 4], count=8, sum=1, min=1024, max=4096)
    merged = statistics.merge_histograms([fine, coarse])
    assert merged is not None and merged.scale == 0 and list(merged.counts) == [12, 12]


def pair(before_ms: float, after_ms: float, n: int, rng: np.random.Generator, **after: int) -> Pair:
    def period(ms: float, **kwargs: int) -> Period:
        return Period(n, latency=histogram(rng.gamma(20, ms / 20, n)), **kwargs)

    return Pair(period(before_ms), period(after_ms, **after))


def test_latency_interval_covers_the_truth() -> None:
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(60):
        base = rng.uniform(1, 20, 5)
        found = statistics.latency_change([pair(b, b * 1.2, 200, rng) for b in base])
        assert found is not None and found.n == 5
        hits += found.low <= 0.2 <= found.high
    assert hits >= 52


def test_spread_between_devices_widens_the_interval() -> None:
    rng = np.random.default_rng(2)
    same = statistics.latency_change([pair(5, 6, 400, rng) for _ in range(6)])
    mixed = statistics.latency_change([pair(5, 5 * f, 400, rng) for f in (0.7, 0.9, 1.2, 1.4, 1.6, 1.9)])
    assert same is not None and mixed is not None
    assert mixed.high - mixed.low > 3 * (same.high - same.low)


def test_devices_without_enough_requests_are_left_out() -> None:
    rng = np.random.default_rng(3)
    assert statistics.latency_change([pair(5, 6, 10, rng)], min_requests=50) is None
    assert statistics.latency_change([Pair(Period(), Period())]) is None


def test_share_difference() -> None:
    clear = statistics.share_difference([(0, 500), (1, 500)], [(40, 500), (45, 500)])
    assert clear is not None and clear.low > 0.05 and clear.value == pytest.approx(0.084)
    none = statistics.share_difference([(3, 500)], [(4, 500)])
    assert none is not None and none.low < 0 < none.high
    assert statistics.share_difference([], [(1, 5)]) is None
    # All failures on one device of four: devices differ, so the interval is wider.
    clustered = statistics.share_difference([(0, 100)] * 4, [(40, 100), (0, 100), (0, 100), (0, 100)])
    spread = statistics.share_difference([(0, 100)] * 4, [(10, 100)] * 4)
    assert clustered is not None and spread is not None
    assert clustered.high - clustered.low > spread.high - spread.low


def test_shares_never_leave_zero_to_one() -> None:
    for hits, n in ((0, 1), (1, 1), (0, 1000), (1000, 1000), (3, 7)):
        found = statistics.share(hits, n)
        assert found is not None and 0 <= found.low <= found.value <= found.high <= 1
    assert statistics.share(0, 0) is None
