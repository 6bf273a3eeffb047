"""Int8 with a limit on what it may lose: which layers go back to float, and that they really do."""

from __future__ import annotations

import copy
import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shoal_optimizer import targets
from shoal_optimizer.lineage import lineage_of
from shoal_optimizer.recipe import Recipe, Step, apply
from shoal_optimizer.targets import Calibration, ClassSpec, qdq
from shoal_optimizer.targets.onnx import Scheme, float_graph, quantized_graph, strip
from shoal_optimizer.targets.reverting import (
    Figures,
    chosen,
    kernel_time,
    profile_onnxruntime,
    profile_openvino,
    ranked,
    units_of,
)
from shoal_optimizer.task import Task
from shoal_protos.errors import InvalidInput, Unsupported

INT8 = Figures(0.5, 1.0, 100.0)


def test_the_best_bargain_goes_back_first() -> None:
    alone: dict[tuple[str, ...], Figures] = {
        ("dear",): Figures(0.9, 0.5, 200.0),  # 0.4 for 100 us
        ("cheap",): Figures(0.6, 0.9, 105.0),  # 0.1 for 5 us
        ("useless",): Figures(0.5, 1.0, 101.0),
        ("near",): Figures(0.5, 0.8, 101.0),  # same metric, outputs closer to float's
    }
    assert ranked(INT8, alone) == [("cheap",), ("dear",), ("near",), ("useless",)]


def additive(gains: dict[str, tuple[float, float]]) -> Any:
    """A net in which each layer regains and costs its own share."""

    def measure(layers: tuple[str, ...]) -> Figures:
        regained = sum(gains[layer][0] for layer in layers)
        cost = sum(gains[layer][1] for layer in layers)
        return Figures(0.5 + regained, 1 - regained, 100 + cost)

    return measure


def test_no_more_goes_back_than_needed_and_both_figures_are_told() -> None:
    measure = additive({"a": (0.2, 10.0), "b": (0.1, 50.0), "c": (0.15, 1.0)})
    steps = chosen([("a",), ("b",), ("c",)], INT8, 0.9, 0.06, measure)
    assert [step.layers for step in steps] == [("c",), ("a",)]
    assert [(round(s.regained, 6), s.microseconds) for s in steps] == [(0.15, 1.0), (0.2, 10.0)]
    assert steps[0].to_json() == {"layers": ["c"], "regained": 0.15, "microseconds": 1.0}


def test_what_a_later_layer_makes_superfluous_stays_in_int8() -> None:
    def measure(layers: tuple[str, ...]) -> Figures:
        value = 0.9 if "b" in layers else 0.6 if "a" in layers else 0.5
        return Figures(value, 1 - value, 100 + 10.0 * ("a" in layers) + 100.0 * ("b" in layers))

    steps = chosen([("a",), ("b",), ("c",)], INT8, 0.9, 0.0, measure)
    assert [step.layers for step in steps] == [("b",)]


def test_a_model_that_int8_cannot_serve_is_refused() -> None:
    with pytest.raises(Unsupported, match="until every layer is back in float") as caught:
        chosen([("a",), ("b",)], INT8, 0.9, 0.0, additive({"a": (0.2, 1.0), "b": (0.2, 1.0)}))
    assert "quantization_aware" in caught.value.remedy


@given(
    st.dictionaries(
        st.sampled_from("abcdefgh"),
        st.tuples(st.floats(0, 0.1), st.floats(0.5, 100)),
        min_size=2,
    ),
    st.floats(0, 0.5),
)
def test_the_limit_holds_whenever_there_is_an_answer(
    gains: dict[str, tuple[float, float]], max_drop: float
) -> None:
    measure = additive(gains)
    top = measure(tuple(gains)).value
    try:
        steps = chosen([(name,) for name in gains], INT8, top, max_drop, measure)
    except Unsupported:
        return
    back = tuple(layer for step in steps for layer in step.layers)
    assert len(set(back)) == len(back) < len(gains)
    assert top - measure(back).value <= max_drop + 1e-12


def test_layers_go_back_alone_or_with_all_readers_of_what_they_write() -> None:
    units = units_of(["a", "b", "c"], {"a": ("b", "c"), "b": (), "c": ("elsewhere",)})
    assert units == [("a",), ("b",), ("c",), ("a", "b", "c")]
    deep = units_of([str(n) for n in range(100)], {}, most=40)
    assert len(deep) == 40
    assert [name for unit in deep for name in unit] == [str(n) for n in range(100)]


def test_kernel_time_sums_the_least_of_each_kernel() -> None:
    events = [
        {"cat": "Node", "name": "conv_kernel_time", "dur": 9},
        {"cat": "Node", "name": "conv_kernel_time", "dur": 5},
        {"cat": "Node", "name": "add_kernel_time", "dur": 2},
        {"cat": "Session", "name": "model_run", "dur": 50},
    ]
    assert kernel_time(events) == 7.0


@pytest.fixture(scope="module")
def uneven(quadrants: Task) -> torch.nn.Module:
    """The same answers in float, but one channel 3000 times as large inside: int8 loses the others."""
    model: Any = copy.deepcopy(quadrants.original)
    with torch.no_grad():
        model[2].second.weight[0] *= 3000
        model[2].second.bias[0] *= 3000
        model[4].weight[:, 0] /= 3000
    return model  # type: ignore[no-any-return]


