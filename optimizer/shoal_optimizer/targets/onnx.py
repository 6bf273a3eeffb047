"""ONNX Runtime: float ONNX, and static int8 as QDQ placed by ONNX Runtime's own quantizer."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from shoal_optimizer.targets import dynamic, pinned, qdq, reverting, weights_only
from shoal_optimizer.targets.base import Calibration, ClassSpec, Exported, Target
from shoal_protos.bundle import RuntimeNeed

if TYPE_CHECKING:
    from torch import nn

    from shoal_optimizer.task import Task

OPSET = 20
OLDEST_OPSET = 17  # a user's older ONNX file is converted to it
IR_VERSION = 10  # onnxruntime 1.20, the oldest that the extra allows, reads it
RUNTIME_MIN = "1.20"
MODEL_FILE = "model.onnx"
FLOAT_PARTS = ("preprocess", "postprocess")
_CACHED_GRAPHS = 16
_TOOL_METADATA = ("onnx.", "pkg.")  # quantizers' and exporters' marks
_CALIBRATION_BATCH = 32


class OnnxTarget(Target):
    """Exports through torch's exporter; the endpoint's own input goes in, casts and layout inside.

    int8 is static QDQ with per-channel weights: U8S8 on x86 (S8S8 is several times slower there),
    with 7-bit weights where the class lacks VNNI (its 16-bit sums saturate), S8S8 on Arm.
    """

    name: ClassVar[str] = "onnxruntime"
    precisions: ClassVar[tuple[str, ...]] = ("fp32", "int8", *weights_only.PRECISIONS)
    dynamic: ClassVar[bool] = True

    def __init__(self, judged_in: str = "") -> None:
        """`judged_in`: the runtime in which `max_drop` has to hold, where it isn't ONNX Runtime."""
        self._judged_in = judged_in or self.name

    def convert(
        self,
        model: nn.Module | None,
        task: Task,
        precision: str,
        calibration: Calibration | None,
        class_spec: ClassSpec,
    ) -> Exported:
        graph = float_graph(model, task)
        isa: tuple[str, ...] = ()
        facts: dict[str, Any] = {"opset": OPSET}
        if precision == "int8":
            assert calibration is not None
            scheme = Scheme.of(class_spec)
            graph, found = int8_graph(graph, task, calibration, scheme, self._judged_in)
            isa = scheme.isa
            facts |= scheme.facts() | found
        elif precision != "fp32":
            graph = weights_only.converted(graph, precision, excluded_nodes(graph))
        need = RuntimeNeed(self.name, MODEL_FILE, version_min=RUNTIME_MIN, isa=isa, precision=precision)
        return Exported({MODEL_FILE: strip(graph)}, need, precision, task.signature, facts)


class Scheme:
    """The int8 types that a class runs fast and without saturation.

    `isa` is what a device must have for the file to be right: full-range weights overflow on x86
    without VNNI, so they must not reach such a device.
    """

    def __init__(self, signed_activations: bool, reduce_range: bool, isa: tuple[str, ...]) -> None:
        self.signed_activations = signed_activations
        self.reduce_range = reduce_range
        self.isa = isa

    @classmethod
    def of(cls, spec: ClassSpec) -> Scheme:
        if spec.arm:
            return cls(True, False, ("neon",) if "neon" in spec.isa else ())
        return cls(False, not spec.vnni, (spec.vnni,) if spec.vnni else ())

    def facts(self) -> dict[str, Any]:
        return {
            "activations": "int8" if self.signed_activations else "uint8",
            "weights": "int8",
            "reduce_range": self.reduce_range,
        }


# ---------------------------------------------------------------------------- float graph

_graphs: OrderedDict[str, bytes] = OrderedDict()


