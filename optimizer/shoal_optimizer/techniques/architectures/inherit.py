"""Weights for a smaller network of the same family: the strongest channels, the centres of kernels."""

from __future__ import annotations

import copy
import warnings
from typing import TYPE_CHECKING, Any

from shoal_protos.errors import MissingExtra

if TYPE_CHECKING:
    from torch import Tensor, nn


def inherit(target: nn.Module, original: nn.Module, example: Tensor) -> float:
    """Copies into `target`, in place, what fits by name; the share of its weights that were found.

    A copy of the original first loses the weakest channels of each layer that the target has narrower
    (through the dependency graph, so that coupled layers lose the same ones); then tensors of equal name
    are copied, of larger kernels the centre. What the target has and the original has not keeps its
    own start.
    """
    import torch

    source = narrowed(copy.deepcopy(original), target, example)
    mine, theirs = target.state_dict(), source.state_dict()
    copied = total = 0
    with torch.no_grad():
        for name, tensor in mine.items():
            weighs = tensor.is_floating_point()
            total += tensor.numel() if weighs else 0
            window = None if name not in theirs else _window(theirs[name], tensor)
            if window is not None:
                tensor.copy_(theirs[name][window])
                copied += tensor.numel() if weighs else 0
    return copied / total if total else 0.0


def _window(source: Tensor, target: Tensor) -> tuple[slice, ...] | None:
    """The part of `source` that `target` gets: first channels, centres of kernels."""
    if source.dim() != target.dim() or any(t > s for s, t in zip(source.shape, target.shape, strict=True)):
        return None
    starts = [
        (s - t) // 2 if source.dim() > 2 and axis >= 2 else 0
        for axis, (s, t) in enumerate(zip(source.shape, target.shape, strict=True))
    ]
    return tuple(slice(b, b + t) for b, t in zip(starts, target.shape, strict=True))


def narrowed(source: nn.Module, target: nn.Module, example: Tensor) -> nn.Module:
    """`source` with its layers as wide as the target's of equal name, in place, weakest channels gone.

    Where the dependency graph cannot be made, it is left as wide as it is: then first channels are taken.
    """
    try:
        import torch_pruning
    except ImportError as error:
        raise MissingExtra("optimizer", "torch-pruning") from error
    wanted = dict(target.named_modules())
    for parameter in source.parameters():
        parameter.requires_grad_(True)
    untouched = copy.deepcopy(source)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            graph = torch_pruning.DependencyGraph().build_dependency(source, example)
            for name, layer in source.named_modules():
                if name in wanted:
                    _narrow(graph, layer, _width(wanted[name]))
            source(example)
        except Exception:  # whatever tracing a user's forward() raises
            return untouched
    return source


def _width(layer: Any) -> int | None:
    width = getattr(layer, "out_channels", getattr(layer, "out_features", None))
    return width if isinstance(width, int) else None


def _narrow(graph: Any, layer: Any, width: int | None) -> None:
    import torch_pruning

    now = _width(layer)
    if width is None or now is None or width >= now:
        return
    remove = graph.get_pruner_of_module(layer).prune_out_channels
    whole = graph.get_pruning_group(layer, remove, idxs=list(range(now)))
    strength = torch_pruning.importance.GroupMagnitudeImportance(p=2)(whole)
    if strength is None or len(strength) != now:
        return
    weakest = strength.argsort()[: now - width].tolist()
    group = graph.get_pruning_group(layer, remove, idxs=sorted(weakest))
    if graph.check_pruning_group(group):
        group.prune()
