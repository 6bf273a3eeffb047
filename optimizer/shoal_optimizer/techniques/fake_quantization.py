"""Int8 simulated in torch: what a runtime will round is rounded while training, on any module.

Nothing of the module is rewritten: hooks tell where a forward pass is, and a `TorchFunctionMode` sees each
torch function that it calls. Rounded are the weights of weighted layers, per output channel, and the tensors
that ONNX Runtime and OpenVINO keep in int8: what convolutions, products, sums, concatenations and pools read,
and what they write, after a fused ReLU. A batch norm after a convolution needs no folding for that:
folding multiplies each output channel by one number, and so its scale.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

INPUT = ":input"  # after a module's path: the tensor that it reads, not the one that it writes
MOMENTUM = 0.05  # of the moving average of the ranges
_SMALLEST_SCALE = 1e-8

# Output channels are the dimension 0 of a weight, but for transposed convolutions.
_WEIGHTED = {
    "conv1d": 0,
    "conv2d": 0,
    "conv3d": 0,
    "linear": 0,
    "conv_transpose1d": 1,
    "conv_transpose2d": 1,
    "conv_transpose3d": 1,
}
_QUANTIZED = frozenset((
    "add", "add_", "__add__", "__radd__", "__iadd__", "mul", "mul_", "__mul__", "__rmul__", "__imul__",
    "matmul", "__matmul__", "__rmatmul__", "bmm", "mm", "cat", "concat", "sigmoid", "softmax",
    "leaky_relu", "silu", "avg_pool1d", "avg_pool2d", "adaptive_avg_pool1d", "adaptive_avg_pool2d",
))  # fmt: skip
# Fused into the layer before: only their output exists in int8.
_FUSED = frozenset((
    "relu", "relu_", "relu6", "hardtanh", "hardtanh_", "clamp", "clamp_", "clip", "clip_", "batch_norm",
))  # fmt: skip
# Their output has the scale of their input.
_PASSING = frozenset((
    "max_pool1d", "max_pool2d", "flatten", "reshape", "view", "permute", "transpose", "squeeze",
    "unsqueeze", "contiguous", "dropout", "chunk", "split", "__getitem__", "t", "movedim", "identity",
    "pad", "to", "float",
))  # fmt: skip
# They look at a tensor, not at its values.
_LOOKING = frozenset((
    "dim", "size", "numel", "stride", "ndimension", "__get__", "__set__", "__len__", "is_contiguous",
    "is_floating_point", "is_complex", "type", "get_device", "data_ptr", "storage_offset",
    "element_size", "detach", "requires_grad_", "_is_view", "is_same_size", "__format__", "__repr__",
    "__bool__", "__iter__", "new_zeros", "new_ones", "new_empty", "zeros_like", "ones_like",
))  # fmt: skip


@dataclass(frozen=True)
class Grid:
    """The int8 types that are simulated.

    Attributes:
        weight_bits: 8, or 7 for x86 without VNNI.
        symmetric: activations are int8 around zero (Arm) instead of uint8 with a zero point (x86).
    """

    weight_bits: int = 8
    symmetric: bool = False

    @property
    def weight_limit(self) -> int:
        return 127 if self.weight_bits == 8 else 64

    def round(self, values: Tensor, low: float, high: float) -> Tensor:
        """`values` on the 8-bit grid of the range; the gradient passes inside it and stops outside."""
        low, high = min(low, 0.0), max(high, 0.0)  # zero is always representable
        if self.symmetric:
            scale = max(max(-low, high) / 127, _SMALLEST_SCALE)
            return torch.fake_quantize_per_tensor_affine(values, scale, 0, -127, 127)
        scale = max((high - low) / 255, _SMALLEST_SCALE)
        return torch.fake_quantize_per_tensor_affine(values, scale, round(-low / scale), 0, 255)

    def round_weight(self, weight: Tensor, axis: int) -> Tensor:
        """`weight` in symmetric int8 per channel of `axis`."""
        rest = [place for place in range(weight.dim()) if place != axis % weight.dim()]
        largest = weight.detach().abs().amax(rest)
        scale = (largest / self.weight_limit).clamp(min=_SMALLEST_SCALE)
        points = torch.zeros_like(scale, dtype=torch.int32)
        limit = self.weight_limit
        return torch.fake_quantize_per_channel_affine(
            weight, scale, points, axis % weight.dim(), -limit, limit
        )


@dataclass
class Site:
    """One tensor of a forward pass.

    Attributes:
        key: where it is made; equal in every pass.
        names: module paths whose output it is, and paths with `INPUT` that read it.
        held: its maker writes int8, so that every reader sees it rounded.
    """

    key: str
    names: list[str] = field(default_factory=list)
    held: bool = False


class Simulated(nn.Module):
    """A module whose forward pass is rounded as int8 would round it. Its state holds the ranges too.

    The wrapped module is `inner`; `close` removes the hooks from it.
    """

    ranges: Tensor  # [tensors, 2] float32: low and high of each

    def __init__(self, inner: nn.Module, grid: Grid) -> None:
        super().__init__()
        self.inner = inner
        self.grid = grid
        self.observing = True
        self.rounding = False
        self.register_buffer("ranges", torch.zeros(0, 2))
        self._places: dict[str, int] = {}  # site key -> row of `ranges`
        self._names: dict[str, list[str]] = {}
        self._calls: dict[str, int] = {}
        self._watch = _Watch(self)
        self._hooks: list[Any] = []
        for path, module in inner.named_modules():
            self._hooks.append(module.register_forward_pre_hook(self._watch.entering(path)))
            self._hooks.append(module.register_forward_hook(self._watch.leaving(path)))

    def forward(self, inputs: Any) -> Any:
        self._watch.start()
        if isinstance(inputs, Tensor):
            self._watch.mark(inputs, Site("input"))
        with self._watch:
            outputs = self.inner(inputs)
        if isinstance(outputs, Tensor):
            outputs = self._watch.rounded(outputs, only_held=True)
        elif isinstance(outputs, tuple | list):
            outputs = type(outputs)(self._watch.rounded(value, only_held=True) for value in outputs)
        self._calls = dict(self._watch.calls)
        return outputs

    def close(self) -> nn.Module:
        """Takes the hooks away and gives the wrapped module."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        return self.inner

    def round(self, values: Tensor, site: Site) -> Tensor:
        """Observes and rounds one tensor."""
        if not values.is_floating_point():
            return values
        place = self._observe(values, site) if self.observing else self._places.get(site.key)
        self._names[site.key] = site.names
        if place is None or not self.rounding:
            return values
        low, high = self.ranges[place].tolist()
        # A diverged pass has no range; its loss says so, and training goes back.
        return self.grid.round(values, low, high) if math.isfinite(high - low) else values

    def _observe(self, values: Tensor, site: Site) -> int:
        low, high = torch.aminmax(values.detach())
        found = torch.stack([low, high]).float()
        place = self._places.get(site.key)
        if place is None:
            place = self._places[site.key] = len(self.ranges)
            self.ranges = torch.cat([self.ranges, found[None]])
        else:
            self.ranges[place] += MOMENTUM * (found - self.ranges[place])
        return place

    def learned(self) -> dict[str, tuple[float, float]]:
        """Module path (or path and `INPUT`) -> (low, high), of every tensor that has such a name.

        A module that is called several times in a pass names no tensor.
        """
        found = {}
        for key, place in self._places.items():
            low, high = self.ranges[place].tolist()
            for name in self._names.get(key, ()):
                if self._calls.get(name.removesuffix(INPUT), 0) == 1:
                    found[name] = (min(low, 0.0), max(high, 0.0))
        return found


