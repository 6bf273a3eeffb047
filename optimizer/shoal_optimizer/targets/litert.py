"""LiteRT: `.tflite` from the torch module by litert-torch, int8 by ai-edge-quantizer."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import warnings
from collections import OrderedDict
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from shoal_optimizer.targets import litert_steps as steps
from shoal_optimizer.targets.base import Calibration, ClassSpec, Exported, Target
from shoal_protos.bundle import RuntimeNeed
from shoal_protos.errors import InvalidInput, Unsupported

if TYPE_CHECKING:
    from torch import nn

    from shoal_optimizer.task import Task

PYTHON_VARIABLE = "SHOAL_LITERT_PYTHON"  # the Python that has litert-torch; this one when unset
EXTRA = "litert-export"
MODEL_FILE = "model.tflite"
RUNTIME_MIN = "1.2"
METHODS = ("minmax", "dynamic")
STEP_LIMIT_S = 900.0
_ERROR = re.compile(r"[\w.]*(?:Error|Exception): ")  # how a traceback ends, hints may follow
_CACHED_FILES = 16
_MODULES = ("litert_torch", "ai_edge_quantizer")


class LiteRtTarget(Target):
    """The endpoint's own input goes in; casts and layout changes lie inside, and convolutions run on
    NHWC. A file answers one item at a time (the exporter cannot leave the batch open), so the
    runtime repeats it for a batch.

    int8 is static, or dynamic when the calibration's method says so; preprocess and postprocess stay
    in float. LiteRT's kernels have no saturating form, so one file suits every instruction set.
    """

    name: ClassVar[str] = "litert"
    isa_matters: ClassVar[bool] = False
    dynamic: ClassVar[bool] = True

    def serves(self, class_spec: ClassSpec) -> bool:
        """Also needs LiteRT's tools here; a class of nothing but LiteRT is served without them, so that
        the refusal can say how to get them."""
        alone = set(class_spec.runtimes) == {self.name}
        return super().serves(class_spec) and (alone or has_tools())

    def convert(
        self,
        model: nn.Module | None,
        task: Task,
        precision: str,
        calibration: Calibration | None,
        class_spec: ClassSpec,
    ) -> Exported:
        if model is None or not task.has_module:
            raise Unsupported(
                "LiteRT files are made from a torch module, and this task is an ONNX file.",
                "Write a task with the torch module, or use onnxruntime or openvino on these devices.",
            )
        if calibration is not None and precision == "int8" and calibration.method not in METHODS:
            raise Unsupported(
                f"LiteRT's quantizer does not choose ranges by '{calibration.method}'.",
                f"Use {' or '.join(METHODS)}.",
            )
        if calibration is not None and calibration.keep_float:
            raise Unsupported(
                f"LiteRT's quantizer can't keep {', '.join(calibration.keep_float[:3])} in float: it knows "
                "no names of the ONNX graph.",
                "Leave keep_float empty (max_drop 1.0), or use onnxruntime or openvino.",
            )
        require_tools()
        content, facts = float_file(model, task)
        if precision == "int8":
            assert calibration is not None
            content, facts = quantized_file(content, task, calibration)
            if calibration.pinned:
                facts = {**facts, "pinned": "none: LiteRT's quantizer took its ranges from data"}
        need = RuntimeNeed(self.name, MODEL_FILE, version_min=RUNTIME_MIN, precision=precision)
        return Exported({MODEL_FILE: content}, need, precision, task.signature, facts)


# ---------------------------------------------------------------------------- tools


def python() -> str:
    """The interpreter that runs LiteRT's tools."""
    return os.environ.get(PYTHON_VARIABLE) or sys.executable


