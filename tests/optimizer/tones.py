"""A regression task for tests: how loud and how high is a tone? Has no preprocess(), but a postprocess()."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from shoal_optimizer import Task, TensorSpec


def tones(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Waves [n, 64] int16 and (amplitude in 0..1000, cycles in 1..8) [n, 2]."""
    random = np.random.default_rng(seed)
    loud, cycles = random.uniform(100, 1000, count), random.uniform(1, 8, count)
    time = np.arange(64) / 64
    phase = random.uniform(0, 2 * np.pi, count)
    waves = loud[:, None] * np.sin(2 * np.pi * cycles[:, None] * time + phase[:, None])
    return waves.astype(np.int16), np.stack([loud, cycles], axis=1).astype(np.float32)


class Units(nn.Module):
    def forward(self, inputs: Tensor) -> Tensor:
        return inputs * torch.tensor([1000.0, 8.0])


class Square(nn.Module):
    def forward(self, inputs: Tensor) -> Tensor:
        return (inputs / 1000.0).unsqueeze(1)


class Tones(Task):
    input = TensorSpec("wave", "INT16", (-1, 64), "NT", low=-1000, high=1000)
    output = TensorSpec("tone", "FP32", (-1, 2), "NC")
    input_kind = "series"
    output_kind = "values"

    def model(self) -> nn.Module:
        model = nn.Sequential(
            Square(),
            nn.Conv1d(1, 16, 9, 2),
            nn.ReLU(),
            nn.Flatten(1),
            nn.Linear(448, 32),
            nn.ReLU(),
            nn.Linear(32, 2),
        )
        inputs, targets = (torch.from_numpy(part) for part in tones(512, 1))
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        for _ in range(150):
            chosen = torch.randint(0, len(inputs), (64,))
            loss = self.loss(model(inputs[chosen].float()), targets[chosen])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        return model.eval()

    def postprocess(self) -> nn.Module:
        return Units()

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.mse_loss(outputs, targets / Units()(torch.ones(2)))

    def training(self):  # type: ignore[no-untyped-def]
        return tones(512, 1)

    def evaluation(self):  # type: ignore[no-untyped-def]
        return zip(*tones(120, 2), strict=True)
