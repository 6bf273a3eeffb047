"""The bearing example: on tiny subsets always, on everything among the slow tests."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.io import savemat

from shoal_optimizer import targets
from shoal_optimizer.evaluation import evaluate_exported, evaluate_model
from shoal_optimizer.recipe import Recipe, Step, apply
from shoal_optimizer.targets import ClassSpec
from shoal_optimizer.task import Task, load_task
from shoal_protos.errors import InvalidInput

DATA = "cwru_12k.npz"


def module_of(task: Task) -> Any:
    return sys.modules[type(task).__module__]


@pytest.fixture
def quick(
    example: Callable[[str], Path], with_data: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> Task:
    with_data(DATA)
    monkeypatch.setenv("SHOAL_QUICK", "1")
    return load_task(example("bearings.py"))


@pytest.mark.usefixtures("without_data")
def test_missing_recordings_are_refused_with_both_ways(example: Callable[[str], Path]) -> None:
    path = example("bearings.py")
    with pytest.raises(InvalidInput, match=r"bearings\.py --download.*SHOAL_DATA"):
        load_task(path).data("evaluation")
    done = subprocess.run([sys.executable, str(path)], capture_output=True, text=True)
    assert done.returncode == 1
    assert "--download" in done.stderr and "SHOAL_DATA" in done.stderr and "Traceback" not in done.stderr


def test_a_tiny_subset_trains_and_exports_the_same(quick: Task) -> None:
    assert quick.required("training").inputs.shape == (200, 1024)
    value = evaluate_model(quick, quick.original).value
    assert value > 0.2  # a few steps: well over one of ten by chance
    for runtime in ("onnxruntime", "openvino"):
        exported = targets.find(runtime).export(quick.original, quick)
        assert evaluate_exported(quick, exported).value == pytest.approx(value, abs=0.01)


def test_parts_are_cut_by_time_and_hold_every_class(quick: Task) -> None:
    module = module_of(quick)
    parts = {part: module.places(part) for part in ("training", "evaluation", "holdout")}
    whole = np.concatenate(list(parts.values()))
    assert len(set(whole.tolist())) == len(whole) == np.sum(module.stored()["load"] == 0)
    for recording in np.unique(module.stored()["src"][whole]):
        own = [chosen[module.stored()["src"][chosen] == recording] for chosen in parts.values()]
        assert own[0].max() < own[1].min() and own[1].max() < own[2].min()
    assert all(len(np.unique(module.stored()["y"][chosen])) == 10 for chosen in parts.values())


def test_the_report_names_a_class_that_never_appears(quick: Task) -> None:
    module = module_of(quick)
    torch.manual_seed(0)
    assert "none of Normal" in module.report(module.network().eval(), "shifted")


def test_a_still_sensor_gives_numbers(quick: Task) -> None:
    module = module_of(quick)
    for level in (0, 500, -32768):
        answer = module.Standardize()(torch.full((1, 1024), level, dtype=torch.int16))
        assert answer.shape == (1, 1, 1024) and answer.abs().max() < 1e-3


def test_loudness_does_not_matter(quick: Task) -> None:
    module = module_of(quick)
    samples = torch.from_numpy(quick.required("evaluation").inputs[:4] // 2)
    loud, quiet = module.Standardize()(samples * 2), module.Standardize()(samples)
    torch.testing.assert_close(loud, quiet, atol=0.02, rtol=0.02)


def test_windows_are_written_as_the_sensor_gives_them(quick: Task, tmp_path: Path) -> None:
    module = module_of(quick)
    module.write_windows(tmp_path / "windows")
    files = sorted((tmp_path / "windows").iterdir())
    assert {path.stem for path in files} <= set(quick.labels) and len(files) >= 8
    window = np.load(files[0])
    assert window.shape == (1024,) and window.dtype == np.int16


def test_public_files_are_packed_as_they_are_published(
    example: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "archives"
    folder.mkdir()
    monkeypatch.setenv("SHOAL_DATA", str(folder))
    module = module_of(load_task(example("bearings.py")))
    times = np.arange(8 * 1024 + 500)
    for name, _, number in module._RECORDINGS:
        signal = 0.1 * np.sin(times / (80 if name == "Normal" else 20))
        savemat(folder / f"{number}.mat", {f"X{number:03d}_DE_time": signal[:, None], "other": 1.0})
    assert len(module._RECORDINGS) == 37
    module.DATA.ensure(tmp_path, download=True)
    stored = module.stored()
    assert stored["x"].shape == (36 * 8 + 2, 1024) and stored["x"].dtype == np.int16
    assert stored["x"].max() == pytest.approx(0.1 / module.SCALE, abs=3)
    assert np.bincount(stored["y"]).tolist() == [2] + [32] * 9
    assert sorted(set(stored["load"][stored["y"] == 5].tolist())) == [0, 1, 2, 3]
    healthy = stored["x"][stored["y"] == 0][0].astype(float) * module.SCALE
    expected = 0.1 * np.sin(4 * np.arange(1024) / 80)  # decimated by 4, and not delayed
    assert np.abs(healthy - expected)[50:-50].max() < 0.01


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_bearings_from_scratch(
    example: Callable[[str], Path], with_data: Callable[[str], None], local_class: ClassSpec
) -> None:
    with_data(DATA)
    task = load_task(example("bearings.py"))
    assert evaluate_model(task, task.original).value >= 0.97
    assert evaluate_model(task, task.original, task.required("holdout")).value >= 0.97
    assert evaluate_model(task, task.original, task.required("shifted")).value < 0.92
    plain = targets.find("onnxruntime").export(task.original, task, class_spec=local_class)
    steps = (Step("channel_pruning"), Step("distillation"), Step("quantization"))
    applied = apply(Recipe(steps, "pruned int8"), task)
    small = targets.find("onnxruntime").export(
        applied.model, task, applied.precision, applied.calibration, local_class
    )
    assert small.wire_bytes <= 0.12 * plain.wire_bytes
    assert evaluate_exported(task, small).value >= 0.96
    assert small.facts["int8_share"] == 1.0
