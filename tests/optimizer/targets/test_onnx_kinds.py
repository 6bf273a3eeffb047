"""ONNX files as people have them: control flow, state, integer inputs, constants, metadata."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from shoal_optimizer import targets
from shoal_optimizer.recipe import Recipe, Step, apply
from shoal_optimizer.targets import Calibration, ClassSpec
from shoal_optimizer.task import Task, load_task
from shoal_protos.errors import Unsupported

RANDOM = np.random.default_rng(0)
ITEMS = RANDOM.normal(size=(120, 12)).astype(np.float32)
CLASSES = RANDOM.integers(0, 3, 120)


def weight(name: str, *shape: int) -> Any:
    values = np.random.default_rng(len(name)).normal(size=shape) / np.sqrt(shape[-2:][0])
    return numpy_helper.from_array(values.astype(np.float32), name)


def scalar(name: str, value: Any) -> Any:
    return numpy_helper.from_array(np.asarray(value), name)


def info(name: str, *shape: int | str, kind: int = TensorProto.FLOAT) -> Any:
    return helper.make_tensor_value_info(name, kind, shape)


def written(
    folder: Path,
    nodes: list[Any],
    weights: list[Any],
    source: Any | None = None,
    items: np.ndarray = ITEMS,
    **metadata: str,
) -> Task:
    graph = helper.make_graph(nodes, "g", [source or info("x", "n", 12)], [info("y", "n", 3)], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    helper.set_model_props(model, metadata)
    onnx.checker.check_model(model)
    onnx.save(model, folder / "model.onnx")
    np.savez(folder / "model.npz", inputs=items, targets=CLASSES)
    return load_task(folder / "model.onnx")


def exported(task: Task, spec: ClassSpec, method: str = "minmax") -> targets.Exported:
    calibration = Calibration(task.calibration_data().inputs, method)
    return targets.find("onnxruntime").export(None, task, "int8", calibration, spec)


def branching(folder: Path) -> Task:
    branches: dict[str, Any] = {
        f"{name}_branch": helper.make_graph(
            [helper.make_node("Gemm", ["h", f"w_{name}"], [f"{name}_out"], name=f"{name}_gemm")],
            name,
            [],
            [info(f"{name}_out", "n", 3)],
        )
        for name in ("then", "else")
    }
    nodes = [
        helper.make_node("Gemm", ["x", "w1"], ["a"], name="first"),
        helper.make_node("Gemm", ["a", "w_middle"], ["h"], name="middle"),
        helper.make_node("ReduceSum", ["h"], ["sum"], name="sum", keepdims=0),
        helper.make_node("Greater", ["sum", "zero"], ["positive"], name="greater"),
        helper.make_node("If", ["positive"], ["y"], name="branch", **branches),
    ]
    weights = [weight("w1", 12, 64), weight("w_middle", 64, 64)]
    weights += [weight("w_then", 64, 3), weight("w_else", 64, 3), scalar("zero", np.float32(0))]
    return written(folder, nodes, weights)


def test_what_lies_inside_an_if_is_named_and_stays_in_float(tmp_path: Path, local_class: ClassSpec) -> None:
    task = branching(tmp_path)
    with pytest.raises(Unsupported, match="then_gemm"):
        exported(task, local_class)


@pytest.mark.parametrize("precision", ["fp16", "int8_weights", "int4_weights"])
def test_an_if_keeps_its_weights_in_narrow_files(precision: str, tmp_path: Path) -> None:
    made = targets.find("onnxruntime").export(None, branching(tmp_path), precision)
    assert made.facts["parity_agreement"] > 0.8


def test_layers_around_a_loop_are_int8(tmp_path: Path, local_class: ClassSpec) -> None:
    body = helper.make_graph(
        [
            helper.make_node("MatMul", ["before", "w_loop"], ["product"], name="inside"),
            helper.make_node("Tanh", ["product"], ["after"], name="tanh"),
            helper.make_node("Identity", ["go"], ["go_on"], name="go"),
        ],
        "body",
        [info("i", kind=TensorProto.INT64), info("go", kind=TensorProto.BOOL), info("before", "n", 64)],
        [info("go_on", kind=TensorProto.BOOL), info("after", "n", 64)],
    )
    nodes = [
        helper.make_node("Gemm", ["x", "w1"], ["h"], name="first"),
        helper.make_node("Loop", ["trips", "yes", "h"], ["done"], name="steps", body=body),
        helper.make_node("Gemm", ["done", "w2"], ["y"], name="last"),
    ]
    constants = [scalar("trips", np.int64(4)), scalar("yes", np.bool_(True))]
    weights = [weight("w1", 12, 64), weight("w_loop", 64, 64), weight("w2", 64, 3)]
    made = exported(written(tmp_path, nodes, [*weights, *constants]), local_class)
    assert made.facts["int8_share"] == pytest.approx(2 / 3)
    assert made.facts["parity_agreement"] > 0.9


def test_an_lstm_needs_dynamic_ranges_and_the_notes_say_so(tmp_path: Path, local_class: ClassSpec) -> None:
    nodes = [
        helper.make_node("Transpose", ["x"], ["steps"], name="steps", perm=[1, 0, 2]),
        helper.make_node("LSTM", ["steps", "w", "r"], ["", "last"], name="lstm", hidden_size=48),
        helper.make_node("Squeeze", ["last", "axis"], ["h"], name="squeeze"),
        helper.make_node("Gemm", ["h", "w2"], ["y"], name="final"),
    ]
    weights = [weight("w", 1, 192, 12), weight("r", 1, 192, 48), weight("w2", 48, 3)]
    items = RANDOM.normal(size=(120, 5, 12)).astype(np.float32)
    axis = numpy_helper.from_array(np.array([0]), "axis")
    task = written(tmp_path, nodes, [*weights, axis], info("x", "n", 5, 12), items)
    assert exported(task, local_class).facts["int8_share"] == 0.5
    assert exported(task, local_class, "dynamic").facts["int8_share"] == 1.0
    assert any("dynamic" in note for note in apply(Recipe((Step("quantization"),)), task).notes)


def test_whole_numbers_go_in_and_embeddings_are_int8(tmp_path: Path, local_class: ClassSpec) -> None:
    nodes = [
        helper.make_node("Gather", ["table", "x"], ["words"], name="embedding"),
        helper.make_node("ReduceMean", ["words"], ["mean"], name="mean", axes=[1], keepdims=0),
        helper.make_node("Gemm", ["mean", "w1"], ["a"], name="first"),
        helper.make_node("Relu", ["a"], ["b"], name="relu"),
        helper.make_node("Gemm", ["b", "w2"], ["y"], name="last"),
    ]
    weights = [weight("table", 500, 32), weight("w1", 32, 64), weight("w2", 64, 3)]
    items = RANDOM.integers(0, 500, (120, 8))
    task = written(tmp_path, nodes, weights, info("x", "n", 8, kind=TensorProto.INT64), items)
    made = exported(task, local_class)
    assert made.facts["int8_share"] == 1.0
    plain = targets.find("onnxruntime").export(None, task)
    assert made.size_bytes < 0.4 * plain.size_bytes
    assert plain.signature.inputs[0].datatype == "INT64"


def test_weights_in_constant_nodes_are_quantized_and_metadata_kept(
    tmp_path: Path, local_class: ClassSpec
) -> None:
    def constant(name: str, *shape: int) -> Any:
        return helper.make_node("Constant", [], [name], name=f"c_{name}", value=weight(name, *shape))

    nodes = [
        constant("w1", 12, 64),
        constant("w2", 64, 3),
        helper.make_node("MatMul", ["x", "w1"], ["a"], name="first"),
        helper.make_node("Relu", ["a"], ["b"], name="relu"),
        helper.make_node("MatMul", ["b", "w2"], ["y"], name="last"),
    ]
    task = written(tmp_path, nodes, [], author="me", classes="a,b,c")
    made = exported(task, local_class)
    assert made.facts["int8_share"] == 1.0
    for files in (made, targets.find("onnxruntime").export(None, task)):
        model = onnx.load_from_string(files.files["model.onnx"])
        assert {item.key: item.value for item in model.metadata_props} == {"author": "me", "classes": "a,b,c"}
