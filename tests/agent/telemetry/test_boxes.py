from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from shoal_agent.telemetry import distances
from shoal_agent.telemetry.boxes import BOXES, Array
from shoal_agent.telemetry.sketches import sketch, statistics
from shoal_protos.errors import InvalidInput


def candidates(*rows: tuple[float, ...], of: int = 6) -> Array:
    """One picture [1, of, 4 + 2] with the given candidates, the rest without a score."""
    made = np.zeros((1, of, 6), np.float32)
    for place, row in enumerate(rows):
        made[0, place] = row
    return made


def test_what_is_above_the_threshold_counts() -> None:
    found = statistics(
        "boxes",
        candidates((0, 0, 0.5, 0.5, 0.9, 0.1), (0.5, 0.5, 0.6, 0.7, 0.0, 0.5), (0, 0, 1, 1, 0.2, 0.2)),
        threshold=0.4,
    )
    assert set(found) == {*BOXES, "class"}
    value = {name: float(column[0]) for name, column in found.items()}
    assert value["candidates"] == pytest.approx(np.log10(3))
    assert value["best_score"] == pytest.approx(0.9)
    assert value["mean_score"] == pytest.approx(0.7)
    assert value["area"] == pytest.approx(np.log10((0.25 + 0.02) / 2), abs=1e-6)
    assert value["aspect"] == pytest.approx((0 + np.log10(0.5)) / 2, abs=1e-6)
    assert value["centre_x"] == pytest.approx((0.25 + 0.55) / 2)
    assert value["class"] == 0
    assert statistics("boxes", candidates((0, 0, 1, 1, 0.2, 0.3)), threshold=0.25)["class"][0] == 1


def test_nothing_found_is_a_class_of_its_own() -> None:
    found = statistics("boxes", candidates((0, 0, 1, 1, 0.1, 0.2)))
    assert found["class"][0] == 2
    assert found["candidates"][0] == 0
    assert found["best_score"][0] == pytest.approx(0.2)
    shares = next(p for p in sketch("boxes", candidates()).sketches if p.name == "class_share")
    assert list(shares.counts) == [0, 0, 1]


@given(
    arrays.arrays(
        np.float32,
        st.tuples(st.integers(1, 4), st.integers(1, 7), st.integers(5, 8)),
        elements=st.floats(width=32, allow_nan=True, allow_infinity=True),
    )
)
def test_any_numbers_give_finite_statistics_within_their_bins(batch: Array) -> None:
    found = statistics("boxes", batch)
    assert all(np.isfinite(column).all() and column.shape == (len(batch),) for column in found.values())
    assert all(part.count == len(batch) == sum(part.counts) for part in sketch("boxes", batch).sketches)


@pytest.mark.parametrize("shape", [(2, 6), (2, 0, 6), (2, 3, 4), (2, 3, 6, 1)])
def test_another_form_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InvalidInput, match="Boxes are"):
        sketch("boxes", np.zeros(shape, np.float32))


def test_a_detector_that_goes_blind_is_far_from_its_reference() -> None:
    random = np.random.default_rng(0)
    seen = np.concatenate([candidates((0.1, 0.1, 0.3, 0.3, random.uniform(0.5, 1), 0.1)) for _ in range(200)])
    blind = seen.copy()
    blind[..., 4:] *= 0.2
    reference = sketch("boxes", seen[:100])
    assert distances.largest(reference, sketch("boxes", seen[100:]))["ks"][0] < 0.3
    assert distances.largest(reference, sketch("boxes", blind[100:]))["ks"][0] == pytest.approx(1.0)
