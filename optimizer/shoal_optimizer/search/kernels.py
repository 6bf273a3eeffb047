"""What a network makes a processor do, one kernel at a time: read from an ONNX graph or from a profile.

A kernel here is an operation as a CPU runtime runs it, for one item: activations and batch norms are
part of the convolution before them, QuantizeLinear and DequantizeLinear around an int8 operation are
part of it, and what only renames dimensions costs nothing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shoal_protos.errors import InvalidInput

Shape = tuple[int, ...]

LANES = 16  # channels that are computed together: an AVX-512 register of float32; others have fewer

_FREE = frozenset(
    {"Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity", "Dropout", "Shape", "Constant", "ReorderInput",
     "ReorderOutput"}
)  # fmt: skip
_FUSED = frozenset({"Relu", "Clip", "LeakyRelu", "Sigmoid", "Tanh", "HardSigmoid", "BatchNormalization"})
_POOLS = frozenset(
    {"MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool", "ReduceMean", "ReduceMax", "ReduceSum",
     "QLinearGlobalAveragePool", "QLinearAveragePool"}
)  # fmt: skip
_PAIRS = frozenset(
    {"Add", "Sub", "Mul", "Div", "Sum", "Max", "Min", "Pow", "Where", "QLinearAdd", "QLinearMul"}
)
_MOVES = frozenset(
    {"Transpose", "Concat", "Slice", "Split", "Pad", "Gather", "Expand", "Cast", "Tile",
     "DepthToSpace", "SpaceToDepth", "QLinearConcat"}
)  # fmt: skip
_CONVOLUTIONS = frozenset({"Conv", "ConvTranspose", "FusedConv", "QLinearConv", "ConvInteger"})
_MATRICES = frozenset(
    {"Gemm", "MatMul", "FusedGemm", "FusedMatMul", "QGemm", "QLinearMatMul", "MatMulInteger",
     "DynamicQuantizeMatMul", "MatMulIntegerToFloat", "MatMulNBits"}
)  # fmt: skip
_BYTES = {
    2: 1,
    3: 1,
    4: 2,
    5: 2,
    7: 8,
    9: 1,
    10: 2,
    11: 8,
    13: 8,
    16: 2,
    21: 1,
    22: 1,
}  # of onnx.TensorProto types


@dataclass(frozen=True)
class Kernel:
    """One operation for one item.

    Attributes:
        operator: "conv", "pointwise" (1x1), "depthwise", "gemm", "pool", "pair" (elementwise with two
            inputs), "activation", "move", "resize", "quantize" or "other".
        given, made: shapes of the first input and of the output, the batch of one among them.
        precision: "fp32", "fp16", "int8", or "int8_weights" where only weights are stored so.
        macs: multiply-adds, 0 where the operation moves rather than computes.
        weight_bytes: of its constants.
        reads: elements of all activations that it reads.
    """

    operator: str
    given: Shape
    made: Shape
    precision: str = "fp32"
    macs: int = 0
    weight_bytes: int = 0
    reads: int = 0

    @property
    def lane_macs(self) -> float:
        """Multiply-adds with the output's channels filled up to whole registers: what is computed."""
        last = self.operator == "gemm" or len(self.made) < 3
        channels = self.made[-1 if last else 1] if self.made else 1
        return self.macs * LANES * math.ceil(channels / LANES) / max(channels, 1)

    @property
    def moved_bytes(self) -> int:
        """Bytes of activations read and written."""
        width = {"int8": 1, "fp16": 2}.get(self.precision, 4)
        return width * (self.reads + math.prod(self.made))


# ---------------------------------------------------------------------------- from a graph


def kernels(graph: bytes) -> tuple[Kernel, ...]:
    """The kernels of a float or QDQ ONNX graph for one item, in the graph's order.

    Raises:
        InvalidInput: it is no ONNX graph.
    """
    import onnx

    try:
        model = onnx.load_from_string(graph)
        _one_item(model)
        model = onnx.shape_inference.infer_shapes(model)
    except Exception as error:  # protobuf's and onnx's own classes
        raise InvalidInput(
            f"No kernels can be read: this is no ONNX graph ({error}).", "Export it again."
        ) from error
    return tuple(_Reading(model.graph).kernels())


def _one_item(model: Any) -> None:
    """Fixes unknown dimensions of the inputs at one, and forgets inner shapes that depended on them."""
    constants = {item.name for item in model.graph.initializer}
    for value in (*model.graph.input, *model.graph.output):
        if value.name not in constants:
            for axis, dim in enumerate(value.type.tensor_type.shape.dim):
                if axis == 0 or not dim.dim_value:
                    dim.dim_value = 1
    del model.graph.value_info[:]
    for value in model.graph.output:
        value.type.tensor_type.ClearField("shape")


