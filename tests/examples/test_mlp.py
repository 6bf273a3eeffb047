"""The perceptron example: with made-up clothes always, with Fashion-MNIST where it lies."""

from __future__ import annotations

import gzip
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from shoal_optimizer import targets
from shoal_optimizer.evaluation import evaluate_exported, evaluate_model
from shoal_optimizer.recipe import Recipe, apply
from shoal_optimizer.targets import ClassSpec
from shoal_optimizer.task import Task, load_task
from shoal_optimizer.techniques import masks
from shoal_optimizer.techniques.distillation import match_teacher
from shoal_protos.errors import InvalidInput

DATA = "fashion_mnist.npz"


def module_of(task: Task) -> Any:
    return sys.modules[type(task).__module__]


def published(folder: Path) -> None:
    """The four files in their format, with pictures whose class is the row of a bright stripe."""
    folder.mkdir()
    random = np.random.default_rng(0)
    for name, count in (("train", 6000), ("t10k", 3000)):
        classes = random.integers(0, 10, count).astype(np.uint8)
        pictures = random.integers(0, 80, (count, 28, 28), np.uint8)
        for picture, number in zip(pictures, classes, strict=True):
            picture[2 * number + 4 : 2 * number + 6] += 150
        for kind, array in (("images-idx3", pictures), ("labels-idx1", classes)):
            head = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
            content = gzip.compress(head + array.tobytes(), 1)
            (folder / f"{name}-{kind}-ubyte.gz").write_bytes(content)


@pytest.fixture
def made_up(example: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Task:
    published(tmp_path / "archives")
    monkeypatch.setenv("SHOAL_DATA", str(tmp_path / "archives"))
    monkeypatch.setenv("SHOAL_QUICK", "1")
    task = load_task(example("mlp.py"))
    module_of(task).DATA.ensure(tmp_path, download=True)
    return task


@pytest.mark.usefixtures("without_data")
def test_missing_pictures_are_refused_with_both_ways(example: Callable[[str], Path]) -> None:
    path = example("mlp.py")
    with pytest.raises(InvalidInput, match=r"mlp\.py --download.*SHOAL_DATA"):
        load_task(path).data("evaluation")
    done = subprocess.run([sys.executable, str(path)], capture_output=True, text=True)
    assert done.returncode == 1
    assert "--download" in done.stderr and "Traceback" not in done.stderr


def test_a_model_with_torchs_own_masks_is_quantized_dynamically(
    made_up: Task, local_class: ClassSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = module_of(made_up)
    assert {
        part: len(module.split(part)[1]) for part in ("training", "thinned", "evaluation", "holdout")
    } == {
        "training": 250,
        "thinned": 63,
        "evaluation": 50,
        "holdout": 150,
    }
    monkeypatch.setattr(module, "QUICK", False)
    torch.manual_seed(0)
    student = module.masked(module.network())
    module.fit(student, epochs=3, teacher=module.network().eval())
    assert any(name.endswith("weight_mask") for name in student.state_dict())
    torch.save(student.state_dict(), module.WEIGHTS)
    task = load_task(Path(module.__file__))
    assert masks.zero_share(task.original) == pytest.approx(0.3, abs=0.01)
    applied = apply(Recipe((module.DYNAMIC,)), task)
    made = targets.find("onnxruntime").export(applied.model, task, "int8", applied.calibration, local_class)
    assert made.facts["int8_share"] == 1.0
    assert made.size_bytes < 0.3 * 4 * sum(p.numel() for p in task.original.parameters())
    wanted = evaluate_model(task, task.original).value
    assert evaluate_exported(task, made).value == pytest.approx(wanted, abs=0.05)


def test_the_loss_that_people_type_is_the_techniques(example: Callable[[str], Path]) -> None:
    module = module_of(load_task(example("mlp.py")))
    torch.manual_seed(0)
    student, teacher = torch.randn(7, 10), torch.randn(7, 10)
    classes = torch.arange(7)
    ours = 0.3 * nn.functional.cross_entropy(student, classes)
    ours = ours + 0.7 * match_teacher(student, teacher, "logits", 4.0)
    assert float(module.distillation_loss(student, teacher, classes)) == pytest.approx(float(ours), rel=1e-5)


def test_a_file_that_is_no_idx_file_is_refused(example: Callable[[str], Path], tmp_path: Path) -> None:
    module = module_of(load_task(example("mlp.py")))
    (tmp_path / "wrong.gz").write_bytes(gzip.compress(b"<html>not found</html>"))
    with pytest.raises(RuntimeError, match=r"wrong\.gz is no IDX file"):
        module.read_idx(tmp_path / "wrong.gz")


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_fashion_mnist_from_scratch(example: Callable[[str], Path], with_data: Callable[[str], None]) -> None:
    with_data(DATA)
    task = load_task(example("mlp.py"))
    assert evaluate_model(task, task.original, task.required("holdout")).value >= 0.87
    lines = module_of(task).compress(task)
    assert len(lines) == 4
    assert all(float(line.split()[-2]) >= 0.87 for line in lines), lines
