from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from shoal_optimizer import targets
from shoal_optimizer.evaluation import evaluate_exported, evaluate_model
from shoal_optimizer.recipe import Applied, Recipe, Step, apply
from shoal_optimizer.search.space import complete
from shoal_optimizer.targets import ClassSpec
from shoal_optimizer.task import Task, load_task

QUADRANTS = Path(__file__).parents[1] / "quadrants.py"


@pytest.mark.parametrize("method", ["minmax", "percentile", "entropy"])
def test_every_way_to_choose_ranges_works(
    quadrants: Task, local_class: ClassSpec, method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    # 70 are no multiple of the calibrator's batch.
    applied = apply(Recipe((Step("quantization", {"method": method, "samples": 70}),)), quadrants)
    target = targets.find("onnxruntime")
    exported = target.export(applied.model, quadrants, "int8", applied.calibration, local_class)
    assert capsys.readouterr().out == ""  # a job's output is read line by line
    original = evaluate_model(quadrants, quadrants.original).value
    assert evaluate_exported(quadrants, exported).value >= original - 0.05


def test_calibration_data_of_the_field_replace_the_tasks_own(quadrants: Task) -> None:
    field = quadrants.required("holdout").take(slice(0, 20))
    applied = apply(Recipe((Step("quantization"),)), quadrants, calibration=field)
    assert applied.calibration is not None
    assert applied.calibration.inputs.tolist() == field.inputs.tolist()


def quantized(task: Task, **params: object) -> Applied:
    return apply(Recipe((Step("quantization", params),)), task)


def test_few_calibration_items_are_told(quadrants: Task) -> None:
    assert any("8 items only" in note for note in quantized(quadrants, samples=8).notes)
    assert not quantized(quadrants, samples=64).notes


def test_layers_are_judged_on_items_that_no_range_came_from(quadrants: Task) -> None:
    calibration = quantized(quadrants, samples=64, max_drop=0.01).calibration
    assert calibration is not None and calibration.judged is not None
    assert (calibration.judged_on, len(calibration.judged), calibration.max_drop) == ("training", 192, 0.01)
    known = {item.tobytes() for item in calibration.inputs}
    assert not any(item.tobytes() in known for item in calibration.judged.inputs)
    assert quantized(quadrants, samples=64).calibration.judged is None  # type: ignore[union-attr]


def test_judging_on_evaluation_data_is_told(write_task: Callable[[str], Path]) -> None:
    text = QUADRANTS.read_text().replace("def training(", "def unused(")
    applied = quantized(load_task(write_task(text)), samples=64, max_drop=0.01)
    assert applied.calibration is not None and applied.calibration.judged_on == "evaluation"
    assert any("evaluation items" in note for note in applied.notes)


def test_a_recipe_knows_its_precision() -> None:
    trained = Recipe((Step("quantization_aware"), Step("distillation")), "r")
    assert trained.precision == "fp32" and trained.training == trained
    for precision in ("int8", "fp16", "int8_weights", "int4_weights"):
        whole = complete(trained, precision)
        assert whole.precision == precision and whole.training == trained
        assert complete(whole, precision) == whole
    assert complete(trained, "fp32") == trained
