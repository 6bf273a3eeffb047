"""The timing: every way that counts and Shoal's choice in the same interleaved rounds, on one thread."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from shoal_agent import runtimes
from shoal_agent.runtimes.base import Options
from shoal_agent.runtimes.golden import example_inputs
from shoal_protos.bundle import open_bundle
from zoo_parts import byhand, work
from zoo_parts.models import Model

ROUND_SECONDS = 0.03
SHOAL = "shoal"
ITEMS = 8


def measure(model: Model, folder: Path, seconds: float) -> dict[str, Any]:
    """Times one built model.

    Returns:
        {"ms": way -> median, "best", "speedup", "low", "high", "rounds"}: the speedup of Shoal's choice over
        the fastest way by hand, the ratio of their medians over the rounds with its 95 % bootstrap interval.
    """
    built = json.loads((folder / "built.json").read_bytes())
    calls: dict[str, Callable[[], Any]] = {}
    if "layout" in built["shoal"]:
        calls[SHOAL] = _shoal(built["shoal"])
    data = model.data()
    for name, row in work.counted(built).items():
        run = byhand.load(row["runtime"], folder / row["file"], row["output"])
        calls[name] = _turns(run, _items(data, folder / f"{model.name}.onnx"))
    rounds = _rounds(calls, seconds)
    medians = {name: statistics.median(values) for name, values in rounds.items()}
    rivals = {name: value for name, value in medians.items() if name != SHOAL}
    best = min(rivals, key=lambda name: rivals[name])
    found = {"ms": {n: v * 1e3 for n, v in medians.items()}, "best": best, "rounds": len(rounds[best])}
    if SHOAL in rounds:
        low, high = _interval(np.array(rounds[best]), np.array(rounds[SHOAL]))
        found |= {"speedup": rivals[best] / medians[SHOAL], "low": low, "high": high}
    return found


def _items(data: Any, file: Path) -> list[byhand.Feed]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    return work.feeds(data, data.evaluation[:ITEMS], session)


def _turns(run: Callable[[Any], Any], items: list[Any]) -> Callable[[], Any]:
    state = {"next": 0}

    def call() -> Any:
        state["next"] = (state["next"] + 1) % len(items)
        return run(items[state["next"]])

    return call


def _shoal(shoal: dict[str, Any]) -> Callable[[], Any]:
    """The bundle in the agent's own runtime, with the options that were chosen, on one thread."""
    bundle = open_bundle(Path(shoal["layout"]), verify=False)
    extra = {str(k): str(v) for k, v in (shoal["options"].get("extra") or {}).items()}
    instance = runtimes.find(bundle.config.runtime.name).load(bundle, Options(threads=1, extra=extra))
    return _turns(instance.run, example_inputs(bundle, ITEMS))


def _rounds(calls: dict[str, Callable[[], Any]], seconds: float) -> dict[str, list[float]]:
    """Seconds of one call, per round; the order turns with every round."""
    runs = {}
    for name, call in calls.items():
        for _ in range(3):
            call()
        began = time.perf_counter()
        call()
        runs[name] = max(1, min(500, int(ROUND_SECONDS / max(time.perf_counter() - began, 1e-6))))
    rounds: dict[str, list[float]] = {name: [] for name in calls}
    began, number = time.monotonic(), 0
    while number < 9 or (time.monotonic() - began < seconds and number < 200):
        names = list(calls)
        order = names[number % len(names) :] + names[: number % len(names)]
        for name in order:
            start = time.perf_counter()
            for _ in range(runs[name]):
                calls[name]()
            rounds[name].append((time.perf_counter() - start) / runs[name])
        number += 1
    return rounds


def _interval(
    theirs: np.ndarray[Any, Any], ours: np.ndarray[Any, Any], resamples: int = 400
) -> tuple[float, float]:
    """Of the ratio of medians; the same rounds are drawn for both, since they share their disturbances."""
    random, found = np.random.default_rng(0), []
    for _ in range(resamples):
        drawn = random.integers(0, len(ours), len(ours))
        found.append(np.median(theirs[drawn]) / np.median(ours[drawn]))
    return float(np.quantile(found, 0.025)), float(np.quantile(found, 0.975))
