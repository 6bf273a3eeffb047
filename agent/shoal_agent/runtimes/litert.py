"""LiteRT (TensorFlow Lite) on the CPU: `.tflite` files, by `ai-edge-litert` or the older `tflite-runtime`."""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from types import ModuleType
from typing import Any

import numpy as np

from shoal_agent.runtimes.base import Facts, Instance, Options, Runtime, reason, share
from shoal_agent.runtimes.tensors import Array, check_model, datatype_of
from shoal_protos.bundle import Bundle
from shoal_protos.errors import InvalidInput, MissingExtra, ShoalError, Unavailable

DELEGATE = "XNNPACK"
PLAIN = "CPU"
XNNPACK_OPTION = "xnnpack"  # of `Options.extra`: "0" runs LiteRT's own kernels
_DISTRIBUTIONS = {"ai_edge_litert": "ai-edge-litert", "tflite_runtime": "tflite-runtime"}
_COMPUTE_OPS = frozenset(
    (
        "CONV_2D",
        "DEPTHWISE_CONV_2D",
        "TRANSPOSE_CONV",
        "CONV_3D",
        "FULLY_CONNECTED",
        "BATCH_MATMUL",
        "UNIDIRECTIONAL_SEQUENCE_LSTM",
    )
)
_WEIGHTS = 1  # which input of a compute op holds its weights
_INT8 = frozenset((np.dtype(np.int8), np.dtype(np.uint8)))


def _module() -> ModuleType:
    try:
        from ai_edge_litert import interpreter
    except ImportError:
        try:
            from tflite_runtime import interpreter
        except ImportError as error:
            raise MissingExtra("litert", "ai-edge-litert") from error
    return interpreter  # type: ignore[no-any-return]


@dataclass(frozen=True)
class _Port:
    """One tensor of the model's signature. `batch`: 0 = any number of items at once, else the only one."""

    index: int
    datatype: str
    shape: tuple[int, ...]
    batch: int


class LiteRt(Runtime):
    """The only key of `Options.extra` is "xnnpack": "0" leaves its faster kernels out."""

    name = "litert"

    def version(self) -> str:
        module = _module()
        return metadata.version(_DISTRIBUTIONS[module.__name__.partition(".")[0]])

    def providers(self) -> tuple[str, ...]:
        _module()
        return (PLAIN,)

    def _load(self, bundle: Bundle, options: Options) -> Instance:
        return LiteRtInstance(bundle, options, self.version())


class LiteRtInstance(Instance):
    """An interpreter runs one inference at a time, so each running thread borrows one."""

    def __init__(self, bundle: Bundle, options: Options, version: str) -> None:
        self._path = str(bundle.model_file)
        self._options = options
        self._version = version
        self._signature = bundle.config.signature
        self._precision = bundle.config.runtime.precision
        self._lock = threading.Lock()
        self._facts: Facts | None = None
        first = self._interpreter()
        self._inputs, self._outputs = _ports(first)
        check_model(self._signature, _tensors(self._inputs), _tensors(self._outputs))
        # A model of a fixed batch of one answers a larger one item by item.
        self._single = any(
            port.batch and spec.shape and spec.shape[0] == -1
            for spec in self._signature.inputs
            for port in (self._inputs[spec.name],)
        )
        self._idle: list[_Borrowed] | None = [_Borrowed(first)]

    def _interpreter(self) -> Any:
        """A new interpreter with its memory planned; the file is mapped, so weights are shared."""
        module = _module()
        more: dict[str, Any] = {}
        if not _xnnpack(self._options):
            more["experimental_op_resolver_type"] = module.OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
        made = module.Interpreter(model_path=self._path, num_threads=self._options.threads or None, **more)
        made.allocate_tensors()
        return made

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        count = self._items(inputs)
        borrowed = self._borrow(count)
        try:
            if self._single and count != 1:
                answers = self._one_by_one(borrowed.interpreter, inputs, count)
            else:
                if not self._single:
                    borrowed.resize(inputs, self._inputs, count)
                answers = self._invoke(borrowed.interpreter, inputs)
        except ShoalError:
            raise
        except Exception as error:
            # Its state is unknown now: it is not given back.
            raise InvalidInput(f"litert refused the request: {reason(error)}") from error
        with self._lock:
            if self._idle is not None:
                self._idle.append(borrowed)
        return answers

    def _items(self, inputs: Mapping[str, Array]) -> int:
        for spec in self._signature.inputs:
            if spec.shape and spec.shape[0] == -1 and spec.name in inputs:
                return len(inputs[spec.name])
        return 1

    def _borrow(self, count: int) -> _Borrowed:
        """An idle interpreter, best one that is planned for this batch already."""
        with self._lock:
            if self._idle is None:
                raise Unavailable("The model was unloaded.")
            if self._idle:
                place = next((i for i, item in enumerate(self._idle) if item.count == count), -1)
                return self._idle.pop(place)
        return _Borrowed(self._interpreter())

    def _one_by_one(self, interpreter: Any, inputs: Mapping[str, Array], count: int) -> dict[str, Array]:
        open_batch = {spec.name for spec in self._signature.inputs if spec.shape and spec.shape[0] == -1}
        parts = [
            self._invoke(
                interpreter,
                {name: value[i : i + 1] if name in open_batch else value for name, value in inputs.items()},
            )
            for i in range(count)
        ]
        return {name: np.concatenate([part[name] for part in parts]) for name in self._outputs}

    def _invoke(self, interpreter: Any, inputs: Mapping[str, Array]) -> dict[str, Array]:
        for name, value in inputs.items():
            interpreter.set_tensor(self._inputs[name].index, value)
        interpreter.invoke()
        return {name: interpreter.get_tensor(port.index) for name, port in self._outputs.items()}

    def facts(self) -> Facts:
        with self._lock:
            if self._facts is None:
                interpreter = self._interpreter()
                operations = interpreter._get_ops_details()
                delegated = any(operation["op_name"] == "DELEGATE" for operation in operations)
                self._facts = Facts(
                    "litert",
                    self._version,
                    DELEGATE if delegated else PLAIN,
                    self._options.threads,
                    *(_int8_share(interpreter, operations) if self._precision == "int8" else (math.nan, ())),
                )
            return self._facts

    def close(self) -> None:
        with self._lock:
            self._idle = None


