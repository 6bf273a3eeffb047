from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from shoal_agent import runtimes
from shoal_agent.telemetry.distances import largest
from shoal_agent.telemetry.sketches import sketch
from shoal_optimizer import targets
from shoal_optimizer.packing import Packed, lineage_of, pack, window_thresholds
from shoal_optimizer.recipe import Recipe, Step
from shoal_optimizer.targets import ClassSpec, Exported
from shoal_optimizer.task import Task
from shoal_protos.bundle import open_bundle
from shoal_protos.v1.telemetry_pb2 import SketchSet

RECIPE = Recipe((Step("quantization", {"samples": 100}),), "int8 only")


@pytest.fixture(scope="module")
def exported(quadrants: Task, local_class: ClassSpec) -> Exported:
    return targets.find("onnxruntime").export(quadrants.original, quadrants, "int8", class_spec=local_class)


@pytest.fixture(scope="module")
def packed(quadrants: Task, exported: Exported, tmp_path_factory: pytest.TempPathFactory) -> Packed:
    lineage = lineage_of(quadrants, RECIPE, exported, model_version=3, seed=5)
    return pack(exported, quadrants, RECIPE, lineage, tmp_path_factory.mktemp("bundle"))


def test_golden_cases_are_real_inputs_with_the_variants_own_answers(packed: Packed, quadrants: Task) -> None:
    bundle = open_bundle(packed.layout, packed.digest)
    golden = bundle.config.golden
    assert golden is not None
    with np.load(bundle.file(golden.file)) as cases:
        inputs, outputs = cases["input:pixels"], cases["output:logits"]
    assert 8 <= len(inputs) <= 16
    assert inputs.dtype == np.uint8
    known = {item.tobytes() for item in quadrants.required("evaluation").inputs}
    assert all(item.tobytes() in known for item in inputs)
    with runtimes.find("onnxruntime").load(bundle) as instance:
        np.testing.assert_array_equal(instance.run({"pixels": inputs})["logits"], outputs)
    ordered = np.sort(outputs, axis=1)
    assert (ordered[:, -1] - ordered[:, -2]).min() > 2 * golden.atol  # no tie that another CPU could flip


def test_the_digest_depends_on_content_only(
    packed: Packed, quadrants: Task, exported: Exported, tmp_path: Path
) -> None:
    lineage = lineage_of(quadrants, RECIPE, exported, model_version=3, seed=5)
    assert pack(exported, quadrants, RECIPE, lineage, tmp_path / "a").digest == packed.digest
    other = lineage_of(quadrants, RECIPE, exported, model_version=4, seed=5)
    assert pack(exported, quadrants, RECIPE, other, tmp_path / "b").digest != packed.digest


def test_sizes_and_lineage(packed: Packed, exported: Exported, quadrants: Task) -> None:
    assert packed.size_bytes == len(exported.files["model.onnx"])
    assert packed.wire_bytes < packed.size_bytes < packed.total_bytes
    lineage = open_bundle(packed.layout).config.lineage
    assert lineage.recipe == ({"technique": "quantization", "params": {"samples": 100}},)
    assert (lineage.model, lineage.model_version, lineage.seed) == ("quadrants", 3, 5)
    assert lineage.data_digest == quadrants.data_digest
    assert lineage.target["runtime"] == "onnxruntime"
    assert lineage.tools["onnxruntime"]


def test_clean_traffic_stays_below_the_thresholds_and_changed_traffic_does_not(
    packed: Packed, quadrants: Task
) -> None:
    bundle = open_bundle(packed.layout)
    reference = SketchSet()
    reference.ParseFromString(bundle.file(bundle.config.reference.inputs).read_bytes())
    assert reference.count == len(quadrants.required("training"))
    thresholds = bundle.config.reference.thresholds
    assert set(thresholds) == {"25", "50", "100", "200"}
    unseen = quadrants.required("holdout").inputs
    random = np.random.default_rng(0)
    for size in (25, 50, 100):
        limits = thresholds[str(size)]
        assert set(limits) == {"psi", "ks", "output_psi", "output_ks"}
        alarms, found = 0, 0
        for _ in range(40):
            window = unseen[random.choice(len(unseen), size, replace=False)]
            changed = (window * 0.6 + random.integers(0, 30, window.shape)).astype(np.uint8)
            alarms += largest(reference, sketch("image", window, 0, 255))["psi"][0] > limits["psi"]
            found += largest(reference, sketch("image", changed, 0, 255))["psi"][0] > limits["psi"]
        assert alarms <= 3
        assert found == 40


def test_thresholds_fall_with_the_window_and_need_held_out_data() -> None:
    random = np.random.default_rng(0)
    reference = sketch("tensor", random.normal(size=(800, 6)))
    found = window_thresholds(reference, random.normal(size=(240, 6)), windows=60)
    psi = [found[size]["psi"] for size in (25, 50, 100, 200)]
    assert psi == sorted(psi, reverse=True)
    assert found[200]["psi"] >= found[50]["psi"] / 4 * 0.99
    assert list(window_thresholds(reference, random.normal(size=(60, 6)), windows=9)) == [25, 50]


def test_outputs_have_a_reference_too(packed: Packed, quadrants: Task) -> None:
    bundle = open_bundle(packed.layout)
    outputs = SketchSet()
    outputs.ParseFromString(bundle.file(bundle.config.reference.outputs).read_bytes())
    assert outputs.kind == "logits"
    assert outputs.count == len(quadrants.required("training"))
