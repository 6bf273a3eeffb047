"""The budget: time for the next training, and what is measured at all."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from shoal_optimizer.jobspec import Budget
from shoal_optimizer.search.purse import LEAST_TRAINING, Purse


@dataclass(frozen=True)
class Made:
    bundle: str
    size_bytes: int


def purse(used: float, minutes: float = 3.0, form: float = 5.0) -> Purse:
    return Purse(Budget(minutes), lambda: used, form)


def test_a_training_leaves_time_for_its_forms_and_the_end() -> None:
    seconds = purse(60.0).training(4, 6, 1, first=False)
    assert seconds == 180 - 60 - 4 * 5 - 24
    assert purse(150.0).training(4, 6, 1, first=False) == 0.0  # nothing more fits
    assert purse(179.0).training(4, 6, 1, first=True) >= LEAST_TRAINING  # one is always tried


@pytest.mark.parametrize("used", [0.0, 30.0, 100.0, 170.0, 300.0])
def test_time_never_grows_with_use(used: float) -> None:
    assert purse(used).left >= purse(used + 1).left >= 0
    assert purse(used).training(2, 6, 2, first=False) >= purse(used + 9).training(2, 6, 2, first=False)


def test_measurements_and_bytes_are_counted_by_bundle() -> None:
    made = [Made("a", 40), Made("b", 40), Made("c", 40)]
    few = Purse(Budget(measurements=2), lambda: 0.0)
    assert few.refused(made[1], made, ["a"]) == ""  # type: ignore[arg-type]
    assert few.refused(made[2], made, ["a", "b"]) == "the budget of 2 measurements is used"  # type: ignore[arg-type]
    assert few.refused(made[0], made, ["a", "b"]) == ""  # type: ignore[arg-type]
    small = Purse(Budget(bytes=90), lambda: 0.0)
    assert small.refused(made[1], made, ["a"]) == ""  # type: ignore[arg-type]
    assert "120 bytes" in small.refused(made[2], made, ["a", "b"])  # type: ignore[arg-type]
