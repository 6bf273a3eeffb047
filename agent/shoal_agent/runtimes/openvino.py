"""OpenVINO on the CPU: IR (`.xml` and `.bin`) and ONNX files."""

from __future__ import annotations

import contextlib
import math
import tempfile
import threading
from collections import deque
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from shoal_agent.runtimes.base import Facts, Instance, Options, Runtime, reason, share
from shoal_agent.runtimes.tensors import Array, check_model
from shoal_protos.bundle import Bundle, blob_path
from shoal_protos.errors import InvalidInput, MissingExtra, Unavailable

DEVICE = "CPU"
_COMPUTE_LAYERS = frozenset(
    (
        "Convolution",
        "GroupConvolution",
        "Deconvolution",
        "FullyConnected",
        "MatMul",
        "LSTMCell",
        "LSTMSequence",
        "RNNSeq",
    )
)
_INT8 = frozenset(("i8", "u8"))
_TYPES = {
    "boolean": "BOOL",
    "u8": "UINT8",
    "u16": "UINT16",
    "u32": "UINT32",
    "u64": "UINT64",
    "i8": "INT8",
    "i16": "INT16",
    "i32": "INT32",
    "i64": "INT64",
    "f16": "FP16",
    "f32": "FP32",
    "f64": "FP64",
}


def _module() -> ModuleType:
    try:
        import openvino
    except ImportError as error:
        raise MissingExtra("openvino", "openvino") from error
    return openvino  # type: ignore[no-any-return]


_core_lock = threading.Lock()
_core: Any = None


def _shared_core() -> Any:
    """One core a process: making one scans for plug-ins."""
    global _core
    with _core_lock:
        if _core is None:
            _core = _module().Core()
        return _core


def _configuration(options: Options) -> dict[str, str]:
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": "1",
        # A bundle says its precision; a silent bf16 would not be the variant that was judged.
        "INFERENCE_PRECISION_HINT": "f32",
        "ENABLE_CPU_PINNING": "NO",
    }
    if options.threads:
        settings["INFERENCE_NUM_THREADS"] = str(options.threads)
    settings.update(options.passed)
    return settings


def _tensors(ports: Iterable[Any]) -> dict[str, tuple[str, list[int]]]:
    found = {}
    for port in ports:
        kind = port.element_type.get_type_name()
        shape = [size.get_length() if size.is_static else -1 for size in port.partial_shape]
        found[_name(port)] = (_TYPES.get(kind, kind), shape)
    return found


def _name(port: Any, wanted: Collection[str] = ()) -> str:
    """A port may carry several names; the signature's is the one that was set at export. Compiling may add
    names of operations that became one; `wanted` ones win."""
    names = set(port.get_names())
    known = names & set(wanted)
    if known:
        return str(min(known))
    return str(port.get_any_name()) if names else ""


class OpenVino(Runtime):
    """`Options.extra` are OpenVINO properties by their text names."""

    name = "openvino"

    def version(self) -> str:
        return str(_module().__version__).split("-", 1)[0]

    def providers(self) -> tuple[str, ...]:
        return tuple(_shared_core().available_devices)

    def _load(self, bundle: Bundle, options: Options) -> Instance:
        core = _shared_core()
        # Blobs are named by digest; OpenVINO finds reader and weights by file name.
        with tempfile.TemporaryDirectory(prefix="shoal-openvino-") as folder:
            for layer in bundle.manifest.layers:
                target = blob_path(bundle.path, layer.digest).resolve()
                (Path(folder) / layer.title).symlink_to(target)
            model = core.read_model(str(Path(folder) / bundle.config.runtime.model_file))
            _rename(model, bundle)
            check_model(bundle.config.signature, _tensors(model.inputs), _tensors(model.outputs))
            compiled = core.compile_model(
                model, options.provider(DEVICE, self.providers()), _configuration(options)
            )
        return OpenVinoInstance(compiled, bundle, options, single_model(model))


def single_model(model: Any) -> tuple[Any, Mapping[int, list[int]]] | None:
    """A clone of `model` and its inputs' shapes for one item; None where not just the batch is open.

    With shapes known, OpenVINO plans memory and kernels when it compiles instead of at each call: one item
    took 11 to 23 % less time on nine measured networks. The weights are the model's own, not copied.
    """
    shapes = {}
    for place, port in enumerate(model.inputs):
        sizes = list(port.partial_shape)
        if not sizes or sizes[0].is_static or any(size.is_dynamic for size in sizes[1:]):
            return None
        shapes[place] = [1, *(size.get_length() for size in sizes[1:])]
    return (model.clone(), shapes) if shapes else None


def _rename(model: Any, bundle: Bundle) -> None:
    """Where a port has several names and the signature's is among them, keeps that one."""
    signature = bundle.config.signature
    for ports, specs in ((model.inputs, signature.inputs), (model.outputs, signature.outputs)):
        wanted = {spec.name for spec in specs}
        for port in ports:
            known = wanted & set(port.get_names())
            if len(known) == 1 and len(port.get_names()) > 1:
                port.get_tensor().set_names(known)


