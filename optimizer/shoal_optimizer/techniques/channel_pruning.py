"""Structured pruning: whole channels go, through the dependency graph of torch-pruning."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np

from shoal_optimizer.techniques.base import Parameter, Technique, Work
from shoal_protos.errors import InvalidInput, MissingExtra


class ChannelPruning(Technique):
    """Removes the weakest channels by group L2 norm. Always fine-tune afterwards: accuracy collapses.

    Channel counts are rounded to a multiple of `round_to`, one at least: kernels run full vectors, and
    unrounded nets were measured slower than unpruned ones. The layer that makes the outputs keeps
    its width; pre- and postprocessing are outside the module and untouched.
    """

    name: ClassVar[str] = "channel_pruning"
    parameters: ClassVar[Mapping[str, Parameter]] = {
        "ratio": Parameter(0.5, 0.0, 0.95, help="share of channels removed from each layer"),
        "round_to": Parameter(8, 1, 256, help="channel counts become multiples of this"),
    }

    def transform(self, work: Work, params: Mapping[str, Any]) -> Work:
        try:
            import torch
            import torch_pruning
        except ImportError as error:
            raise MissingExtra("optimizer", "torch-pruning") from error
        model = work.module()
        item = torch.from_numpy(np.ascontiguousarray(work.task.required("evaluation").inputs[:2]))
        with torch.no_grad():
            example = work.task.pre(item)
            wanted = work.task.guard("model()", lambda: model(example)).shape
        before = sum(p.numel() for p in model.parameters())
        for parameter in model.parameters():
            parameter.requires_grad_(True)  # tracing follows gradients
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                torch_pruning.pruner.BasePruner(
                    model,
                    example,
                    importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
                    pruning_ratio=params["ratio"],
                    pruning_ratio_dict=layer_ratios(model, params["ratio"], params["round_to"]),
                    round_to=params["round_to"],
                    ignored_layers=output_layers(model, example),
                ).step()
                with torch.no_grad():
                    got = model(example).shape
            except Exception as error:
                raise InvalidInput(
                    f"The model cannot be pruned by channels: {type(error).__name__}: {error}.",
                    "Avoid fixed sizes in forward() (reshape(-1, 512)); use flatten(1).",
                ) from error
        if got != wanted:
            raise InvalidInput(
                f"Pruning changed the output from {list(wanted)} to {list(got)}.",
                "End the model with one linear or convolutional layer.",
            )
        after = sum(p.numel() for p in model.parameters())
        return replace(work, model=model.eval()).note(f"channel pruning: {before} -> {after} parameters")


def layer_ratios(model: Any, ratio: float, round_to: int) -> dict[Any, float]:
    """layer -> the share to remove so that a multiple of `round_to` channels stays, one at least.

    torch-pruning alone rounds down, and where nothing would be left it prunes nothing.
    """
    from torch import nn

    found = {}
    for layer in model.modules():
        width = getattr(layer, "out_channels", getattr(layer, "out_features", None))
        if not isinstance(layer, nn.Module) or not isinstance(width, int):
            continue
        kept = min(width, max(round_to, round(width * (1 - ratio) / round_to) * round_to))
        # A quarter of a channel keeps the pruner's own truncation away from the next multiple.
        found[layer] = 0.0 if kept == width else 1 - (kept + 0.25) / width
    return found


def output_layers(model: Any, example: Any) -> list[Any]:
    """Weighted layers from which the model's output comes without another weighted layer between:
    their output channels are the model's, so they keep their width. Found in autograd's graph."""
    import torch
    from torch import nn

    weighted = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    made: dict[int, Any] = {}
    layers = [layer for layer in model.modules() if isinstance(layer, weighted)]

    def remember(layer: Any, args: Any, output: Any) -> None:
        if isinstance(output, torch.Tensor) and output.grad_fn is not None:
            made[id(output.grad_fn)] = layer
            kept.append(output.grad_fn)

    kept: list[Any] = []  # keeps grad_fns alive, so that ids stay unique
    handles = [layer.register_forward_hook(remember) for layer in layers]
    try:
        with torch.enable_grad():
            # Also a frozen model gets a graph when its input asks for gradients.
            output = model(example.detach().clone().requires_grad_(True))
    finally:
        for handle in handles:
            handle.remove()
    found, seen, queue = [], set(), [output.grad_fn]
    while queue:
        node = queue.pop()
        if node is None or id(node) in seen:
            continue
        seen.add(id(node))
        kept.append(node)
        if id(node) in made:
            found.append(made[id(node)])
            continue
        queue.extend(parent for parent, _ in node.next_functions)
    return found or layers[-1:]