def optimized(graph: bytes, folder: Path) -> Counter[str]:
    """Operators of the graph that ONNX Runtime really runs."""
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.optimized_model_filepath = str(folder / "optimized.onnx")
    settings.log_severity_level = 3
    onnxruntime.InferenceSession(graph, settings, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(folder / "optimized.onnx").graph.node)


def test_every_layer_can_be_kept_in_float_in_the_runtimes_own_graph(quadrants: Task, tmp_path: Path) -> None:
    graph = float_graph(quadrants.original, quadrants)
    calibration = Calibration(quadrants.required("training").inputs[:32])
    layers = qdq.weighted_nodes(graph)
    assert len(layers) == 5
    for layer in layers:
        kept = dataclasses.replace(calibration, keep_float=(layer,))
        made = strip(quantized_graph(graph, quadrants, kept, Scheme(False, False, ())))
        found = optimized(made, tmp_path)
        in_float = sum(found[name] for name in ("Conv", "FusedConv", "Gemm", "FusedGemm", "MatMul"))
        in_int8 = sum(found[name] for name in ("QLinearConv", "QGemm", "QLinearMatMul"))
        assert (in_float, in_int8) == (1, 4), layer
        assert not found["LeakyRelu"], "the shield is fused into the layer"


def test_excluding_a_layer_alone_would_not_keep_it_in_float(quadrants: Task, tmp_path: Path) -> None:
    """Why `qdq.shield` is there. Where this fails, ONNX Runtime has changed and the shield can go."""
    graph = float_graph(quadrants.original, quadrants)
    calibration = Calibration(quadrants.required("training").inputs[:32], keep_float=("node_conv2d_3",))
    model = onnx.load_from_string(quantized_graph(graph, quadrants, calibration, Scheme(False, False, ())))
    shield = next(node for node in model.graph.node if node.op_type == "LeakyRelu")
    assert optimized(model.SerializeToString(), tmp_path)["Conv"] == 1
    shield.op_type = "Relu"
    del shield.attribute[:]
    assert optimized(model.SerializeToString(), tmp_path)["Conv"] == 0


def test_layers_are_reverted_until_the_limit_holds(
    quadrants: Task, uneven: torch.nn.Module, local_class: ClassSpec
) -> None:
    applied = apply(
        Recipe((Step("quantization", {"max_drop": 0.02, "samples": 64}),)), quadrants, teacher=uneven
    )
    made = targets.find("onnxruntime").export(uneven, quadrants, "int8", applied.calibration, local_class)
    facts = made.facts
    assert facts["drop_before"] > 0.1 >= 0.02 >= facts["drop"]
    assert facts["judged_on"] == "training" and facts["judged_items"] == 192
    back = [layer for step in facts["reverted"] for layer in step["layers"]]
    assert back == facts["keep_float"] and 0 < len(back) < 5
    assert sum(step["regained"] for step in facts["reverted"]) == pytest.approx(
        facts["drop_before"] - facts["drop"], abs=1e-3
    )
    assert facts["int8_share"] == pytest.approx(1 - len(back) / 5)
    evaluation = quadrants.required("evaluation")
    with targets.load_exported(made) as instance:
        got = targets.run_instance(instance, made.signature, evaluation.inputs)
    wanted = quadrants.predict(uneven, evaluation.inputs)
    assert np.mean(got.argmax(1) == wanted.argmax(1)) > 0.95


def test_nothing_is_reverted_where_int8_is_good_enough(quadrants: Task, local_class: ClassSpec) -> None:
    applied = apply(Recipe((Step("quantization", {"max_drop": 0.02, "samples": 64}),)), quadrants)
    made = targets.find("onnxruntime").export(
        applied.model, quadrants, "int8", applied.calibration, local_class
    )
    assert made.facts["reverted"] == [] and made.facts["int8_share"] == 1.0


def test_an_unknown_layer_is_refused(quadrants: Task, local_class: ClassSpec) -> None:
    calibration = Calibration(quadrants.required("training").inputs[:8], keep_float=("no such",))
    with pytest.raises(InvalidInput, match="'no such' is no convolution"):
        targets.find("onnxruntime").export(quadrants.original, quadrants, "int8", calibration, local_class)


@pytest.mark.parametrize("profile", [profile_onnxruntime, profile_openvino])
def test_both_runtimes_give_a_profile(profile: Any, quadrants: Task) -> None:
    graph = strip(float_graph(quadrants.original, quadrants))
    assert profile(graph, {"pixels": quadrants.required("evaluation").inputs[:1]}) > 1


def test_what_was_timed_is_told_but_not_in_the_bundle(
    quadrants: Task, uneven: torch.nn.Module, tmp_path: Path
) -> None:
    exported = targets.find("onnxruntime").export(quadrants.original, quadrants)
    step = {"layers": ["node_linear"], "regained": 0.1, "microseconds": 3.7}
    told = dataclasses.replace(exported, facts={**exported.facts, "reverted": [step]})
    lineage = lineage_of(quadrants, Recipe(), told, model_version=1, seed=0)
    assert lineage.target["reverted"] == [["node_linear"]]
