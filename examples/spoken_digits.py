"""Spoken digits: one second of sound at 8 kHz, ten words, a small network on a mel spectrogram.

python examples/spoken_digits.py --download    fetch the recordings once, train (a minute), write the weights
python examples/spoken_digits.py --sounds digits    also write WAV files that the network never heard
shoal optimize examples/spoken_digits.py       compress it for this machine

The recordings are the Free Spoken Digit Dataset (github.com/Jakobovski/free-spoken-digit-dataset,
CC BY-SA 4.0): 6 speakers, 10 digits, 50 takes. Takes 0 to 4 are its official test; Shoal never sees
them. `fsdd_8k.npz` holds the samples end to end; public_data.py says where it is looked for.

The spectrogram is part of the exported model, so applications send plain samples.

SHOAL_QUICK=1 takes a few takes and few steps: enough to see that everything runs.
"""

from __future__ import annotations

import argparse
import io
import math
import os
import wave
import zipfile
from functools import cache
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from public_data import Archive, DataSet, locate
from torch import Tensor, nn

from shoal_optimizer import Task, TensorSpec

HERE = Path(__file__).parent
WEIGHTS = HERE / "spoken_digits.pt"
QUICK = bool(os.environ.get("SHOAL_QUICK"))
LABELS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
RATE = 8000  # Hz
LENGTH = 8000  # samples of an input; shorter recordings are followed by silence, longer ones cut
FRAME, HOP, BANDS = 160, 80, 32  # 20 ms every 10 ms, in 32 mel bands

# Takes of each digit and speaker, see `split`.
TAKES = {"holdout": range(5), "evaluation": range(5, 12), "training": range(12, 50)}

# ---------------------------------------------------------------------------- data

_ARCHIVE = Archive("https://github.com/Jakobovski/free-spoken-digit-dataset/archive/refs/heads/master.zip")


def pack(places: list[Path], target: Path) -> None:
    """Writes `target` from the repository's archive: samples end to end, digit, speaker and take."""
    found = []
    with zipfile.ZipFile(locate(places, _ARCHIVE.name)) as archive:
        for name in archive.namelist():
            path = PurePosixPath(name)
            if path.parent.name == "recordings" and path.suffix == ".wav":
                digit, speaker, take = path.stem.split("_")
                with wave.open(io.BytesIO(archive.read(name))) as sound:
                    if (sound.getframerate(), sound.getsampwidth(), sound.getnchannels()) != (RATE, 2, 1):
                        raise RuntimeError(f"{path.name} is not 16-bit mono at {RATE} Hz")
                    samples = np.frombuffer(sound.readframes(sound.getnframes()), "<i2")
                found.append((int(digit), speaker, int(take), samples))
    found.sort(key=lambda entry: entry[:3])
    speakers = sorted({speaker for _, speaker, _, _ in found})
    np.savez_compressed(
        target,
        samples=np.concatenate([samples for *_, samples in found]),
        offsets=np.cumsum([0, *(len(samples) for *_, samples in found)]).astype(np.int32),
        y=np.array([digit for digit, *_ in found], np.uint8),
        speaker=np.array([speakers.index(speaker) for _, speaker, _, _ in found], np.uint8),
        take=np.array([take for _, _, take, _ in found], np.uint8),
        speakers=np.array(speakers),
        rate=np.int32(RATE),
    )


DATA = DataSet(
    "fsdd_8k.npz",
    "The Free Spoken Digit Dataset",
    "github.com/Jakobovski/free-spoken-digit-dataset",
    "spoken_digits.py",
    (_ARCHIVE,),
    pack,
)


@cache
def stored() -> dict[str, np.ndarray]:
    """The packed arrays by name, once."""
    with np.load(DATA.find(HERE), allow_pickle=False) as packed:
        return {name: packed[name] for name in packed.files}


