"""The int8 share is read from the runtime's optimized graph, and int8 that became float is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest

from shoal_optimizer import targets
from shoal_optimizer.targets import Calibration, ClassSpec, Exported
from shoal_optimizer.targets.onnx import OnnxTarget
from shoal_optimizer.targets.openvino import OpenVinoTarget
from shoal_optimizer.targets.tensorrt_rules import declared_share
from shoal_optimizer.task import Task, load_task
from shoal_protos.errors import Unsupported


class Fallback(OnnxTarget):
    """A converter whose int8 is float in truth."""

    inner: ClassVar[type[targets.Target]] = OnnxTarget

    def convert(
        self, model: Any, task: Task, precision: str, calibration: Calibration | None, class_spec: ClassSpec
    ) -> Exported:
        made = self.inner().convert(model, task, "fp32", None, class_spec)
        return replace(made, runtime=replace(made.runtime, precision=precision), precision=precision)


class OpenVinoFallback(Fallback):
    inner = OpenVinoTarget


@pytest.mark.parametrize("kind", [Fallback, OpenVinoFallback])
def test_silent_float_is_refused_where_it_was_seen(
    kind: type[Fallback], quadrants: Task, local_class: ClassSpec
) -> None:
    calibration = Calibration(quadrants.required("training").inputs[:8])
    with pytest.raises(Unsupported, match="runs in int8"):
        kind().export(quadrants.original, quadrants, "int8", calibration, local_class)


def test_of_another_machine_only_its_devices_can_tell(quadrants: Task, local_class: ClassSpec) -> None:
    calibration = Calibration(quadrants.required("training").inputs[:8])
    remote = replace(local_class, local=False)
    made = Fallback().export(quadrants.original, quadrants, "int8", calibration, remote)
    assert made.facts["int8_share"] == 0.0


def test_what_a_file_declares_is_not_what_is_read(quadrants: Task) -> None:
    exported = targets.find("tensorrt").export(quadrants.original, quadrants, "int8")
    assert declared_share(exported.files["model.onnx"]) == 1.0
    assert exported.twin is not None
    with targets.load_exported(exported.twin) as instance:
        # Sums with one float summand suit TensorRT; ONNX Runtime can't fuse the convolution before.
        assert instance.facts().int8_share < 1.0


def test_a_model_without_products_is_left_in_float(
    write_task: Callable[[str], Path], local_class: ClassSpec
) -> None:
    path = write_task(
        "import numpy as np, torch\n"
        "from torch import nn\n"
        "from shoal_optimizer import Task, TensorSpec\n"
        "class Sums(Task):\n"
        "    input = TensorSpec('x', 'FP32', (-1, 3))\n"
        "    output_kind = 'logits'\n"
        "    def model(self): return nn.Softmax(1)\n"
        "    def evaluation(self): return np.eye(9, 3, dtype=np.float32), np.zeros(9, np.int64)\n"
    )
    task = load_task(path)
    with pytest.raises(Unsupported, match="runs in int8"):
        targets.find("onnxruntime").export(task.original, task, "int8", class_spec=local_class)
