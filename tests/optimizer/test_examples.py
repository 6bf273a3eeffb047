"""The digits example does what the documentation says; the others are in tests/examples."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from shoal_optimizer import targets
from shoal_optimizer.analysis import analyse
from shoal_optimizer.evaluation import evaluate_exported, evaluate_model
from shoal_optimizer.recipe import Recipe, Step, apply
from shoal_optimizer.targets import ClassSpec
from shoal_optimizer.task import Task, load_task

EXAMPLES = Path(__file__).parents[2] / "examples"
RECIPE = Recipe((Step("channel_pruning"), Step("distillation"), Step("quantization")), "pruned int8")


def _copy(name: str, folder: Path) -> Path:
    path = folder / name
    path.write_text((EXAMPLES / name).read_text())
    return path


def _compressed_is_small_and_as_good(task: Task, spec: ClassSpec) -> None:
    original = evaluate_model(task, task.original)
    target = targets.find("onnxruntime")
    plain = target.export(task.original, task, class_spec=spec)
    applied = apply(RECIPE, task)
    small = target.export(applied.model, task, applied.precision, applied.calibration, spec)
    assert small.wire_bytes <= 0.10 * plain.wire_bytes
    assert evaluate_exported(task, small).value >= original.value - 0.01
    assert small.facts["int8_share"] == 1.0


@pytest.mark.slow
def test_digits_from_scratch(tmp_path: Path, local_class: ClassSpec) -> None:
    path = _copy("digits.py", tmp_path)
    done = subprocess.run([sys.executable, str(path)], check=True, capture_output=True, text=True)
    assert "of 250 images right" in done.stdout
    task = load_task(path)
    assert analyse(task).parameters == 241_898
    assert evaluate_model(task, task.original).value >= 0.97
    _compressed_is_small_and_as_good(task, local_class)


def test_digits_hold_back_traffic_that_shoal_never_sees(tmp_path: Path) -> None:
    task = load_task(_copy("digits.py", tmp_path))
    parts = {split: task.required(split) for split in ("training", "evaluation", "holdout")}
    assert {split: len(data) for split, data in parts.items()} == {
        "training": 847,
        "evaluation": 250,
        "holdout": 700,
    }
    assert parts["training"].inputs.dtype == np.uint8
    assert parts["training"].inputs.shape[1:] == (8, 8, 1)
    assert parts["training"].inputs.max() == 16
    task.save_data(tmp_path / "data.npz")
    with np.load(tmp_path / "data.npz") as stored:
        assert not any(name.startswith("holdout") for name in stored)
