"""Each of TensorRT's rules with a graph that keeps it and graphs that break it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from shoal_optimizer.targets import tensorrt_rules as rules
from shoal_protos.errors import Unsupported

Change = Callable[[Any], None]


def graph(change: Change | None = None) -> bytes:
    """x -> Q -> DQ -> Conv(weights by channel, float bias) -> y, as TensorRT wants it."""
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "x_scale", "x_zero"], ["x_q"], "q"),
        helper.make_node("DequantizeLinear", ["x_q", "x_scale", "x_zero"], ["x_dq"], "dq"),
        helper.make_node("DequantizeLinear", ["w_q", "w_scale", "w_zero"], ["w"], "wdq", axis=0),
        helper.make_node("Conv", ["x_dq", "w", "b"], ["y"], "conv"),
    ]
    constants = {
        "x_scale": np.float32(0.1),
        "x_zero": np.int8(0),
        "w_q": np.ones((3, 2, 1, 1), np.int8),
        "w_scale": np.array([0.1, 0.2, 0.3], np.float32),
        "w_zero": np.zeros(3, np.int8),
        "b": np.zeros(3, np.float32),
    }
    made = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 2, 4, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 3, 4, 4])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)])
    if change is not None:
        change(model)
    content: bytes = model.SerializeToString()
    return content


def constant(name: str, value: Any) -> Change:
    """Replaces a constant."""

    def change(model: Any) -> None:
        item = next(item for item in model.graph.initializer if item.name == name)
        item.CopyFrom(numpy_helper.from_array(np.asarray(value), name))

    return change


def renamed(node: str, place: int, name: str) -> Change:
    """Has a node read another tensor."""

    def change(model: Any) -> None:
        next(item for item in model.graph.node if item.name == node).input[place] = name

    return change


def all_of(*changes: Change) -> Change:
    def change(model: Any) -> None:
        for one in changes:
            one(model)

    return change


def appended(kind: str, inputs: list[str], outputs: list[str], **attributes: Any) -> Change:
    def change(model: Any) -> None:
        model.graph.node.append(helper.make_node(kind, inputs, outputs, kind.lower(), **attributes))

    return change


def added(name: str, value: Any) -> Change:
    def change(model: Any) -> None:
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))

    return change


def opset(version: int) -> Change:
    def change(model: Any) -> None:
        model.opset_import[0].version = version

    return change


def open_height(model: Any) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_param = "height"


def uint8_input(model: Any) -> None:
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.UINT8


def axis(value: int) -> Change:
    def change(model: Any) -> None:
        next(item for item in model.graph.node if item.name == "wdq").attribute[0].i = value

    return change


BROKEN: list[tuple[str, Change]] = [
    ("known_operators", appended("QLinearMatMul", ["y"] * 8, ["z"])),
    ("known_operators", appended("FusedConv", ["y", "w"], ["z"], domain="com.microsoft")),
    ("known_opset", opset(8)),
    ("known_opset", opset(21)),
    ("signed_int8", constant("x_zero", np.uint8(0))),
    ("signed_int8", renamed("q", 2, "")),  # without one the type is uint8
    ("signed_int8", constant("w_q", np.ones((3, 2, 1, 1), np.uint8))),
    ("zero_points_are_zero", constant("x_zero", np.int8(3))),
    ("zero_points_are_zero", constant("w_zero", np.array([0, 0, 1], np.int8))),
    ("zero_points_are_zero", renamed("dq", 2, "computed")),
    ("scales_are_positive_constants", constant("x_scale", np.float32(0))),
    ("scales_are_positive_constants", constant("w_scale", np.array([1, -1, 1], np.float32))),
    ("scales_are_positive_constants", constant("x_scale", np.float32(np.inf))),
    ("scales_are_positive_constants", constant("x_scale", np.float64(0.1))),
    ("scales_are_positive_constants", renamed("q", 1, "computed")),
    ("activations_per_tensor", constant("x_scale", np.array([0.1, 0.2], np.float32))),
    ("weights_per_output_channel", constant("w_scale", np.array([0.1, 0.2], np.float32))),
    ("weights_per_output_channel", all_of(axis(1), constant("w_scale", np.array([0.1, 0.2], np.float32)))),
    (
        "float_biases",
        all_of(
            added("b_q", np.zeros(3, np.int32)),
            appended("DequantizeLinear", ["b_q", "w_scale"], ["b_dq"], axis=0),
            renamed("conv", 2, "b_dq"),
        ),
    ),
    ("pairs", appended("Relu", ["x_q"], ["z"])),
    ("pairs", all_of(added("other", np.float32(0.3)), renamed("dq", 1, "other"))),
    ("both_or_none", renamed("conv", 0, "x")),
    ("both_or_none", all_of(added("w_f", np.ones((3, 2, 1, 1), np.float32)), renamed("conv", 1, "w_f"))),
    ("uint8_only_at_the_edge", uint8_input),
    ("uint8_only_at_the_edge", all_of(added("u", np.uint8(1)), appended("Add", ["u", "u"], ["z"]))),
    ("batch_alone_is_dynamic", open_height),
]


def test_a_graph_that_keeps_every_rule_passes() -> None:
    onnx.checker.check_model(onnx.load_from_string(graph()))
    assert rules.verify(graph()) == []
    rules.require(graph())


@pytest.mark.parametrize(("rule", "change"), BROKEN)
def test_a_graph_that_breaks_a_rule_is_named(rule: str, change: Change) -> None:
    content = graph(change)
    assert rule in {violation.rule for violation in rules.verify(content)}
    with pytest.raises(Unsupported, match="TensorRT would not build"):
        rules.require(content)


def test_every_rule_has_a_broken_graph_and_a_source() -> None:
    assert {rule.__name__ for rule in rules.RULES} == {name for name, _ in BROKEN}
    assert all("Source:" in (rule.__doc__ or "") for rule in rules.RULES)


@given(
    scale=st.floats(width=32, allow_nan=True, allow_infinity=True),
    zero=st.integers(-128, 127),
)
def test_only_positive_scales_and_zero_zero_points_pass(scale: float, zero: int) -> None:
    content = graph(all_of(constant("x_scale", np.float32(scale)), constant("x_zero", np.int8(zero))))
    right = scale > 0 and math.isfinite(scale) and zero == 0
    assert (rules.verify(content) == []) is right


def test_the_share_is_that_of_operators_with_both_inputs_in_int8() -> None:
    assert rules.declared_share(graph()) == 1.0
    assert rules.declared_share(graph(renamed("conv", 0, "x"))) == 0.0
    second = all_of(added("v", np.ones((1, 3, 1, 1), np.float32)), appended("Conv", ["y", "v"], ["z"]))
    assert rules.declared_share(graph(second)) == 0.5
    assert math.isnan(rules.declared_share(graph(lambda model: model.graph.node.pop())))
