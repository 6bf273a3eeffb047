from __future__ import annotations

import pytest

from shoal_optimizer import targets
from shoal_optimizer.evaluation import evaluate_exported, evaluate_model
from shoal_optimizer.recipe import Recipe, Step, apply
from shoal_optimizer.targets import ClassSpec
from shoal_optimizer.task import Task


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
