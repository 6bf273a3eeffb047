"""`shoal optimize` on models that nobody tuned for: an ONNX file and a network as torchvision writes it."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shoal_optimizer import cli

MOBILENET = '''
import numpy as np, torch
from torch import nn
from shoal_optimizer import Task, TensorSpec


class Inverted(nn.Module):
    """MobileNetV2's block, as torchvision builds it: expand, depthwise, project, add."""

    def __init__(self, wide_in, wide_out, stride, expand):
        super().__init__()
        hidden, layers = wide_in * expand, []
        if expand != 1:
            layers += [nn.Conv2d(wide_in, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6(True)]
        layers += [
            nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False), nn.BatchNorm2d(hidden),
            nn.ReLU6(True), nn.Conv2d(hidden, wide_out, 1, bias=False), nn.BatchNorm2d(wide_out),
        ]
        self.conv, self.add = nn.Sequential(*layers), stride == 1 and wide_in == wide_out

    def forward(self, x):
        return x + self.conv(x) if self.add else self.conv(x)


class MobileNet(nn.Module):
    def __init__(self, classes):
        super().__init__()
        layers, wide = [nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU6(True)], 16
        for expand, out, repeat, stride in ((1, 8, 1, 1), (6, 16, 2, 2), (6, 24, 2, 2), (6, 32, 2, 1)):
            for place in range(repeat):
                layers.append(Inverted(wide, out, stride if place == 0 else 1, expand))
                wide = out
        layers += [nn.Conv2d(wide, 128, 1, bias=False), nn.BatchNorm2d(128), nn.ReLU6(True)]
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(128, classes))

    def forward(self, x):
        return self.classifier(self.features(x).mean([2, 3]))


class Untrained(Task):
    input = TensorSpec("image", "FP32", (-1, 3, 48, 48))
    output_kind = "logits"
    labels = tuple("abcd")

    def model(self):
        return MobileNet(4)

    def items(self, seed, count):
        random = np.random.default_rng(seed)
        colour = random.integers(0, 4, count)
        tint = np.eye(4, 3, dtype=np.float32)[colour][:, :, None, None]
        return (random.normal(0, 0.5, (count, 3, 48, 48)).astype(np.float32) + tint), colour

    def evaluation(self):
        return self.items(1, 200)

    def calibration(self):
        return self.items(2, 64)
'''


def sound(result: dict[str, Any], out: Path) -> dict[str, Any]:
    """What every result owes: a front that no point of itself dominates, and a report that names it."""
    assert (out / "report.html").stat().st_size > 10_000
    report: dict[str, Any] = json.loads((out / "report.json").read_bytes())
    front = result["classes"][0]["front"]
    assert front and len({entry["bundle"] for entry in front}) == len(front)
    for one in front:
        assert Path(one["layout"]).is_dir() and one["accuracy"] is not None
        for other in front:
            better = other["accuracy"] > one["accuracy"] + 0.02 and other["size_bytes"] < one["size_bytes"]
            faster = other["latency_p95_ms"] < 0.8 * one["latency_p95_ms"]
            assert not (better and faster), (one["name"], other["name"])
    assert result["classes"][0]["choice"]["bundle"] in {entry["bundle"] for entry in front}
    return report


@pytest.mark.slow
def test_an_untrained_mobilenet(tmp_path: Path) -> None:
    """Nothing to lose and nothing to train on: conversion and quantization, and a choice that is as right."""
    task = tmp_path / "untrained.py"
    task.write_text(MOBILENET)
    out = tmp_path / "out"
    result = cli.optimize(task, objective_text="accuracy>=0.15; minimise latency_p95", minutes=1.0, out=out)
    sound(result, out)
    entry = result["classes"][0]
    assert entry["choice"]["feasible"]
    chosen = next(e for e in entry["front"] if e["bundle"] == entry["choice"]["bundle"])
    assert chosen["latency_p95_ms"] <= min(e["latency_p95_ms"] for e in entry["front"]) * 1.001


@pytest.mark.slow
def test_a_pretrained_onnx_model(tmp_path: Path) -> None:
    """ResNet-8 of MLPerf Tiny with public pictures: smaller, within a point of its accuracy."""
    folder = Path(os.environ.get("SHOAL_DATA", ""))
    source = folder / "models" / "resnet8_mlperftiny_cifar10.onnx"
    if not os.environ.get("SHOAL_DATA") or not source.is_file():
        pytest.skip("SHOAL_DATA is not set")
    inputs, truth = _pictures(folder / "cifar10_jpeg.npz", 600)
    (tmp_path / "resnet8.onnx").write_bytes(source.read_bytes())
    np.savez(tmp_path / "resnet8.npz", inputs=inputs[100:], targets=truth[100:], calibration=inputs[:100])
    out = tmp_path / "out"
    task = tmp_path / "resnet8.onnx"
    result = cli.optimize(task, objective_text="accuracy>=0.70; minimise size", minutes=1.0, out=out)
    sound(result, out)
    entry = result["classes"][0]
    chosen = next(e for e in entry["front"] if e["bundle"] == entry["choice"]["bundle"])
    assert chosen["size_bytes"] < 0.5 * source.stat().st_size
    assert chosen["accuracy"] >= result["baseline"]["value"] - 0.03


def _pictures(path: Path, count: int) -> tuple[np.ndarray, np.ndarray]:
    import io

    from PIL import Image

    with np.load(path) as stored:
        content, offsets = stored["test_bytes"].tobytes(), stored["test_offsets"]
        pictures = [
            np.asarray(
                Image.open(io.BytesIO(content[offsets[i] : offsets[i + 1]])).convert("RGB"), np.float32
            )
            for i in range(count)
        ]
        return np.moveaxis(np.stack(pictures), -1, 1).copy(), stored["test_y"][:count].astype(np.int64)