class _Borrowed:
    """An interpreter and the batch that its memory is planned for (0 = as the file says)."""

    def __init__(self, interpreter: Any) -> None:
        self.interpreter = interpreter
        self.count = 0

    def resize(self, inputs: Mapping[str, Array], ports: Mapping[str, _Port], count: int) -> None:
        if count == self.count:
            return
        for name, value in inputs.items():
            if not ports[name].batch:
                self.interpreter.resize_tensor_input(ports[name].index, list(value.shape), strict=True)
        self.interpreter.allocate_tensors()
        self.count = count


def _xnnpack(options: Options) -> bool:
    unknown = sorted(set(options.extra) - {XNNPACK_OPTION})
    if unknown:
        raise InvalidInput(f"litert has no option '{unknown[0][:40]}'.", f"It has {XNNPACK_OPTION}=0 or 1.")
    return options.extra.get(XNNPACK_OPTION, "1") != "0"


def _ports(interpreter: Any) -> tuple[dict[str, _Port], dict[str, _Port]]:
    """Inputs and outputs by the names of the file's signature; by tensor names where it has none."""
    inputs, outputs = interpreter.get_input_details(), interpreter.get_output_details()
    names = sorted(interpreter.get_signature_list())
    if len(names) > 1:
        raise InvalidInput(
            f"The model has {len(names)} signatures: {', '.join(names)[:200]}.", "Export it with one."
        )
    if not names:
        return {d["name"]: _port(d) for d in inputs}, {d["name"]: _port(d) for d in outputs}
    runner = interpreter.get_signature_runner(names[0])
    return (
        {name: _port(details) for name, details in runner.get_input_details().items()},
        {name: _port(details) for name, details in runner.get_output_details().items()},
    )


def _port(details: Mapping[str, Any]) -> _Port:
    shape = tuple(int(size) for size in details["shape_signature"])
    if not len(shape):  # a file that leaves no dimension open need not repeat its shape
        shape = tuple(int(size) for size in details["shape"])
    datatype = datatype_of(np.dtype(details["dtype"]))
    return _Port(int(details["index"]), datatype, shape, shape[0] if shape and shape[0] > 0 else 0)


def _tensors(ports: Mapping[str, _Port]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """What the file promises; a batch of one counts as open, for it is repeated."""
    return {
        name: (port.datatype, (-1 if port.batch == 1 else port.batch or -1, *port.shape[1:]))
        if port.shape
        else (port.datatype, ())
        for name, port in ports.items()
    }


def _int8_share(interpreter: Any, operations: list[Any]) -> tuple[float, tuple[str, ...]]:
    """Share of convolutions and matrix products whose weights are int8 when they run, and the others'
    kinds with the names of what they give.

    Weights that are stored as int8 but made float first reach their operation as float.
    """
    tensors = {details["index"]: details for details in interpreter.get_tensor_details()}
    compute = [operation for operation in operations if operation["op_name"] in _COMPUTE_OPS]
    floating = []
    for operation in compute:
        weights = tensors.get(operation["inputs"][_WEIGHTS])
        if weights is None or np.dtype(weights["dtype"]) not in _INT8:
            made = tensors.get(operation["outputs"][0])
            floating.append(f"{operation['op_name']} {made['name'] if made else ''}".strip())
    return share(len(compute) - len(floating), len(floating)), tuple(floating)
