"""One interleaved run over everything that is finished: each round times every form of every seed once."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from compression_parts.rows import ORIGINAL, Subject, options
from shoal_agent import runtimes
from shoal_agent.bench import median_interval
from shoal_agent.runtimes.golden import example_inputs
from shoal_protos.bundle import open_bundle

EAGER = "pytorch"
ROUNDS = 21
ROUND_SECONDS = 0.02
WARM_UP = 20
Key = tuple[str, int, str, str]  # network, seed, row, runtime


def timed(
    subjects: Mapping[tuple[str, int], Subject],
    rows: Mapping[tuple[str, int], Mapping[str, dict[str, Any]]],
    rounds: int = ROUNDS,
) -> dict[Key, list[float]]:
    """Median microseconds of each round at batch 1 on one thread.

    Args:
        subjects, rows: by network and seed; rows by name, the original among them.
    """
    torch.set_num_threads(1)
    with contextlib.ExitStack() as stack:
        calls: dict[Key, Callable[[], object]] = {}
        for (network, seed), subject in subjects.items():
            calls[network, seed, ORIGINAL, EAGER] = _eager(subject)
            for row, found in rows[network, seed].items():
                for name, form in found["forms"].items():
                    folder = subject.folder / "rows" / found["folder"] / name
                    calls[network, seed, row, name] = _loaded(stack, folder, form["digest"])
        return interleaved(calls, rounds)


def interleaved(calls: Mapping[Key, Callable[[], object]], rounds: int) -> dict[Key, list[float]]:
    """Each round goes through all calls, forwards and backwards in turn: what slows the machine hits all."""
    counts = {key: _warmed(call) for key, call in calls.items()}
    readings: dict[Key, list[float]] = {key: [] for key in calls}
    collecting = gc.isenabled()
    gc.disable()  # a collection inside a reading is not the model's time
    try:
        for number in range(rounds):
            for key in calls if number % 2 == 0 else reversed(list(calls)):
                readings[key].append(_round(calls[key], counts[key]))
    finally:
        if collecting:
            gc.enable()
    return readings


def _eager(subject: Subject) -> Callable[[], object]:
    pipeline = subject.task.pipeline(subject.task.original)
    item = torch.from_numpy(np.ascontiguousarray(subject.test.inputs[:1]))

    def call() -> object:
        with torch.inference_mode():
            return pipeline(item)

    return call


def _loaded(stack: contextlib.ExitStack, folder: Path, digest: str) -> Callable[[], object]:
    bundle = open_bundle(folder, digest, verify=False)
    instance = runtimes.find(bundle.config.runtime.name).load(bundle, options())
    stack.callback(instance.close)
    item = example_inputs(bundle)[0]
    return lambda: instance.run(item)


def _warmed(call: Callable[[], object]) -> int:
    """Calls that fill a round, found after warming up."""
    for _ in range(WARM_UP):
        call()
    begun = time.perf_counter()
    for _ in range(5):
        call()
    return max(3, min(200, int(ROUND_SECONDS / max((time.perf_counter() - begun) / 5, 1e-6))))


def _round(call: Callable[[], object], count: int) -> float:
    call()  # brings the model back into the caches: others ran between
    readings = []
    for _ in range(count):
        begun = time.perf_counter_ns()
        call()
        readings.append((time.perf_counter_ns() - begun) / 1e3)
    return float(np.median(readings))


def ratio(over: list[float], under: list[float]) -> tuple[float, float, float, int]:
    """(median, low, high, n) of the ratios within each round; 95 % interval of the median."""
    found = [a / b for a, b in zip(over, under, strict=True)]
    low, high = median_interval(found)
    return float(np.median(found)), low, high, len(found)
