"""Small torch modules that Shoal puts into graphs."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ToFloat(nn.Module):
    """Casts endpoint inputs of any dtype to float32: the preprocessing of a task that has none."""

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs.to(torch.float32)


class Pipeline(nn.Module):
    """preprocess, model, postprocess. The names of the parts mark their operations in exported graphs."""

    def __init__(self, preprocess: nn.Module, model: nn.Module, postprocess: nn.Module) -> None:
        super().__init__()
        self.preprocess = preprocess
        self.model = model
        self.postprocess = postprocess

    def forward(self, inputs: Tensor) -> Tensor:
        # A permuted NHWC picture keeps its strides, and then AdaptiveAvgPool2d is exported as a gathering
        # by computed indices, which OpenVINO gets wrong in int8 and which costs time everywhere.
        prepared = self.preprocess(inputs)
        if isinstance(prepared, Tensor):
            prepared = prepared.contiguous()
        result: Tensor = self.postprocess(self.model(prepared))
        return result


class Skipped(nn.Module):
    """Where a block was that a smaller network does without: its first input goes on as it is."""

    def forward(self, inputs: Tensor, *others: object, **more: object) -> Tensor:
        return inputs


class Resize(nn.Module):
    """Brings pictures [n, channels, height, width] of one size to a smaller one: linear, each pixel the
    mean of what it covers.

    Two products with constant matrices: every runtime computes them fast, while ONNX Runtime's Resize
    took longer than the small network behind it (0.1 ms for 32x32 to 24x24, measured with 1.32).
    """

    down: Tensor
    across: Tensor

    def __init__(self, given: tuple[int, int], size: tuple[int, int]) -> None:
        super().__init__()
        self.size = size
        self.register_buffer("down", shares(given[0], size[0]))  # [size[0], height]
        self.register_buffer("across", shares(given[1], size[1]).T.contiguous())  # [width, size[1]]

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.matmul(self.down, torch.matmul(inputs, self.across))

    def extra_repr(self) -> str:
        return f"size={self.size}"


def shares(given: int, made: int) -> Tensor:
    """What each of `made` samples takes of `given` ones, float32 [made, given]; rows add up to 1.

    The weights of antialiased linear resizing: a triangle as wide as two of the made samples.
    """
    step = given / made
    centres = (torch.arange(made, dtype=torch.float64) + 0.5) * step - 0.5
    away = (torch.arange(given, dtype=torch.float64)[None] - centres[:, None]).abs()
    weights = (1 - away / max(step, 1.0)).clamp(min=0)
    return (weights / weights.sum(1, keepdim=True)).to(torch.float32)
