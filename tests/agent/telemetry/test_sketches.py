from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal_agent.telemetry.sketches import RULE_VERSION, Sketcher, merge, sketch, statistics
from shoal_protos.errors import InvalidInput
from shoal_protos.v1.telemetry_pb2 import SketchSet

Array = np.ndarray[Any, Any]
KINDS: dict[str, tuple[tuple[int, ...], float | None, float | None]] = {
    "image": ((8, 8, 1), 0, 16),
    "series": ((64,), None, None),
    "audio": ((2, 128), -1, 1),
    "tensor": ((5, 3), None, None),
    "logits": ((10,), None, None),
    "values": ((4,), 0, 1),
    "boxes": ((6, 7), None, None),
}


def batch(kind: str, count: int, seed: int) -> Array:
    shape, low, high = KINDS[kind]
    random = np.random.default_rng(seed)
    if low is not None and high is not None:
        return random.uniform(low, high, (count, *shape)).astype(np.float32)
    return random.normal(0, 3, (count, *shape)).astype(np.float32)


def make(kind: str, array: Array) -> SketchSet:
    _, low, high = KINDS[kind]
    return sketch(kind, array, low, high)


def counts(found: SketchSet) -> dict[str, list[int]]:
    return {part.name: list(part.counts) for part in found.sketches}


