"""TensorRT's rules for explicit quantization, checked on the ONNX graph without TensorRT or a GPU.

A builder on the device refuses a graph that breaks them, or, worse, silently computes in float. The
rules come from NVIDIA's documentation of TensorRT 10 and 11 and the ONNX parser's own tables; each
names its source.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from shoal_protos.errors import Unsupported

OPSETS = range(9, 21)  # TensorRT 10.0's parser; later ones read newer opsets as well
WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_AXES = {"Conv": 0, "ConvTranspose": 1}  # of output channels in the weights
_DOMAINS = ("", "ai.onnx")
# What the parser's table marks as unsupported in every release read.
_REFUSED = frozenset(
    (
        "ConvInteger",
        "DynamicQuantizeLinear",
        "MatMulInteger",
        "QLinearConv",
        "QLinearMatMul",
        "Det",
        "MaxRoiPool",
        "MaxUnpool",
        "Multinomial",
        "SequenceAt",
        "SequenceConstruct",
        "SequenceEmpty",
        "SequenceErase",
        "SequenceInsert",
        "SequenceLength",
        "SplitToSequence",
        "StringNormalizer",
        "TfIdfVectorizer",
        "Unique",
    )
)


@dataclass(frozen=True)
class Violation:
    """One broken rule: `rule` is the function's name below, `node` what breaks it."""

    rule: str
    node: str
    message: str

    def __str__(self) -> str:
        return f"{self.node}: {self.message}"


class Graph:
    """A parsed model with look-ups by tensor name."""

    def __init__(self, content: bytes) -> None:
        import onnx

        self.model: Any = onnx.load_from_string(content)
        self.nodes: list[Any] = list(self.model.graph.node)
        self.makers = {name: node for node in self.nodes for name in node.output}
        self._helper: Any = onnx.numpy_helper
        self.types: Any = onnx.TensorProto

    @cached_property
    def constants(self) -> dict[str, np.ndarray]:
        """Initializers and values of Constant nodes, by tensor name."""
        found = {item.name: self._helper.to_array(item) for item in self.model.graph.initializer}
        for node in self.nodes:
            for attribute in node.attribute if node.op_type == "Constant" else ():
                if attribute.name == "value":
                    found[node.output[0]] = self._helper.to_array(attribute.t)
        return found

    @cached_property
    def readers(self) -> dict[str, list[Any]]:
        """Tensor name -> the nodes that read it."""
        found: dict[str, list[Any]] = {}
        for node in self.nodes:
            for name in node.input:
                found.setdefault(name, []).append(node)
        return found

    @property
    def inputs(self) -> list[Any]:
        """The graph's inputs that are no initializers."""
        return [item for item in self.model.graph.input if item.name not in self.constants]

    def scaled(self) -> list[Any]:
        """Its QuantizeLinear and DequantizeLinear nodes."""
        return [node for node in self.nodes if node.op_type in ("QuantizeLinear", "DequantizeLinear")]

    def quantized(self, name: str) -> bool:
        """True when a tensor comes from a DequantizeLinear."""
        maker = self.makers.get(name)
        return maker is not None and maker.op_type == "DequantizeLinear"

    def weights(self, node: Any) -> bool:
        """True when a Q or DQ works on a constant: weights, not activations."""
        name = node.input[0]
        maker = self.makers.get(name)
        if maker is not None and maker.op_type == "QuantizeLinear":
            name = maker.input[0]
        return name in self.constants


def _label(node: Any) -> str:
    return f"{node.op_type} '{node.name or (node.output[0] if node.output else '')}'"


def _broken(rule: str, node: Any, message: str) -> Violation:
    return Violation(rule, node if isinstance(node, str) else _label(node), message)


def known_operators(graph: Graph) -> Iterator[Violation]:
    """Only operators that the ONNX parser has. Source: github.com/onnx/onnx-tensorrt, docs/operators.md
    (operators marked N; contrib domains are not in the table at all)."""
    for node in graph.nodes:
        if node.domain not in _DOMAINS:
            yield _broken("known_operators", node, f"the domain '{node.domain}' is not ONNX's own")
        elif node.op_type in _REFUSED:
            yield _broken("known_operators", node, "TensorRT's parser does not have this operator")


def known_opset(graph: Graph) -> Iterator[Violation]:
    """Opset 9 to 20. Source: onnx-tensorrt, docs/operators.md of the 10.0 release."""
    for item in graph.model.opset_import:
        if item.domain in _DOMAINS and item.version not in OPSETS:
            message = f"opset {item.version} is outside {OPSETS.start} to {OPSETS.stop - 1}"
            yield _broken("known_opset", "the model", message)


