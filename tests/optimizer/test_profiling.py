from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from shoal_optimizer import profiling
from shoal_optimizer.targets.onnx import float_graph
from shoal_optimizer.task import Task
from shoal_protos.errors import Unsupported


def test_every_weighted_layer_has_a_time(quadrants: Task) -> None:
    found = profiling.layer_times(quadrants, seconds=0.05)
    inside = [name for operation in found for name in operation.layers]
    assert {"0", "2.first", "2.second", "4", "7"} <= set(inside)
    assert sum(operation.share for operation in found) == pytest.approx(1.0)
    assert all(operation.us > 0 for operation in found)


def test_fused_layers_stand_together(quadrants: Task) -> None:
    found = profiling.layer_times(quadrants, seconds=0.05)
    assert any({"0", "1"} <= set(operation.layers) for operation in found), "conv and its relu"


def test_openvino_says_what_it_computes_in(quadrants: Task, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(float_graph(quadrants.original, quadrants))
    item = {"pixels": quadrants.required("evaluation").inputs[:1]}
    found = profiling.profile("openvino", path, item, seconds=0.05)
    assert any("4" in operation.layers for operation in found)
    assert "f32" in {operation.precision for operation in found}


def test_a_runtime_without_profiler_is_named(tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="litert"):
        profiling.profile("litert", tmp_path / "m", {"x": np.zeros(1)})
