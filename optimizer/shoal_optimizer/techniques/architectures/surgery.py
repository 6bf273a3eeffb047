"""Changing a network part by part: blocks that become nothing, smaller kernels, a coarser picture.

Parts are replaced by modules of torch or of `shoal_optimizer.modules`, so that the result is stored and
exported like any other.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from shoal_optimizer.techniques.masks import MARK

if TYPE_CHECKING:
    from torch import Tensor, nn

    from shoal_optimizer.data import TaskData
    from shoal_optimizer.task import Task

    from .blocks import Call, Unit

LEAST_SIDE = 8  # pixels or samples that must be left of the input
LEAST_MAP = 2  # and of the last convolution's output
_SETTLE_ITEMS, _SETTLE_BATCH = 512, 64


def part(model: nn.Module, path: str) -> Any:
    """The submodule at `path`, whatever it is."""
    return model.get_submodule(path)


def replace(model: nn.Module, path: str, new: nn.Module) -> nn.Module:
    """Puts `new` at `path` and gives back what was there."""
    parent, _, name = path.rpartition(".")
    home = model.get_submodule(parent)
    old = getattr(home, name)
    setattr(home, name, new)
    return old  # type: ignore[no-any-return]


# ---------------------------------------------------------------------------- depth


def without(model: nn.Module, gone: Iterable[Unit]) -> list[tuple[str, nn.Module]]:
    """Removes units in place; gives back what was there, for `put_back`."""
    from shoal_optimizer.modules import Skipped

    return [(path, replace(model, path, Skipped())) for unit in gone for path in unit.paths]


def put_back(model: nn.Module, old: Sequence[tuple[str, nn.Module]]) -> None:
    for path, module in reversed(old):
        replace(model, path, module)


# ---------------------------------------------------------------------------- kernels


def plain_convolutions(model: nn.Module) -> list[tuple[str, Any]]:
    """Convolutions of torch's own classes whose weight is an ordinary parameter."""
    from torch import nn
    from torch.nn.utils import parametrize

    kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return [
        (path, layer)
        for path, layer in model.named_modules()
        if type(layer) in kinds and not parametrize.is_parametrized(layer)
    ]