@given(
    st.sampled_from(sorted(KINDS)), st.lists(st.integers(0, 20), min_size=3, max_size=3), st.integers(0, 99)
)
def test_merging_equals_sketching_together(kind: str, sizes: list[int], seed: int) -> None:
    arrays = [batch(kind, size, seed + place) for place, size in enumerate(sizes)]
    a, b, c = (make(kind, array) for array in arrays)
    together = make(kind, np.concatenate(arrays))
    left, right = merge(merge(a, b), c), merge(a, merge(b, c))
    assert counts(left) == counts(right) == counts(together) == counts(merge(merge(c, b), a))
    assert left.count == sum(sizes)
    for part in left.sketches:
        assert sum(part.counts) == part.count == left.count
    np.testing.assert_allclose(left.mean_log_spectrum, together.mean_log_spectrum, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_each_kind_has_fixed_bins_and_enough_statistics(kind: str) -> None:
    found = make(kind, batch(kind, 7, 1))
    other = make(kind, batch(kind, 3, 2) * 5)
    assert [(p.name, p.low, p.width, len(p.counts)) for p in found.sketches] == [
        (p.name, p.low, p.width, len(p.counts)) for p in other.sketches
    ]
    assert found.rule_version == RULE_VERSION
    minimum = {"logits": 4, "boxes": 9}.get(kind, 12)
    assert len(found.sketches) >= minimum
    assert bool(found.mean_log_spectrum) == (kind in ("series", "audio"))


@pytest.mark.parametrize(
    "shape", [(8, 8), (8, 8, 1), (32, 32, 3), (300, 200, 3), (2, 2, 1), (1, 1, 1), (500, 8, 1)]
)
def test_images_of_any_size(shape: tuple[int, ...]) -> None:
    images = np.random.default_rng(0).integers(0, 256, (4, *shape), dtype=np.uint8)
    found = statistics("image", images, 0, 255)
    assert all(values.shape == (4,) and np.isfinite(values).all() for values in found.values())
    assert ("saturation" in found) == (shape[-1] == 3)


def test_image_statistics_move_with_what_they_are_named_after() -> None:
    random = np.random.default_rng(0)
    clean = random.uniform(0.3, 0.7, (20, 4, 4, 1)).repeat(4, 1).repeat(4, 2).astype(np.float32)
    before = statistics("image", clean, 0, 1)
    noisy = statistics("image", clean + random.normal(0, 0.1, clean.shape), 0, 1)
    assert noisy["noise"].mean() == pytest.approx(-1.0, abs=0.15)  # log10 of the sigma
    assert noisy["noise"].min() > before["noise"].max()
    flat = statistics("image", (clean - 0.5) * 0.3 + 0.5, 0, 1)
    assert (flat["contrast"] < before["contrast"]).all()
    bright = statistics("image", clean + 0.2, 0, 1)
    np.testing.assert_allclose(bright["brightness"] - before["brightness"], 0.2, atol=1e-5)
    assert (flat["gradient_energy"] < before["gradient_energy"]).all()


def test_the_declared_range_makes_scales_equal() -> None:
    images = np.random.default_rng(0).integers(0, 17, (6, 8, 8, 1), dtype=np.uint8)
    small = statistics("image", images, 0, 16)
    large = statistics("image", images.astype(np.float32) * 15.9375, 0, 255)
    for name, values in small.items():
        np.testing.assert_allclose(values, large[name], atol=1e-4, err_msg=name)


def test_series_find_frequency_and_level() -> None:
    time = np.arange(512)
    slow, fast = np.sin(time * 0.1)[None], np.sin(time * 2.5)[None]
    a, b = statistics("series", slow), statistics("series", 10 * fast)
    assert a["centroid"] < b["centroid"]
    assert b["rms"] - a["rms"] == pytest.approx(1.0, abs=0.05)
    assert a["zero_crossings"] < b["zero_crossings"]


def test_logits_give_shares_of_classes() -> None:
    logits = np.full((6, 3), -5.0)
    logits[[0, 1, 2, 3, 4, 5], [0, 0, 0, 1, 1, 2]] = 5.0
    found = {part.name: part for part in sketch("logits", logits).sketches}
    assert list(found["class_share"].counts) == [3, 2, 1]
    assert found["confidence"].min > 0.99
    assert found["margin"].min > 0.99


def test_many_classes_share_bins() -> None:
    part = {p.name: p for p in sketch("logits", np.eye(1000)).sketches}["class_share"]
    assert len(part.counts) <= 256
    assert sum(part.counts) == 1000


def test_not_finite_values_are_counted_and_harm_nothing() -> None:
    values = np.asarray([[1.0, np.nan, np.inf, -np.inf], [1, 2, 3, 4]])
    found = statistics("values", values)
    assert found["not_finite"].tolist() == [0.75, 0.0]
    assert all(np.isfinite(column).all() for column in found.values())
    assert sketch("logits", values).count == 2
    assert sketch("image", np.full((1, 8, 8, 1), np.nan)).count == 1


def test_resetting_starts_anew() -> None:
    sketcher = Sketcher("tensor")
    sketcher.update(np.ones((3, 2)))
    sketcher.reset()
    assert sketcher.to_proto().count == 0
    sketcher.update(np.ones((2, 2)))
    assert sketcher.to_proto().count == 2


def test_what_cannot_be_merged_or_sketched_is_refused() -> None:
    images, logits = make("image", batch("image", 2, 0)), make("logits", batch("logits", 2, 0))
    with pytest.raises(InvalidInput, match="cannot meet"):
        merge(images, logits)
    older = SketchSet()
    older.CopyFrom(images)
    older.rule_version = 99
    with pytest.raises(InvalidInput, match="rule 99"):
        merge(images, older)
    moved = SketchSet()
    moved.CopyFrom(images)
    moved.sketches[0].low = 0.5
    with pytest.raises(InvalidInput, match="different bins"):
        merge(images, moved)
    missing = SketchSet()
    missing.CopyFrom(images)
    del missing.sketches[0]
    with pytest.raises(InvalidInput, match="Only one"):
        merge(images, missing)
    with pytest.raises(InvalidInput, match="Unknown kind"):
        Sketcher("smell")
    with pytest.raises(InvalidInput, match="Images are"):
        sketch("image", np.ones((2, 3)))
    with pytest.raises(InvalidInput, match="Series are"):
        sketch("series", np.ones((2, 1)))
