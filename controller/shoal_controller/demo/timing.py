"""The original in PyTorch against what was deployed: the same input, one item, one thread, taking turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from shoal_agent import runtimes
from shoal_agent.runtimes.base import Instance, Options
from shoal_protos.bundle import open_bundle

ROUNDS, CALLS = 60, 30  # rounds that take turns, calls a round
WARM_UP = 30


def load(store: Path, digest: str) -> Instance:
    """The deployed bundle in its own runtime with one thread, from an agent's store."""
    bundle = open_bundle(store, digest)
    return runtimes.find(bundle.config.runtime.name).load(bundle, Options(threads=1))


def eager(task: Any, item: np.ndarray[Any, Any]) -> Callable[[], object]:
    """A call of the original, preprocessing and postprocessing included, on one item [1, ...]."""
    from shoal_optimizer.task import require_torch

    torch = require_torch()
    torch.set_num_threads(1)
    pipeline = task.pipeline(task.original)
    tensor = torch.from_numpy(np.ascontiguousarray(item))

    def call() -> object:
        with torch.inference_mode():
            return pipeline(tensor)

    return call


def deployed(instance: Instance, inputs: Mapping[str, np.ndarray[Any, Any]]) -> Callable[[], object]:
    return lambda: instance.run(inputs)


def interleaved(calls: Mapping[str, Callable[[], object]]) -> dict[str, list[float]]:
    """Medians per round in seconds, for each call, measured in turns so that load hits all alike."""
    for call in calls.values():
        for _ in range(WARM_UP):
            call()
    medians: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            times = []
            for _ in range(CALLS):
                started = time.perf_counter()
                call()
                times.append(time.perf_counter() - started)
            medians[name].append(float(np.median(times)))
    return medians
