"""What a competent user would do by hand with a model: the documented ways, each in a few lines.

The file is taken as it comes. Every way is tried on every model, and one that fails says why.
"""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

Feed = dict[str, np.ndarray[Any, Any]]
Run = Callable[[Feed], np.ndarray[Any, Any]]


@dataclass(frozen=True)
class Case:
    """A model as a user has it: its file, feeds of single items to calibrate with, the judged output."""

    model: Path
    calibration: list[Feed]
    output: str


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    logging.disable(logging.WARNING)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


# ---------------------------------------------------------------------------- making


def onnxruntime_int8(case: Case, target: Path, *, fast: bool) -> None:
    """quant_pre_process, then quantize_static: its defaults, or (`fast`) what its documentation asks of x86
    with VNNI: unsigned activations and one scale a channel."""
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._left = iter(case.calibration)

        def get_next(self) -> Feed | None:
            return next(self._left, None)

    options: dict[str, Any] = {}
    if fast:
        options = {
            "activation_type": QuantType.QUInt8,
            "weight_type": QuantType.QInt8,
            "per_channel": True,
        }
    with tempfile.TemporaryDirectory() as folder, quiet():
        prepared = Path(folder) / "prepared.onnx"
        try:
            quant_pre_process(str(case.model), str(prepared))
        except Exception:  # symbolic shapes fail on some models; its message says to skip them
            quant_pre_process(str(case.model), str(prepared), skip_symbolic_shape=True)
        quantize_static(str(prepared), str(target), Reader(), **options)
        if fast and not _loads(target):  # 1.32 writes files that it refuses; one scale a tensor then
            quantize_static(str(prepared), str(target), Reader(), **{**options, "per_channel": False})


def _loads(file: Path) -> bool:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    except Exception:
        return False
    return True


def nncf_openvino(case: Case, target: Path) -> None:
    """nncf.quantize with its defaults on the model that OpenVINO reads."""
    import nncf
    import openvino

    with quiet():
        model = openvino.Core().read_model(str(case.model))
        made = nncf.quantize(model, nncf.Dataset(case.calibration))
        openvino.save_model(made, str(target))


WAYS: dict[str, tuple[str, str, Callable[[Case, Path], None] | None]] = {
    # name: (runtime, file's suffix, how it is made; None = the file as it comes)
    "onnxruntime fp32": ("onnxruntime", ".onnx", None),
    "openvino fp32": ("openvino", ".onnx", None),
    "onnxruntime static int8, defaults": (
        "onnxruntime",
        ".onnx",
        lambda case, target: onnxruntime_int8(case, target, fast=False),
    ),
    "onnxruntime static int8, U8S8": (
        "onnxruntime",
        ".onnx",
        lambda case, target: onnxruntime_int8(case, target, fast=True),
    ),
    "nncf on openvino": ("openvino", ".xml", nncf_openvino),
}


# ---------------------------------------------------------------------------- running


def load(runtime: str, file: Path, output: str) -> Run:
    """One thread, as each runtime's documentation sets it."""
    return _onnxruntime(file, output) if runtime == "onnxruntime" else _openvino(file, output)


def _onnxruntime(file: Path, output: str) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    return lambda feed: session.run([output], feed)[0]  # type: ignore[no-any-return]


def _openvino(file: Path, output: str) -> Run:
    import openvino

    core = openvino.Core()
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": "1",
        "NUM_STREAMS": "1",
        "INFERENCE_PRECISION_HINT": "f32",
        "ENABLE_CPU_PINNING": "NO",
    }
    compiled = core.compile_model(core.read_model(str(file)), "CPU", settings)
    request = compiled.create_infer_request()
    port = next(p for p in compiled.outputs if output in p.get_names())

    def run(feed: Feed) -> np.ndarray[Any, Any]:
        request.infer(feed, share_inputs=True)
        return np.array(request.get_tensor(port).data)

    return run
