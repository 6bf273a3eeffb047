"""From a module's path to the tensors of an exported ONNX graph: where learned ranges belong.

The exporter writes the module path of each node into its metadata and names stored weights by their module.
A range is only pinned where both leave no doubt.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

INPUT = ":input"
ROOT = "model."  # where `modules.Pipeline` holds the task's model


def tensor_ranges(graph: bytes, pinned: Mapping[str, tuple[float, float]]) -> dict[str, tuple[float, float]]:
    """Tensor name -> (low, high) for every pinned range whose tensor can be told.

    Args:
        graph: float ONNX, with the exporter's metadata.
        pinned: module path -> range of its output, or path and ":input" -> of what it reads.
    """
    import onnx

    proto = onnx.load_from_string(graph).graph
    index = _Index(proto)
    found: dict[str, tuple[float, float]] = {}
    for name, (low, high) in sorted(pinned.items()):
        reads = name.endswith(INPUT)
        path = ROOT + name.removesuffix(INPUT)
        tensor = index.read_by(path) if reads else index.written_by(path)
        if tensor is not None:
            found.setdefault(tensor, (float(low), float(high)))
    return found


class _Index:
    """Nodes by module path."""

    def __init__(self, proto: Any) -> None:
        self._constants = {item.name for item in proto.initializer}
        self._outputs = {item.name for item in proto.output}
        self._readers: dict[str, list[int]] = {}
        self._nodes = list(proto.node)
        self._inside: dict[str, set[int]] = {}
        for place, node in enumerate(self._nodes):
            for path in paths_of(node, self._constants):
                self._inside.setdefault(path, set()).add(place)
            for name in node.input:
                self._readers.setdefault(name, []).append(place)

    def written_by(self, path: str) -> str | None:
        """The one tensor that leaves the module; None when it is not one."""
        inside = self._inside.get(path, set())
        leaving = [
            name
            for place in sorted(inside)
            for name in self._nodes[place].output
            if name in self._outputs or not inside.issuperset(self._readers.get(name, ()))
        ]
        return leaving[0] if len(leaving) == 1 else None

    def read_by(self, path: str) -> str | None:
        """What the one weighted node of the module reads."""
        weighted = [
            self._nodes[place]
            for place in sorted(self._inside.get(path, set()))
            if self._nodes[place].op_type in ("Conv", "ConvTranspose", "Gemm", "MatMul")
        ]
        return str(weighted[0].input[0]) if len(weighted) == 1 else None


def paths_of(node: Any, constants: set[str]) -> set[str]:
    """Module paths that a node belongs to: its scopes, and the module of each weight that it reads (a
    convolution that was folded with its batch norm bears the norm's scope only)."""
    from shoal_optimizer.targets.onnx import scopes_of

    found = {scope for scope in scopes_of(node) if scope}
    for name in node.input:
        if name in constants and "." in name:
            module = name.rpartition(".")[0]
            parts = module.split(".")
            found.update(".".join(parts[: length + 1]) for length in range(len(parts)))
    return found
