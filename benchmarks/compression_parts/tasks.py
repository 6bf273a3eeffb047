"""The benchmark's networks as tasks of Shoal: what the product's techniques and targets work on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from torch import nn

from compression_parts.networks import Scale
from compression_parts.pictures import Pictures
from shoal_optimizer import Task, TensorSpec


class CompressionTask(Task):
    """Pictures uint8 [n, 3, 32, 32] to classes. Training data are one epoch that was augmented before,
    so that the teacher answers it once for all rows."""

    input = TensorSpec("picture", "UINT8", (-1, 3, 32, 32), "NCHW", low=0, high=255)
    input_kind = "image"
    output_kind = "logits"
    source = Path(__file__)
    labels: ClassVar[Sequence[str]] = ()

    def __init__(
        self,
        network: nn.Module,
        scale: nn.Module,
        training: Pictures,
        validation: Pictures,
        calibration: Pictures,
        cache_dir: Path,
    ) -> None:
        self._network, self._scale, self.cache_dir = network, scale, cache_dir
        self._parts = {"training": training, "evaluation": validation, "calibration": calibration}

    def model(self) -> nn.Module:
        return self._network

    def preprocess(self) -> nn.Module:
        return self._scale

    def training(self) -> Any:
        return self._pairs("training")

    def evaluation(self) -> Any:
        return self._pairs("evaluation")

    def calibration(self) -> Any:
        return self._pairs("calibration")

    def _pairs(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        part = self._parts[name]
        return part.inputs, part.targets


def task_of(
    network: nn.Module,
    training: Pictures,
    validation: Pictures,
    calibration: Pictures,
    cache_dir: Path,
    *,
    labels: Sequence[str],
    scale: nn.Module | None = None,
    name: str = "compression",
) -> CompressionTask:
    """The task of one trained network.

    Args:
        validation: what choices are made on; never the test set.
        calibration: what int8 ranges come from: training pictures as they are.
        scale: from bytes to the network's input, `Scale` when None.
    """
    kind = type(name, (CompressionTask,), {"labels": tuple(labels), "name": name})
    task: CompressionTask = kind(network, scale or Scale(), training, validation, calibration, cache_dir)
    return task
