"""The trained originals on traffic signs: which networks, which schedule, where they are kept."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from compression_parts import networks, pictures
from compression_parts.training import Schedule, has_bfloat16, trained

SEEDS = (0, 1, 2)
# Rows of which network; schedules were fixed before anything was trained.
NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "resnet18": networks.resnet18,
    "wide": networks.wide_resnet10,
    "mobilenet": networks.MobileNet,
}
EPOCHS = {"resnet18": 5, "wide": 5, "mobilenet": 5}


def checkpoints() -> Path:
    """SHOAL_CHECKPOINTS, else shoal-benchmarks in the cache directory."""
    named = os.environ.get("SHOAL_CHECKPOINTS")
    if named:
        return Path(named)
    return (
        Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "shoal-benchmarks" / "compression"
    )


def schedule(name: str) -> Schedule:
    return Schedule(epochs=EPOCHS[name], bfloat16=has_bfloat16())


def original(name: str, seed: int, folder: Path) -> tuple[nn.Module, float]:
    """The trained network `name` and the CPU seconds it took."""
    data, scale = pictures.part("training"), networks.Scale()

    def batch(rows: np.ndarray, step_seed: int) -> tuple[Tensor, Tensor]:
        varied = pictures.vary(torch.from_numpy(data.inputs[rows]), step_seed)
        return scale(varied), torch.from_numpy(data.targets[rows])

    return trained(
        lambda: NETWORKS[name](pictures.CLASSES),
        len(data),
        batch,
        schedule(name),
        data=pictures.data_digest(),
        seed=seed,
        folder=folder,
        name=name,
    )


def finished(name: str, seed: int, folder: Path) -> bool:
    """True when the original is trained: `original` then only reads it."""
    return any(folder.glob(f"{name}-seed{seed}-*.pt"))