def signed_int8(graph: Graph) -> Iterator[Violation]:
    """Quantized values are signed int8. Source: TensorRT documentation, "Working with Quantized Types"
    (supported data types: INT8 is the only 8-bit integer; scheme is symmetric)."""
    for node in graph.scaled():
        kinds = {graph.constants[name].dtype.name for name in node.input[2:] if name in graph.constants}
        if node.op_type == "DequantizeLinear" and node.input[0] in graph.constants:
            kinds.add(graph.constants[node.input[0]].dtype.name)
        if node.op_type == "QuantizeLinear" and not any(node.input[2:]):
            kinds.add(_output_type(graph, node))
        for kind in sorted(kinds - {"int8"}):
            if node.op_type == "DequantizeLinear" and kind == "int32":
                continue  # float_biases tells of it
            yield _broken("signed_int8", node, f"quantizes to {kind}; TensorRT has int8 only")


def _output_type(graph: Graph, node: Any) -> str:
    """A QuantizeLinear without a zero point gives uint8 unless it says otherwise (ONNX, opset 21)."""
    kinds = {graph.types.INT8: "int8", graph.types.UINT8: "uint8"}
    chosen = [attribute.i for attribute in node.attribute if attribute.name == "output_dtype"]
    return kinds.get(chosen[0], str(chosen[0])) if chosen else "uint8"


def zero_points_are_zero(graph: Graph) -> Iterator[Violation]:
    """Zero points are constants and all zero. Source: TensorRT operator reference, "Quantize" ("must
    only contain zero-valued coefficients"), and onnx-tensorrt, docs/operators.md."""
    for node in graph.scaled():
        for name in filter(None, node.input[2:3]):
            if name not in graph.constants:
                yield _broken("zero_points_are_zero", node, "its zero point is computed")
            elif np.any(graph.constants[name]):
                yield _broken("zero_points_are_zero", node, "its zero point is not 0")


def scales_are_positive_constants(graph: Graph) -> Iterator[Violation]:
    """Scales are build-time constants, strictly positive. Source: TensorRT operator reference,
    "Quantize", and NvInfer.h, IQuantizeLayer ("strictly positive values")."""
    for node in graph.scaled():
        value = graph.constants.get(node.input[1])
        if value is None:
            yield _broken("scales_are_positive_constants", node, "its scale is computed")
        elif value.dtype not in (np.float32, np.float16):
            yield _broken("scales_are_positive_constants", node, f"its scale is {value.dtype.name}")
        elif not np.all(np.isfinite(value)) or not np.all(value > 0):
            yield _broken("scales_are_positive_constants", node, "its scale is not positive")


def activations_per_tensor(graph: Graph) -> Iterator[Violation]:
    """One scale an activation; scales per channel are for weights. Source: TensorRT documentation,
    "Quantization Workflows" (INT8: per-tensor activations, per-tensor or per-channel weights)."""
    for node in graph.scaled():
        scale = graph.constants.get(node.input[1])
        if scale is not None and scale.size > 1 and not graph.weights(node):
            yield _broken("activations_per_tensor", node, f"has {scale.size} scales for an activation")


def weights_per_output_channel(graph: Graph) -> Iterator[Violation]:
    """Scales of weights are one, or one for each output channel: axis 0 of a convolution, 1 of a
    deconvolution. Source: NvInfer.h, IQuantizeLayer (the size of a 1-D scale is that of its axis), and
    TensorRT documentation, "Working with Quantized Types" (per-channel: K of the weights)."""
    for node in graph.nodes:
        if node.op_type not in WEIGHTED or len(node.input) < 2 or not graph.quantized(node.input[1]):
            continue
        source = graph.makers[node.input[1]]
        scale, weight = graph.constants.get(source.input[1]), _stored(graph, source)
        if scale is None or scale.size == 1 or weight is None:
            continue
        axis = next((a.i for a in source.attribute if a.name == "axis"), 1) % weight.ndim
        if scale.ndim != 1 or scale.size != weight.shape[axis]:
            message = f"{scale.size} scales for {weight.shape[axis]} channels of axis {axis}"
            yield _broken("weights_per_output_channel", source, message)
        elif axis != _AXES.get(node.op_type, axis):
            message = f"scales along axis {axis}; {node.op_type} has its output channels on another"
            yield _broken("weights_per_output_channel", source, message)


def _stored(graph: Graph, source: Any) -> np.ndarray | None:
    """The constant that a weight's DQ (or Q, DQ) reads."""
    name = source.input[0]
    maker = graph.makers.get(name)
    return graph.constants.get(maker.input[0] if maker is not None and name not in graph.constants else name)


