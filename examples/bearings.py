"""Bearing faults from vibration: windows of 1024 samples at 12 kHz, ten classes, a 1-D network.

python examples/bearings.py --download    fetch the recordings once, train (seconds), write bearings.pt
python examples/bearings.py --windows windows    also write windows that the network never saw, as .npy files
shoal optimize examples/bearings.py       compress it for this machine

The recordings are the drive-end ones of the Case Western Reserve University bearing data center
(engineering.case.edu/bearingdatacenter, public, no licence stated). `cwru_12k.npz` holds them in windows:
x [n, 1024] int16, y [n], load [n] in hp, src [n] (recording, windows in the order of time); public_data.py
says where it is looked for.

The network learns the machine at load 0; `shifted()` is the same machine at load 3, where the healthy
bearing was not recorded.
"""

from __future__ import annotations

import argparse
import os
import re
from functools import cache
from pathlib import Path

import numpy as np
import torch
from public_data import Archive, DataSet, locate
from torch import Tensor, nn

from shoal_optimizer import Task, TensorSpec

HERE = Path(__file__).parent
WEIGHTS = HERE / "bearings.pt"
QUICK = bool(os.environ.get("SHOAL_QUICK"))
CLASSES = ("Normal", "B007", "B014", "B021", "IR007", "IR014", "IR021", "OR007", "OR014", "OR021")
SCALE = 0.00020305010877320648  # g per step
WINDOW = 1024

# ---------------------------------------------------------------------------- data

# Number of the first recording of a class, at load 0; those at loads 1 to 3 follow it.
_FIRST = {
    "B007": 118, "B014": 185, "B021": 222, "IR007": 105, "IR014": 169, "IR021": 209,
    "OR007": 130, "OR014": 197, "OR021": 234,
}  # fmt: skip
_RECORDINGS = [(name, load, first + load) for name, first in _FIRST.items() for load in range(4)]
_RECORDINGS.append(("Normal", 0, 97))


def pack(places: list[Path], target: Path) -> None:
    """Writes `target` from the public MATLAB files. The healthy recording has 48 kHz and is decimated."""
    from scipy.io import loadmat
    from scipy.signal import decimate

    arrays: dict[str, list[np.ndarray]] = {"x": [], "y": [], "load": [], "src": []}
    for source, (name, load, number) in enumerate(_RECORDINGS):
        stored = loadmat(locate(places, f"{number}.mat"))
        key = next(key for key in stored if re.fullmatch(rf"X0*{number}_DE_time", key))
        signal = stored[key].ravel()
        if name == "Normal":
            signal = decimate(signal, 4, ftype="fir")
        count = len(signal) // WINDOW
        steps = np.clip(np.rint(signal[: count * WINDOW] / SCALE), -32768, 32767)
        arrays["x"].append(steps.astype(np.int16).reshape(count, WINDOW))
        for field, value in (("y", CLASSES.index(name)), ("load", load), ("src", source)):
            arrays[field].append(np.full(count, value, np.uint8))
    np.savez_compressed(target, **{field: np.concatenate(parts) for field, parts in arrays.items()})  # type: ignore[arg-type]


_BASE = "https://engineering.case.edu/sites/default/files"
DATA = DataSet(
    "cwru_12k.npz",
    "The CWRU bearing data",
    "engineering.case.edu/bearingdatacenter",
    "bearings.py",
    tuple(Archive(f"{_BASE}/{number}.mat") for _, _, number in _RECORDINGS),
    pack,
)


@cache
def stored() -> dict[str, np.ndarray]:
    """The packed arrays by name, once."""
    with np.load(DATA.find(HERE), allow_pickle=False) as packed:
        return {name: packed[name] for name in ("x", "y", "load", "src")}


def places(part: str) -> np.ndarray:
    """Which windows belong to a part.

    Neighbouring windows of a recording look alike, so parts are cut by time, never at random: of each
    recording, the first half trains, the next quarter evaluates, and Shoal never sees the last quarter.
    """
    data = stored()
    if part == "shifted":
        return np.flatnonzero(data["load"] == 3)
    first, last = {"training": (0, 0.5), "evaluation": (0.5, 0.75), "holdout": (0.75, 1)}[part]
    chosen = []
    for recording in np.unique(data["src"][data["load"] == 0]):
        own = np.flatnonzero(data["src"] == recording)
        chosen.append(own[int(first * len(own)) : int(last * len(own))])
    return np.concatenate(chosen)


