"""Fewer bytes, same arithmetic: ONNX files whose weights are stored in float16, int8 or int4.

Weights are stored narrow and made float again by operations on constants (Cast, Mul), which runtimes fold
when they load the file: it computes as fast as float and needs as much memory, it is only smaller on disk
and on the wire. A DequantizeLinear would not do: ONNX Runtime keeps it and dequantizes at each call. The
exception are int4 matrix products: ONNX Runtime computes with them as they are (MatMulNBits).
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from shoal_optimizer.targets import qdq
from shoal_protos.errors import MissingExtra, Unsupported

PRECISIONS = ("fp16", "int8_weights", "int4_weights")
LEAST_VALUES = 64  # of a weight: below it the extra nodes take what they save
LEAST_SAVED = {"fp16": 0.1, "int8_weights": 0.1, "int4_weights": 0.04}  # of the compressed file
BLOCK = 32  # inputs that share a scale in int4
_RECURRENT = ("LSTM", "GRU", "RNN")
_LARGEST_HALF = 65504.0


def converted(graph: bytes, precision: str, excluded: Sequence[str]) -> bytes:
    """The graph with narrow weights.

    Args:
        precision: "fp16", "int8_weights" (per channel) or "int4_weights" (matrix products in blocks of 32
            inputs; other weights as int8).
        excluded: names of the nodes whose weights stay as they are.

    Raises:
        Unsupported: the file would hardly be smaller than a plainer precision's.
    """
    from shoal_optimizer.targets.base import compressed_size
    from shoal_optimizer.targets.onnx import strip

    if precision == "fp16":
        made, plainer = stored_half(graph, excluded), "fp32"
        other = graph
    elif precision == "int8_weights":
        made, plainer = stored_int8(graph, excluded), "fp32"
        other = graph
    else:
        made, plainer = stored_int4(graph, excluded), "int8_weights"
        other = stored_int8(graph, excluded)
    wide, narrow = strip(other), strip(made)
    saved = min(1 - compressed_size(narrow) / compressed_size(wide), 1 - len(narrow) / len(wide))
    if saved < LEAST_SAVED[precision]:
        raise Unsupported(
            f"{precision} would save {max(0.0, saved):.0%} of the {len(wide)} bytes of {plainer}: too little "
            "of the file are weights that it is for.",
            f"Use the precision {plainer} or int8.",
        )
    return made


# ---------------------------------------------------------------------------- computed in float


def stored_int8(graph: bytes, excluded: Sequence[str]) -> bytes:
    """Weights as int8 with a scale per output channel: round(w / s), s = max|w| / 127."""
    import onnx

    model = onnx.load_from_string(graph)
    for name, axes in _weights(model.graph, excluded).items():
        item = _initializer(model.graph, name)
        values = onnx.numpy_helper.to_array(item)
        scale = np.abs(values).max(axis=axes, keepdims=True).astype(np.float32) / 127
        scale[scale == 0] = 1.0
        narrow = np.clip(np.rint(values / scale), -127, 127).astype(np.int8)
        _replace(model, item, narrow, scale)
    content: bytes = model.SerializeToString()
    return content


def stored_half(graph: bytes, excluded: Sequence[str]) -> bytes:
    """Weights as float16. One that is too large for it stays in float."""
    import onnx

    model = onnx.load_from_string(graph)
    for name in _weights(model.graph, excluded):
        item = _initializer(model.graph, name)
        values = onnx.numpy_helper.to_array(item)
        if np.abs(values).max() <= _LARGEST_HALF:
            _replace(model, item, values.astype(np.float16), None)
    content: bytes = model.SerializeToString()
    return content


def _weights(graph: Any, excluded: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Stored float weights of layers, with the axes that share a scale."""
    import onnx

    sizes = {
        item.name: list(item.dims)
        for item in graph.initializer
        if item.data_type == onnx.TensorProto.FLOAT and np.prod(item.dims) >= LEAST_VALUES
    }
    found: dict[str, tuple[int, ...]] = {}
    kept_as_it_is: set[str] = set()
    for node in graph.node:
        for place, name in enumerate(node.input):
            if name not in sizes:
                continue
            axes = None if node.name in excluded else _shared_axes(node, place, len(sizes[name]))
            if axes is None:
                kept_as_it_is.add(name)
            else:
                found.setdefault(name, axes)
    return {name: axes for name, axes in found.items() if name not in kept_as_it_is}


def _shared_axes(node: Any, place: int, rank: int) -> tuple[int, ...] | None:
    """Axes of a weight over which one scale holds; None where the input is no weight."""
    if rank < 2:
        return None
    if node.op_type == "Gather":
        return tuple(range(1, rank)) if place == 0 else None
    if node.op_type in _RECURRENT:
        return (rank - 1,) if place in (1, 2) else None
    if node.op_type not in qdq.WEIGHTED or place != 1:
        return None
    if node.op_type == "MatMul":
        return (rank - 2,)
    transposed = any(item.name == "transB" and item.i for item in node.attribute)
    if node.op_type == "ConvTranspose" or (node.op_type == "Gemm" and not transposed):
        return (0, *range(2, rank))
    return tuple(range(1, rank))


