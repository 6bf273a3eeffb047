"""Files whose weights are stored narrow: smaller, computed in float, refused where nothing is saved."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from shoal_optimizer import targets
from shoal_optimizer.evaluation import evaluate_exported, evaluate_model
from shoal_optimizer.recipe import Recipe, Step, apply
from shoal_optimizer.targets import weights_only
from shoal_optimizer.targets.onnx import excluded_nodes, float_graph, strip
from shoal_optimizer.targets.weights_only import converted, stored_half, stored_int4, stored_int8
from shoal_optimizer.task import Task, load_task
from shoal_protos.errors import InvalidInput, Unsupported

SHARES = {"fp16": 0.55, "int8_weights": 0.32, "int4_weights": 0.31}


def optimized(graph: bytes, folder: Path) -> Counter[str]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(folder / "optimized.onnx").graph.node)


@pytest.mark.parametrize("precision", sorted(SHARES))
def test_files_are_smaller_and_answer_alike(precision: str, quadrants: Task) -> None:
    applied = apply(Recipe((Step("quantization", {"precision": precision}),)), quadrants)
    assert (applied.precision, applied.calibration) == (precision, None)
    target = targets.find("onnxruntime")
    made = target.export(applied.model, quadrants, precision, applied.calibration)
    assert made.precision == made.runtime.precision == precision
    assert made.wire_bytes < SHARES[precision] * target.export(applied.model, quadrants).wire_bytes
    assert made.facts["int8_share"] is None
    original = evaluate_model(quadrants, quadrants.original).value
    assert evaluate_exported(quadrants, made).value == pytest.approx(original, abs=0.02)


@pytest.mark.parametrize("store", [stored_half, stored_int8])
def test_the_runtime_computes_the_same_operators_as_in_float(
    store: Callable[..., bytes], quadrants: Task, tmp_path: Path
) -> None:
    graph = float_graph(quadrants.original, quadrants)
    made = strip(store(graph, excluded_nodes(graph)))
    assert optimized(made, tmp_path) == optimized(strip(graph), tmp_path)


def test_int4_products_are_computed_as_they_are(quadrants: Task, tmp_path: Path) -> None:
    graph = float_graph(quadrants.original, quadrants)
    found = optimized(strip(stored_int4(graph, excluded_nodes(graph))), tmp_path)
    assert found["MatMulNBits"] == 1 and found["Conv"] == 4 and found["Gemm"] == 0


def test_importing_the_int4_quantizer_leaves_logging_alone(quadrants: Task) -> None:
    root = logging.getLogger()
    before = (list(root.handlers), root.level)
    graph = float_graph(quadrants.original, quadrants)
    stored_int4(graph, excluded_nodes(graph))
    assert (list(root.handlers), root.level) == before


PRODUCTS = """
import numpy as np, torch
from torch import nn
from shoal_optimizer import Task, TensorSpec
class Given(Task):
    input = TensorSpec('x', 'FP32', (-1, 3, 6, 6))
    output_kind = 'logits'
    def model(self): return MODEL
    def evaluation(self):
        random = np.random.default_rng(0)
        return random.normal(size=(40, 3, 6, 6)).astype(np.float32), np.zeros(40, np.int64)
"""


@pytest.mark.parametrize(
    ("model", "precision", "reason"),
    [
        ("nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(1), nn.Linear(3, 2))", "fp16", "too little"),
        (
            "nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(1), nn.Linear(3, 2))",
            "int8_weights",
            "too little",
        ),
        ("nn.Sequential(nn.Conv2d(3, 32, 6), nn.Flatten(1))", "int4_weights", "linear layers"),
    ],
)
def test_a_precision_that_saves_nothing_is_refused(
    model: str, precision: str, reason: str, write_task: Callable[[str], Path]
) -> None:
    task = load_task(write_task(PRODUCTS.replace("MODEL", model)))
    with pytest.raises(Unsupported, match=reason) as caught:
        targets.find("onnxruntime").export(task.original, task, precision)
    assert "Use the precision" in caught.value.remedy


def test_options_of_int8_are_refused_for_other_precisions(quadrants: Task) -> None:
    for option in ({"method": "entropy"}, {"max_drop": 0.01}):
        with pytest.raises(InvalidInput, match="are for int8"):
            apply(Recipe((Step("quantization", {"precision": "fp16", **option}),)), quadrants)


def product(weight: np.ndarray, transposed: bool) -> bytes:
    """A graph with one Gemm."""
    node = helper.make_node("Gemm", ["x", "w"], ["y"], name="only", transB=int(transposed))
    rows, columns = weight.shape[::-1] if transposed else weight.shape
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        [node],
        "g",
        [info("x", onnx.TensorProto.FLOAT, ["n", rows])],
        [info("y", onnx.TensorProto.FLOAT, ["n", columns])],
        [numpy_helper.from_array(weight, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    content: bytes = model.SerializeToString()
    return content


def answers(graph: bytes, feed: np.ndarray) -> np.ndarray:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": feed})[0])


@settings(max_examples=25, deadline=None)
@given(st.integers(8, 40), st.integers(8, 20), st.booleans(), st.integers(0, 1000))
def test_int8_weights_are_off_by_half_a_step_at_most(
    rows: int, columns: int, transposed: bool, seed: int
) -> None:
    random = np.random.default_rng(seed)
    shape = (columns, rows) if transposed else (rows, columns)
    weight = (random.normal(size=shape) * 10.0 ** random.integers(-6, 6)).astype(np.float32)
    weight[0] = 0  # a row (or a whole channel) of zeros has no scale
    seen = answers(stored_int8(product(weight, transposed), ()), np.eye(rows, dtype=np.float32))
    wanted = weight.T if transposed else weight
    step = np.abs(wanted).max(axis=0, keepdims=True) / 127
    assert np.all(np.abs(seen - wanted) <= step * 0.501)


def test_a_weight_too_large_for_float16_stays_in_float() -> None:
    weight = np.full((16, 16), 1e6, np.float32)
    made = onnx.load_from_string(stored_half(product(weight, False), ()))
    assert [item.data_type for item in made.graph.initializer] == [onnx.TensorProto.FLOAT]


def test_excluded_nodes_keep_their_weights() -> None:
    graph = product(np.ones((16, 16), np.float32), False)
    assert stored_int8(graph, ["only"]) == graph == stored_half(graph, ["only"])
    with pytest.raises(Unsupported):
        converted(graph, "fp16", ["only"])
    assert set(weights_only.PRECISIONS) == set(SHARES)
