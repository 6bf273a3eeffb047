from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from shoal_optimizer import targets
from shoal_optimizer.evaluation import evaluate_exported, evaluate_model
from shoal_optimizer.recipe import Recipe, Step, apply
from shoal_optimizer.targets import Calibration, ClassSpec
from shoal_optimizer.task import Task, load_task
from shoal_protos.errors import InvalidInput, Unsupported

DYNAMIC = Recipe((Step("quantization", {"method": "dynamic"}),), "dynamic")

TASK = """
import numpy as np, torch
from torch import nn
from shoal_optimizer import Task, TensorSpec

class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.last = nn.LSTM(12, 48, batch_first=True), nn.Linear(48, 3)
    def forward(self, x):
        return self.last(self.lstm(x)[0].mean(1))

def items(count, seed):
    random = np.random.default_rng(seed)
    return random.normal(size=(count, SHAPE)).astype(np.float32), random.integers(0, 3, count)

class Given(Task):
    input = TensorSpec('x', 'FP32', (-1, SHAPE))
    output_kind = 'logits'
    def model(self): return MODEL
    def evaluation(self): return items(120, 1)
"""
PERCEPTRON = "nn.Sequential(nn.Linear(12, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3))"


@pytest.fixture
def perceptron(write_task: Callable[[str], Path]) -> Task:
    return load_task(write_task(TASK.replace("SHAPE", "12").replace("MODEL", PERCEPTRON)))


def recurrent(write_task: Callable[[str], Path]) -> Task:
    text = TASK.replace("(count, SHAPE)", "(count, 5, 12)").replace("(-1, SHAPE)", "(-1, 5, 12)")
    return load_task(write_task(text.replace("MODEL", "Recurrent()")))


def test_linear_layers_are_int8_without_calibration_data(perceptron: Task, local_class: ClassSpec) -> None:
    applied = apply(DYNAMIC, perceptron)
    assert applied.precision == "int8" and applied.calibration is not None
    target = targets.find("onnxruntime")
    made = target.export(applied.model, perceptron, "int8", applied.calibration, local_class)
    assert made.facts["int8_share"] == 1.0 and made.facts["method"] == "dynamic"
    assert made.facts["parity_agreement"] > 0.95
    assert made.size_bytes < 0.5 * target.export(applied.model, perceptron).size_bytes
    original = evaluate_model(perceptron, perceptron.original).value
    assert evaluate_exported(perceptron, made).value == pytest.approx(original, abs=0.04)


def test_an_lstm_is_int8_too(write_task: Callable[[str], Path], local_class: ClassSpec) -> None:
    task = recurrent(write_task)
    applied = apply(DYNAMIC, task)
    target = targets.find("onnxruntime")
    made = target.export(applied.model, task, "int8", applied.calibration, local_class)
    assert made.facts["int8_share"] == 1.0
    assert made.size_bytes < 0.5 * target.export(applied.model, task).size_bytes


def test_convolutions_are_refused_with_the_reason(quadrants: Task) -> None:
    with pytest.raises(Unsupported, match=r"\d+% of the multiply-adds are in convolutions") as caught:
        apply(DYNAMIC, quadrants)
    assert "minmax" in caught.value.remedy


def test_a_runtime_without_it_refuses(perceptron: Task, local_class: ClassSpec) -> None:
    dynamic = Calibration(perceptron.required("evaluation").inputs[:1], "dynamic")
    with pytest.raises(Unsupported, match="openvino has no dynamic int8"):
        targets.find("openvino").export(perceptron.original, perceptron, "int8", dynamic, local_class)


def test_a_model_without_such_layers_is_refused(write_task: Callable[[str], Path]) -> None:
    task = load_task(write_task(TASK.replace("SHAPE", "12").replace("MODEL", "nn.Softmax(-1)")))
    with pytest.raises(InvalidInput, match="no matrix product"):
        targets.find("onnxruntime").export(task.original, task, "int8", apply(DYNAMIC, task).calibration)