@cache
def split(part: str) -> tuple[np.ndarray, np.ndarray]:
    """Samples [n, 8000] int16 and digits [n] int64 of "training", "evaluation" or "holdout"."""
    takes = TAKES[part][:4] if QUICK else TAKES[part]
    data = stored()
    chosen = np.flatnonzero(np.isin(data["take"], list(takes)))
    chosen = np.random.default_rng(0).permutation(chosen)
    samples = np.zeros((len(chosen), LENGTH), np.int16)
    for row, place in enumerate(chosen):
        start = data["offsets"][place]
        sound = data["samples"][start : min(data["offsets"][place + 1], start + LENGTH)]
        samples[row, : len(sound)] = sound
    return samples, data["y"][chosen].astype(np.int64)


# ---------------------------------------------------------------------------- network


class LogMel(nn.Module):
    """From samples [n, 8000] to a log-mel spectrogram [n, 1, 32, 99], as loud as every other.

    The Fourier transform of a frame is a convolution with fixed cosines and sines under a Hann window:
    plain convolutions export to every runtime, where complex numbers do not.
    """

    def __init__(self) -> None:
        super().__init__()
        times = torch.arange(FRAME, dtype=torch.float64)
        window = 0.5 - 0.5 * torch.cos(2 * math.pi * times / FRAME)
        angles = 2 * math.pi / FRAME * torch.arange(FRAME // 2 + 1, dtype=torch.float64)[:, None] * times
        waves = torch.stack([torch.cos(angles), torch.sin(angles)]) * window
        self.register_buffer("waves", waves.reshape(-1, 1, FRAME).float())
        self.register_buffer("bands", mel_bands()[:, :, None].float())
        self.waves: Tensor
        self.bands: Tensor

    def forward(self, samples: Tensor) -> Tensor:
        # By way of INT32: OpenVINO takes INT16, scale and convolution for quantized ones, and refuses.
        sound = samples.to(torch.int32).to(torch.float32) / 32768
        sound = sound / (sound.square().mean(1, keepdim=True).sqrt() + 1e-4)
        parts = nn.functional.conv1d(sound.unsqueeze(1), self.waves, stride=HOP)
        cosines, sines = torch.split(parts, FRAME // 2 + 1, dim=1)
        power = nn.functional.conv1d(cosines.square() + sines.square(), self.bands)
        return (torch.log(power + 1e-2) * 0.25).unsqueeze(1)


def mel_bands() -> Tensor:
    """Triangles [32, 81] over the bins of a frame, evenly spaced on the mel scale from 50 to 4000 Hz."""

    def mel(hertz: float) -> float:
        return 2595 * math.log10(1 + hertz / 700)

    corners = 700 * (
        10 ** (torch.linspace(mel(50), mel(RATE / 2), BANDS + 2, dtype=torch.float64) / 2595) - 1
    )
    bins = torch.linspace(0, RATE / 2, FRAME // 2 + 1, dtype=torch.float64)
    rising = (bins - corners[:-2, None]) / (corners[1:-1] - corners[:-2])[:, None]
    falling = (corners[2:, None] - bins) / (corners[2:] - corners[1:-1])[:, None]
    return torch.minimum(rising, falling).clamp(min=0)


def block(channels_in: int, channels_out: int, stride: int) -> list[nn.Module]:
    convolution = nn.Conv2d(channels_in, channels_out, 3, stride, 1, bias=False)
    return [convolution, nn.BatchNorm2d(channels_out), nn.ReLU()]


def network() -> nn.Module:
    return nn.Sequential(
        *block(1, 24, 2),
        *block(24, 48, 2),
        *block(48, 96, 2),
        *block(96, 96, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(1),
        nn.Linear(96, len(LABELS)),
    )


def vary(samples: Tensor) -> Tensor:
    """Another start, loudness and background noise for each sound of a batch [n, 8000]."""
    count = len(samples)
    starts = torch.randint(0, LENGTH // 4, (count, 1))
    places = torch.arange(LENGTH) - starts
    late = samples.to(torch.float32).gather(1, places.clamp(min=0)) * (places >= 0)
    gain = 0.3 + 0.9 * torch.rand(count, 1)
    noise = 0.1 * torch.rand(count, 1) ** 2 * late.std(1, keepdim=True)
    return ((late + noise * torch.randn_like(late)) * gain).clamp(-32768, 32767)


def train(epochs: int = 14, batch: int = 64) -> nn.Module:
    """Trains from scratch in about a minute on one CPU core."""
    torch.manual_seed(0)
    samples, digits = split("training")
    inputs, targets = torch.from_numpy(samples), torch.from_numpy(digits)
    model, spectrogram = network(), LogMel()
    epochs = 3 if QUICK else epochs
    steps = -(-len(inputs) // batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=epochs * steps)
    model.train()
    for _ in range(epochs):
        order = torch.randperm(len(inputs))
        for chosen in torch.split(order, batch):
            outputs = model(spectrogram(vary(inputs[chosen])))
            loss = nn.functional.cross_entropy(outputs, targets[chosen], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    return model.eval()


class SpokenDigits(Task):
    """Which digit was said?"""

    name = "spoken-digits"
    input = TensorSpec("sound", "INT16", (-1, LENGTH), "NT", low=-32768, high=32767)
    input_kind = "audio"
    output_kind = "logits"
    sample_rate = RATE
    labels = LABELS
    files = ("public_data.py",)
    optional_files = ("spoken_digits.pt", "fsdd_8k.npz")

    def model(self) -> nn.Module:
        if not WEIGHTS.exists():
            return train()
        model = network()
        model.load_state_dict(torch.load(WEIGHTS, weights_only=True))
        return model

    def preprocess(self) -> nn.Module:
        return LogMel()

    def training(self):  # type: ignore[no-untyped-def]
        return split("training")

    def evaluation(self):  # type: ignore[no-untyped-def]
        return split("evaluation")

    def holdout(self):  # type: ignore[no-untyped-def]
        return split("holdout")

    def augment(self, samples: Tensor) -> Tensor:
        return vary(samples)


# ---------------------------------------------------------------------------- the script


def report(model: nn.Module, part: str) -> str:
    samples, digits = split(part)
    with torch.inference_mode():
        pieces = [model(LogMel()(piece)).argmax(1) for piece in torch.split(torch.from_numpy(samples), 256)]
    right = torch.cat(pieces).numpy() == digits
    return f"{part}: {right.mean():.3f} of {len(right)} recordings right"


def write_sounds(folder: Path) -> None:
    """One recording of each digit that the network never heard, each as long as it is."""
    folder.mkdir(parents=True, exist_ok=True)
    data = stored()
    for digit, label in enumerate(LABELS):
        own = np.flatnonzero((data["y"] == digit) & (data["take"] < 5))
        place = own[(7 * digit) % len(own)]
        with wave.open(str(folder / f"{label}.wav"), "wb") as sound:
            sound.setnchannels(1)
            sound.setsampwidth(2)
            sound.setframerate(RATE)
            sound.writeframes(
                data["samples"][data["offsets"][place] : data["offsets"][place + 1]].astype("<i2").tobytes()
            )


def main() -> None:
    parser = argparse.ArgumentParser(description="Trains the spoken digit network.")
    parser.add_argument("--download", action="store_true", help="fetch the public data set if it is missing")
    parser.add_argument("--sounds", type=Path, metavar="DIR", help="also write ten WAV files to try it with")
    options = parser.parse_args()
    try:
        DATA.ensure(HERE, options.download)
    except (OSError, RuntimeError) as error:
        raise SystemExit(str(error)) from error
    if options.sounds:
        write_sounds(options.sounds)
        print(f"{options.sounds}: ten WAV files to try it with")
    trained = train()
    torch.save(trained.state_dict(), WEIGHTS)
    print(f"{WEIGHTS.name} written")
    for part in ("evaluation", "holdout"):
        print(report(trained, part))


if __name__ == "__main__":
    main()
