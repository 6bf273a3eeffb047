from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from shoal_optimizer.recipe import Recipe, Step, apply
from shoal_optimizer.search.kernels import Kernel, kernels, profiled
from shoal_optimizer.search.latency import features_of
from shoal_optimizer.search.tracing import kernels_of
from shoal_optimizer.targets import ClassSpec, find
from shoal_optimizer.targets.onnx import float_graph
from shoal_optimizer.task import Task
from shoal_protos.errors import InvalidInput
from tests.optimizer.techniques.families import InvertedResidual, Pictures, conv_norm, pictures


def _costly(found: tuple[Kernel, ...]) -> list[tuple[str, str, int]]:
    return [(k.operator, k.precision, k.macs) for k in found if k.operator not in ("move", "pair")]


@pytest.fixture(scope="module")
def float_file(quadrants: Task) -> bytes:
    return float_graph(quadrants.original, quadrants)


@pytest.fixture(scope="module")
def int8_file(quadrants: Task, local_class: ClassSpec) -> bytes:
    applied = apply(Recipe((Step("quantization"),)), quadrants)
    exported = find("onnxruntime").export(applied.model, quadrants, "int8", applied.calibration, local_class)
    content = exported.files["model.onnx"]
    assert isinstance(content, bytes)
    return content


LAYERS = [
    ("conv", 64 * 16 * 9),
    ("conv", 64 * 16 * 16 * 9),
    ("conv", 64 * 16 * 16 * 9),
    ("pool", 64 * 16),
    ("conv", 16 * 32 * 16 * 9),
    ("gemm", 512 * 4),
]


def test_activations_and_norms_belong_to_their_convolution(float_file: bytes) -> None:
    assert _costly(kernels(float_file)) == [(name, "fp32", macs) for name, macs in LAYERS]


def test_int8_kernels_have_no_quantization_between_them(int8_file: bytes) -> None:
    found = _costly(kernels(int8_file))
    assert [entry for entry in found if entry[0] != "quantize"] == [
        (name, "int8", macs) for name, macs in LAYERS
    ]
    assert sum(name == "quantize" for name, _, _ in found) == 2  # into int8 and out of it
    assert [k.operator for k in kernels(int8_file)][-1] == "quantize"


def test_weights_that_are_only_stored_in_int8_are_told_apart(float_file: bytes) -> None:
    import onnx
    from onnx import helper, numpy_helper

    model = onnx.load_from_string(float_file)
    (index, weight), *_ = [
        (i, item) for i, item in enumerate(model.graph.initializer) if tuple(item.dims) == (32, 16, 3, 3)
    ]
    del model.graph.initializer[index]
    model.graph.initializer.extend(
        [
            numpy_helper.from_array(np.ones((32, 16, 3, 3), np.int8), "stored"),
            numpy_helper.from_array(np.array(0.01, np.float32), "scale"),
        ]
    )
    model.graph.node.insert(0, helper.make_node("DequantizeLinear", ["stored", "scale"], [weight.name]))
    found = [k for k in kernels(model.SerializeToString()) if k.precision == "int8_weights"]
    assert [(k.operator, k.made) for k in found] == [("conv", (1, 32, 4, 4))]
    assert found[0].weight_bytes < 2 * 32 * 16 * 9


def test_depthwise_and_pointwise_are_told_apart() -> None:
    block = InvertedResidual(8, 8, 1, 6).eval()
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(1), nn.Linear(8, 10)]
    task = Pictures(nn.Sequential(conv_norm(3, 8), block, *head).eval())
    found = [k.operator for k in kernels(float_graph(task.original, task)) if k.macs]
    assert found == ["conv", "pointwise", "depthwise", "pointwise", "pool", "gemm"]
    traced = kernels_of(task.original, torch.randn(2, 3, 32, 32))
    assert [k.operator for k in traced if k.macs] == found


@pytest.mark.parametrize("content", [b"no graph", b"\x08\x07\xff"])
def test_what_is_no_graph_is_refused(content: bytes) -> None:
    with pytest.raises(InvalidInput, match="ONNX"):
        kernels(content)


