from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal_agent.detection import Detections, average_precision, match, mean_precision, overlaps, suppress
from shoal_protos.bundle import BoxRule
from shoal_protos.errors import InvalidInput

Array = np.ndarray[Any, Any]
RULE = BoxRule(score_threshold=0.3, iou_threshold=0.5, max_boxes=20)


def candidates(count: int, classes: int, seed: int) -> Array:
    """Boxes in clusters, so that many overlap; scores with many equal ones."""
    random = np.random.default_rng(seed)
    corner = random.integers(0, 6, (count, 2)) * 0.15 + random.normal(0, 0.01, (count, 2))
    size = random.uniform(0.05, 0.3, (count, 2))
    scores = np.round(random.random((count, classes)), 2)
    return np.concatenate([corner, corner + size, scores], axis=1).astype(np.float32)


def plainly(rows: Array, rule: BoxRule) -> list[int]:
    """The rule word by word."""
    best = rows[:, 4:].max(axis=1)
    kind = rows[:, 4:].argmax(axis=1)
    shares = overlaps(rows[:, :4], rows[:, :4])
    kept: list[int] = []
    for place in sorted(range(len(rows)), key=lambda place: (-best[place], place)):
        if best[place] < rule.score_threshold or len(kept) == rule.max_boxes:
            continue
        if all(kind[place] != kind[k] or shares[place, k] <= rule.iou_threshold for k in kept):
            kept.append(place)
    return kept


class TestSuppress:
    @given(st.integers(0, 60), st.integers(1, 4), st.integers(0, 2**31), st.integers(1, 30))
    @settings(deadline=None, max_examples=60)
    def test_it_is_the_greedy_rule(self, count: int, classes: int, seed: int, most: int) -> None:
        rows = candidates(count, classes, seed)
        rule = BoxRule(0.3, 0.4, most)
        found, places = suppress(rows, rule) if count else suppress(rows.reshape(0, 4 + classes), rule), None
        places = plainly(rows, rule)
        np.testing.assert_array_equal(found.boxes, rows[places, :4].reshape(-1, 4))
        np.testing.assert_array_equal(found.scores, rows[places, 4:].max(axis=1, initial=0))
        np.testing.assert_array_equal(found.classes, rows[places, 4:].argmax(axis=1))

    def test_many_candidates_give_the_same_as_few(self) -> None:
        """Beyond 256 boxes rows are compared one by one: the same rule."""
        rows = candidates(900, 3, 5)
        found = suppress(rows, BoxRule(0.3, 0.4, 100))
        np.testing.assert_array_equal(found.boxes, rows[plainly(rows, BoxRule(0.3, 0.4, 100)), :4])

    def test_dtypes_and_nothing(self) -> None:
        found = suppress(np.zeros((5, 7), np.float64), RULE)
        assert len(found) == 0 and found.boxes.shape == (0, 4)
        found = suppress(np.asarray([[0, 0, 1, 1, 0.9, 0.9]]), RULE)
        assert (found.boxes.dtype, found.scores.dtype, found.classes.dtype) == ("float32", "float32", "int64")
        assert found.classes.tolist() == [0]  # the first of equal ones
        assert repr(found) == "Detections(1 boxes)"

    def test_what_is_not_a_number_is_dropped(self) -> None:
        rows = np.asarray(
            [[0, 0, 1, 1, np.nan], [0, 0, np.nan, 1, 0.9], [0, 0, np.inf, 1, 0.9], [0, 0, 1, 1, 0.8]]
        )
        assert suppress(rows, RULE).scores.tolist() == [pytest.approx(0.8)]

    def test_boxes_without_an_area_do_not_divide_by_zero(self) -> None:
        rows = np.asarray([[0.5, 0.5, 0.5, 0.5, 0.9], [0.5, 0.5, 0.5, 0.5, 0.8], [0.9, 0.9, 0.1, 0.1, 0.7]])
        assert len(suppress(rows, RULE)) == 3

    @pytest.mark.parametrize("shape", [(5,), (5, 4), (1, 5, 6)])
    def test_another_form_is_refused(self, shape: tuple[int, ...]) -> None:
        with pytest.raises(InvalidInput, match="one picture"):
            suppress(np.zeros(shape), RULE)


def answer(*rows: tuple[float, float, float, float, float, int]) -> Detections:
    values = np.asarray(rows, np.float64).reshape(-1, 6)
    return Detections(
        values[:, :4].astype(np.float32), values[:, 4].astype(np.float32), values[:, 5].astype(np.int64)
    )


class TestAveragePrecision:
    def test_perfect_and_nothing(self) -> None:
        target = np.asarray([[[0, 0, 0.5, 0.5, 0], [0.5, 0.5, 1, 1, 2], [0, 0, 0, 0, -1]]], np.float32)
        right = answer((0, 0, 0.5, 0.5, 0.9, 0), (0.5, 0.5, 1, 1, 0.8, 2))
        assert average_precision([right], target) == pytest.approx(1.0)
        assert average_precision([answer()], target) == 0.0

    def test_by_hand(self) -> None:
        """One class, two boxes; right, wrong, right: precision 1 up to recall 0.5, then 2/3."""
        target = np.asarray([[[0, 0, 0.4, 0.4, 0], [0.5, 0.5, 1, 1, 0]]])
        found = answer((0, 0, 0.4, 0.4, 0.9, 0), (0.6, 0, 0.9, 0.2, 0.8, 0), (0.5, 0.5, 1, 1, 0.7, 0))
        assert average_precision([found], target) == pytest.approx((51 + 50 * 2 / 3) / 101)

    def test_a_box_is_hit_once_and_by_its_class(self) -> None:
        target = np.asarray([[0, 0, 0.5, 0.5, 1.0]])
        twice = answer((0, 0, 0.5, 0.5, 0.9, 1), (0, 0, 0.5, 0.5, 0.8, 1), (0, 0, 0.5, 0.5, 0.95, 0))
        assert match(twice, target).hits.tolist() == [True, False, False]
        assert average_precision([twice], [target]) == pytest.approx(1.0)  # class 0 has no target

    def test_classes_count_alike(self) -> None:
        target = np.asarray([[[0, 0, 0.2, 0.2, 0], [0.5, 0.5, 1, 1, 1], [0.5, 0, 1, 0.4, 1]]])
        only_first = answer((0, 0, 0.2, 0.2, 0.9, 0))
        assert average_precision([only_first], target) == pytest.approx(0.5)

    @given(st.integers(0, 2**31))
    @settings(deadline=None, max_examples=40)
    def test_bounds_and_order_of_pictures(self, seed: int) -> None:
        random = np.random.default_rng(seed)
        targets = []
        found = []
        for _ in range(4):
            rows = candidates(6, 3, int(random.integers(2**31)))
            kinds = random.integers(-1, 3, (6, 1))
            targets.append(np.concatenate([rows[:, :4], kinds], axis=1))
            found.append(suppress(rows, RULE))
        if not any((target[:, 4] >= 0).any() for target in targets):
            return
        value = average_precision(found, targets)
        assert 0.0 <= value <= 1.0
        matched = [match(one, target) for one, target in zip(found, targets, strict=True)]
        assert mean_precision(matched) == value

    def test_refusals(self) -> None:
        nothing = np.full((1, 3, 5), -1.0)
        with pytest.raises(InvalidInput, match="No target"):
            average_precision([answer()], nothing)
        with pytest.raises(InvalidInput, match="2 predictions"):
            average_precision([answer(), answer()], nothing)
        with pytest.raises(InvalidInput, match=r"\[boxes, 5\]"):
            match(answer(), np.zeros((2, 4)))
