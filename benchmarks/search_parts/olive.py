"""Microsoft Olive on the same model, data and time: its environment, its configuration, what it made.

Olive lives in a virtual environment below the benchmark's cache. A `.pth` file lends it our torch and ONNX
Runtime, so that both optimizers work with the same versions; everything else is its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from shoal_optimizer.targets.onnx import float_graph, strip
from shoal_optimizer.task import Task

# pydantic 2.12 and later call an enumeration with None, which Olive 0.13.0 does not expect.
PACKAGES = ("olive-ai==0.13.0", "pydantic==2.11.*")
SCRIPT = Path(__file__).with_name("olive_script.py")
GRACE_S = 60.0  # to end after its own time limit, its start included


@dataclass(frozen=True)
class Outcome:
    """Model files that one run of Olive left, and how it ended."""

    models: tuple[Path, ...]
    seconds: float
    evaluations: int
    reason: str = ""  # why there are no models


def environment(cache: Path) -> Path:
    """The interpreter of Olive's environment; made at the first call."""
    folder = cache / "olive" / "venv"
    python, mark = folder / "bin" / "python", folder / "ready.json"
    if mark.is_file() and json.loads(mark.read_text()) == list(PACKAGES):
        return python
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "shared.pth").write_text(sysconfig.get_path("purelib") + "\n")
    install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *PACKAGES]
    subprocess.run(install, check=True)
    mark.write_text(json.dumps(list(PACKAGES)))
    return python


def configuration(model: Path, out: Path, labels: int, seconds: float, seed: int) -> dict[str, Any]:
    """A search as Olive documents it: quantization (static and dynamic, all their options) and session
    parameters, sampled jointly by TPE; accuracy may fall by 5 points, then latency counts."""

    def data(name: str) -> dict[str, Any]:
        return {
            "name": name,
            "type": "DataContainer",
            "user_script": str(SCRIPT),
            "load_dataset_config": {"type": "search_items", "params": {"split": name}},
            "post_process_data_config": {"type": "search_argmax"},
            "dataloader_config": {"batch_size": 1},
        }

    accuracy = {
        "name": "accuracy",
        "type": "accuracy",
        "data_config": "evaluation",
        "sub_types": [
            {
                "name": "accuracy_score",
                "priority": 1,
                "higher_is_better": True,
                "metric_config": {"task": "multiclass", "num_classes": labels},
                "goal": {"type": "max-degradation", "value": 0.05},
            }
        ],
    }
    latency = {
        "name": "latency",
        "type": "latency",
        "data_config": "evaluation",
        "sub_types": [
            {
                "name": "avg",
                "priority": 2,
                "metric_config": {"warmup_num": 10, "repeat_test_num": 50},
            }
        ],
    }
    size = {
        "name": "size",
        "type": "size_on_disk",
        "sub_types": [{"name": "bytes", "priority": 3, "higher_is_better": False}],
    }
    accelerator = {"device": "cpu", "execution_providers": ["CPUExecutionProvider"]}
    return {
        "input_model": {"type": "OnnxModel", "model_path": str(model)},
        "systems": {"local": {"type": "LocalSystem", "accelerators": [accelerator]}},
        "data_configs": [data("calibration"), data("evaluation")],
        "evaluators": {"all": {"metrics": [accuracy, latency, size]}},
        "passes": {
            "quantization": {"type": "OnnxQuantization", "data_config": "calibration"},
            "session": {"type": "OrtSessionParamsTuning", "data_config": "evaluation", "io_bind": False},
        },
        "search_strategy": {
            "execution_order": "joint",
            "sampler": "tpe",
            "max_time": int(seconds),
            "max_samples": 1000,
            "seed": seed,
        },
        "evaluator": "all",
        "host": "local",
        "target": "local",
        "cache_dir": str(out / "cache"),
        "output_dir": str(out / "models"),
    }


def search(python: Path, task: Task, folder: Path, *, seconds: float, seed: int) -> Outcome:
    """One search by Olive within `seconds`; whatever it made until its end counts."""
    folder.mkdir(parents=True, exist_ok=True)
    model, data = folder / "model.onnx", folder / "data.npz"
    model.write_bytes(strip(float_graph(task.original, task)))
    calibration, evaluation = task.calibration_data(), task.required("evaluation")
    arrays: dict[str, Any] = {
        "calibration:inputs": calibration.inputs,
        "calibration:targets": np.zeros(len(calibration.inputs), np.int64),
        "evaluation:inputs": evaluation.inputs,
        "evaluation:targets": evaluation.targets,
    }
    np.savez(data, **arrays)
    config = folder / "config.json"
    config.write_text(json.dumps(configuration(model, folder, len(task.labels), seconds, seed), indent=1))
    settings = {
        **os.environ, "SEARCH_DATA": str(data), "SEARCH_INPUT": task.input.name, "OMP_NUM_THREADS": "1",
        "OLIVE_DISABLE_TELEMETRY": "1",
    }  # fmt: skip
    started, reason = time.monotonic(), ""
    try:
        done = subprocess.run(
            [str(python), "-m", "olive", "run", "--config", str(config)],
            env=settings, cwd=folder, capture_output=True, text=True, timeout=seconds + GRACE_S,
        )  # fmt: skip
        (folder / "log.txt").write_text(done.stdout + done.stderr)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
    except subprocess.TimeoutExpired:
        reason = "still at work when its time was over; what it had made counts"
    spent = time.monotonic() - started
    found = sorted({p.resolve() for p in (folder / "cache").rglob("*.onnx")} | set(models_in(folder)))
    evaluations = len(list((folder / "cache").rglob("evaluations/*.json")))
    return Outcome(tuple(found), spent, evaluations, "" if found else reason or "it left no models")


def models_in(folder: Path) -> list[Path]:
    """Model files among Olive's outputs."""
    return [p.resolve() for p in (folder / "models").rglob("*.onnx")]
