"""The whole way for a task that is no classification: series in, values out, own postprocessing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from shoal_agent import runtimes
from shoal_optimizer import targets
from shoal_optimizer.evaluation import evaluate_exported, evaluate_model
from shoal_optimizer.packing import lineage_of, pack
from shoal_optimizer.recipe import Recipe, Step, apply
from shoal_optimizer.targets import ClassSpec
from shoal_optimizer.targets.onnx import excluded_nodes, float_graph
from shoal_optimizer.task import Task, load_task
from shoal_protos.bundle import open_bundle

RECIPE = Recipe((Step("channel_pruning"), Step("distillation", {"epochs": 8}), Step("quantization")), "small")


@pytest.fixture(scope="module")
def task() -> Task:
    return load_task(Path(__file__).with_name("tones.py"))


def test_it_is_compressed_and_still_right(task: Task, local_class: ClassSpec, tmp_path: Path) -> None:
    original = evaluate_model(task, task.original)
    assert original.metric == "r2"
    assert 0.9 < original.low < original.value < original.high <= 1
    applied = apply(RECIPE, task)
    for name in ("onnxruntime", "openvino"):
        target = targets.find(name)
        exported = target.export(applied.model, task, applied.precision, applied.calibration, local_class)
        assert evaluate_exported(task, exported).value > original.value - 0.05
        assert exported.facts["parity_agreement"] is None
        lineage = lineage_of(task, applied.recipe, exported)
        packed = pack(exported, task, applied.recipe, lineage, tmp_path / name)
        bundle = open_bundle(packed.layout, packed.digest)
        golden = bundle.config.golden
        assert golden is not None
        with np.load(bundle.file(golden.file)) as cases, runtimes.find(name).load(bundle) as instance:
            got = instance.run({"wave": cases["input:wave"]})["tone"]
            np.testing.assert_allclose(got, cases["output:tone"], rtol=golden.rtol, atol=golden.atol)


def test_postprocessing_is_in_the_graph_and_stays_in_float(task: Task, local_class: ClassSpec) -> None:
    graph = float_graph(task.original, task)
    kinds = {node.name: node.op_type for node in onnx.load_from_string(graph).graph.node}
    assert sorted(kinds[name] for name in excluded_nodes(graph)) == ["Cast", "Mul"]
    exported = targets.find("onnxruntime").export(task.original, task, "int8", class_spec=local_class)
    last = onnx.load_from_string(exported.files["model.onnx"]).graph.node[-1]
    assert (last.op_type, list(last.output)) == ("Mul", ["tone"])