def _initializer(graph: Any, name: str) -> Any:
    return next(item for item in graph.initializer if item.name == name)


def _replace(model: Any, item: Any, narrow: np.ndarray, scale: np.ndarray | None) -> None:
    """Stores `narrow` in place of a weight and makes the weight from it by nodes on constants."""
    import onnx

    name = item.name
    stored, factor, wide = f"{name}_stored", f"{name}_scale", f"{name}_wide"
    item.CopyFrom(onnx.numpy_helper.from_array(narrow, stored))
    float_type = onnx.TensorProto.FLOAT
    cast = onnx.helper.make_node(
        "Cast", [stored], [name if scale is None else wide], f"{name}_cast", to=float_type
    )
    made = [cast]
    if scale is not None:
        model.graph.initializer.append(onnx.numpy_helper.from_array(scale, factor))
        made.append(onnx.helper.make_node("Mul", [wide, factor], [name], f"{name}_times"))
    for place, node in enumerate(made):
        model.graph.node.insert(place, node)


# ---------------------------------------------------------------------------- computed narrow


def stored_int4(graph: bytes, excluded: Sequence[str]) -> bytes:
    """Matrix products with stored weights as MatMulNBits (int4 in blocks of 32 inputs), the rest as int8.

    Raises:
        Unsupported: the graph has no matrix product with stored weights.
    """
    import onnx

    from shoal_optimizer.targets.onnx import quiet

    quantizer_class = _int4_quantizer()
    model = onnx.load_from_string(graph)
    if not products_from_gemms(model.graph, excluded):
        raise Unsupported(
            "int4_weights are for linear layers, and this model has none.",
            "Use the precision int8_weights or int8.",
        )
    with quiet(), tempfile.TemporaryDirectory(prefix="shoal-int4-") as folder:
        quantizer = quantizer_class(
            model, block_size=BLOCK, is_symmetric=True, bits=4, nodes_to_exclude=list(excluded)
        )
        quantizer.process()
        path = Path(folder) / "int4.onnx"
        quantizer.model.save_model_to_file(str(path), False)
        return stored_int8(path.read_bytes(), excluded)


def _int4_quantizer() -> Any:
    """ONNX Runtime's quantizer; importing it sets up the root logger, which is put back."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    try:
        from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
    except ImportError as error:
        raise MissingExtra("optimizer", "onnxruntime") from error
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
    return MatMulNBitsQuantizer


def products_from_gemms(graph: Any, excluded: Sequence[str]) -> int:
    """Rewrites each Gemm with stored weights as MatMul and Add, which the int4 quantizer knows. In place.

    Returns:
        The number of products with stored weights.
    """
    import onnx

    count = 0
    constants = {item.name: item for item in graph.initializer}
    for place, node in reversed(list(enumerate(graph.node))):
        if node.name in excluded or len(node.input) < 2 or node.input[1] not in constants:
            continue
        if node.op_type == "MatMul":
            count += 1
        if node.op_type != "Gemm" or not _plain_gemm(node):
            continue
        count += 1
        weight, output = onnx.numpy_helper.to_array(constants[node.input[1]]), node.output[0]
        if any(item.name == "transB" and item.i for item in node.attribute):
            weight = np.ascontiguousarray(weight.T)
        held = f"{node.name}_columns"
        graph.initializer.append(onnx.numpy_helper.from_array(weight, held))
        bias = node.input[2] if len(node.input) > 2 else ""
        product = output if not bias else f"{node.name}_product"
        made = [onnx.helper.make_node("MatMul", [node.input[0], held], [product], node.name)]
        if bias:
            made.append(onnx.helper.make_node("Add", [product, bias], [output], f"{node.name}_bias"))
        graph.node.remove(node)
        for offset, new in enumerate(made):
            graph.node.insert(place + offset, new)
    _drop_unused(graph)
    return count


def _plain_gemm(node: Any) -> bool:
    values = {item.name: item.f if item.name in ("alpha", "beta") else item.i for item in node.attribute}
    return values.get("alpha", 1.0) == values.get("beta", 1.0) == 1.0 and not values.get("transA", 0)


def _drop_unused(graph: Any) -> None:
    from shoal_optimizer.onnx_graph import nodes_of

    used = {name for node in nodes_of(graph) for name in node.input} | {item.name for item in graph.output}
    kept = [item for item in graph.initializer if item.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)


__all__ = ["PRECISIONS", "converted", "stored_half", "stored_int4", "stored_int8"]
