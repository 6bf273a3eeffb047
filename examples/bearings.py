"""Bearing faults from vibration: windows of 1024 samples at 12 kHz, ten classes, a 1-D network.

    SHOAL_DATA=FOLDER python examples/bearings.py       train and write bearings.pt beside this file
    SHOAL_DATA=FOLDER shoal optimize examples/bearings.py

FOLDER holds `cwru_12k.npz` (or put that file beside this one; then `shoal model push` takes it along).
It is made of the drive-end recordings of the Case Western Reserve University bearing data center
(engineering.case.edu/bearingdatacenter), arrays: x [n, 1024] int16, scale (g per step), y [n], load [n]
in hp, src [n] (recording), is_test [n] (last quarter of each recording), classes (names).

The network learns the machine at load 0; `shifted()` is the same machine at load 3.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from shoal_optimizer import Task, TensorSpec

HERE = Path(__file__).parent
WEIGHTS = HERE / "bearings.pt"
DATA = "cwru_12k.npz"
CLASSES = ("Normal", "B007", "B014", "B021", "IR007", "IR014", "IR021", "OR007", "OR014", "OR021")
SCALE = 0.00020305  # g per step


@cache
def windows() -> dict[str, np.ndarray]:
    """The whole recording set, by array name."""
    for folder in (HERE, Path(os.environ.get("SHOAL_DATA", "."))):
        if (folder / DATA).is_file():
            with np.load(folder / DATA, allow_pickle=False) as stored:
                return {name: stored[name] for name in ("x", "y", "load", "src", "is_test")}
    raise FileNotFoundError(
        f"{DATA} is neither beside bearings.py nor in SHOAL_DATA; its docstring says how to get it"
    )


def split(part: str) -> tuple[np.ndarray, np.ndarray]:
    """Windows [n, 1024] int16 and classes [n] int64 of "training", "evaluation", "holdout" or "shifted".

    Neighbouring windows of a recording look alike, so parts are cut by time, never at random: the last
    quarter of each recording evaluates (first half of it) and is held out (second half).
    """
    data = windows()
    if part == "shifted":
        chosen = np.flatnonzero(data["load"] == 3)
        chosen = np.random.default_rng(0).permutation(chosen)
    else:
        calm = data["load"] == 0
        late = np.zeros(len(calm), bool)
        for recording in np.unique(data["src"][calm]):
            own = np.flatnonzero(calm & (data["src"] == recording) & (data["is_test"] == 1))
            late[own[len(own) // 2 :]] = True
        wanted = {
            "training": calm & (data["is_test"] == 0),
            "evaluation": calm & (data["is_test"] == 1) & ~late,
            "holdout": late,
        }[part]
        chosen = np.random.default_rng(0).permutation(np.flatnonzero(wanted))
    return data["x"][chosen], data["y"][chosen].astype(np.int64)


class InG(nn.Module):
    """From raw samples [n, 1024] to [n, 1, 1024] acceleration in g."""

    def forward(self, samples: Tensor) -> Tensor:
        return (samples.to(torch.float32) * SCALE).unsqueeze(1)


def block(channels_in: int, channels_out: int, kernel: int, stride: int) -> list[nn.Module]:
    convolution = nn.Conv1d(channels_in, channels_out, kernel, stride, kernel // 2, bias=False)
    return [convolution, nn.BatchNorm1d(channels_out), nn.ReLU()]


def network() -> nn.Module:
    """A wide first kernel learns the filter bank; the rest classifies what passes it."""
    return nn.Sequential(
        *block(1, 32, 65, 8),
        *block(32, 64, 5, 2),
        *block(64, 128, 5, 2),
        *block(128, 128, 3, 2),
        nn.AdaptiveAvgPool1d(1),
        nn.Flatten(1),
        nn.Linear(128, len(CLASSES)),
    )


def vary(samples: Tensor) -> Tensor:
    """Another gain and a circular shift for each window."""
    gain = 0.8 + 0.4 * torch.rand(len(samples), 1)
    return torch.roll(samples.to(torch.float32), int(torch.randint(0, samples.shape[1], ())), dims=1) * gain


def train(epochs: int = 12, batch: int = 32) -> nn.Module:
    """Trains from scratch in a few seconds on one CPU core."""
    torch.manual_seed(0)
    samples, classes = split("training")
    inputs, targets = torch.from_numpy(samples), torch.from_numpy(classes)
    model, in_g = network(), InG()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-3)
    steps = -(-len(inputs) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=epochs * steps)
    model.train()
    for _ in range(epochs):
        order = torch.randperm(len(inputs))
        for start in range(0, len(inputs), batch):
            chosen = order[start : start + batch]
            loss = nn.functional.cross_entropy(model(in_g(vary(inputs[chosen]))), targets[chosen])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    return model.eval()


class Bearings(Task):
    """Which fault does the bearing have?"""

    input = TensorSpec("vibration", "INT16", (-1, 1024), "NT", low=-32768, high=32767)
    input_kind = "series"
    output_kind = "logits"
    units = "0.000203 g"
    labels = CLASSES
    optional_files = ("cwru_12k.npz", "bearings.pt")

    def model(self) -> nn.Module:
        if not WEIGHTS.exists():
            return train()
        model = network()
        model.load_state_dict(torch.load(WEIGHTS, weights_only=True))
        return model

    def preprocess(self) -> nn.Module:
        return InG()

    def training(self):  # type: ignore[no-untyped-def]
        return split("training")

    def evaluation(self):  # type: ignore[no-untyped-def]
        return split("evaluation")

    def holdout(self):  # type: ignore[no-untyped-def]
        return split("holdout")

    def shifted(self):  # type: ignore[no-untyped-def]
        return split("shifted")

    def augment(self, samples: Tensor) -> Tensor:
        return vary(samples)


if __name__ == "__main__":
    trained = train()
    torch.save(trained.state_dict(), WEIGHTS)
    for part in ("evaluation", "shifted"):
        samples, classes = split(part)
        with torch.inference_mode():
            answers = trained(InG()(torch.from_numpy(samples))).argmax(1).numpy()
        print(f"{part}: {np.mean(answers == classes):.3f} of {len(classes)} windows right")
