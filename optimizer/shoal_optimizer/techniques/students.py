"""A student: a network of the model's own structure with scaled widths."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

from shoal_optimizer.techniques import allocation, masks
from shoal_optimizer.techniques.channels import pruned

if TYPE_CHECKING:
    from torch import nn

    from shoal_optimizer.task import Task

ROUND_TO = 8


def scaled(
    model: nn.Module, task: Task, width: float, *, inherit: bool, seed: int, round_to: int = ROUND_TO
) -> nn.Module:
    """A copy of `model` with `width` of its channels, multiples of `round_to`, in evaluation mode.

    Args:
        inherit: keep the weights of the strongest channels; else all weights are drawn anew, each layer
            by its own rule.

    Raises:
        InvalidInput: the model cannot be scaled; the message names the layer.
    """
    from shoal_optimizer.task import seeded
    from shoal_optimizer.techniques.architectures.blocks import example_of

    student, _ = pruned(
        copy.deepcopy(model),
        example_of(task),
        lambda channels: allocation.uniform(channels.units, 1 - width, round_to),
        "magnitude",
    )
    if not inherit:
        with seeded(seed):
            renew(student)
    return student.eval()


def renew(model: nn.Module) -> None:
    """Draws all weights anew, in place: by the layers' own `reset_parameters`, free parameters (tokens,
    positions) with the spread that they had."""
    import torch

    drawn: set[int] = set()
    for layer in model.modules():
        layer.__dict__.pop(masks.MARK, None)
        reset = getattr(layer, "reset_parameters", None) or getattr(layer, "_reset_parameters", None)
        if callable(reset):
            reset()
            drawn |= {id(parameter) for parameter in layer.parameters()}
    with torch.no_grad():
        for parameter in model.parameters():
            if id(parameter) not in drawn and parameter.numel() > 1:
                spread = float(parameter.std())
                if spread > 0:
                    parameter.normal_(0.0, spread)
