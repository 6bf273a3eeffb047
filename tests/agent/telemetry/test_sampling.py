from __future__ import annotations

import random

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from shoal_agent.telemetry import sampling
from shoal_agent.telemetry.sampling import Policy, Sample, Sampler


def sample(number: int, time_s: float = 0.0, margin: float = 0.5, size: int = 8) -> Sample:
    return Sample(time_s, f"id-{number}", 0, {"x": np.full(size, number % 256, np.uint8)}, 1, 0.9, margin)


def sampler(**policy: float) -> Sampler:
    return Sampler(Policy(**{"share": 1.0, **policy}), random.Random(1))  # type: ignore[arg-type]


def test_off_by_default() -> None:
    assert not Sampler(Policy()).wants()


def test_the_share_is_a_lottery() -> None:
    lottery = sampler(share=0.25)
    assert 200 < sum(lottery.wants() for _ in range(1000)) < 300


def test_an_item_waits_for_its_label_or_for_the_end_of_its_time() -> None:
    waiting = sampler(wait_s=10)
    for number in range(3):
        waiting.offer(sample(number))
    assert waiting.take(5.0) == []
    assert waiting.label("id-1", [7]) == 1
    assert waiting.label("id-1", [8]) == 0  # the first label stays
    taken = waiting.take(6.0)
    assert [(s.request_id, s.label) for s in taken] == [("id-1", 7)]
    assert sorted(s.request_id for s in waiting.take(10.0)) == ["id-0", "id-2"]
    assert len(waiting) == 0


def test_labelled_items_leave_before_others_and_the_least_certain_first() -> None:
    waiting = sampler(wait_s=1, max_samples_per_window=4)
    for number in range(20):
        waiting.offer(sample(number, margin=number / 40))
    waiting.label("id-19", [3])
    taken = waiting.take(2.0)
    assert len(taken) == 4
    assert taken[0].request_id == "id-19"
    assert [s.request_id for s in taken[1:]] == ["id-0", "id-1", "id-2"]
    assert waiting.take(3.0) == []  # what did not fit is gone: its time was over


def test_the_day_bounds_the_bytes() -> None:
    waiting = sampler(wait_s=0, max_samples_per_window=10, max_bytes_per_day=3 * (100 + 64))
    for day in range(2):
        for number in range(10):
            waiting.offer(sample(number, size=100))
        assert len(waiting.take(day * 86400.0 + 1)) == 3
        waiting.offer(sample(99, size=100))
        assert waiting.take(day * 86400.0 + 2) == []


@given(st.integers(1, 8), st.integers(1, 400))
def test_memory_is_bounded(per_window: int, offered: int) -> None:
    waiting = sampler(wait_s=1e9, max_samples_per_window=per_window)
    for number in range(offered):
        waiting.offer(sample(number, margin=(number * 7919 % 100) / 100))
    assert len(waiting) <= 2 * 4 * per_window


def test_pruning_keeps_labelled_fair_and_uncertain_items() -> None:
    waiting = sampler(wait_s=1e9, max_samples_per_window=4)
    for number in range(12):
        waiting.offer(sample(number, margin=0.9))
    waiting.label("id-5", [1])
    for number in range(12, 60):
        waiting.offer(sample(number, margin=0.0 if number == 40 else 0.9))
    kept = {s.request_id for s in waiting._waiting}
    assert {"id-5", "id-40"} <= kept


def test_large_inputs_are_bounded_by_bytes() -> None:
    waiting = sampler(wait_s=1e9, max_samples_per_window=1000)
    for number in range(12):
        waiting.offer(sample(number, size=8 << 20))
    assert sum(s.nbytes for s in waiting._waiting) <= sampling.MAX_MEMORY_BYTES + (8 << 20)
