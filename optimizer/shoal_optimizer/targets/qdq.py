"""Static int8 for ONNX files: QDQ placed by ONNX Runtime's own quantizer, with learned ranges pinned."""

from __future__ import annotations

import contextlib
import hashlib
import io
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from shoal_optimizer.targets import pinned
from shoal_protos.errors import InvalidInput, MissingExtra

if TYPE_CHECKING:
    from shoal_optimizer.targets.base import Calibration
    from shoal_optimizer.targets.onnx import Scheme
    from shoal_optimizer.task import Task

WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
SHIELD = "_kept_in_float"  # ends the names of nodes and tensors that keep a layer in float


def quantized(graph: bytes, task: Task, calibration: Calibration, scheme: Scheme) -> bytes:
    """The QDQ form of a float graph, for `scheme`'s types; per-channel weights.

    Operations of preprocess and postprocess and the layers of `calibration.keep_float` stay in float,
    learned ranges are taken as they are, the others come from `calibration.inputs` and are kept in the
    task's cache.

    Raises:
        InvalidInput: `keep_float` names no weighted layer of the graph.
    """
    from shoal_optimizer.targets import onnx as files

    shielded, kept = shield(graph, calibration.keep_float)

    def quantize(**more: bool) -> bytes:
        return placed(
            files.marked_prepared(shielded),
            files.reader(graph, calibration.inputs),
            calibration.method,
            signed_activations=scheme.signed_activations,
            reduce_range=scheme.reduce_range,
            nodes_to_exclude=[*files.excluded_nodes(graph), *kept],
            calibration_cache_path=_ranges_path(task, shielded, calibration),
            extra_options={
                "ActivationSymmetric": scheme.signed_activations,
                "TensorQuantOverrides": overrides(graph, calibration),
                **more,
            },
        )

    try:
        return quantize()
    except ValueError as error:
        # 1.32 stumbles over biases beside weights of several dimensions; it can leave that step out.
        if "truth value of an array" not in str(error):
            raise
        return quantize(QDQDisableWeightAdjustForInt32Bias=True)


def placed(prepared: bytes, reader: Any, method: str, *, signed_activations: bool, **settings: Any) -> bytes:
    """A graph with Q and DQ where ONNX Runtime's quantizer puts them, weights per channel in int8.

    Args:
        prepared: the float graph, marked as prepared.
        reader: the calibration inputs, see `onnx.reader`.
        method: "minmax", "percentile" or "entropy".
        settings: further ones of `quantize_static`.
    """
    try:
        from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
    except ImportError as error:
        raise MissingExtra("optimizer", "onnxruntime") from error
    from shoal_optimizer.targets import onnx as files

    methods = {
        "minmax": CalibrationMethod.MinMax,
        "percentile": CalibrationMethod.Percentile,
        "entropy": CalibrationMethod.Entropy,
    }
    # The calibrators of histograms print what they do, and a job's output is read line by line.
    silence = contextlib.redirect_stdout(io.StringIO())
    with tempfile.TemporaryDirectory(prefix="shoal-quantize-") as name, files.quiet(), silence:
        source, target = Path(name) / "float.onnx", Path(name) / "int8.onnx"
        source.write_bytes(prepared)
        quantize_static(
            str(source),
            str(target),
            reader,
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QInt8 if signed_activations else QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=methods[method],
            **settings,
        )
        return target.read_bytes()


def overrides(graph: bytes, calibration: Calibration) -> dict[str, list[dict[str, Any]]]:
    """ONNX Runtime's TensorQuantOverrides for the learned ranges: its own quantizer makes scale and zero
    point of them, by the same formula as of calibrated ones."""
    found = pinned.tensor_ranges(graph, calibration.pinned)
    return {
        # float32 arrays: what the quantizer computes with.
        name: [{"rmin": np.array(low, np.float32), "rmax": np.array(high, np.float32)}]
        for name, (low, high) in found.items()
    }


def _ranges_path(task: Task, graph: bytes, calibration: Calibration) -> str | None:
    """Where ranges of equal graph and data are kept: every class's int8 file comes from one calibration."""
    if task.cache_dir is None:
        return None
    state = hashlib.sha256(graph)
    state.update(np.ascontiguousarray(calibration.inputs).tobytes())
    state.update(calibration.method.encode())
    task.cache_dir.mkdir(parents=True, exist_ok=True)
    return str(task.cache_dir / f"ranges-{state.hexdigest()[:32]}.json")