@cache
def split(part: str) -> tuple[np.ndarray, np.ndarray]:
    """Windows [n, 1024] int16 and classes [n] int64 of one part, in a fixed random order."""
    chosen = np.random.default_rng(0).permutation(places(part))
    if QUICK:
        chosen = chosen[:200]
    return stored()["x"][chosen], stored()["y"][chosen].astype(np.int64)


# ---------------------------------------------------------------------------- network


class Standardize(nn.Module):
    """From raw samples [n, 1024] to [n, 1, 1024] with mean 0 and deviation 1 in each window.

    How strongly a machine shakes says more about its load, its mounting and its surroundings than about the
    fault; what is left is the form of the vibration.
    """

    def forward(self, samples: Tensor) -> Tensor:
        # By way of INT32: OpenVINO takes INT16 and a scale before quantized layers for quantized inputs.
        steps = samples.to(torch.int32).to(torch.float32)
        centred = steps - steps.mean(1, keepdim=True)
        deviation = centred.square().mean(1, keepdim=True).sqrt()
        return (centred / (deviation + 1)).unsqueeze(1)


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
    """Another gain and start for each window of a batch [n, 1024], whose end is joined to its start."""
    count = len(samples)
    gain = 0.8 + 0.4 * torch.rand(count, 1)
    moved = (torch.arange(WINDOW) + torch.randint(0, WINDOW, (count, 1))) % WINDOW
    return samples.to(torch.float32).gather(1, moved) * gain


def train(epochs: int = 16, batch: int = 32) -> nn.Module:
    """Trains from scratch in a few seconds on one CPU core."""
    torch.manual_seed(0)
    samples, classes = split("training")
    inputs, targets = torch.from_numpy(samples), torch.from_numpy(classes)
    model, standardize = network(), Standardize()
    epochs = 3 if QUICK else epochs
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-3)
    steps = -(-len(inputs) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=epochs * steps)
    model.train()
    for _ in range(epochs):
        for chosen in torch.split(torch.randperm(len(inputs)), batch):
            loss = nn.functional.cross_entropy(model(standardize(vary(inputs[chosen]))), targets[chosen])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    return model.eval()


class Bearings(Task):
    """Which fault does the bearing have?"""

    input = TensorSpec("vibration", "INT16", (-1, WINDOW), "NT", low=-32768, high=32767)
    input_kind = "series"
    output_kind = "logits"
    sample_rate = 12_000
    units = "0.000203 g"
    labels = CLASSES
    files = ("public_data.py",)
    optional_files = ("cwru_12k.npz", "bearings.pt")

    def model(self) -> nn.Module:
        if not WEIGHTS.exists():
            return train()
        model = network()
        model.load_state_dict(torch.load(WEIGHTS, weights_only=True))
        return model

    def preprocess(self) -> nn.Module:
        return Standardize()

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


# ---------------------------------------------------------------------------- the script


def report(model: nn.Module, part: str) -> str:
    samples, classes = split(part)
    with torch.inference_mode():
        answers = model(Standardize()(torch.from_numpy(samples))).argmax(1).numpy()
    missing = [CLASSES[number] for number in sorted(set(range(len(CLASSES))) - set(classes.tolist()))]
    none = f"; none of {', '.join(missing)}" if missing else ""
    return f"{part}: {np.mean(answers == classes):.3f} of {len(classes)} windows right{none}"


def write_windows(folder: Path) -> None:
    """One window of each class that the network never saw: [1024] int16, as the sensor gives it."""
    folder.mkdir(parents=True, exist_ok=True)
    samples, classes = split("holdout")
    for number, name in enumerate(CLASSES):
        if (classes == number).any():
            np.save(folder / f"{name}.npy", samples[np.flatnonzero(classes == number)[0]])


def main() -> None:
    parser = argparse.ArgumentParser(description="Trains the bearing network.")
    parser.add_argument("--download", action="store_true", help="fetch the public data set if it is missing")
    parser.add_argument("--windows", type=Path, metavar="DIR", help="also write ten windows to try it with")
    options = parser.parse_args()
    try:
        DATA.ensure(HERE, options.download)
    except (OSError, RuntimeError) as error:
        raise SystemExit(str(error)) from error
    if options.windows:
        write_windows(options.windows)
        print(f"{options.windows}: windows to try it with")
    trained = train()
    torch.save(trained.state_dict(), WEIGHTS)
    print(f"{WEIGHTS.name} written")
    for part in ("evaluation", "holdout", "shifted"):
        print(report(trained, part))


if __name__ == "__main__":
    main()
