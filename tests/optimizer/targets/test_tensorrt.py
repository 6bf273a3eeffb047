from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from shoal_optimizer import packing, targets
from shoal_optimizer.jobspec import ProfileClass
from shoal_optimizer.recipe import Recipe
from shoal_optimizer.search import space
from shoal_optimizer.targets import ClassSpec, Exported, tensorrt_rules
from shoal_optimizer.targets.tensorrt import RECIPE_FILE, build_recipe
from shoal_optimizer.task import Task
from shoal_protos.bundle import open_bundle
from shoal_protos.errors import Unsupported

JETSON = ClassSpec.of("aarch64.orin", ["neon"], {"tensorrt": "10.3.0"})


@pytest.fixture(scope="module")
def exported(quadrants: Task) -> Exported:
    return targets.find("tensorrt").export(quadrants.original, quadrants, "int8", class_spec=JETSON)


def test_the_graph_keeps_the_rules_and_all_of_it_is_int8(exported: Exported) -> None:
    content = exported.files["model.onnx"]
    assert tensorrt_rules.verify(content) == []
    assert exported.facts["int8_share_declared"] == 1.0
    assert exported.facts["int8_share"] is None  # an engine was never seen
    assert exported.facts["run_on_gpu"] is False


def test_onnx_runtimes_own_int8_would_be_refused(quadrants: Task, local_class: ClassSpec) -> None:
    made = targets.find("onnxruntime").export(
        quadrants.original, quadrants, "int8", class_spec=replace(local_class, isa=frozenset({"avx2"}))
    )
    broken = {violation.rule for violation in tensorrt_rules.verify(made.files["model.onnx"])}
    assert broken >= {"signed_int8", "zero_points_are_zero", "float_biases"}


def test_a_residual_sum_has_one_quantized_summand(exported: Exported) -> None:
    graph = tensorrt_rules.Graph(exported.files["model.onnx"])
    sums = [node for node in graph.nodes if node.op_type == "Add"]
    assert len(sums) == 1
    makers = sorted(graph.makers[name].op_type for name in sums[0].input)
    assert makers == ["Conv", "DequantizeLinear"]


def test_the_recipe_says_how_to_build(exported: Exported, quadrants: Task) -> None:
    recipe = json.loads(exported.files[RECIPE_FILE])
    assert recipe == build_recipe(quadrants.signature, "int8")
    assert recipe["model"] in exported.files
    assert recipe["strongly_typed"] is True
    assert recipe["precisions"] == ["int8", "fp32"]
    assert recipe["profiles"] == [
        {"pixels": {"min": [1, 8, 8, 1], "opt": [1, 8, 8, 1], "max": [64, 8, 8, 1]}}
    ]
    assert recipe["workspace_bytes"] > 0
    assert {"gpu_name", "tensorrt_version", "driver_version"} <= set(recipe["engine_key"])


def test_open_dimensions_are_refused(quadrants: Task) -> None:
    spec = replace(quadrants.signature.inputs[0], shape=(-1, -1, 8, 1))
    with pytest.raises(Unsupported, match="open dimensions"):
        build_recipe(replace(quadrants.signature, inputs=(spec,)), "fp32")


def test_a_bundle_has_the_recipe_and_golden_cases_of_the_twin(
    exported: Exported, quadrants: Task, tmp_path: Path
) -> None:
    recipe = Recipe()
    packed = packing.pack(
        exported, quadrants, recipe, packing.lineage_of(quadrants, recipe, exported), tmp_path / "b"
    )
    bundle = open_bundle(packed.layout, packed.digest)
    assert bundle.config.runtime.name == "tensorrt"
    assert bundle.config.runtime.isa == ()
    assert json.loads(bundle.file(RECIPE_FILE).read_bytes())["schema"] == 1
    with np.load(bundle.file("golden.npz")) as golden:
        wanted = quadrants.predict(quadrants.original, golden["input:pixels"])
        assert np.array_equal(golden["output:logits"].argmax(1), wanted.argmax(1))


def test_a_model_without_products_has_no_int8(quadrants: Task, tmp_path: Path) -> None:
    from shoal_optimizer.targets.tensorrt import _declared

    node = onnx.helper.make_node("Relu", ["x"], ["y"])
    shapes = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, 2]) for name in "xy"]
    model = onnx.helper.make_model(onnx.helper.make_graph([node], "g", shapes[:1], shapes[1:]))
    with pytest.raises(Unsupported, match="would run in int8"):
        _declared(model.SerializeToString())


def test_only_classes_with_the_runtime_get_it() -> None:
    assert [target.name for target in targets.available(JETSON)] == ["tensorrt"]
    assert [t.name for t in targets.available(ClassSpec.of("mac", [], {"coreml": "9.0"}))] == ["coreml"]


def test_the_cpu_of_a_class_does_not_change_the_file() -> None:
    boards = [
        ProfileClass(f"aarch64.{isa}.6c+tensorrt", (isa,), {"tensorrt": "10.3"}) for isa in ("neon", "i8mm")
    ]
    exports = {(e.target, e.precision, e.isa): len(e.classes) for e in space.exports_for(boards)}
    assert exports == {("tensorrt", "fp32", ()): 2, ("tensorrt", "int8", ()): 2}
    mac = ProfileClass("aarch64.neon.8c+coreml", ("neon",), {"coreml": "9.0"})
    assert [e.precision for e in space.exports_for([mac])] == ["fp32", "fp16", "int8_weights"]
