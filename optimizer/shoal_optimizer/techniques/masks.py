"""Weights that are zero on purpose: finding them, choosing them, and keeping them zero while training.

A layer remembers in its attribute `keeps_zeros` which of its parameters are sparse. It goes along when
a module is copied or stored, and stays right when channels are removed, since the zeros themselves are
the mask.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.nn.utils import prune

MARK = "keeps_zeros"
LEAST_KEPT = 0.02  # of each layer's weights: a layer without any passes nothing on


@dataclass(frozen=True)
class Weight:
    """One matrix or kernel that may become sparse."""

    name: str
    layer: nn.Module
    parameter: str

    @property
    def tensor(self) -> Tensor:
        found: Tensor = getattr(self.layer, self.parameter)
        return found


def weights(model: nn.Module) -> list[Weight]:
    """The weights of convolutions, linear layers, attention and recurrent layers; each shared one once."""
    from torch import nn
    from torch.nn.modules.conv import _ConvNd

    kinds = (_ConvNd, nn.Linear, nn.RNNBase, nn.MultiheadAttention)
    found, seen = [], set()
    for path, layer in model.named_modules():
        if not isinstance(layer, kinds):
            continue
        for name, parameter in layer.named_parameters(recurse=False):
            if parameter.dim() >= 2 and id(parameter) not in seen:
                seen.add(id(parameter))
                found.append(Weight(f"{path}.{name}".lstrip("."), layer, name))
    return found


def zero_share(model: nn.Module) -> float:
    """Share of exact zeros among the weights that may become sparse; 0 when there are none."""
    tensors = [weight.tensor.detach() for weight in weights(model)]
    total = sum(tensor.numel() for tensor in tensors)
    return sum(int((tensor == 0).sum()) for tensor in tensors) / total if total else 0.0


# ---------------------------------------------------------------------------- masks of torch.nn.utils.prune


def copied(model: nn.Module) -> nn.Module:
    """A copy to change, also of a model under torch.nn.utils.prune: its masks are permanent in the copy.

    torch refuses to copy such a model as it is, because the masked weight is a result of autograd.
    """
    import torch

    with torch.no_grad():
        for layer, _, hook in _pruned(model):
            hook(layer, None)
    return settled(copy.deepcopy(model))


def settled(model: nn.Module) -> nn.Module:
    """Makes the masks of torch.nn.utils.prune permanent, in place; later training keeps those zeros."""
    from torch.nn.utils import prune

    for layer, name, _ in list(_pruned(model)):
        prune.remove(layer, name)  # type: ignore[no-untyped-call]
        mark(layer, name)
    return model


def _pruned(model: nn.Module) -> Iterator[tuple[nn.Module, str, prune.BasePruningMethod]]:
    from torch.nn.utils import prune

    for layer in model.modules():
        for hook in list(layer._forward_pre_hooks.values()):
            if isinstance(hook, prune.BasePruningMethod):
                yield layer, hook._tensor_name, hook


# ---------------------------------------------------------------------------- keeping zeros


def mark(layer: nn.Module, parameter: str) -> None:
    """Remembers that the zeros of this parameter are meant."""
    kept = set(getattr(layer, MARK, ())) | {parameter}
    layer.__dict__[MARK] = tuple(sorted(kept))


def keeper(model: nn.Module) -> Keeper:
    """What keeps the model's intended zeros zero: call it after each optimizer step."""
    pairs: list[tuple[Tensor, Tensor]] = [
        (parameter, parameter.detach() != 0)
        for layer in model.modules()
        for name, parameter in layer.named_parameters(recurse=False)
        if name in getattr(layer, MARK, ())
    ]
    return Keeper(pairs)


class Keeper:
    """Parameters with the mask of what may differ from zero."""

    def __init__(self, pairs: list[tuple[Tensor, Tensor]]) -> None:
        self._pairs = pairs

    def __call__(self) -> None:
        import torch

        with torch.no_grad():
            for parameter, mask in self._pairs:
                parameter.mul_(mask)


# ---------------------------------------------------------------------------- choosing zeros


def by_magnitude(chosen: list[Weight], share: float) -> Mapping[str, Tensor]:
    """Masks that zero the `share` of smallest magnitudes over all weights together.

    Each weight keeps a fiftieth of its values at least. Weights that are zero already count.
    """
    import torch

    if not chosen:
        return {}
    scores = []
    for weight in chosen:
        score = weight.tensor.detach().abs().flatten().clone()
        least = max(1, round(LEAST_KEPT * score.numel()))
        score[score.topk(least).indices] = torch.inf
        scores.append(score)
    everything = torch.cat(scores)
    count = round(share * everything.numel())
    mask = torch.ones(everything.numel(), dtype=torch.bool)
    if count:
        # Of equal magnitudes some go and some stay, so that the share is met exactly.
        smallest = everything.topk(count, largest=False).indices
        mask[smallest[torch.isfinite(everything[smallest])]] = False
    parts = torch.split(mask, [score.numel() for score in scores])
    return {
        weight.name: part.reshape(weight.tensor.shape) for weight, part in zip(chosen, parts, strict=True)
    }


def n_of_m(weight: Weight, kept: int, group: int) -> Tensor | None:
    """The mask that keeps the `kept` largest of each `group` neighbours along the inputs (dimension 1).

    None where the inputs are no multiple of `group`: hardware has no form for such a layer.
    """
    import torch

    tensor = weight.tensor.detach().abs()
    if tensor.shape[1] % group:
        return None
    rows = tensor.movedim(1, -1)
    grouped = rows.reshape(-1, group)
    mask = torch.zeros_like(grouped, dtype=torch.bool)
    mask.scatter_(1, grouped.topk(kept, dim=1).indices, True)
    return mask.reshape(rows.shape).movedim(-1, 1)


def apply(chosen: list[Weight], found: Mapping[str, Tensor]) -> None:
    """Zeroes what the masks say and marks the layers."""
    import torch

    with torch.no_grad():
        for weight in chosen:
            if weight.name in found:
                weight.tensor.mul_(found[weight.name])
                mark(weight.layer, weight.parameter)
