"""Small torch modules that Shoal puts into graphs."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ToFloat(nn.Module):
    """Casts endpoint inputs of any dtype to float32: the preprocessing of a task that has none."""

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs.to(torch.float32)
