from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from compression_parts import figures, page, ready, timing, training

ROOT = Path(__file__).resolve().parents[2]
ROWS = ("weight_pruning", "channel_pruning", "int8", "distillation", "architecture_search", "combined")
KEYS = (
    "size_ratio", "speedup_over_pytorch", "speedup_over_onnxruntime_fp32", "speedup_over_best_fp32",
    "accuracy_kept",
)  # fmt: skip
SCHEDULE = training.Schedule(epochs=2, batch=8, learning_rate=0.05)


class Killed(Exception):
    pass


def tiny() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(1), nn.Linear(4 * 4, 3))


def batch(rows: np.ndarray, seed: int) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    noise = torch.randn((len(rows), 1, 4, 4), generator=random)
    targets = torch.from_numpy(rows % 3)
    return noise + targets[:, None, None, None], targets


def train(folder: Path, say: Any = lambda text: None, seed: int = 0) -> nn.Module:
    return training.trained(
        tiny, 80, batch, SCHEDULE, data="d", seed=seed, folder=folder, name="tiny", save_every=3, say=say
    )[0]


def same(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def test_killed_training_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole")
    said: list[str] = []

    def kill_at_third_save(text: str) -> None:
        said.append(text)
        if len(said) == 3:
            raise Killed

    with pytest.raises(Killed):
        train(tmp_path / "cut", kill_at_third_save)
    assert not list((tmp_path / "cut").glob("*.pt"))
    told: list[str] = []
    resumed = train(tmp_path / "cut", told.append)
    assert "step 12 of 20" in told[0]  # three saves of three steps were not repeated
    assert same(whole, resumed)
    assert not same(whole, train(tmp_path / "other", seed=1))


def test_finished_training_is_only_read(tmp_path: Path) -> None:
    first = train(tmp_path)
    said: list[str] = []
    assert same(first, train(tmp_path, said.append)) and not said


def test_another_schedule_is_another_checkpoint() -> None:
    other = training.Schedule(epochs=3, batch=8, learning_rate=0.05)
    keys = {
        training.key_of(tiny(), SCHEDULE, "d", 0), training.key_of(tiny(), other, "d", 0),
        training.key_of(tiny(), SCHEDULE, "e", 0), training.key_of(tiny(), SCHEDULE, "d", 1),
    }  # fmt: skip
    assert len(keys) == 4


def graph_of(network: nn.Module, swapped: bool = False) -> bytes:
    """An ONNX file with the weighted layers of `network` in their order, and nothing between."""
    nodes, constants = [], []
    layers = [layer for layer in network.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    for number, layer in enumerate(reversed(layers) if swapped else layers):
        assert layer.bias is not None
        for name, value in (("w", layer.weight), ("b", layer.bias)):
            constants.append(numpy_helper.from_array(value.detach().numpy(), f"{name}{number}"))
        kind = "Conv" if isinstance(layer, nn.Conv2d) else "Gemm"
        nodes.append(helper.make_node(kind, [f"x{number}", f"w{number}", f"b{number}"], [f"y{number}"]))
    info = helper.make_tensor_value_info("x0", TensorProto.FLOAT, None)
    content: bytes = helper.make_model(
        helper.make_graph(nodes, "g", [info], [], constants)
    ).SerializeToString()
    return content


def test_weights_come_from_the_initializers() -> None:
    given, wanted = ready.Ready(1, True, True), ready.Ready(1, True, True)
    assert not same(given, wanted)
    assert same(ready.read_weights(given, graph_of(wanted)), wanted)


def test_a_graph_of_another_network_is_refused() -> None:
    network = ready.Ready(1, True, True)
    with pytest.raises(ValueError, match="the graph has 20 weighted layers, the network 10"):
        ready.read_weights(network, graph_of(ready.Ready(3, False, False)))
    with pytest.raises(ValueError, match="layer 0 is"):
        ready.read_weights(network, graph_of(network, swapped=True))


@pytest.mark.parametrize("name", ["resnet8", "resnet20"])
def test_ready_networks_answer_as_their_files_do(
    name: str, data_pack: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures = ready.cifar("train", np.arange(16)).inputs
    network = ready.checked(name, pictures)
    assert sum(p.numel() for p in network.parameters()) > 70_000
    monkeypatch.setattr(ready, "read_weights", lambda fresh, graph: fresh.eval())
    with pytest.raises(ValueError, match="differs from"):
        ready.checked(name, pictures)


def test_accuracy_kept_has_an_interval_over_pictures_and_seeds() -> None:
    whole = np.arange(1000) < 950
    right = np.arange(1000) < 940
    low, high = figures.kept_interval([(whole, right)] * 3)
    assert 0.97 < low < 940 / 950 < high < 1.0
    low, high = figures.kept_interval([(whole, whole)])
    assert low == high == 1.0


def test_ratios_are_taken_within_rounds() -> None:
    value, low, high, n = timing.ratio([10.0, 20.0, 40.0], [1.0, 2.0, 4.0])
    assert (value, low, high, n) == (10.0, 10.0, 10.0, 3)


def test_every_round_times_every_call() -> None:
    seen: list[str] = []
    calls: dict[timing.Key, Any] = {
        ("n", 0, name, "r"): (lambda name=name: seen.append(name)) for name in ("a", "b")
    }
    readings = timing.interleaved(calls, 4)
    assert [len(values) for values in readings.values()] == [4, 4]
    assert min(min(values) for values in readings.values()) > 0


def test_a_missed_aim_is_called_missed() -> None:
    names = (
        "size_ratio",
        "accuracy_kept_worst_seed",
        "speedup_over_onnxruntime_fp32",
        "speedup_over_pytorch",
    )
    values = dict(zip(names, (0.03, 0.98, 15.0, 39.0), strict=True))
    found = {f"combined.{name}": {"value": value} for name, value in values.items()}
    (line,) = page.verdicts(found, vnni=True)
    assert [part.rsplit(" ", 1)[1] for part in line.split("; ")] == ["met", "missed", "met", "missed"]
    assert page.verdicts(found, vnni=False)[0].endswith("over PyTorch 39 (>= 30) met")


@pytest.mark.slow
@pytest.mark.usefixtures("data_pack")
def test_quick_makes_all_six_rows(tmp_path: Path) -> None:
    out = tmp_path / "quick.json"
    subprocess.run(
        [
            sys.executable, str(ROOT / "benchmarks" / "compression.py"), "--quick", "--steps", "4",
            "--rounds", "3", "--checkpoints", str(tmp_path / "kept"), "--json", str(out),
        ],
        check=True, timeout=170, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    document = json.loads(out.read_text())
    for row in ROWS:
        for key in KEYS:
            assert document["figures"][f"{row}.{key}"]["value"] > 0, (row, key)
    assert document["figures"]["int8.size_ratio"]["value"] < 0.5
    assert document["figures"]["int8.accuracy_kept"]["value"] > 0.9
    assert isinstance(document["context"]["isa"], list)
    assert not document["missing"]
