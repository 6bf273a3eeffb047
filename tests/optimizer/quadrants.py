"""A task for tests: which quadrant of an 8x8 image is bright? Trains in about a second."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from shoal_optimizer import Task, TensorSpec


def images(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    labels = random.integers(0, 4, count)
    pixels = random.integers(0, 60, (count, 8, 8, 1))
    for image, label in zip(pixels, labels, strict=True):
        image[4 * (label // 2) :, 4 * (label % 2) :][:4, :4] += random.integers(20, 60)
    return pixels.astype(np.uint8), labels


class Scale(nn.Module):
    def forward(self, pixels: Tensor) -> Tensor:
        return pixels.to(torch.float32).permute(0, 3, 1, 2) / 128.0 - 0.3


class Block(nn.Module):
    """A residual block: pruning must keep both branches equally wide."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.relu(inputs + self.second(torch.relu(self.norm(self.first(inputs)))))


class Quadrants(Task):
    input = TensorSpec("pixels", "UINT8", (-1, 8, 8, 1), "NHWC", low=0, high=255)
    input_kind = "image"
    output_kind = "logits"
    color = "gray"
    labels = ("upper left", "upper right", "lower left", "lower right")

    def network(self) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            Block(16),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.Flatten(1),
            nn.Linear(512, 4),
        )

    def model(self) -> nn.Module:
        model, scale = self.network(), Scale()
        inputs, targets = (torch.from_numpy(part) for part in images(256, 1))
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        model.train()
        for _ in range(40):
            chosen = torch.randint(0, len(inputs), (64,))
            loss = nn.functional.cross_entropy(model(scale(inputs[chosen])), targets[chosen])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        return model.eval()

    def preprocess(self) -> nn.Module:
        return Scale()

    def training(self):  # type: ignore[no-untyped-def]
        return images(256, 1)

    def evaluation(self):  # type: ignore[no-untyped-def]
        return images(300, 2)

    def holdout(self):  # type: ignore[no-untyped-def]
        return images(200, 3)
