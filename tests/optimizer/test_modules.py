"""The modules that Shoal puts around a model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from shoal_optimizer import targets
from shoal_optimizer.evaluation import evaluate_exported
from shoal_optimizer.recipe import Recipe, Step, apply
from shoal_optimizer.task import Task, load_task

POOLED = """
import numpy as np
import torch
from torch import nn
from shoal_optimizer import Task, TensorSpec

class Scale(nn.Module):
    def forward(self, pictures):
        return pictures.to(torch.float32).permute(0, 3, 1, 2) / 255

class Pooled(Task):
    input = TensorSpec("picture", "UINT8", (-1, 8, 8, 3), "NHWC", 0, 255)
    input_kind, output_kind = "image", "logits"
    labels = tuple("abcd")

    def model(self):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 16, 3, 1, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(1), nn.Linear(16, 4)
        )

    def preprocess(self):
        return Scale()

    def training(self):
        pictures = np.random.default_rng(0).integers(0, 256, (64, 1, 1, 3), np.uint8)
        pictures = np.broadcast_to(pictures, (64, 8, 8, 3)).copy()
        with torch.inference_mode():
            answers = self.model().eval()(Scale()(torch.from_numpy(pictures))).argmax(1)
        return pictures, answers.numpy()

    evaluation = training
"""


@pytest.fixture
def pooled(tmp_path: Path) -> Task:
    path = tmp_path / "pooled.py"
    path.write_text(POOLED)
    return load_task(path)


def test_permuted_pictures_are_pooled_without_gathering(pooled: Task) -> None:
    exported = targets.find("onnxruntime").export(pooled.original, pooled)
    graph = onnx.load_from_string(exported.files[exported.model_file]).graph
    kinds = {node.op_type for node in graph.node}
    assert "Gather" not in kinds and "Range" not in kinds


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_permuted_pictures_keep_their_answers_in_int8(pooled: Task, runtime: str) -> None:
    applied = apply(Recipe((Step("quantization"),), "int8"), pooled)
    exported = targets.find(runtime).export(applied.model, pooled, applied.precision, applied.calibration)
    assert np.isfinite(evaluate_exported(pooled, exported).value)
    assert evaluate_exported(pooled, exported).value >= 0.9
