"""What Olive calls: calibration and evaluation data from one `.npz`, as its documentation asks for.

Runs in Olive's own environment; nothing of Shoal is imported here.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch
from olive.data.registry import Registry


class Items(torch.utils.data.Dataset):
    """({input name: item}, target) of one split."""

    def __init__(self, split: str) -> None:
        with np.load(os.environ["SEARCH_DATA"], allow_pickle=False) as stored:
            self.inputs = stored[f"{split}:inputs"]
            self.targets = stored[f"{split}:targets"]

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, place: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        name = os.environ["SEARCH_INPUT"]
        return {name: torch.from_numpy(self.inputs[place])}, torch.tensor(int(self.targets[place]))


@Registry.register_dataset()
def search_items(split: str, **_: Any) -> Items:
    return Items(split)


@Registry.register_post_process()
def search_argmax(output: torch.Tensor) -> torch.Tensor:
    return output.argmax(dim=1)
