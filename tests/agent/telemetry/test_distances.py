from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal_agent.telemetry.distances import each, ks, largest, psi
from shoal_agent.telemetry.sketches import sketch
from shoal_protos.errors import InvalidInput
from shoal_protos.v1.telemetry_pb2 import Sketch, SketchSet


def one(counts: list[int]) -> Sketch:
    return Sketch(name="x", low=0, width=0.1, counts=counts, count=sum(counts))


histograms = st.lists(st.integers(0, 50), min_size=12, max_size=12)


@given(histograms, histograms)
def test_distances_are_not_negative_and_zero_for_equals(a: list[int], b: list[int]) -> None:
    assert psi(one(a), one(b)) >= 0
    assert 0 <= ks(one(a), one(b)) <= 1
    assert psi(one(a), one(a)) == 0
    assert ks(one(a), one(a)) == 0


def test_distances_grow_with_the_shift() -> None:
    base = [0, 10, 40, 40, 10, 0, 0, 0, 0, 0, 0, 0]
    near, far = [0, 5, 30, 45, 20, 0, 0, 0, 0, 0, 0, 0], [0] * 8 + [20, 60, 20, 0]
    assert 0 < psi(one(base), one(near)) < psi(one(base), one(far))
    assert 0 < ks(one(base), one(near)) < ks(one(base), one(far)) == 1.0


def test_nothing_is_near_everything() -> None:
    assert psi(one([0] * 12), one([1] * 12)) == 0.0
    assert largest(SketchSet(), SketchSet()) == {"psi": (0.0, ""), "ks": (0.0, "")}


def test_other_bins_are_refused() -> None:
    with pytest.raises(InvalidInput, match="different bins"):
        psi(one([1] * 12), one([1] * 11))


def test_a_small_corruption_of_digits_is_far_from_every_clean_window() -> None:
    from sklearn.datasets import load_digits

    images = load_digits().images[..., None].astype(np.uint8)
    reference = sketch("image", images[:900], 0, 16)
    random = np.random.default_rng(0)
    for size in (20, 50):
        clean, dirty = [], []
        for _ in range(20):
            part = images[900:][random.permutation(897)[:size]]
            clean.append(largest(reference, sketch("image", part, 0, 16)))
            worse = np.clip((part - 8.0) * 0.8 + 8 + random.normal(0, 1.0, part.shape), 0, 16)
            dirty.append(largest(reference, sketch("image", worse.astype(np.uint8), 0, 16)))
        for measure in ("psi", "ks"):
            assert min(d[measure][0] for d in dirty) > max(c[measure][0] for c in clean)
    assert set(each(reference, sketch("image", part, 0, 16))) >= {"noise", "contrast", "brightness"}
