"""OpenVINO: it reads the same ONNX files, so those are shipped.

The IR's xml of a QDQ graph is larger than the whole ONNX file on small nets (measured: 108 kB beside
73 kB), and a device that has both runtimes shares the blob between its bundles.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from shoal_optimizer.targets.base import Calibration, ClassSpec, Exported, Target
from shoal_optimizer.targets.onnx import OnnxTarget
from shoal_protos.bundle import RuntimeNeed

if TYPE_CHECKING:
    from torch import nn

    from shoal_optimizer.task import Task

RUNTIME_MIN = "2025.0"


class OpenVinoTarget(Target):
    """The ONNX file of `OnnxTarget`, named for OpenVINO. U8S8 QDQ runs in int8 there as well, and
    the same saturation rule holds for x86 without VNNI."""

    name: ClassVar[str] = "openvino"

    def convert(
        self,
        model: nn.Module | None,
        task: Task,
        precision: str,
        calibration: Calibration | None,
        class_spec: ClassSpec,
    ) -> Exported:
        made = OnnxTarget().convert(model, task, precision, calibration, class_spec)
        need = RuntimeNeed(
            self.name, made.model_file, version_min=RUNTIME_MIN, isa=made.runtime.isa, precision=precision
        )
        return Exported(made.files, need, precision, made.signature, made.facts)
