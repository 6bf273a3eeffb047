from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from shoal_optimizer import targets
from shoal_optimizer.targets import Calibration, ClassSpec
from shoal_optimizer.targets import onnx as onnx_target
from shoal_optimizer.targets.onnx import Scheme, excluded_nodes, float_graph, quantized_graph
from shoal_optimizer.task import Task, load_task


@pytest.mark.parametrize(
    ("name", "isa", "signed", "reduced", "needs"),
    [
        ("x86_64.avx512vnni.2c", ["avx2", "avx512_vnni"], False, False, ("avx512_vnni",)),
        ("x86_64.avx2.4c", ["avx2"], False, True, ()),
        ("x86_64.avxvnni.4c", ["avx2", "avx_vnni"], False, False, ("avx_vnni",)),
        ("aarch64.dotprod.4c", ["neon", "dotprod"], True, False, ("neon",)),
    ],
)
def test_int8_types_follow_the_isa(
    name: str, isa: list[str], signed: bool, reduced: bool, needs: tuple[str, ...]
) -> None:
    scheme = Scheme.of(ClassSpec.of(name, isa, {}))
    assert (scheme.signed_activations, scheme.reduce_range, scheme.isa) == (signed, reduced, needs)


def _weights(graph: bytes) -> list[np.ndarray]:
    items = onnx.load_from_string(graph).graph.initializer
    return [onnx.numpy_helper.to_array(item) for item in items if item.data_type == onnx.TensorProto.INT8]


def test_reduced_range_keeps_weights_in_seven_bits(quadrants: Task) -> None:
    graph = float_graph(quadrants.original, quadrants)
    calibration = Calibration(quadrants.required("training").inputs[:64])
    full = quantized_graph(graph, quadrants, calibration, Scheme(False, False, ()))
    reduced = quantized_graph(graph, quadrants, calibration, Scheme(False, True, ()))
    assert max(np.abs(w).max() for w in _weights(full) if w.ndim > 1) == 127
    assert max(np.abs(w).max() for w in _weights(reduced) if w.ndim > 1) <= 64


def test_zero_points_are_zero_on_arm(quadrants: Task) -> None:
    arm = ClassSpec.of("aarch64.dotprod", ["neon"], {"onnxruntime": "1.32"})
    exported = targets.find("onnxruntime").export(quadrants.original, quadrants, "int8", class_spec=arm)
    model = onnx.load_from_string(exported.files["model.onnx"])
    constants = {item.name: onnx.numpy_helper.to_array(item) for item in model.graph.initializer}
    points = [constants[n.input[2]] for n in model.graph.node if n.op_type == "QuantizeLinear"]
    assert points
    assert all(point.dtype == np.int8 and not point.any() for point in points)


def test_preprocessing_is_in_the_graph_and_stays_in_float(quadrants: Task, local_class: ClassSpec) -> None:
    graph = float_graph(quadrants.original, quadrants)
    kinds = {node.name: node.op_type for node in onnx.load_from_string(graph).graph.node}
    outside = [kinds[name] for name in excluded_nodes(graph)]
    assert sorted(outside) == ["Cast", "Div", "Sub", "Transpose"]
    exported = targets.find("onnxruntime").export(
        quadrants.original, quadrants, "int8", class_spec=local_class
    )
    model = onnx.load_from_string(exported.files["model.onnx"]).graph
    assert model.input[0].type.tensor_type.elem_type == onnx.TensorProto.UINT8
    makers = {output: node.op_type for node in model.node for output in node.output}
    for node in model.node:
        if node.op_type in outside:
            assert makers.get(node.input[0]) != "DequantizeLinear"


def test_files_carry_no_exporter_metadata(quadrants: Task) -> None:
    exported = targets.find("onnxruntime").export(quadrants.original, quadrants)
    model = onnx.load_from_string(exported.files["model.onnx"])
    onnx.checker.check_model(model)
    assert not model.metadata_props
    assert not any(node.metadata_props or node.doc_string for node in model.graph.node)
    assert str(Path.cwd()).encode() not in exported.files["model.onnx"]


def test_equal_models_are_exported_once(
    quadrants_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = load_task(quadrants_path)
    task.cache_dir = tmp_path / "cache"
    first = float_graph(task.original, task)
    monkeypatch.setattr(onnx_target, "_export", lambda *_: pytest.fail("exported again"))
    assert float_graph(task.original, task) == first
    onnx_target._graphs.clear()
    assert float_graph(task.original, task) == first  # from the cache directory
    assert [path.suffix for path in task.cache_dir.iterdir()] == [".onnx"]


def test_calibration_ranges_are_kept_for_other_classes(quadrants_path: Path, tmp_path: Path) -> None:
    task = load_task(quadrants_path)
    task.cache_dir = tmp_path / "cache"
    target = targets.find("onnxruntime")
    for isa in (["avx2"], ["avx2", "avx512_vnni"]):
        target.export(task.original, task, "int8", class_spec=ClassSpec.of("x86_64.c", isa, {}))
    assert sorted(path.suffix for path in task.cache_dir.iterdir()) == [".json", ".onnx"]


def test_both_runtimes_share_one_file(quadrants: Task, local_class: ClassSpec) -> None:
    made = [
        targets.find(name).export(quadrants.original, quadrants, "int8", class_spec=local_class).files
        for name in ("onnxruntime", "openvino")
    ]
    assert made[0] == made[1]
