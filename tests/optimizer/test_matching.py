"""Corruptions stay in range and shape; matching finds what happened to the inputs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal_agent.telemetry.sketches import sketch
from shoal_optimizer import corruptions
from shoal_optimizer.corruptions import FAMILIES, Corruption, Range
from shoal_optimizer.matching import equaliser, limits_of, match
from shoal_protos.bundle import Signature, TensorSpec
from shoal_protos.errors import InvalidInput
from shoal_protos.v1.telemetry_pb2 import SketchSet

SHAPES = {
    "image": [(5, 8, 8), (5, 8, 8, 1), (5, 9, 7, 3)],
    "series": [(5, 64), (5, 64, 2), (5, 2, 64)],
    "tensor": [(5, 7), (5, 3, 4)],
}
IMAGES = Signature(
    (TensorSpec("image", "UINT8", (-1, 8, 8, 1), "NHWC", 0, 16),),
    (TensorSpec("y", "FP32", (-1, 10)),),
    "image",
)
SERIES = Signature((TensorSpec("x", "FP32", (-1, 256), "NT"),), (TensorSpec("y", "FP32", (-1, 3)),), "series")


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 1000), whole=st.booleans(), refine=st.booleans())
def test_a_change_keeps_shape_range_and_wholeness(family: str, seed: int, whole: bool, refine: bool) -> None:
    random = np.random.default_rng(seed)
    shape = SHAPES[family][seed % len(SHAPES[family])]
    limits = Range(-3, 13, whole)
    change = corruptions.draw(family, random, tuple(random.normal(size=33)))
    if refine:
        change = corruptions.near(change, random)
    inputs = torch.from_numpy(random.uniform(-3, 13, shape).astype(np.float32))
    before = inputs.clone()
    changed = change.apply(inputs, limits, torch.Generator().manual_seed(seed))
    assert changed.shape == inputs.shape and torch.equal(inputs, before)
    assert bool(torch.isfinite(changed).all())
    assert float(changed.min()) >= -3 and float(changed.max()) <= 13
    assert not whole or torch.equal(changed, changed.round())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_neutral_change_changes_nothing(family: str) -> None:
    inputs = torch.rand(SHAPES[family][0])
    changed = Corruption(family).apply(inputs, Range(0, 1))
    assert torch.allclose(changed, inputs, atol=1e-5) and Corruption(family).sentence() == "no change"


def test_equal_seeds_give_equal_noise() -> None:
    change, inputs = Corruption("image", {"noise": 0.2}), torch.rand(3, 8, 8)
    first, second = (change.apply(inputs, Range(0, 1), torch.Generator().manual_seed(4)) for _ in range(2))
    assert torch.equal(first, second)


def blobs(count: int, seed: int) -> np.ndarray:
    """Images 0..16 with one soft blob each."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:8, :8]
    centres = random.uniform(2, 6, (count, 2))
    widths = random.uniform(1.0, 2.5, count)
    far: np.ndarray = (y - centres[:, :1, None]) ** 2 + (x - centres[:, 1:, None]) ** 2
    images: np.ndarray = (16 * np.exp(-far / (2 * widths[:, None, None] ** 2))).round().astype(np.uint8)
    return images[..., None]


def test_it_finds_contrast_and_noise_from_histograms_alone() -> None:
    field, random = blobs(200, 1).astype(float), np.random.default_rng(2)
    field = np.clip((field - 8) * 0.6 + 8 + random.normal(0, 1.6, field.shape), 0, 16).round()
    found = match(sketch("image", field, 0, 16), blobs(500, 3), IMAGES)
    assert len(found.corruptions) == 10 and list(found.distances) == sorted(found.distances)
    assert found.distances[0] < 0.2 * found.before
    best = found.corruptions[0]
    assert best.get("contrast") == pytest.approx(0.6, abs=0.1)
    assert best.get("noise") == pytest.approx(0.1, abs=0.04)
    assert found == match(sketch("image", field, 0, 16), blobs(500, 3), IMAGES)  # same seed, same answer


def tones(count: int, seed: int, slope: float = 0.0) -> np.ndarray:
    """Series with a coloured spectrum; `slope` tilts it."""
    random = np.random.default_rng(seed)
    spectrum = np.fft.rfft(random.normal(size=(count, 256)), axis=1)
    places = np.linspace(0, 1, spectrum.shape[1])
    shaped = spectrum * (0.2 + np.exp(-((places - 0.3) ** 2) / 0.01)) * np.exp(slope * places)
    result: np.ndarray = np.fft.irfft(shaped, 256, axis=1).astype(np.float32)
    return result


def test_series_are_matched_through_their_mean_spectrum() -> None:
    field = sketch("series", tones(150, 1, slope=2.5))
    gains = equaliser(field, sketch("series", tones(300, 2)))
    assert gains[-20] - gains[20] > 1.0  # the tilt of the field
    found = match(field, tones(300, 2), SERIES, candidates=120)
    assert found.corruptions[0].get("equaliser") > 0
    assert found.distances[0] < 0.5 * found.before


def test_an_empty_or_foreign_field_is_refused() -> None:
    with pytest.raises(InvalidInput, match="0 inputs"):
        match(SketchSet(), blobs(50, 0), IMAGES)
    with pytest.raises(InvalidInput):
        match(sketch("series", tones(50, 1)), blobs(50, 0), IMAGES, candidates=1)


def test_limits_come_from_the_declaration_or_the_data() -> None:
    assert limits_of(IMAGES, blobs(5, 0)) == Range(0, 16, whole=True)
    series = tones(5, 0)
    found = limits_of(SERIES, series)
    assert (found.low, found.high, found.clip) == (float(series.min()), float(series.max()), False)
