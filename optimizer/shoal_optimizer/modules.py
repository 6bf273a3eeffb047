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
    """Brings pictures [n, channels, height, width] to a fixed `size` (height, width), bilinear."""

    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__()
        self.size = size

    def forward(self, inputs: Tensor) -> Tensor:
        return nn.functional.interpolate(inputs, size=self.size, mode="bilinear", align_corners=False)

    def extra_repr(self) -> str:
        return f"size={self.size}"  # part of what tells two networks apart
