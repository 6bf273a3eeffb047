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

    Channel counts are rounded up to a multiple of `round_to`: kernels run full vectors, and
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
            wanted = model(example).shape
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
                    round_to=params["round_to"],
                    ignored_layers=_output_layers(model, example),
                ).step()
                with torch.no_grad():
                    got = model(example).shape
            except Exception as error:
                raise InvalidInput(
                    f"The model cannot be pruned by channels: {type(error).__name__}: {error}.",
                    "Avoid fixed sizes in forward() (view(-1, 512)); use flatten(1).",
                ) from error
        if got != wanted:
            raise InvalidInput(
                f"Pruning changed the output from {list(wanted)} to {list(got)}.",
                "End the model with one linear or convolutional layer.",
            )
        after = sum(p.numel() for p in model.parameters())
        return replace(work, model=model.eval()).note(f"channel pruning: {before} -> {after} parameters")


def _output_layers(model: Any, example: Any) -> list[Any]:
    """Layers whose output channels reach the model's output: the last weighted one that ran on each path.

    A layer's output channels reach the model's output when changing one channel's gradient mask does;
    cheaper and enough: the layers whose output gradient graph has no other weighted layer above it.
    """
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
            output = model(example)
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
