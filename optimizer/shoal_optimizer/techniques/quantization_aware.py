"""Quantization-aware training: fine-tunes with fake-quantization and pins the ranges it learned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from shoal_optimizer.techniques import ranges
from shoal_optimizer.techniques.base import Parameter, Technique, Work
from shoal_optimizer.techniques.training import TrainingPlan, fine_tune
from shoal_protos.errors import InvalidInput, Unsupported

if TYPE_CHECKING:
    from torch import nn

    from shoal_optimizer.targets.base import ClassSpec
    from shoal_optimizer.techniques.fake_quantization import Grid, Simulated

FREEZE = 0.5  # share of the steps after which ranges and batch statistics no longer move
CALIBRATION_ITEMS = 256
BATCH = 32


class QuantizationAware(Technique):
    """Trains float weights that keep their accuracy in int8.

    The weights stay in float and the learned ranges go along with the module; a later step
    `quantization` has the runtime's own quantizer emit the graph with those ranges.
    """

    name: ClassVar[str] = "quantization_aware"
    parameters: ClassVar[Mapping[str, Parameter]] = {
        "epochs": Parameter(3, 1, 1000, help="passes over the training data"),
        "learning_rate": Parameter(1e-3, 1e-7, 1.0, help="peak of the one-cycle schedule"),
        "batch": Parameter(64, 1, 4096, help="items per step"),
        "alpha": Parameter(0.9, 0.0, 1.0, help="weight of the teacher"),
        "temperature": Parameter(4.0, 0.5, 20.0, help="softens the teacher's answers; logits only"),
        "weight_bits": Parameter(
            8, choices=(8, 7), help="7 for x86 without VNNI; a known class decides by itself"
        ),
    }

    def transform(self, work: Work, params: Mapping[str, Any]) -> Work:
        from shoal_optimizer.techniques.fake_quantization import Simulated

        plan = {key: value for key, value in params.items() if key != "weight_bits"}
        data = work.training_data()
        simulated = Simulated(work.module(), grid_of(work.class_spec, params["weight_bits"]))
        try:
            _first_ranges(simulated, work)
            if not simulated.learned():
                raise Unsupported(
                    "No convolution, linear layer or sum was seen in the model's forward pass.",
                    "Quantize without training: the step quantization.",
                )
            fine_tune(
                work,
                simulated,
                TrainingPlan(seed=work.seed, **plan),
                lambda share, message: work.progress(self.name, share, message),
                data=data,
                after_step=lambda share: settle(simulated, share),
            )
            found = simulated.learned()
        finally:
            model = simulated.close()
        ranges.pin(model.eval(), found)
        return replace(work, model=model).note(f"{len(found)} ranges were learned with int8 in mind")


def grid_of(spec: ClassSpec | None, weight_bits: int = 8) -> Grid:
    """The types that int8 files of the class have; `weight_bits` only counts where no class is known."""
    from shoal_optimizer.targets.onnx import Scheme
    from shoal_optimizer.techniques.fake_quantization import Grid

    if spec is None:
        return Grid(weight_bits)
    scheme = Scheme.of(spec)
    return Grid(7 if scheme.reduce_range else 8, scheme.signed_activations)


def _first_ranges(simulated: Simulated, work: Work) -> None:
    """Ranges of the float model on calibration data; training moves them on."""
    import torch

    data = work.calibration or work.task.calibration_data(CALIBRATION_ITEMS)
    simulated.eval()
    with torch.no_grad():
        for start in range(0, min(len(data), CALIBRATION_ITEMS), BATCH):
            work.checkpoint()
            part = np.ascontiguousarray(data.inputs[start : start + BATCH])
            simulated(work.task.pre(torch.from_numpy(part)))
    if not bool(torch.isfinite(simulated.ranges).all()):
        raise InvalidInput(
            "The model gives values that are no finite numbers on the calibration data.",
            "Look for NaN in weights and data.",
        )
    simulated.rounding = True


def settle(simulated: Simulated, share: float) -> None:
    """Moves ranges and batch statistics in the first part of the training only: weights that are to fit
    the rounding need it to stand still."""
    frozen = share >= FREEZE
    if simulated.observing == frozen:
        simulated.observing = not frozen
        for module in simulated.modules():
            if _is_norm(module):
                module.train(not frozen)


def _is_norm(module: nn.Module) -> bool:
    from torch.nn.modules.batchnorm import _BatchNorm

    return isinstance(module, _BatchNorm)