@pytest.mark.parametrize("family", ["resnet", "unet"])
def test_a_traced_module_costs_what_its_graph_does(family: str) -> None:
    task = pictures(family)
    traced = features_of(kernels_of(task.original, torch.randn(2, 3, 32, 32)))
    graph = features_of(kernels(float_graph(task.original, task)))
    assert set(traced) == set(graph)
    for kind, values in graph.items():
        exact = kind.partition("/")[0] != "pool"
        assert traced[kind] == pytest.approx(values, rel=1e-6 if exact else 0.2, abs=0 if exact else 4096)


def test_a_traced_int8_module_is_quantized_at_its_ends() -> None:
    found = kernels_of(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()).eval(), torch.randn(1, 3, 8, 8), "int8")
    assert [(k.operator, k.precision) for k in found] == [
        ("quantize", "fp32"),
        ("conv", "int8"),
        ("quantize", "fp32"),
    ]


def test_more_channels_than_a_register_has_need_another() -> None:
    one, two = (Kernel("conv", (1, 8, 4, 4), (1, width, 4, 4), macs=100 * width) for width in (16, 17))
    assert one.lane_macs == 1600
    assert two.lane_macs == pytest.approx(3200)
    assert Kernel("gemm", (1, 8), (1, 8), macs=64).lane_macs == 128


# ---------------------------------------------------------------------------- profiles


def _event(
    name: str, kind: str, us: float, given: list[dict[str, list[int]]], made: list[int]
) -> dict[str, object]:
    return {
        "cat": "Node", "name": f"{name}_kernel_time", "dur": us,
        "args": {"op_name": kind, "input_type_shape": given, "output_type_shape": [{"float": made}]},
    }  # fmt: skip


def test_a_profile_gives_medians_without_the_first_round() -> None:
    given = [{"float": [1, 3, 8, 8]}, {"float": [16, 3, 3, 3]}, {"float": [16]}]
    events = [_event("a", "Conv", us, given, [1, 16, 8, 8]) for us in (900, 10, 12, 11)]
    events += [_event("b", "Flatten", 5, [{"float": [1, 16, 8, 8]}], [1, 1024])]
    events += [_event("c", "Gemm", 4, [{"float": [1, 1024]}, {"float": [10]}], [1, 10])]
    events += [{"cat": "Session", "name": "model_run", "dur": 99}]  # type: ignore[dict-item]
    found = profiled(json.dumps(events))
    assert [(k.operator, k.macs, us) for k, us in found] == [
        ("conv", 64 * 16 * 27, 11),
        ("gemm", 10240, 4),
    ]


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_real_profile_of_onnxruntime_is_read(
    precision: str, float_file: bytes, int8_file: bytes, tmp_path: Path
) -> None:
    import onnxruntime

    content = float_file if precision == "fp32" else int8_file
    options = onnxruntime.SessionOptions()
    options.enable_profiling = True
    options.profile_file_prefix = f"{tmp_path}/profile"
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    for _ in range(3):
        session.run(None, {session.get_inputs()[0].name: np.zeros((1, 8, 8, 1), np.uint8)})
    text = Path(session.end_profiling()).read_text()
    weighty = [k for k, _ in profiled(text, kernels(content)) if k.operator in ("conv", "gemm")]
    assert [(k.operator, k.macs) for k in weighty] == [entry for entry in LAYERS if entry[0] != "pool"]
    assert {k.precision for k in weighty} == {precision}
    if precision == "int8":  # without the network it isn't known what was computed
        assert not any(k.operator == "conv" for k, _ in profiled(text))


@pytest.mark.parametrize(
    "text", ["", "5", "[1]", '[{"cat": "Node"}]', '[{"cat":"Node","name":"a_kernel_time"}]']
)
def test_what_is_no_profile_is_refused(text: str) -> None:
    with pytest.raises(InvalidInput, match="profile"):
        profiled(text)