class _Reading:
    """A graph with what is asked of it: shapes, constants, who makes and who uses a tensor."""

    def __init__(self, graph: Any) -> None:
        self.graph = graph
        self.shapes: dict[str, Shape] = {}
        for value in (*graph.value_info, *graph.input, *graph.output):
            dims = value.type.tensor_type.shape.dim
            self.shapes[value.name] = tuple(max(dim.dim_value, 1) for dim in dims)
        self.maker = {name: node for node in graph.node for name in node.output}
        self.users: dict[str, list[Any]] = {}
        for node in graph.node:
            for name in node.input:
                self.users.setdefault(name, []).append(node)
        self.constants = self._constants()

    def _constants(self) -> dict[str, tuple[Shape, int]]:
        """Name -> shape and bytes an element, of initializers and of what is computed from them alone."""
        found: dict[str, tuple[Shape, int]] = {}
        for item in self.graph.initializer:
            found[item.name] = (tuple(item.dims), _BYTES.get(item.data_type, 4))
        for node in self.graph.node:
            if node.op_type == "Constant":
                tensor = next((a.t for a in node.attribute if a.name == "value"), None)
                found[node.output[0]] = (
                    (tuple(tensor.dims), _BYTES.get(tensor.data_type, 4)) if tensor is not None else ((), 4)
                )
            elif node.input and all(name in found for name in node.input if name):
                shape, width = found[node.input[0]] if node.input[0] else ((), 4)
                for name in node.output:
                    found[name] = (self.shapes.get(name, shape), width)
        return found

    def kernels(self) -> Iterable[Kernel]:
        for node in self.graph.node:
            if node.op_type in _FREE or not node.output or all(n in self.constants for n in node.output if n):
                continue
            if node.op_type in ("QuantizeLinear", "DynamicQuantizeLinear"):
                if self._int8_maker(node.input[0]) is None:
                    yield self._kernel(node, "quantize")
            elif node.op_type == "DequantizeLinear":
                users = self.users.get(node.output[0], ())
                if not users or any(not self._is_int8(user) for user in users):
                    yield self._kernel(node, "quantize")
            elif not self._folded(node):
                yield self._kernel(node, "")

    def _folded(self, node: Any) -> bool:
        """True for an activation or batch norm that the operation before it does along."""
        if node.op_type not in _FUSED:
            return False
        before = self.maker.get(node.input[0])
        if before is None or len(self.users.get(node.input[0], ())) != 1:
            return False
        kinds = _CONVOLUTIONS | _MATRICES | {"Add", "BatchNormalization"}
        return before.op_type in kinds or self._folded(before)

    def _is_int8(self, node: Any) -> bool:
        """True if a runtime computes the node in int8: int8 comes in and goes out, or its kind says so."""
        if (
            "Integer" in node.op_type
            or node.op_type.startswith("Q")
            or node.op_type == "DynamicQuantizeMatMul"
        ):
            return node.op_type not in ("QuantizeLinear",)
        given = [name for name in node.input if name and name not in self.constants]
        makers = [self.maker.get(name) for name in given]
        if not given or any(maker is None or maker.op_type != "DequantizeLinear" for maker in makers):
            return False
        return self._goes_out_int8(node)

    def _goes_out_int8(self, node: Any) -> bool:
        users = self.users.get(node.output[0], ())
        if not users:
            return False
        return all(
            user.op_type == "QuantizeLinear" or (user.op_type in _FUSED and self._goes_out_int8(user))
            for user in users
        )

    def _int8_maker(self, name: str) -> Any:
        """The int8 operation whose float output `name` is; None where float really exists there."""
        node = self.maker.get(name)
        while node is not None and node.op_type in _FUSED and not self._is_int8(node):
            node = self.maker.get(node.input[0])
        return node if node is not None and self._is_int8(node) else None

    def _kernel(self, node: Any, operator: str) -> Kernel:
        made = self.shapes.get(node.output[0], ())
        active = [self.shapes.get(n, ()) for n in node.input if n and n not in self.constants]
        used = [self.constants[n] for n in node.input if n in self.constants]
        matrix = max((shape for shape, _ in used), key=math.prod, default=())
        attributes = {a.name: a for a in node.attribute}
        groups = attributes["group"].i if "group" in attributes else 1
        given = active[0] if active else ()
        reads = sum(math.prod(shape) for shape in active)
        weight_bytes = sum(width * math.prod(shape) for shape, width in used)
        precision = self._precision(node, used)
        return _make(
            operator or node.op_type, active, made, matrix, precision, groups, weight_bytes,
            tuple(attributes["kernel_shape"].ints) if "kernel_shape" in attributes else (), given, reads,
        )  # fmt: skip

    def _precision(self, node: Any, used: Sequence[tuple[Shape, int]]) -> str:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"):
            return "fp32"
        if self._is_int8(node):
            return "int8"
        matrices = [pair for pair in used if len(pair[0]) > 1]
        width = max(matrices, key=lambda pair: math.prod(pair[0]), default=((), 4))[1]
        return {2: "fp16", 1: "int8_weights"}.get(width, "fp32")