def float_graph(model: nn.Module | None, task: Task) -> bytes:
    """The fp32 ONNX of preprocess, `model`, postprocess; exported once for equal content.

    The exporter takes seconds, so its result is kept in memory and, if the task has one, in its cache
    directory. An ONNX task gives its own file.
    """
    if model is None or not task.has_module:
        return _modern(task.onnx_file.read_bytes())
    key = fingerprint(model, task)
    path = task.cache_dir / f"graph-{key}.onnx" if task.cache_dir else None
    stored = path is not None and path.is_file()
    if key not in _graphs:
        _graphs[key] = path.read_bytes() if path is not None and stored else _export(model, task)
        while len(_graphs) > _CACHED_GRAPHS:
            _graphs.popitem(last=False)
    if path is not None and not stored:
        _write(path, _graphs[key])
    return _graphs[key]


def _modern(graph: bytes) -> bytes:
    """A user's graph in an opset that has per-channel scales (13) and that every runtime reads."""
    import onnx
    from onnx import version_converter

    model = onnx.load_from_string(graph)
    versions = {item.domain: item.version for item in model.opset_import}
    if versions.get("", OLDEST_OPSET) >= OLDEST_OPSET:
        return graph
    content: bytes = version_converter.convert_version(model, OLDEST_OPSET).SerializeToString()
    return content


def fingerprint(model: nn.Module, task: Task) -> str:
    """Digest (32 hex digits) of structure, weights, code and signature: equal ones export equally."""
    state = hashlib.sha256(repr((task.pre, model, task.post, task.input, OPSET)).encode())
    if task.source.is_file():
        state.update(task.source.read_bytes())
    for module in (task.pre, model, task.post):
        for name, tensor in module.state_dict().items():
            state.update(name.encode())
            state.update(np.ascontiguousarray(tensor.detach().cpu().numpy()).tobytes())
    return state.hexdigest()[:32]


def _export(model: nn.Module, task: Task) -> bytes:
    import torch

    from shoal_optimizer.modules import Pipeline

    signature = task.signature
    pipeline = Pipeline(task.pre, model, task.post).eval()
    # Two items: the exporter would take a single one for a constant batch.
    items = task.required("evaluation").inputs
    example = torch.from_numpy(np.ascontiguousarray(items[np.arange(2) % len(items)]))
    with quiet(), torch.no_grad():
        program = torch.onnx.export(
            pipeline,
            (example,),
            dynamo=True,
            verbose=False,
            opset_version=OPSET,
            external_data=False,
            input_names=[signature.inputs[0].name],
            output_names=[signature.outputs[0].name],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
        )
    assert program is not None
    proto = program.model_proto
    proto.ir_version = min(proto.ir_version, IR_VERSION)
    content: bytes = proto.SerializeToString(deterministic=True)
    return content


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silences the exporter's warnings and log lines; its errors still raise."""
    talkative = ("torch.onnx", "onnxscript", "onnx_ir", "torch.export", "onnxruntime.quantization")
    loggers = [logging.getLogger(name) for name in talkative]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


# ---------------------------------------------------------------------------- int8


def int8_graph(
    graph: bytes, task: Task, calibration: Calibration, scheme: Scheme, runtime: str
) -> tuple[bytes, dict[str, Any]]:
    """The int8 form of a float graph with at most `calibration.max_drop` of the metric lost in `runtime`.

    Returns:
        The graph, and facts: "method", "pinned" (number of learned ranges in it), "keep_float" (weighted
        layers that stay in float), and of layers that went back to float what `reverting.within` tells.
    """
    facts: dict[str, Any] = {"method": calibration.method}
    if calibration.pinned:
        facts["pinned"] = len(pinned.tensor_ranges(graph, calibration.pinned))
    if calibration.max_drop < 1:
        calibration, told = reverting.within(
            graph, task, calibration, runtime, lambda given: quantized_graph(graph, task, given, scheme)
        )
        facts |= told
    if calibration.keep_float:
        facts["keep_float"] = list(calibration.keep_float)
    return quantized_graph(graph, task, calibration, scheme), facts


def quantized_graph(graph: bytes, task: Task, calibration: Calibration, scheme: Scheme) -> bytes:
    """The int8 form of a float graph. Operations of preprocess and postprocess stay in float."""
    if calibration.method == "dynamic":
        with quiet():
            return dynamic.quantized(marked_prepared(graph), scheme, excluded_nodes(graph))
    return qdq.quantized(graph, task, calibration, scheme)


