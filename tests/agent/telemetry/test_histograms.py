from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal_agent.telemetry.histograms import (
    ExponentialHistogram,
    bucket_bounds,
    check,
    merge,
    merge_all,
    quantile,
)
from shoal_protos.errors import InvalidInput
from shoal_protos.v1.telemetry_pb2 import Histogram

values = st.lists(st.floats(min_value=0.0, max_value=1e10, allow_nan=False), max_size=60)
ERROR = 2 ** (0.5 / 16) - 1


def histogram(readings: list[float]) -> Histogram:
    result = ExponentialHistogram()
    for reading in readings:
        result.record(reading)
    return result.to_proto()


def counts(proto: Histogram) -> tuple[object, ...]:
    return (proto.count, proto.zero_count, [(bound, n) for bound, n in bucket_bounds(proto) if n])


@given(values, values, values)
def test_merging_is_commutative_and_associative(a: list[float], b: list[float], c: list[float]) -> None:
    first, second, third = histogram(a), histogram(b), histogram(c)
    assert counts(merge(first, second)) == counts(merge(second, first))
    left, right = merge(merge(first, second), third), merge(first, merge(second, third))
    assert counts(left) == counts(right) == counts(histogram(a + b + c))
    assert math.isclose(left.sum, right.sum, rel_tol=1e-9, abs_tol=1e-9)
    assert (left.min, left.max) == (right.min, right.max)


@given(st.lists(st.floats(min_value=0.01, max_value=1e9), min_size=1, max_size=80), st.floats(0, 1))
def test_quantiles_are_off_by_half_a_bucket_at_most(readings: list[float], q: float) -> None:
    exact = sorted(readings)[max(1, math.ceil(q * len(readings))) - 1]
    assert quantile(histogram(readings), q) == pytest.approx(exact, rel=ERROR * 1.001)


@given(values)
def test_counts_add_up(readings: list[float]) -> None:
    proto = histogram(readings)
    assert proto.count == len(readings) == sum(proto.counts) + proto.zero_count


def test_adding_windows_equals_one_histogram() -> None:
    whole = ExponentialHistogram()
    whole.add(histogram([1, 2, 3]))
    whole.add(Histogram())
    whole.add(histogram([0.0, 400]))
    assert counts(whole.to_proto()) == counts(histogram([1, 2, 3, 0, 400]))


def test_scales_meet_at_the_coarser_one() -> None:
    coarse = Histogram(scale=2, offset=4, counts=[5], count=5, sum=12, min=2.1, max=2.3)
    merged = merge(coarse, histogram([2.2, 1000.0]))
    assert merged.scale == 2
    assert merged.count == 7
    assert dict(bucket_bounds(merged))[2 ** (5 / 4)] == 6


def test_nothing_counted() -> None:
    assert math.isnan(quantile(Histogram(), 0.5))
    assert merge_all([Histogram(), Histogram()]).count == 0


def test_a_negative_reading_counts_as_zero() -> None:
    assert quantile(histogram([-5.0, 0.0]), 0.5) == 0.0


@pytest.mark.parametrize(
    "bad",
    [Histogram(scale=40, count=1, counts=[1]), Histogram(scale=4, count=1, counts=[0] * 5000)],
)
def test_a_hostile_histogram_is_refused(bad: Histogram) -> None:
    with pytest.raises(InvalidInput):
        check(bad)
    with pytest.raises(InvalidInput):
        merge(bad, histogram([1.0]))


def test_a_quantile_outside_of_0_to_1_is_refused() -> None:
    with pytest.raises(InvalidInput, match="between 0 and 1"):
        quantile(histogram([1.0]), 1.5)


def test_another_scale_cannot_be_added_to_a_running_histogram() -> None:
    with pytest.raises(InvalidInput, match="scale 3"):
        ExponentialHistogram().add(Histogram(scale=3, counts=[1], count=1))