def _make(
    kind: str, active: Sequence[Shape], made: Shape, matrix: Shape, precision: str, groups: int,
    weight_bytes: int, window: Shape, given: Shape, reads: int,
) -> Kernel:  # fmt: skip
    """A kernel of ONNX operator `kind` (or of our own operator name)."""
    elements = math.prod(made)
    if kind in _CONVOLUTIONS:
        macs = elements * math.prod(matrix[1:]) if matrix else 0
        if kind == "ConvTranspose":
            macs = math.prod(given) * math.prod(matrix[1:])
        operator = "conv"
        if groups > 1 and matrix and matrix[1] == 1:
            operator = "depthwise"
        elif matrix and math.prod(matrix[2:]) == 1:
            operator = "pointwise"
    elif kind in _MATRICES:
        operator, macs = "gemm", elements * (given[-1] if given else 1)
    elif kind in _POOLS:
        operator, macs = "pool", elements * math.prod(window) if window else math.prod(given)
    elif kind in _PAIRS:
        operator, macs = "pair", 0
    elif kind in ("Resize", "Upsample"):
        operator, macs = "resize", 0
    elif kind in _MOVES:
        operator, macs = "move", 0
    elif kind == "quantize":
        operator, macs = "quantize", 0
    elif len(active) == 1 and active[0] == made:
        operator, macs = "activation", 0
    else:
        operator, macs = "other", elements * matrix[-1] if matrix else 0
    return Kernel(operator, given, made, precision, int(macs), int(weight_bytes), int(reads))


# ---------------------------------------------------------------------------- from a profile


def profiled(profile: str | bytes, found: Sequence[Kernel] = ()) -> tuple[tuple[Kernel, float], ...]:
    """Kernels with their time in microseconds, the median of all runs but the first, from the JSON that
    ONNX Runtime writes with `enable_profiling`.

    Args:
        found: the network's kernels. A profile doesn't tell the weights of int8 convolutions; they are
            looked up here by the shapes around them, and left out where that leaves a doubt.

    Raises:
        InvalidInput: it is no such profile.
    """
    try:
        times: dict[str, tuple[Mapping[str, Any], list[float]]] = {}
        for event in json.loads(profile):
            if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
                times.setdefault(event["name"], (event["args"], []))[1].append(float(event["dur"]))
        named = [(_from_event(args), us) for args, us in times.values()]
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise InvalidInput(
            f"This is no profile of ONNX Runtime: {error!r}.", "Set SessionOptions.enable_profiling."
        ) from error
    known = [(_looked_up(kernel, found), us[1:] or us) for kernel, us in named if kernel is not None]
    return tuple((kernel, sorted(us)[len(us) // 2]) for kernel, us in known if kernel is not None)


def _looked_up(kernel: Kernel, found: Sequence[Kernel]) -> Kernel | None:
    """The kernel itself, or, where its weights are untold, the only one of the network that it can be."""
    if kernel.operator != "conv" or kernel.macs:
        return kernel
    around = (math.prod(kernel.given), math.prod(kernel.made))
    alike = {
        other
        for other in found
        if other.operator in ("conv", "pointwise", "depthwise")
        and other.precision == kernel.precision
        and (math.prod(other.given), math.prod(other.made)) == around
    }
    return alike.pop() if len(alike) == 1 else None


def _from_event(args: Mapping[str, Any]) -> Kernel | None:
    kind = str(args["op_name"])
    if kind in _FREE:
        return None
    typed = [
        (name, tuple(int(d) for d in shape))
        for item in args["input_type_shape"]
        for name, shape in item.items()
    ]
    made = next((tuple(int(d) for d in s) for item in args["output_type_shape"] for s in item.values()), ())
    if not typed:
        return None
    kind = {"QuantizeLinear": "quantize", "DequantizeLinear": "quantize"}.get(kind, kind)
    width = 1 if typed[0][0] in ("int8", "uint8") and kind != "quantize" else 4
    given, rest = typed[0][1], [shape for _, shape in typed[1:]]
    constant = kind in _CONVOLUTIONS | _MATRICES
    matrix = next((shape for shape in rest if len(shape) >= 2), ()) if constant else ()
    groups = 1
    if kind in _CONVOLUTIONS and matrix and len(given) > 1:
        groups = max(1, given[1] // max(matrix[1], 1))
    if kind in _MATRICES and not matrix and given and made:
        matrix = (made[-1], given[-1])  # prepacked weights are not told of
    active = [given] if constant else [given, *(shape for shape in rest if math.prod(shape) > 1)]
    reads = sum(math.prod(shape) for shape in active)
    precision = "int8" if width == 1 else "fp32"
    return _make(kind, active, made, matrix, precision, groups, width * math.prod(matrix), (), given, reads)
