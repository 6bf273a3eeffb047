"""ONNX Runtime on the CPU."""

from __future__ import annotations

import math
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from shoal_agent.runtimes import graph
from shoal_agent.runtimes.base import Facts, Instance, Options, Runtime, reason, share
from shoal_agent.runtimes.tensors import Array, check_model
from shoal_protos.bundle import Bundle
from shoal_protos.errors import InvalidInput, MissingExtra, Unavailable

CPU = "CPUExecutionProvider"
_INT8_OPS = frozenset(
    (
        "QLinearConv",
        "QLinearConvTranspose",
        "QGemm",
        "QLinearMatMul",
        "ConvInteger",
        "MatMulInteger",
        "MatMulIntegerToFloat",
        "DynamicQuantizeMatMul",
        "DynamicQuantizeLSTM",
        "QAttention",
    )
)
_FLOAT_OPS = frozenset(
    (
        "Conv",
        "FusedConv",
        "NhwcFusedConv",
        "ConvTranspose",
        "Gemm",
        "FusedGemm",
        "MatMul",
        "FusedMatMul",
        "Attention",
        "MultiHeadAttention",
        "LSTM",
        "GRU",
        "RNN",
    )
)
_TYPES = {
    "tensor(bool)": "BOOL",
    "tensor(uint8)": "UINT8",
    "tensor(uint16)": "UINT16",
    "tensor(uint32)": "UINT32",
    "tensor(uint64)": "UINT64",
    "tensor(int8)": "INT8",
    "tensor(int16)": "INT16",
    "tensor(int32)": "INT32",
    "tensor(int64)": "INT64",
    "tensor(float16)": "FP16",
    "tensor(float)": "FP32",
    "tensor(double)": "FP64",
}


def _module() -> ModuleType:
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingExtra("onnxruntime", "onnxruntime") from error
    return onnxruntime  # type: ignore[no-any-return]


def _session_options(options: Options) -> Any:
    module = _module()
    settings = module.SessionOptions()
    settings.intra_op_num_threads = options.threads
    settings.inter_op_num_threads = 1
    settings.log_severity_level = 3  # errors reach us as exceptions
    # Spinning threads would burn a core that the application needs.
    settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
    for key, value in options.passed.items():
        settings.add_session_config_entry(key, value)
    return settings


def _tensors(nodes: Any) -> dict[str, tuple[str, list[int]]]:
    return {
        node.name: (
            _TYPES.get(node.type, node.type),
            [size if isinstance(size, int) else -1 for size in node.shape],
        )
        for node in nodes
    }


class OnnxRuntime(Runtime):
    """Loads `.onnx` files, weights inside. `Options.extra` are session configuration entries,
    and `provider` one of its execution providers."""

    name = "onnxruntime"

    def version(self) -> str:
        return str(_module().__version__)

    def providers(self) -> tuple[str, ...]:
        return tuple(_module().get_available_providers())

    def _load(self, bundle: Bundle, options: Options) -> Instance:
        module = _module()
        provider = options.provider(CPU, self.providers())
        session = module.InferenceSession(
            str(bundle.model_file),
            _session_options(options),
            providers=[provider, CPU] if provider != CPU else [CPU],
            enable_fallback=False,
        )
        check_model(bundle.config.signature, _tensors(session.get_inputs()), _tensors(session.get_outputs()))
        return OnnxRuntimeInstance(session, bundle, options)


class OnnxRuntimeInstance(Instance):
    def __init__(self, session: Any, bundle: Bundle, options: Options) -> None:
        self._session: Any = session
        self._bundle = bundle
        self._options = options
        self._outputs = [node.name for node in session.get_outputs()]
        self._facts: Facts | None = None
        self._lock = threading.Lock()

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        session = self._session
        if session is None:
            raise Unavailable("The model was unloaded.")
        try:
            values = session.run(self._outputs, inputs)
        except Exception as error:
            raise InvalidInput(f"onnxruntime refused the request: {reason(error)}") from error
        return dict(zip(self._outputs, values, strict=True))

    def facts(self) -> Facts:
        with self._lock:
            if self._facts is None:
                self._facts = Facts(
                    "onnxruntime",
                    str(_module().__version__),
                    self._session.get_providers()[0] if self._session is not None else CPU,
                    self._options.threads,
                    *self._int8_share(),
                )
            return self._facts

    def _int8_share(self) -> tuple[float, tuple[str, ...]]:
        """The share, and the names of the operations that stayed in float."""
        if self._bundle.config.runtime.precision != "int8":
            return math.nan, ()
        with tempfile.TemporaryDirectory(prefix="shoal-graph-") as folder:
            target = Path(folder) / "optimized.onnx"
            settings = _session_options(self._options)
            settings.optimized_model_filepath = str(target)
            _module().InferenceSession(str(self._bundle.model_file), settings, providers=[CPU])
            nodes = graph.operators(target.read_bytes())
        floating = tuple(name for kind, name in nodes if kind in _FLOAT_OPS)
        return share(sum(1 for kind, _ in nodes if kind in _INT8_OPS), len(floating)), floating

    def close(self) -> None:
        self._session = None