class _Single:
    """The model for one item, compiled when the first one comes.

    Inputs are copied into the request's own tensors: handing over arrays without a copy costs more up to
    150 kB (3 to 5 us each against 0.5 to 5), keeps the caller's array after the call, and isn't possible
    for read-only ones.
    """

    def __init__(
        self, source: tuple[Any, Mapping[int, list[int]]], options: Options, inputs: Collection[str]
    ) -> None:
        self._inputs = inputs  # names in the signature
        self._source: tuple[Any, Mapping[int, list[int]]] | None = source
        self._options = options
        self._compiled: Any = None
        self._idle: deque[_SingleRequest] = deque()
        self._lock = threading.Lock()

    def borrow(self) -> _SingleRequest | None:
        """A request of one's own; None where there is no such model, or another thread compiles it."""
        try:
            return self._idle.pop()
        except IndexError:
            pass
        if self._compiled is None and not self._compile():
            return None
        return _SingleRequest(self._compiled.create_infer_request(), self._inputs)

    def give_back(self, request: _SingleRequest) -> None:
        self._idle.append(request)

    def _compile(self) -> bool:
        if not self._lock.acquire(blocking=False):
            return False
        try:
            if self._compiled is None and self._source is not None:
                model, shapes = self._source
                self._source = None  # also after a failure: the model with an open batch answers as well
                with contextlib.suppress(RuntimeError):
                    model.reshape(shapes)
                    self._compiled = _shared_core().compile_model(
                        model,
                        self._options.provider(DEVICE, OpenVino().providers()),
                        _configuration(self._options),
                    )
            return self._compiled is not None
        finally:
            self._lock.release()


class _SingleRequest:
    def __init__(self, request: Any, wanted: Collection[str]) -> None:
        self._request = request
        self._inputs = [
            (_name(port, wanted), request.get_input_tensor(place).data)
            for place, port in enumerate(request.model_inputs)
        ]

    def run(self, inputs: Mapping[str, Array], outputs: list[str]) -> dict[str, Array]:
        for name, own in self._inputs:
            given = inputs[name]
            if given.shape != own.shape:
                raise ValueError(f"'{name}' has shape {list(given.shape)}, not {list(own.shape)}")
            np.copyto(own, given, casting="no")
        self._request.infer(None, share_outputs=True)
        return {
            name: np.array(self._request.get_output_tensor(place).data) for place, name in enumerate(outputs)
        }


class OpenVinoInstance(Instance):
    def __init__(
        self,
        compiled: Any,
        bundle: Bundle,
        options: Options,
        single: tuple[Any, Mapping[int, list[int]]] | None = None,
    ) -> None:
        """
        Args:
            single: what `single_model` gave.
        """
        self._compiled: Any = compiled
        names = {spec.name for spec in bundle.config.signature.inputs}
        self._single = None if single is None else _Single(single, options, names)
        self._precision = bundle.config.runtime.precision
        self._options = options
        wanted = {spec.name for spec in bundle.config.signature.outputs}
        self._outputs = [_name(port, wanted) for port in compiled.outputs]
        # An infer request runs one inference at a time: each running thread borrows one.
        self._idle: deque[Any] = deque()
        self._facts: Facts | None = None
        self._lock = threading.Lock()

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        compiled, single = self._compiled, self._single
        if compiled is None:
            raise Unavailable("The model was unloaded.")
        try:
            if single is not None and all(len(value) == 1 for value in inputs.values()):
                request = single.borrow()
                if request is not None:
                    try:
                        return request.run(inputs, self._outputs)
                    finally:
                        single.give_back(request)
            return self._run_batch(compiled, inputs)
        except Exception as error:
            raise InvalidInput(f"openvino refused the request: {reason(error)}") from error

    def _run_batch(self, compiled: Any, inputs: Mapping[str, Array]) -> dict[str, Array]:
        try:
            request = self._idle.pop()
        except IndexError:
            request = compiled.create_infer_request()
        try:
            # Without a copy where the array is writable: shared inputs are only read.
            request.infer(inputs, share_inputs=True, share_outputs=True)
            # Into arrays that the caller owns: the request's own tensors are written again.
            return {
                name: np.array(request.get_output_tensor(place).data)
                for place, name in enumerate(self._outputs)
            }
        finally:
            self._idle.append(request)

    def facts(self) -> Facts:
        with self._lock:
            if self._facts is None:
                self._facts = Facts(
                    "openvino",
                    str(_module().__version__).split("-", 1)[0],
                    self._options.extra.get("provider", DEVICE),
                    self._options.threads,
                    *self._int8_share(),
                )
            return self._facts

    def _int8_share(self) -> tuple[float, tuple[str, ...]]:
        """The share, and the names of the operations that stayed in float."""
        if self._precision != "int8" or self._compiled is None:
            return math.nan, ()
        quantized = 0
        floating = []
        for operation in self._compiled.get_runtime_model().get_ordered_ops():
            details = operation.get_rt_info()
            if _text(details, "layerType") in _COMPUTE_LAYERS:
                if _text(details, "runtimePrecision") in _INT8:
                    quantized += 1
                else:
                    floating.append(str(operation.get_friendly_name()))
        return share(quantized, len(floating)), tuple(floating)

    def close(self) -> None:
        self._compiled = self._single = None
        self._idle.clear()


def _text(details: Any, key: str) -> str:
    try:
        return str(details[key].astype(str) if hasattr(details[key], "astype") else details[key])
    except (KeyError, RuntimeError):
        return ""
