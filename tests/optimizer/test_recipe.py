from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shoal_optimizer.recipe import Recipe, Step, apply
from shoal_optimizer.task import Task
from shoal_optimizer.techniques import Cancelled
from shoal_protos.errors import InvalidInput, NotFound

SMALL = Recipe(
    (Step("channel_pruning", {"ratio": 0.5}), Step("distillation", {"epochs": 2}), Step("quantization")),
    "small",
)

_values = st.one_of(st.integers(-100, 100), st.floats(-10, 10), st.text(max_size=5))
_steps = st.builds(Step, st.text(min_size=1, max_size=9), st.dictionaries(st.text(max_size=5), _values))


@given(st.lists(_steps, max_size=4))
def test_json_and_back(steps: list[Step]) -> None:
    recipe = Recipe(tuple(steps), "any")
    assert Recipe.from_json(recipe.to_json(), "any") == recipe
    assert Recipe.from_json(recipe.to_json(), "other").key == recipe.key
    assert len({recipe, Recipe.from_json(recipe.to_json(), "any")}) == 1


@pytest.mark.parametrize("bad", [None, 3, ["x"], [{"params": {}}], [{"technique": "t", "params": 3}]])
def test_what_is_no_recipe_is_refused(bad: object) -> None:
    with pytest.raises(InvalidInput):
        Recipe.from_json(bad)


def test_unknown_techniques_and_parameters_are_refused_before_any_work(quadrants: Task) -> None:
    with pytest.raises(NotFound, match="channel_pruning"):
        apply(Recipe((Step("shrinking"),)), quadrants)
    with pytest.raises(InvalidInput, match="ratio"):
        apply(Recipe((Step("channel_pruning", {"rate": 0.5}),)), quadrants)
    with pytest.raises(InvalidInput, match=r"ratio is 1\.5"):
        apply(Recipe((Step("channel_pruning", {"ratio": 1.5}),)), quadrants)


def test_precision_and_the_part_that_trains() -> None:
    assert (SMALL.precision, SMALL.training.precision, Recipe().precision) == ("int8", "fp32", "fp32")
    assert [step.technique for step in SMALL.training.steps] == ["channel_pruning", "distillation"]


def test_applying_is_deterministic_and_leaves_the_original_alone(quadrants: Task) -> None:
    before = [p.clone() for p in quadrants.original.parameters()]
    one, two = apply(SMALL, quadrants, seed=4), apply(SMALL, quadrants, seed=4)
    assert one.model is not None
    assert two.model is not None
    assert all(torch.equal(a, b) for a, b in zip(one.model.parameters(), two.model.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, quadrants.original.parameters(), strict=True))
    assert one.precision == "int8"
    assert one.calibration is not None
    assert len(one.calibration.inputs) == 200
    assert one.recipe.steps[0].params.items() >= {"ratio": 0.5, "round_to": 8}.items()


def test_progress_rises_within_each_step(quadrants: Task) -> None:
    seen: list[tuple[str, float]] = []
    apply(SMALL, quadrants, progress=lambda step, share, message: seen.append((step, share or 0.0)))
    for name in ("channel_pruning", "distillation", "quantization"):
        shares = [share for step, share in seen if step == name]
        assert shares == sorted(shares)
        assert shares[-1] == 1.0


def test_cancelling_stops_in_the_middle_of_training(quadrants: Task) -> None:
    asked = 0

    def cancelled() -> bool:
        nonlocal asked
        asked += 1
        return asked > 4

    with pytest.raises(Cancelled):
        apply(SMALL, quadrants, cancelled=cancelled)
    assert asked == 5
