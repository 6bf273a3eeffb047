from __future__ import annotations

import json
from pathlib import Path

import pytest

from shoal_optimizer.analysis import analyse
from shoal_optimizer.recipe import Recipe, Step, apply
from shoal_optimizer.targets.onnx import float_graph
from shoal_optimizer.task import Task, load_task


def test_costs_of_known_layers(quadrants: Task) -> None:
    found = analyse(quadrants)
    layers = {layer.name: layer for layer in found.layers}
    assert layers["0"].macs == 8 * 8 * 16 * 9
    assert layers["4"].macs == 4 * 4 * 32 * 16 * 9
    assert layers["7"].macs == 512 * 4
    assert layers["0"].output == (16, 8, 8)
    assert found.parameters == sum(p.numel() for p in quadrants.original.parameters())
    assert found.weight_bytes == 4 * found.parameters
    assert found.macs == sum(layer.macs for layer in found.layers)
    assert found.conv_share == pytest.approx(1 - 2048 / found.macs)
    assert found.activation_peak_bytes == 4 * 2 * 16 * 8 * 8
    json.dumps(found.to_json())


def test_a_pruned_model_costs_less(quadrants: Task) -> None:
    pruned = apply(Recipe((Step("channel_pruning"),)), quadrants).model
    assert analyse(quadrants, pruned).macs < 0.5 * analyse(quadrants).macs


def test_an_onnx_file_costs_the_same(quadrants: Task, tmp_path: Path) -> None:
    data = quadrants.required("evaluation")
    (tmp_path / "m.onnx").write_bytes(float_graph(quadrants.original, quadrants))
    import numpy as np

    np.savez(tmp_path / "m.npz", inputs=data.inputs, targets=data.targets)
    found, wanted = analyse(load_task(tmp_path / "m.onnx")), analyse(quadrants)
    assert found.macs == wanted.macs
    assert found.conv_share == pytest.approx(wanted.conv_share)
