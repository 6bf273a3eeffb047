"""German traffic signs (GTSRB) for the benchmark: validation by track, augmentation by step number."""

from __future__ import annotations

import hashlib
import io
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))
import signs  # noqa: E402

LABELS: tuple[str, ...] = signs.LABELS
CLASSES = len(LABELS)


@dataclass(frozen=True)
class Pictures:
    """Pictures uint8 [n, 3, 32, 32], classes int64 [n]."""

    inputs: np.ndarray
    targets: np.ndarray

    def __len__(self) -> int:
        return len(self.targets)


@cache
def part(name: str) -> Pictures:
    """The training part without, the validation part with only the tracks 5, 15, 25, ... of each class;
    frames of a track show one physical sign, so a random split would leak. "test": the official one."""
    arrays = signs.stored()
    source = "test" if name == "test" else "train"
    rows = np.arange(len(arrays[f"{source}_y"]))
    if name != "test":
        judges = arrays["train_track"] % 10 == 5
        rows = np.flatnonzero(judges if name == "validation" else ~judges)
    content, offsets = arrays[f"{source}_bytes"], arrays[f"{source}_offsets"]
    pictures = np.empty((len(rows), 3, signs.SIZE, signs.SIZE), np.uint8)
    for place, row in enumerate(rows):
        with Image.open(io.BytesIO(content[offsets[row] : offsets[row + 1]].tobytes())) as picture:
            pictures[place] = np.asarray(picture.convert("RGB")).transpose(2, 0, 1)
    return Pictures(pictures, arrays[f"{source}_y"][rows].astype(np.int64))


@cache
def data_digest() -> str:
    """SHA-256 of the packed file: part of every checkpoint's key."""
    with signs.DATA.find(EXAMPLES).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def vary(pictures: Tensor, seed: int) -> Tensor:
    """Moves, turns, sizes and lights a batch uint8 [n, 3, 32, 32] as `seed` says; float32, nothing mirrored.

    A batch depends on its seed alone, so training goes on after an interruption as if there had been none.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return signs.vary(pictures.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).contiguous()


def augmented_epoch(data: Pictures, seed: int, batch: int = 512) -> Pictures:
    """Each picture once, varied and rounded to bytes: one fixed epoch, whose teacher answers once."""
    parts = [
        vary(torch.from_numpy(data.inputs[start : start + batch]), seed * 1_000_003 + start)
        .round().clamp(0, 255).to(torch.uint8).numpy()
        for start in range(0, len(data), batch)
    ]  # fmt: skip
    return Pictures(np.concatenate(parts), data.targets)
