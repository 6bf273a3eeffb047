"""Counts the operations of an ONNX file without the `onnx` package: a walk over the protobuf wire
format (ModelProto.graph = 7, GraphProto.node = 1, NodeProto.name = 3, .op_type = 4, .attribute = 5,
AttributeProto.g = 6 for sub-graphs). A device must not need 30 MB of schema code to count names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from shoal_protos.errors import InvalidInput

_GRAPH, _NODE, _OP_TYPE, _ATTRIBUTE, _SUBGRAPH = 7, 1, 4, 5, 6
_NAME = 3  # NodeProto.name
_MAX_DEPTH = 16


def op_counts(model: bytes) -> Counter[str]:
    """op_type -> number of nodes, sub-graphs included, of a serialized ModelProto.

    Raises:
        InvalidInput: the bytes are not a protobuf message.
    """
    return Counter(kind for kind, _ in operators(model))


def operators(model: bytes) -> list[tuple[str, str]]:
    """(op_type, name) of every node, sub-graphs included, in the file's order.

    Raises:
        InvalidInput: the bytes are not a protobuf message.
    """
    found: list[tuple[str, str]] = []
    for number, value in _fields(memoryview(model)):
        if number == _GRAPH:
            _collect(value, found, 0)
    return found


def _collect(graph: memoryview, found: list[tuple[str, str]], depth: int) -> None:
    if depth > _MAX_DEPTH:
        raise InvalidInput("The model's graphs are nested too deeply.")
    for number, node in _fields(graph):
        if number != _NODE:
            continue
        kind = name = None
        for field, value in _fields(node):
            if field == _OP_TYPE:
                kind = bytes(value).decode("utf-8", "replace")
            elif field == _NAME:
                name = bytes(value).decode("utf-8", "replace")
            elif field == _ATTRIBUTE:
                for inner, subgraph in _fields(value):
                    if inner == _SUBGRAPH:
                        _collect(subgraph, found, depth + 1)
        if kind is not None:
            found.append((kind, name or kind))


def _fields(data: memoryview) -> Iterator[tuple[int, memoryview]]:
    """(number, content) of each length-delimited field; the others are skipped."""
    position, end = 0, len(data)
    while position < end:
        key, position = _varint(data, position)
        kind = key & 7
        if kind == 2:
            size, position = _varint(data, position)
            if size > end - position:
                raise InvalidInput("The model file is truncated.")
            yield key >> 3, data[position : position + size]
            position += size
        elif kind == 0:
            _, position = _varint(data, position)
        elif kind in (1, 5):
            position += 8 if kind == 1 else 4
            if position > end:
                raise InvalidInput("The model file is truncated.")
        else:
            raise InvalidInput("The model file is not an ONNX model.")


def _varint(data: memoryview, position: int) -> tuple[int, int]:
    value = shift = 0
    while shift < 70:
        if position >= len(data):
            raise InvalidInput("The model file is truncated.")
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
    raise InvalidInput("The model file is not an ONNX model.")
