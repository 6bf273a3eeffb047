"""Gates need no labels and are fooled neither by an untrained network nor by a constant one."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal_optimizer.targets import gates
from shoal_optimizer.targets.gates import compare, expected_share, parity_refusal, share_refusal
from shoal_protos.errors import InvalidInput, Unsupported

RANDOM = np.random.default_rng(0)


def trained(count: int = 64, classes: int = 10) -> np.ndarray:
    """Logits that decide: one class of each item is far above the others."""
    logits = RANDOM.normal(size=(count, classes))
    logits[np.arange(count), RANDOM.integers(0, classes, count)] += 8
    return logits.astype(np.float32)


def noisy(outputs: np.ndarray, size: float) -> np.ndarray:
    return (outputs + RANDOM.normal(scale=size, size=outputs.shape)).astype(np.float32)


class TestParity:
    def test_a_faithful_export_passes(self) -> None:
        logits = trained()
        parity = compare(logits, noisy(logits, 0.1), "logits")
        assert parity.agreement == 1.0 and parity.kappa == 1.0
        assert parity.varying_sqnr_db > 20
        assert not parity_refusal(parity)

    def test_what_was_measured_once_is_refused(self) -> None:
        """Agreement .27 of ten classes, with errors as large as the logits."""
        logits = trained()
        wrong = RANDOM.permutation(logits)
        parity = compare(logits, np.where(RANDOM.random((64, 1)) < 0.2, logits, wrong), "logits")
        assert parity.agreement is not None and parity.agreement < 0.5
        assert "best class is the same" in parity_refusal(parity)
        with pytest.raises(Unsupported, match="does not answer as the original"):
            gates.require_parity(parity, "onnxruntime", "int8")

    def test_an_untrained_network_is_not_refused_for_its_ties(self) -> None:
        """All logits of an item nearly tie, so that rounding decides; the answers are still right."""
        bias = RANDOM.permutation(np.repeat([-1.0, 1.0], 5))
        logits = (bias + RANDOM.normal(scale=1e-4, size=(64, 10))).astype(np.float32)
        parity = compare(logits, noisy(logits, 1e-3), "logits")
        assert parity.agreement is not None and parity.agreement < 0.5
        assert parity.varying_sqnr_db < 0
        assert not parity_refusal(parity)

    def test_always_answering_the_commonest_class_is_no_agreement(self) -> None:
        logits = np.full((64, 2), [4.0, -4.0], np.float32)
        logits[::8] *= -1  # one item of eight is of the other class
        constant = np.full((64, 2), [4.0, -4.0], np.float32)
        parity = compare(logits, constant, "logits")
        assert parity.agreement == 0.875
        assert parity.kappa == pytest.approx(0.0)
        assert parity_refusal(parity)

    def test_values_must_follow_the_original_not_its_mean(self) -> None:
        kelvin = (293 + RANDOM.normal(scale=3, size=(64, 1))).astype(np.float32)
        assert not parity_refusal(compare(kelvin, noisy(kelvin, 0.1), "values"))
        constant = compare(kelvin, np.full_like(kelvin, 293), "values")
        assert constant.sqnr_db > 30
        assert "what differs between items" in parity_refusal(constant)

    def test_boxes_are_judged_without_their_grid(self) -> None:
        grid = np.linspace(0, 1, 40, dtype=np.float32).reshape(1, 10, 4)
        boxes = grid + RANDOM.normal(scale=0.01, size=(16, 10, 4)).astype(np.float32)
        assert parity_refusal(compare(boxes, np.broadcast_to(grid, boxes.shape), "boxes"))
        assert not parity_refusal(compare(boxes, noisy(boxes, 0.001), "boxes"))

    @pytest.mark.parametrize("bad", [np.full((64, 10), np.nan, np.float32), np.zeros((64, 9), np.float32)])
    def test_other_shapes_and_nan_are_refused_in_every_precision(self, bad: np.ndarray) -> None:
        parity = compare(trained(), bad, "logits")
        assert parity.largest == math.inf
        assert "another shape or are not finite" in parity_refusal(parity)
        with pytest.raises(InvalidInput, match="answers differently"):
            gates.require_parity(parity, "openvino", "fp32")

    def test_fp32_allows_rounding_only(self) -> None:
        logits = trained()
        gates.require_parity(compare(logits, noisy(logits, 1e-3), "logits"), "openvino", "fp32")
        with pytest.raises(InvalidInput, match="answers differently"):
            gates.require_parity(compare(logits, noisy(logits, 0.5), "logits"), "openvino", "fp32")

    @given(st.integers(1, 40), st.integers(1, 6), st.floats(0, 100), st.integers(0, 9))
    def test_figures_are_finite_and_in_range(self, count: int, classes: int, size: float, seed: int) -> None:
        random = np.random.default_rng(seed)
        wanted = random.normal(size=(count, classes))
        parity = compare(wanted, wanted + size * random.normal(size=wanted.shape), "logits")
        assert parity.agreement is not None and 0 <= parity.agreement <= 1
        assert parity.kappa is not None and -1 <= parity.kappa <= (parity.kappa_high or 0) <= 1
        assert all(map(math.isfinite, (parity.sqnr_db, parity.varying_sqnr_db, parity.largest)))
        assert parity.varying_sqnr_db <= parity.sqnr_db + 1e-6
        same = compare(wanted, wanted, "logits")
        assert same.agreement == 1.0 and not parity_refusal(same)


class TestShare:
    def test_what_belongs_in_float_does_not_count(self) -> None:
        assert expected_share(5 / 7, 2, 2) == 1.0
        assert expected_share(5 / 7, 2, 1) == pytest.approx(5 / 6)
        assert expected_share(0.0, 4, 0) == 0.0
        assert expected_share(0.0, 4, 4) == 1.0  # every layer was kept in float on purpose
        assert expected_share(1.0, 0, 3) == 1.0

    @given(st.integers(0, 50), st.integers(0, 50), st.integers(0, 60))
    def test_it_is_a_share_and_never_below_the_plain_one(self, ints: int, floats: int, meant: int) -> None:
        if ints + floats:
            share = ints / (ints + floats)
            assert share - 1e-9 <= expected_share(share, floats, meant) <= 1

    def test_too_small_a_share_names_what_stayed_in_float(self) -> None:
        reason = share_refusal(0.25, 0.5, ["conv_3", "conv_4", "head"])
        assert "25%" in reason and "conv_3, conv_4, head stayed in float" in reason
        with pytest.raises(Unsupported, match="conv_3"):
            gates.require_share(0.25, "openvino", 0.5, ["conv_3"])
        assert "..." in share_refusal(0.1, 0.5, [f"conv_{i}" for i in range(20)])

    def test_nothing_is_refused_that_nobody_measured(self) -> None:
        assert not share_refusal(None)
        assert not share_refusal(math.nan)
        assert not share_refusal(0.5)

    def test_int8_that_is_all_float_is_refused_at_any_minimum(self) -> None:
        with pytest.raises(Unsupported, match="runs in int8"):
            gates.require_share(0.0, "onnxruntime", 0.0)