def marked_prepared(graph: bytes) -> bytes:
    """The graph with the mark that the quantizer looks for: torch's exporter has already folded batch
    norms and inferred shapes, which is what its own preparation would do."""
    import onnx

    model = onnx.load_from_string(graph)
    entry = model.metadata_props.add()
    entry.key, entry.value = "onnx.quant.pre_process", "onnxruntime.quant"
    content: bytes = model.SerializeToString()
    return content


def excluded_nodes(graph: bytes) -> list[str]:
    """Names of the nodes that come from preprocess or postprocess: they stay in float.

    Single layers of the model cannot be kept in float like this, see `qdq.shield`.
    """
    import onnx

    proto = onnx.load_from_string(graph).graph
    weights = {item.name for item in proto.initializer}
    found = []
    outside: set[str] = set()
    for node in proto.node:
        # A convolution folded with its batch norm bears the norm's scope; its weight tells the rest.
        scopes = [*scopes_of(node), *(name.rpartition(".")[0] for name in node.input if name in weights)]
        named = [scope.partition(".")[0] for scope in scopes if scope]
        inputs = [name for name in node.input if name and name not in weights]
        # The exporter makes some nodes (Split) without a scope: they belong to what they read.
        follows = not named and bool(inputs) and all(name in outside for name in inputs)
        if follows or any(part in FLOAT_PARTS for part in named):
            found.append(node.name)
            outside.update(node.output)
    return found


def scopes_of(node: Any) -> list[str]:
    """Torch module paths that a node was exported from, outermost first."""
    import ast

    for item in node.metadata_props:
        if item.key == "pkg.torch.onnx.name_scopes":
            with contextlib.suppress(ValueError, SyntaxError):
                return [str(scope) for scope in ast.literal_eval(item.value)]
    return []


def reader(graph: bytes, inputs: np.ndarray) -> Any:
    """Feeds endpoint inputs [n, ...] to ONNX Runtime's calibrator in batches."""
    import onnx
    from onnxruntime.quantization import CalibrationDataReader

    proto = onnx.load_from_string(graph).graph
    constants = {item.name for item in proto.initializer}
    given = [item for item in proto.input if item.name not in constants]
    fixed = given[0].type.tensor_type.shape.dim[0].dim_value
    size = min(fixed, _CALIBRATION_BATCH) if fixed else _CALIBRATION_BATCH

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        """Feeds batches to ONNX Runtime's calibrator."""

        def __init__(self) -> None:
            self._position = 0

        def get_next(self) -> dict[str, np.ndarray] | None:
            if self._position >= len(inputs):
                return None
            # The calibrators of histograms take batches of one size only, so the last one starts earlier.
            start = max(0, min(self._position, len(inputs) - size))
            self._position += size
            part = inputs[start : start + size]
            if inputs.dtype.names is None:
                return {given[0].name: np.ascontiguousarray(part)}
            return {name: np.ascontiguousarray(part[name]) for name in inputs.dtype.names}

    return Reader()


# ---------------------------------------------------------------------------- files


def strip(graph: bytes) -> bytes:
    """Removes what no runtime needs: exporter metadata, documentation, inner shapes. The model's own
    metadata stay: a user may have put them there."""
    import onnx

    model: Any = onnx.load_from_string(graph)
    own = [item for item in model.metadata_props if not item.key.startswith(_TOOL_METADATA)]
    del model.metadata_props[:]
    model.metadata_props.extend(own)
    model.doc_string, model.producer_name, model.producer_version = "", "", ""
    del model.graph.value_info[:]
    del model.graph.metadata_props[:]
    model.graph.doc_string = ""
    for node in model.graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
    value: Any
    for value in (*model.graph.input, *model.graph.output, *model.graph.initializer):
        del value.metadata_props[:]
        value.doc_string = ""
    content: bytes = model.SerializeToString(deterministic=True)
    return content


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".tmp{os.getpid()}")
    temporary.write_bytes(content)
    temporary.replace(path)