def weighted_nodes(graph: bytes) -> list[str]:
    """Names of the nodes with stored weights that int8 is for, in graph order; not of the task's parts."""
    import onnx

    from shoal_optimizer.targets.onnx import excluded_nodes

    proto = onnx.load_from_string(graph).graph
    outside, constants = set(excluded_nodes(graph)), {item.name for item in proto.initializer}
    constants |= {name for node in proto.node if node.op_type == "Constant" for name in node.output}
    return [
        node.name
        for node in proto.node
        if node.op_type in WEIGHTED and node.name not in outside and constants & set(node.input[1:2])
    ]


def shield(graph: bytes, layers: Sequence[str]) -> tuple[bytes, list[str]]:
    """The graph in which `layers` can stay in float, and the nodes that the quantizer must leave alone.

    ONNX Runtime quantizes the weights of a float convolution by itself when it stands between a
    DequantizeLinear and a QuantizeLinear, also through a ReLU or Clip that the latter makes superfluous
    (measured with 1.32). A LeakyRelu after it prevents that and costs nothing: it is fused into the
    convolution. With slope 0 it is the ReLU, with slope 1 it changes nothing.

    Raises:
        InvalidInput: a name is no weighted layer of the graph.
    """
    if not layers:
        return graph, []
    import onnx

    model = onnx.load_from_string(graph)
    nodes = {node.name: node for node in model.graph.node}
    kept: list[str] = []
    for name in layers:
        node = nodes.get(name)
        if node is None or node.op_type not in WEIGHTED:
            raise InvalidInput(
                f"'{name}' is no convolution or matrix product of this model.",
                f"keep_float takes names of {', '.join(weighted_nodes(graph)[:6])}...",
            )
        made = _shield(model.graph, node)
        kept += [name, made.name, *_sum_after(model.graph, made)]
    content: bytes = model.SerializeToString()
    return content, kept


def _shield(graph: Any, node: Any) -> Any:
    """Puts the LeakyRelu behind one node and gives it."""
    import onnx

    output = node.output[0]
    readers = _readers(graph, output)
    exposed = any(item.name == output for item in graph.output)
    if len(readers) == 1 and readers[0].op_type == "Relu" and not exposed:
        readers[0].op_type = "LeakyRelu"
        readers[0].attribute.append(onnx.helper.make_attribute("alpha", 0.0))
        return readers[0]
    node.output[0] = output + SHIELD
    shape = next((item for item in graph.value_info if item.name == output), None)
    if shape is not None:
        copied = graph.value_info.add()
        copied.CopyFrom(shape)
        copied.name = node.output[0]
    place = next(index for index, other in enumerate(graph.node) if other.name == node.name)
    made = onnx.helper.make_node("LeakyRelu", [node.output[0]], [output], node.name + SHIELD, alpha=1.0)
    graph.node.insert(place + 1, made)
    return made


def _sum_after(graph: Any, node: Any) -> list[str]:
    """The residual sum that alone reads a node's output: it is fused into the layer, and goes with it."""
    readers = _readers(graph, node.output[0])
    return [readers[0].name] if len(readers) == 1 and readers[0].op_type == "Add" else []


def _readers(graph: Any, tensor: str) -> list[Any]:
    return [node for node in graph.node if tensor in node.input]


def next_layers(graph: bytes) -> dict[str, tuple[str, ...]]:
    """Weighted layer -> the weighted layers that read what it wrote, through whatever is between.

    A tensor between two layers is only in float when its writer and all its readers are.
    """
    import onnx

    proto = onnx.load_from_string(graph).graph
    readers: dict[str, list[Any]] = {}
    for node in proto.node:
        for name in set(node.input):
            readers.setdefault(name, []).append(node)
    layers, reached = set(weighted_nodes(graph)), dict[str, tuple[str, ...]]()

    def after(node: Any) -> tuple[str, ...]:
        found: dict[str, None] = {}
        for reader in (reader for name in node.output for reader in readers.get(name, ())):
            if reader.name in layers:
                found[reader.name] = None
            else:
                found.update(dict.fromkeys(reached.get(reader.name, ())))
        return tuple(found)

    for node in reversed(proto.node):  # readers come after writers in ONNX graphs
        reached[node.name] = after(node)
    return {name: reached[name] for name in weighted_nodes(graph)}
