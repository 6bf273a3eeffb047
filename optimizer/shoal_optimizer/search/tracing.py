"""Kernels of a torch module that was never exported: one forward pass, in which each operation is noted.

An export takes seconds and this milliseconds, so that hundreds of networks can be predicted. The same
operations are folded as `search.kernels` folds them in a graph; the figures are close, not equal.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch.utils._python_dispatch import TorchDispatchMode

from shoal_optimizer.search.kernels import Kernel

if TYPE_CHECKING:
    from torch import Tensor, nn

_FUSED = frozenset(
    {"relu", "relu_", "hardtanh", "hardtanh_", "clamp", "clamp_", "leaky_relu", "leaky_relu_", "sigmoid",
     "native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training",
     "cudnn_batch_norm"}
)  # fmt: skip
_PAIRS = frozenset({"add", "add_", "sub", "sub_", "mul", "mul_", "div", "div_", "maximum", "minimum", "pow"})
_POOLS = frozenset(
    {"max_pool2d_with_indices", "avg_pool2d", "_adaptive_avg_pool2d", "mean", "amax",
     "max_pool1d_with_indices", "avg_pool1d", "_adaptive_avg_pool3d", "avg_pool3d"}
)  # fmt: skip
_MOVES = frozenset(
    {"cat", "constant_pad_nd", "slice", "clone", "_to_copy",
     "index_select", "index", "pixel_shuffle"}
)  # fmt: skip
_RESIZES = frozenset({"upsample_bilinear2d", "upsample_nearest2d", "upsample_bicubic2d"})
_ACTIVATIONS = frozenset(
    {"gelu", "silu", "silu_", "hardswish", "hardswish_", "hardsigmoid", "_softmax", "tanh",
     "native_layer_norm", "native_group_norm", "elu", "mish", "softplus", "exp", "sqrt"}
)  # fmt: skip
_BYTES = {"int8": 1, "int8_weights": 1, "fp16": 2}


def kernels_of(model: nn.Module, example: Tensor, precision: str = "fp32") -> tuple[Kernel, ...]:
    """The kernels of `model` for one item, as they would be after an export in `precision`.

    Args:
        model: in evaluation mode.
        example: what it takes, [n, ...]; the first item is used.
        precision: "fp32", "fp16", "int8" (everything between the quantized input and the output) or
            "int8_weights".
    """
    import torch

    noted, item = _Noted(precision), example[:1]
    with torch.no_grad(), noted:
        model(item)
    if precision != "int8":
        return tuple(noted.kernels)
    given = tuple(int(d) for d in example[:1].shape)
    made = noted.kernels[-1].made if noted.kernels else given
    return (
        Kernel("quantize", given, given, reads=math.prod(given)),
        *noted.kernels,
        Kernel("quantize", made, made, reads=math.prod(made)),
    )


class _Noted(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes a kernel for each operation that costs something."""

    def __init__(self, precision: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.precision = precision
        self.kernels: list[Kernel] = []
        self._folds: set[int] = set()  # results into which an activation may be folded
        self._alive: list[Any] = []  # keeps ids unique

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self._note(func.overloadpacket.__name__, args, result)
        return result

    def _note(self, name: str, args: tuple[Any, ...], result: Any) -> None:
        import torch

        made = result[0] if isinstance(result, tuple | list) else result
        if not isinstance(made, torch.Tensor):
            return
        self._alive.append(made)
        flat = [a for arg in args for a in (arg if isinstance(arg, tuple | list) else (arg,))]
        tensors = [a for a in flat if isinstance(a, torch.Tensor)]
        if name in _FUSED and tensors and id(tensors[0]) in self._folds:
            self._folds.add(id(made))
            return
        kernel = _kernel(name, args, tensors, made, self.precision)
        if kernel is None:
            return
        if kernel.operator in ("conv", "pointwise", "depthwise", "gemm") or name.startswith("add"):
            self._folds.add(id(made))
        self.kernels.append(kernel)


def _kernel(name: str, args: tuple[Any, ...], tensors: list[Any], made: Any, precision: str) -> Kernel | None:
    shape = tuple(int(d) for d in made.shape)
    if name == "convolution":
        return _convolution(args, shape, precision)
    if name in ("addmm", "mm", "bmm", "linear"):
        return _matrix(name, args, shape, precision)
    if name.startswith("_scaled_dot_product"):
        return _attention(args, shape, precision)
    operator = next(
        (
            operator
            for operator, names in (
                ("pair", _PAIRS), ("pool", _POOLS), ("move", _MOVES), ("resize", _RESIZES),
                ("activation", _ACTIVATIONS | _FUSED),
            )
            if name in names
        ),
        None,
    )  # fmt: skip
    if operator is None or not tensors:
        return None
    given = tuple(int(d) for d in tensors[0].shape)
    counted = tensors if operator in ("pair", "move") else tensors[:1]
    reads = sum(t.numel() for t in counted if t.numel() > 1)
    macs = _window(args, shape, given) if operator == "pool" else 0
    return Kernel(operator, given, shape, precision if precision == "int8" else "fp32", macs, 0, reads)


def _window(args: tuple[Any, ...], made: tuple[int, ...], given: tuple[int, ...]) -> int:
    window = args[1] if len(args) > 1 and isinstance(args[1], list | tuple) else None
    if window is None or len(made) < 3 or math.prod(made) * 2 > math.prod(given) * math.prod(window):
        return math.prod(given)
    return min(math.prod(given) * 9, math.prod(made) * math.prod(max(1, int(w)) for w in window))


def _convolution(args: tuple[Any, ...], made: tuple[int, ...], precision: str) -> Kernel:
    source, weight, bias = args[0], args[1], args[2]
    transposed, groups = bool(args[6]), int(args[8])
    given = tuple(int(d) for d in source.shape)
    macs = (math.prod(given) if transposed else math.prod(made)) * math.prod(weight.shape[1:])
    operator = "conv"
    if groups > 1 and weight.shape[1] == 1:
        operator = "depthwise"
    elif math.prod(weight.shape[2:]) == 1:
        operator = "pointwise"
    width = _BYTES.get(precision, 4)
    stored = width * weight.numel() + (4 * bias.numel() if bias is not None else 4 * made[1])
    return Kernel(operator, given, made, precision, int(macs), int(stored), math.prod(given))


def _matrix(name: str, args: tuple[Any, ...], made: tuple[int, ...], precision: str) -> Kernel:
    left, right = (args[1], args[2]) if name == "addmm" else (args[0], args[1])
    given = tuple(int(d) for d in left.shape)
    both = name == "bmm"  # two activations
    stored = 0 if both else _BYTES.get(precision, 4) * right.numel() + 4 * made[-1]
    reads = math.prod(given) + (right.numel() if both else 0)
    return Kernel("gemm", given, made, precision, math.prod(made) * given[-1], int(stored), int(reads))


def _attention(args: tuple[Any, ...], made: tuple[int, ...], precision: str) -> Kernel:
    """Two products of activations, [.., n, d] x [.., d, m] and back, counted as one kernel."""
    query, key = args[0], args[1]
    given = tuple(int(d) for d in query.shape)
    macs = 2 * math.prod(given) * int(key.shape[-2])
    return Kernel("gemm", given, made, precision, macs, 0, math.prod(given) + 2 * key.numel())
