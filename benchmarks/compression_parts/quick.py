"""The subjects of `--quick`: ready networks, few pictures, capped training."""

from __future__ import annotations

import hashlib
import itertools
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from compression_parts import ready
from compression_parts.rows import Subject
from compression_parts.tasks import task_of

LABELS = ("plane", "car", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
PARITY_PICTURES = 64


@dataclass(frozen=True)
class Caps:
    """How much of everything: pictures of each part, and training steps of a recovery."""

    networks: tuple[str, ...] = ("resnet8", "resnet20")
    training: int = 6400
    validation: int = 1000
    test: int = 2000
    calibration: int = 384
    steps: int = 100


def subject(name: str, caps: Caps, folder: Path) -> Subject:
    """A ready network with its task.

    The parts of the original training pictures do not overlap; the test pictures are the official ones.

    Raises:
        FileNotFoundError: SHOAL_DATA has no such data. ValueError: the network and its file differ.
    """
    starts = np.cumsum([0, caps.training, caps.validation, caps.calibration])
    training, validation, calibration = (
        ready.cifar("train", np.arange(start, stop)) for start, stop in itertools.pairwise(starts)
    )
    network = ready.checked(name, validation.inputs[:PARITY_PICTURES])
    source = ready.SOURCES[name]
    graph = (ready.data_folder() / "models" / source.file).read_bytes()
    task = task_of(
        network, training, validation, calibration, folder / "cache",
        labels=LABELS, scale=source.scale(), name=name,
    )  # fmt: skip
    key = hashlib.sha256(graph + repr(caps).encode()).hexdigest()[:16]
    return Subject(name, 0, key, task, ready.cifar("test", np.arange(caps.test)), folder)