def float_biases(graph: Graph) -> Iterator[Violation]:
    """Biases stay float: no Q or DQ leads to one. Source: onnx-tensorrt, docs/operators.md
    (DequantizeLinear takes int8; int32 biases, which ONNX Runtime writes by default, are refused)."""
    for node in graph.nodes:
        if node.op_type in WEIGHTED[:3] and len(node.input) > 2 and graph.quantized(node.input[2]):
            yield _broken("float_biases", node, "has a quantized bias")
    for node in graph.scaled():
        stored = graph.constants.get(node.input[0])
        if node.op_type == "DequantizeLinear" and stored is not None and stored.dtype == np.int32:
            yield _broken("float_biases", node, "dequantizes int32")


def pairs(graph: Graph) -> Iterator[Violation]:
    """Each Q is read by DQ alone, with the same scale; no other operator sees int8. Source: TensorRT
    documentation, "Explicit Quantization" (fake quantization is exported as a Q followed by a DQ)."""
    for node in graph.nodes:
        if node.op_type != "QuantizeLinear":
            continue
        for reader in graph.readers.get(node.output[0], []):
            if reader.op_type != "DequantizeLinear":
                yield _broken("pairs", reader, f"reads int8 from {_label(node)}")
            elif not _equal(graph, node.input[1], reader.input[1]):
                yield _broken("pairs", reader, f"has another scale than {_label(node)}")


def _equal(graph: Graph, first: str, second: str) -> bool:
    one, other = graph.constants.get(first), graph.constants.get(second)
    return first == second or (one is not None and other is not None and np.array_equal(one, other))


def both_or_none(graph: Graph) -> Iterator[Violation]:
    """A weighted operator has both inputs quantized or neither: with one, it is computed in float.
    Source: TensorRT documentation, "Explicit Quantization" (a layer runs in int8 when DQ lead to all its
    inputs; pre-quantized weights need a DQ before the linear operator)."""
    for node in graph.nodes:
        if node.op_type in WEIGHTED and graph.quantized(node.input[0]) != graph.quantized(node.input[1]):
            yield _broken("both_or_none", node, "has only one of its two inputs quantized")


def uint8_only_at_the_edge(graph: Graph) -> Iterator[Violation]:
    """UINT8 is a type for the network's inputs and outputs alone, behind a Cast. Source: NvInfer.h,
    DataType::kUINT8 ("only used to represent quantized network inputs or outputs ... casts")."""
    for item in graph.inputs:
        if item.type.tensor_type.elem_type != graph.types.UINT8:
            continue
        for reader in graph.readers.get(item.name, []):
            if reader.op_type != "Cast":
                yield _broken("uint8_only_at_the_edge", reader, f"reads the uint8 input '{item.name}'")
    for name, value in graph.constants.items():
        readers = graph.readers.get(name, [])
        if value.dtype == np.uint8 and any(node not in graph.scaled() for node in readers):
            yield _broken("uint8_only_at_the_edge", f"constant '{name}'", "is uint8")


def batch_alone_is_dynamic(graph: Graph) -> Iterator[Violation]:
    """Only the first dimension of an input is open: the build recipe's profile gives its range. Source:
    TensorRT documentation, "Working with Dynamic Shapes" (a profile must bound every open dimension)."""
    for item in graph.inputs:
        sizes = item.type.tensor_type.shape.dim
        if any(not size.HasField("dim_value") for size in list(sizes)[1:]):
            yield _broken("batch_alone_is_dynamic", f"input '{item.name}'", "has an open dimension")


RULES: tuple[Callable[[Graph], Iterator[Violation]], ...] = (
    known_operators,
    known_opset,
    signed_int8,
    zero_points_are_zero,
    scales_are_positive_constants,
    activations_per_tensor,
    weights_per_output_channel,
    float_biases,
    pairs,
    both_or_none,
    uint8_only_at_the_edge,
    batch_alone_is_dynamic,
)


def verify(content: bytes) -> list[Violation]:
    """Every broken rule of a serialized ONNX model, in the order of `RULES`. Pure."""
    graph = Graph(content)
    return [violation for rule in RULES for violation in rule(graph)]


def require(content: bytes) -> None:
    """Raises Unsupported, naming the first of the broken rules."""
    found = verify(content)
    if found:
        more = f" ({len(found) - 1} more like it)" if len(found) > 1 else ""
        raise Unsupported(
            f"TensorRT would not build this model: {found[0]}{more}.",
            "Change that layer, or leave the target out.",
        )


def declared_share(content: bytes) -> float:
    """Share of convolutions and matrix products whose inputs are all int8 in the file; NaN without any.

    It is what the file asks for. What an engine does, its own inspector tells on the device.
    """
    graph = Graph(content)
    weighted = [node for node in graph.nodes if node.op_type in WEIGHTED]
    asked = [node for node in weighted if all(graph.quantized(name) for name in node.input[:2])]
    return len(asked) / len(weighted) if weighted else math.nan