def cuttable(layer: Any, size: int) -> bool:
    """True if the kernel is larger than `size` in some dimension and padding hides the difference."""
    if isinstance(layer.padding, str):
        fits = layer.padding == "same"
    else:
        cuts = [max(0, (k - size) // 2 * d) for k, d in zip(layer.kernel_size, layer.dilation, strict=True)]
        fits = all(p >= c for p, c in zip(layer.padding, cuts, strict=True))
    return fits and max(layer.kernel_size) > size and all(k % 2 for k in layer.kernel_size)


def cut(layer: Any, size: int) -> nn.Module:
    """The same convolution with the centre of its kernel, `size` wide at most; padding keeps the output's
    shape, as in the kernel transformation of Cai et al., "Once-for-All" (2020), without its matrices."""
    sides = [min(k, size) for k in layer.kernel_size]
    starts = [(k - s) // 2 for k, s in zip(layer.kernel_size, sides, strict=True)]
    padding = layer.padding
    if not isinstance(padding, str):
        padding = tuple(p - start * d for p, start, d in zip(padding, starts, layer.dilation, strict=True))
    window = (slice(None), slice(None), *(slice(b, b + s) for b, s in zip(starts, sides, strict=True)))
    new = like(layer, kernel_size=tuple(sides), padding=padding)
    new.weight.data.copy_(layer.weight.detach()[window])
    if layer.bias is not None:
        new.bias.data.copy_(layer.bias.detach())
    return new  # type: ignore[no-any-return]


def like(layer: Any, **changed: Any) -> Any:
    """A convolution with the settings of `layer` but for those that change; its weights are not set."""
    from torch.nn.utils import skip_init

    settings = {
        name: getattr(layer, name)
        for name in (
            "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups",
            "padding_mode",
        )
    }  # fmt: skip
    settings |= {"bias": layer.bias is not None, "dtype": layer.weight.dtype} | changed
    new: Any = skip_init(type(layer), **settings)  # type: ignore[no-untyped-call]
    if MARK in layer.__dict__:
        new.__dict__[MARK] = layer.__dict__[MARK]
    return new.train(layer.training)


def kernels_to_cut(model: nn.Module, found: Sequence[Unit], kernel: int) -> list[tuple[str, int]]:
    """(convolution, new size) for "no kernel above `kernel`".

    3 and more: every larger kernel. 1: larger kernels become 3, and in residual blocks with two or more
    dense 3x3 convolutions all but the first become 1x1: one look at the neighbours per block remains.
    """
    least = max(kernel, 3)
    cuts = {path: least for path, layer in plain_convolutions(model) if cuttable(layer, least)}
    if kernel == 1:
        for unit in found:
            if unit.residual:
                for path in _second_looks(model, unit.name):
                    cuts[path] = 1
    return list(cuts.items())


def _second_looks(model: nn.Module, block: str) -> list[str]:
    looks = [
        (path, layer)
        for path, layer in plain_convolutions(model)
        if path.startswith(f"{block}.") and max(layer.kernel_size) >= 3
    ]
    return [
        path
        for path, layer in looks[1:]
        if layer.groups == 1 and set(layer.stride) == {1} and cuttable(layer, 1)
    ]


# ---------------------------------------------------------------------------- resolution


def stem(model: nn.Module, calls: dict[str, Call]) -> str | None:
    """The convolution that sees the input first; None where that is no ordinary one, called once."""
    paths = [path for path, _ in plain_convolutions(model) if path in calls]
    first = min(paths, key=lambda path: calls[path].order, default=None)
    if first is None or calls[first].count != 1 or calls[first].given is None:
        return None
    return first


def coarser(layer: Any, given: tuple[int, ...], resolution: float, how: str) -> nn.Module | None:
    """The stem on a picture of `resolution` times the size; None where that is not possible.

    Args:
        given: shape of its input, with the batch.
        how: "pool" (a resize in front) or "stride" (the stem itself takes wider steps).
    """
    from torch import nn

    from shoal_optimizer.modules import Resize

    sides = given[2:]
    sizes = tuple(
        max(1, round(side * resolution / 8) * 8) if side > 32 else round(side * resolution) for side in sides
    )
    if min(sizes, default=0) < LEAST_SIDE or sizes == tuple(sides):
        return None
    halves = resolution == 0.5 and all(side % 2 == 0 for side in sides)
    if how == "stride":
        if not halves or set(layer.stride) != {1} or min(layer.kernel_size) < 3:
            return None
        wider = like(layer, stride=tuple(2 * step for step in layer.stride))
        wider.load_state_dict(layer.state_dict())
        return wider  # type: ignore[no-any-return]
    if halves:
        pool: nn.Module = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}[len(sides)](2)
        return nn.Sequential(pool, layer)
    if len(sizes) != 2:
        return None
    return nn.Sequential(Resize((sides[0], sides[1]), (sizes[0], sizes[1])), layer)


# ---------------------------------------------------------------------------- afterwards


def settle(model: nn.Module, task: Task, data: TaskData) -> int:
    """Takes the running statistics of batch norms anew from some of the data; weights stay.

    Smaller networks pass other values on than the original did, and batch norm is right about
    neither. Returns the number of batch norms.
    """
    import numpy as np
    import torch
    from torch.nn.modules.batchnorm import _BatchNorm

    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    if not norms:
        return 0
    kept = [norm.momentum for norm in norms]
    model.eval()
    chosen = data.sample(_SETTLE_ITEMS, task.seed).inputs
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # = the plain mean over the batches
        norm.train()
    try:
        with torch.no_grad():
            for start in range(0, len(chosen), _SETTLE_BATCH):
                batch = chosen[start : start + _SETTLE_BATCH]
                if start and len(batch) < 2:
                    break  # one item has no variance
                model(task.pre(torch.from_numpy(np.ascontiguousarray(batch))))
    finally:
        for norm, momentum in zip(norms, kept, strict=True):
            norm.momentum = momentum
        model.eval()
    return len(norms)


def outputs_of(model: nn.Module, batches: Sequence[Tensor]) -> Tensor:
    """The model's outputs for prepared batches, one after the other."""
    import torch

    with torch.inference_mode():
        return torch.cat([model(batch) for batch in batches])
