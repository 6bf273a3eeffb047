"""How important each channel of a group is: the criteria of torch-pruning that work here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

    from shoal_optimizer.data import TaskData
    from shoal_optimizer.task import Task

NAMES = ("magnitude", "taylor", "bn_scale", "lamp", "fpgm", "random")
TAYLOR_ITEMS, TAYLOR_BATCH = 256, 64


def of_group(group: Any, width: int, name: str) -> Tensor:
    """Importance of each channel of a torch-pruning group, float32 [width].

    - magnitude: squares of all weights that belong to the channel (Li et al., "Pruning Filters for
      Efficient ConvNets", 2017, over the whole group);
    - taylor: |weight x gradient| (Molchanov et al., "Importance Estimation for Neural Network
      Pruning", 2019); gradients must be there, see `gradients`;
    - bn_scale: |scale of the batch norm| (Liu et al., "Network Slimming", 2017);
    - lamp: magnitude as a share of all that is not smaller (Lee et al., "Layer-adaptive Sparsity",
      2021): within a layer it orders as magnitude, between layers it does not;
    - fpgm: distance from the other channels (He et al., "Filter Pruning via Geometric Median", 2019).

    Groups that a criterion cannot judge (no batch norm, no gradient) are judged by magnitude.
    """
    import torch
    import torch_pruning

    kinds = torch_pruning.importance
    if name == "random":
        return torch.rand(width)
    if name == "lamp":
        return _lamp(of_group(group, width, "magnitude"))
    found = None
    try:
        if name == "bn_scale":
            found = kinds.BNScaleImportance()(group)
        elif name == "fpgm":
            found = kinds.FPGMImportance()(group)
        elif name == "taylor" and all(_has_gradient(dep.target.module) for dep, _ in group):
            found = kinds.GroupTaylorImportance()(group)
    except (IndexError, RuntimeError):  # torch-pruning's fpgm cannot read grouped convolutions
        found = None
    if found is None or found.dim() != 1 or len(found) != width or not bool(torch.isfinite(found).all()):
        found = kinds.GroupMagnitudeImportance(p=2)(group)
    if found is None or len(found) != width or not bool(torch.isfinite(found).all()):
        return torch.zeros(width)
    result: Tensor = found.detach().float()
    return result


def _lamp(squares: Tensor) -> Tensor:
    import torch

    order = squares.argsort(descending=True)
    above = squares[order].cumsum(0)
    result = torch.empty_like(squares)
    result[order] = squares[order] / above.clamp(min=1e-12)
    return result


def _has_gradient(layer: Any) -> bool:
    weight = getattr(layer, "weight", None)
    return weight is None or not hasattr(weight, "grad") or weight.grad is not None


def gradients(model: nn.Module, task: Task, data: TaskData, seed: int) -> None:
    """Leaves in `model` the gradients of the task's loss, summed over some of the data."""
    import numpy as np
    import torch

    model.eval()
    model.zero_grad(set_to_none=True)
    chosen = data.sample(TAYLOR_ITEMS, seed)
    for start in range(0, len(chosen), TAYLOR_BATCH):
        part = chosen.take(slice(start, start + TAYLOR_BATCH))
        with torch.no_grad():
            inputs = task.pre(torch.from_numpy(np.ascontiguousarray(part.inputs)))
        targets = torch.from_numpy(np.ascontiguousarray(part.targets))
        loss = task.guard("loss()", lambda i=inputs, t=targets: task.loss(model(i), t))  # type: ignore[misc]
        loss.backward()  # type: ignore[no-untyped-call]
    for parameter in model.parameters():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