class _Watch(TorchFunctionMode):
    """Sees the torch functions of a pass and rounds their arguments."""

    def __init__(self, owner: Simulated) -> None:
        super().__init__()
        self._owner = owner
        self.start()

    def start(self) -> None:
        self._scopes: list[str] = []
        self._counts: dict[str, int] = {}
        self.calls: dict[str, int] = {}
        self._sites: dict[int, Site] = {}
        self._alive: list[Tensor] = []  # an id is only a name while its tensor lives
        self._rounded: dict[tuple[str, int], Tensor] = {}

    def entering(self, path: str) -> Any:
        def hook(module: nn.Module, inputs: Any) -> None:
            self._scopes.append(path)
            self.calls[path] = self.calls.get(path, 0) + 1

        return hook

    def leaving(self, path: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            self._scopes.pop()
            site = self.site(output)
            if site is not None and path:
                site.names.append(path)

        return hook

    def site(self, value: Any) -> Site | None:
        return self._sites.get(id(value)) if isinstance(value, Tensor) else None

    def mark(self, value: Tensor, site: Site) -> None:
        self._sites[id(value)] = site
        self._alive.append(value)

    def rounded(self, value: Any, *, only_held: bool = False) -> Any:
        site = self.site(value)
        if site is None or (only_held and not site.held):
            return value
        known = (site.key, id(value))
        if known not in self._rounded:
            self._rounded[known] = self._owner.round(value, site)
        return self._rounded[known]

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name, kwargs = getattr(func, "__name__", ""), dict(kwargs or {})
        source = next((s for s in map(self.site, _flat(args)) if s is not None), None)
        if name in _WEIGHTED:
            args = self._weighted(_WEIGHTED[name], args)
        elif name in _QUANTIZED:
            args = tuple(self._both(name, value) for value in args)
        elif source is not None and not any(name in known for known in (_FUSED, _PASSING, _LOOKING)):
            args = tuple(self.rounded(value, only_held=True) for value in args)
        result = func(*args, **kwargs)
        self._tag(name, result, source)
        return result

    def _weighted(self, axis: int, args: tuple[Any, ...]) -> tuple[Any, ...]:
        site = self.site(args[0])
        if site is not None and self._scopes and self._scopes[-1]:
            site.names.append(self._scopes[-1] + INPUT)
        weight = args[1]
        if self._owner.rounding:
            weight = self._owner.grid.round_weight(weight, axis)
        return (self.rounded(args[0]), weight, *args[2:])

    def _both(self, name: str, value: Any) -> Any:
        if isinstance(value, tuple | list):
            return type(value)(self.rounded(item) for item in value)
        if isinstance(value, nn.Parameter) and "m" in name and value.dim() == 2 and self._owner.rounding:
            return self._owner.grid.round_weight(value, -1) if "mm" in name or "matmul" in name else value
        return self.rounded(value)

    def _tag(self, name: str, result: Any, source: Site | None) -> None:
        if source is None or name in _LOOKING:
            return
        scope = self._scopes[-1] if self._scopes else ""
        for value in result if isinstance(result, tuple | list) else (result,):
            if not isinstance(value, Tensor) or not value.is_floating_point():
                continue
            if name in _PASSING:
                self.mark(value, source)
                continue
            key = f"{scope}/{name}"
            self._counts[key] = self._counts.get(key, 0) + 1
            held = name in _WEIGHTED or name in _QUANTIZED or (name in _FUSED and source.held)
            self.mark(value, Site(f"{key}#{self._counts[key]}", held=held))


def _flat(values: tuple[Any, ...]) -> list[Any]:
    found: list[Any] = []
    for value in values:
        found.extend(value if isinstance(value, tuple | list) else (value,))
    return found
