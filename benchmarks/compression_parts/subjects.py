"""Puts an original and its data together."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np

from compression_parts import networks, originals, pictures
from compression_parts.pictures import Pictures
from compression_parts.rows import Subject
from compression_parts.tasks import task_of
from compression_parts.training import key_of

CALIBRATION = 1024  # training pictures that ranges are drawn from
AUGMENTATION_SEED = 7


@cache
def augmented() -> Pictures:
    """The one epoch that all recoveries see."""
    return pictures.augmented_epoch(pictures.part("training"), AUGMENTATION_SEED)


def subject(name: str, seed: int, folder: Path) -> tuple[Subject, float]:
    """The trained original with its task, and the CPU seconds that its training took."""
    network, spent = originals.original(name, seed, folder)
    key = key_of(network, originals.schedule(name), pictures.data_digest(), seed)
    training = pictures.part("training")
    chosen = np.sort(np.random.default_rng(0).choice(len(training), CALIBRATION, replace=False))
    task = task_of(
        network,
        augmented(),
        pictures.part("validation"),
        Pictures(training.inputs[chosen], training.targets[chosen]),
        folder / "cache",
        labels=pictures.LABELS,
        scale=networks.Scale(),
        name=name,
    )
    return Subject(name, seed, key, task, pictures.part("test"), folder), spent