@functools.cache
def _has_tools(interpreter: str) -> bool:
    if interpreter == sys.executable:
        return all(find_spec(module) is not None for module in _MODULES)
    check = f"from importlib.util import find_spec as f; import sys; sys.exit(not all(map(f, {_MODULES})))"
    try:
        done = subprocess.run(
            [interpreter, "-c", check], capture_output=True, check=False, timeout=60, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0


def has_tools() -> bool:
    """True when litert-torch and ai-edge-quantizer are there; asked once for each interpreter."""
    return _has_tools(python())


def require_tools() -> None:
    """Raises Unsupported, saying how to get the tools."""
    if has_tools():
        return
    if os.environ.get(PYTHON_VARIABLE):
        raise Unsupported(
            f"{PYTHON_VARIABLE} names a Python without litert-torch and ai-edge-quantizer: {python()}.",
            f"Run: {python()} -m pip install 'shoal[{EXTRA}]'",
        )
    raise Unsupported(
        "litert-torch and ai-edge-quantizer, which make .tflite files, are not installed here.",
        f"Install 'shoal[{EXTRA}]' in a Python of its own and set {PYTHON_VARIABLE} to that python.",
    )


def _run(step: str, folder: Path) -> Mapping[str, str]:
    """Runs one step in a process of its own: its tools print to stdout and keep much memory.

    Returns:
        Versions of the tools.
    """
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    if python() != sys.executable:  # our packages are not the other one's
        for variable in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"):
            environment.pop(variable, None)
    done = subprocess.run(
        [python(), str(Path(steps.__file__)), step, str(folder)],
        capture_output=True,
        check=False,
        stdin=subprocess.DEVNULL,
        env=environment,
        timeout=STEP_LIMIT_S,
    )
    if done.returncode != 0:
        lines = [line for line in done.stderr.decode(errors="replace").splitlines() if line.strip()]
        errors = [line for line in lines if _ERROR.match(line)] or lines or ["no reason given"]
        raise InvalidInput(
            f"LiteRT's tools cannot {step} the model: {errors[-1][:300]}",
            "Leave litert out for this model: devices with onnxruntime or openvino are served as well.",
        )
    found: dict[str, str] = json.loads((folder / steps.FACTS).read_text())
    return found


# ---------------------------------------------------------------------------- float

_files: OrderedDict[str, tuple[bytes, dict[str, Any]]] = OrderedDict()


def float_file(model: nn.Module, task: Task) -> tuple[bytes, dict[str, Any]]:
    """The fp32 `.tflite` of preprocess, `model`, postprocess with its facts; made once for equal content.

    It takes seconds and every int8 form starts from it, so it is kept as `float_graph` keeps ONNX.
    """
    from shoal_optimizer.targets.onnx import fingerprint

    key = fingerprint(model, task)
    path = task.cache_dir / f"litert-{key}.tflite" if task.cache_dir else None
    if key not in _files:
        if path is not None and path.is_file():
            _files[key] = (path.read_bytes(), {})
        else:
            _files[key] = _convert(model, task)
        while len(_files) > _CACHED_FILES:
            _files.popitem(last=False)
    content, facts = _files[key]
    if path is not None and not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".tmp{os.getpid()}")
        partial.write_bytes(content)
        partial.replace(path)
    return content, facts


def _convert(model: nn.Module, task: Task) -> tuple[bytes, dict[str, Any]]:
    import torch

    from shoal_optimizer.modules import Pipeline

    pipeline = Pipeline(task.pre, model, task.post).eval()
    items = np.ascontiguousarray(task.required("evaluation").inputs[:1])
    with tempfile.TemporaryDirectory(prefix="shoal-litert-") as name:
        folder = Path(name)
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            program = torch.export.export(pipeline, (torch.from_numpy(items),))
            torch.export.save(program, str(folder / steps.PROGRAM))
        _write_job(folder, task, items)
        versions = _run("convert", folder)
        return (folder / steps.FLOAT).read_bytes(), {"tools": dict(versions)}


def _write_job(folder: Path, task: Task, items: np.ndarray, dynamic: bool = False) -> None:
    signature = task.signature
    job = {"input": signature.inputs[0].name, "output": signature.outputs[0].name, "dynamic": dynamic}
    (folder / steps.JOB).write_text(json.dumps(job))
    np.save(folder / steps.CALIBRATION, np.ascontiguousarray(items), allow_pickle=False)


# ---------------------------------------------------------------------------- int8


def quantized_file(content: bytes, task: Task, calibration: Calibration) -> tuple[bytes, dict[str, Any]]:
    """The int8 form of a float file with its facts."""
    dynamic = calibration.method == "dynamic"
    state = hashlib.sha256(content)
    state.update(calibration.method.encode())
    if not dynamic:
        state.update(np.ascontiguousarray(calibration.inputs).tobytes())
    key = state.hexdigest()[:32]
    if key not in _files:
        with tempfile.TemporaryDirectory(prefix="shoal-litert-") as name:
            folder = Path(name)
            (folder / steps.FLOAT).write_bytes(content)
            _write_job(folder, task, calibration.inputs[:1] if dynamic else calibration.inputs, dynamic)
            versions = _run("quantize", folder)
            facts = {
                "tools": dict(versions),
                "activations": "dynamic" if dynamic else "int8",
                "weights": "int8",
            }
            _files[key] = ((folder / steps.INT8).read_bytes(), facts)
    return _files[key]
