"""What a model costs before anything is tried: parameters, MACs, activation memory, where they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from shoal_optimizer.hooks import watching

if TYPE_CHECKING:
    from torch import Tensor, nn

    from shoal_optimizer.task import Task


@dataclass(frozen=True)
class Layer:
    """One leaf of the model for a single item: `output` shape without the batch."""

    name: str
    kind: str
    parameters: int
    macs: int
    output: tuple[int, ...]
    activation_bytes: int  # its float32 output


@dataclass(frozen=True)
class Analysis:
    """Costs of one item through the whole model.

    Attributes:
        activation_peak_bytes: largest input plus output of one layer, float32: a lower bound of
            what any runtime needs besides weights.
        conv_share: share of MACs in convolutions; dynamic quantization is not for those models.
    """

    parameters: int
    weight_bytes: int
    macs: int
    activation_peak_bytes: int
    conv_share: float
    layers: tuple[Layer, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"layers": [asdict(layer) for layer in self.layers]}


def analyse(task: Task, model: nn.Module | None = None) -> Analysis:
    """Runs one evaluation item through the torch model (or reads an ONNX task's graph).

    Raises:
        InvalidInput: the model cannot run on the data.
    """
    if not task.has_module:
        return _analyse_onnx(task)
    import torch

    module = model if model is not None else task.original
    item = torch.from_numpy(np.ascontiguousarray(task.required("evaluation").inputs[:1]))
    layers: list[Layer] = []
    peak = 0

    def hook(name: str) -> Any:
        def record(layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            nonlocal peak
            if not isinstance(output, torch.Tensor):
                return
            given = sum(a.numel() for a in args if isinstance(a, torch.Tensor))
            peak = max(peak, 4 * (given + output.numel()))
            layers.append(_layer(name, layer, args, output))

        return record

    leaves = [(name, part) for name, part in module.named_modules() if not list(part.children())]
    with watching((part, hook(name)) for name, part in leaves), torch.inference_mode():
        task.guard("model()", lambda: module(task.pre(item)))
    parameters = sum(p.numel() for p in module.parameters())
    weights = sum(p.numel() * p.element_size() for p in module.parameters())
    return _summary(parameters, weights, peak, layers)


def _layer(name: str, layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Layer:
    return Layer(
        name=name,
        kind=type(layer).__name__,
        parameters=sum(p.numel() for p in layer.parameters(recurse=False)),
        macs=_macs(layer, output),
        output=tuple(output.shape[1:]),
        activation_bytes=4 * output.numel(),
    )


def _macs(layer: nn.Module, output: Tensor) -> int:
    """Multiply-adds: each output element of a conv or linear layer needs one weight row."""
    weight = getattr(layer, "weight", None)
    kind = type(layer).__name__
    if weight is None or not kind.startswith(("Conv", "Linear")):
        return 0
    if kind.startswith("ConvTranspose"):
        return int(weight.numel() * output.shape[2:].numel())
    return int(output.numel() * weight[0].numel())


def _summary(parameters: int, weights: int, peak: int, layers: Sequence[Layer]) -> Analysis:
    macs = sum(layer.macs for layer in layers)
    conv = sum(layer.macs for layer in layers if layer.kind.startswith("Conv"))
    return Analysis(parameters, weights, macs, peak, conv / macs if macs else 0.0, tuple(layers))


def _analyse_onnx(task: Task) -> Analysis:
    import onnx
    from onnx import numpy_helper, shape_inference

    model = shape_inference.infer_shapes(onnx.load(str(task.onnx_file)))
    graph = model.graph
    weights = {item.name: numpy_helper.to_array(item) for item in graph.initializer}
    shapes = {
        value.name: tuple(max(d.dim_value, 1) for d in value.type.tensor_type.shape.dim)
        for value in [*graph.value_info, *graph.input, *graph.output]
    }
    layers, peak = [], 0
    for node in graph.node:
        output = shapes.get(node.output[0], ())
        elements = int(np.prod(output[1:], dtype=np.int64)) if len(output) > 1 else 0
        given = sum(
            int(np.prod(shapes[n][1:], dtype=np.int64)) for n in node.input if len(shapes.get(n, ())) > 1
        )
        peak = max(peak, 4 * (elements + given))
        used = [weights[name] for name in node.input if name in weights]
        macs = 0
        if node.op_type in ("Conv", "Gemm", "MatMul") and used:
            matrix = used[0]
            rows = matrix.shape[0] if node.op_type == "Conv" else _gemm_outputs(node, matrix)
            macs = elements * (matrix.size // max(rows, 1))
        layers.append(
            Layer(
                node.name or node.output[0],
                node.op_type,
                sum(w.size for w in used),
                macs,
                output[1:],
                4 * elements,
            )
        )
    total = sum(w.size for w in weights.values() if w.dtype.kind == "f")
    size = sum(w.nbytes for w in weights.values())
    return _summary(total, size, peak, layers)


def _gemm_outputs(node: Any, matrix: np.ndarray) -> int:
    transposed = any(a.name == "transB" and a.i for a in node.attribute)
    return int(matrix.shape[0] if transposed else matrix.shape[-1])
