from __future__ import annotations

import contextlib

import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

from shoal_agent.runtimes.graph import op_counts
from shoal_protos.errors import InvalidInput
from tests.agent import bundles


def test_the_walk_counts_what_onnx_counts() -> None:
    model = bundles.image_graph()
    expected: dict[str, int] = {}
    for node in model.graph.node:
        expected[node.op_type] = expected.get(node.op_type, 0) + 1
    assert dict(op_counts(model.SerializeToString())) == expected


def test_sub_graphs_count() -> None:
    def branch(name: str) -> onnx.GraphProto:
        node = helper.make_node("Identity", ["x"], [name])
        return helper.make_graph(
            [node], name, [], [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1])]
        )

    node = helper.make_node("If", ["c"], ["y"], then_branch=branch("a"), else_branch=branch("b"))
    graph = helper.make_graph([node], "g", [], [])
    assert op_counts(helper.make_model(graph).SerializeToString()) == {"If": 1, "Identity": 2}


@given(st.binary(max_size=200))
def test_any_bytes_end_in_counts_or_a_refusal(data: bytes) -> None:
    with contextlib.suppress(InvalidInput):
        op_counts(data)


def test_a_truncated_file_is_refused() -> None:
    with pytest.raises(InvalidInput, match="truncated"):
        op_counts(bundles.image_graph().SerializeToString()[:-5])
