from __future__ import annotations

import pytest

from shoal_optimizer import targets
from shoal_optimizer.evaluation import evaluate_exported, evaluate_model
from shoal_optimizer.recipe import Recipe, Step, apply
from shoal_optimizer.targets import ClassSpec
from shoal_optimizer.task import Task
from shoal_protos.errors import InvalidInput


@pytest.mark.parametrize("method", ["minmax", "percentile", "entropy"])
def test_every_way_to_choose_ranges_works(quadrants: Task, local_class: ClassSpec, method: str) -> None:
    applied = apply(Recipe((Step("quantization", {"method": method, "samples": 64}),)), quadrants)
    target = targets.find("onnxruntime")
    exported = target.export(applied.model, quadrants, "int8", applied.calibration, local_class)
    original = evaluate_model(quadrants, quadrants.original).value
    assert evaluate_exported(quadrants, exported).value >= original - 0.05


def test_excluded_modules_stay_in_float(quadrants: Task, local_class: ClassSpec) -> None:
    applied = apply(Recipe((Step("quantization", {"exclude": "0, 2.first"}),)), quadrants)
    target = targets.find("onnxruntime")
    exported = target.export(applied.model, quadrants, "int8", applied.calibration, local_class)
    assert exported.facts["int8_share"] == pytest.approx(3 / 5)  # two of four convolutions and one linear


def test_excluding_what_the_model_does_not_have_is_refused(quadrants: Task) -> None:
    with pytest.raises(InvalidInput, match="stem") as caught:
        apply(Recipe((Step("quantization", {"exclude": "stem"}),)), quadrants)
    assert "2.first" in caught.value.remedy


def test_calibration_data_of_the_field_replace_the_tasks_own(quadrants: Task) -> None:
    field = quadrants.required("holdout").take(slice(0, 20))
    applied = apply(Recipe((Step("quantization"),)), quadrants, calibration=field)
    assert applied.calibration is not None
    assert applied.calibration.inputs.tolist() == field.inputs.tolist()
