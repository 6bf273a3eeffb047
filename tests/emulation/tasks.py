"""A task that needs no training and no download: which colour a picture has."""

from __future__ import annotations

from pathlib import Path

NAME = "colours"
COLOURS = {"red": (200, 40, 30), "green": (40, 180, 60), "blue": (30, 60, 210)}

TASK = """
import numpy as np
import torch
from shoal_optimizer import Task, TensorSpec

COLOURS = np.array([(200, 40, 30), (40, 180, 60), (30, 60, 210)])


class Scale(torch.nn.Module):
    def forward(self, pictures):
        return pictures.to(torch.float32).permute(0, 3, 1, 2) / 255.0


class Colours(Task):
    input = TensorSpec("picture", "UINT8", (-1, 16, 16, 3), layout="NHWC", low=0, high=255)
    input_kind = "image"
    color = "rgb"
    resize = "stretch"
    output_kind = "logits"
    labels = ("red", "green", "blue")

    def preprocess(self):
        return Scale()

    def model(self):
        torch.manual_seed(0)
        spread = torch.nn.Conv2d(3, 48, 3, padding=1)
        keep = torch.nn.Conv2d(48, 48, 3, padding=1)  # large enough for int8 to be the smaller file
        gather = torch.nn.Conv2d(48, 3, 1, bias=False)
        with torch.no_grad():
            for layer in (spread, keep):
                layer.weight.mul_(0.02)
                layer.bias.zero_()
            gather.weight.zero_()
            for channel in range(48):
                spread.weight[channel, channel % 3, 1, 1] = 1.0
                keep.weight[channel, channel, 1, 1] = 1.0
                gather.weight[channel % 3, channel] = 0.75
        relu, pool = torch.nn.ReLU, torch.nn.AdaptiveAvgPool2d(1)
        return torch.nn.Sequential(spread, relu(), keep, relu(), gather, pool, torch.nn.Flatten(1))

    def evaluation(self):
        random = np.random.default_rng(3)
        labels = random.integers(0, 3, 120)
        noise = random.normal(0, 25, (120, 16, 16, 3))
        pictures = np.clip(COLOURS[labels][:, None, None, :] + noise, 0, 255)
        return pictures.astype(np.uint8), labels.astype(np.int64)

    def calibration(self):
        return self.evaluation()
"""


def write_task(folder: Path) -> Path:
    """The task's file."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{NAME}.py"
    path.write_text(TASK)
    return path


def write_pictures(folder: Path) -> dict[str, Path]:
    """A PNG file of 64x48 pixels a colour, by the colour's name."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    found = {}
    for name, colour in COLOURS.items():
        found[name] = folder / f"{name}.png"
        Image.new("RGB", (64, 48), colour).save(found[name])
    return found
