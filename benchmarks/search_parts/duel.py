"""Shoal and Olive in the same time on the same model; both fronts by the same meter, in the same rounds."""

from __future__ import annotations

import hashlib
import random
import shutil
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from search_parts import olive
from search_parts.world import this_machine
from shoal_agent import bench, runtimes
from shoal_agent.runtimes.base import Options
from shoal_optimizer import cli, evaluation
from shoal_optimizer.search import looks
from shoal_optimizer.search.looks import Bounds
from shoal_optimizer.targets.onnx import float_graph, strip
from shoal_optimizer.task import Task, load_task
from shoal_protos.bundle import Bundle, BundleConfig, RuntimeNeed, open_bundle, write_bundle
from shoal_protos.errors import ShoalError

THREADS = (1, 2)
ROUNDS = 5
SECONDS = 0.15
FLOOR = 0.05


@dataclass(frozen=True)
class Contestant:
    """A model of one side with its figures: accuracy, p50 in ms with the better number of threads, bytes."""

    side: str
    bundle: Bundle
    accuracy: float
    size: int

    @property
    def key(self) -> str:
        return f"{self.side} {self.bundle.digest}"


@dataclass(frozen=True)
class Duel:
    """Volumes of both fronts from the same corner, and what was behind them."""

    ratio: float
    ours: float
    theirs: float
    our_models: int
    their_models: int
    their_evaluations: int
    their_reason: str


def fight(task_file: Path, cache: Path, *, seconds: float, seed: int, say: Callable[[str], None]) -> Duel:
    """One search each of `seconds`, then both measured together."""
    folder = cache / "duels" / f"{task_file.stem}-{seconds:g}-{seed}"
    task = load_task(task_file)
    say(f"Olive, seed {seed}")
    shutil.rmtree(folder / "olive", ignore_errors=True)
    outcome = olive.search(olive.environment(cache), task, folder / "olive", seconds=seconds, seed=seed)
    say(f"Shoal, seed {seed}")
    ours = list(_ours(task_file, folder, seconds, seed))
    theirs = list(_theirs(task, outcome.models, folder))
    original = _bundle(task, strip(float_graph(task.original, task)), "fp32", folder / "original")
    base = Contestant("original", original, _accuracy(task, original), original.model_file.stat().st_size)
    times = _time([base, *ours, *theirs], say)
    corner = Bounds(base.accuracy - FLOOR, 1.001 * times[base.key], 1.001 * base.size)

    def volume(side: list[Contestant]) -> float:
        # The untouched original is everybody's: no side does worse than leaving it alone.
        points = [corner.gains(c.accuracy, times[c.key], float(c.size)) for c in [base, *side]]
        return looks.volume(points)

    our_volume, their_volume = volume(ours), volume(theirs)
    # A peer that made nothing did not run: that is no win, and no figure.
    return Duel(
        our_volume / their_volume if theirs and their_volume else float("nan"),
        our_volume, their_volume, len(ours), len(theirs), outcome.evaluations, outcome.reason,
    )  # fmt: skip


def _ours(task_file: Path, folder: Path, seconds: float, seed: int) -> Iterator[Contestant]:
    """What Shoal's own command keeps."""
    out = folder / "shoal"
    shutil.rmtree(out, ignore_errors=True)
    result = cli.optimize(
        task_file,
        objective_text="minimise latency_p95, size",
        classes=[this_machine().name],
        minutes=seconds / 60,
        out=out,
        seed=seed,
    )
    task = load_task(task_file)
    for entry in result["classes"][0]["front"]:
        bundle = open_bundle(Path(entry["layout"]), entry["bundle"])
        yield Contestant("shoal", bundle, _accuracy(task, bundle), bundle.model_file.stat().st_size)


def _theirs(task: Task, models: tuple[Path, ...], folder: Path) -> Iterator[Contestant]:
    """Every different model that Olive made and that loads."""
    seen: set[str] = set()
    for path in models:
        content = path.read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        if digest in seen:
            continue
        seen.add(digest)
        try:
            bundle = _bundle(task, content, "int8", folder / "theirs" / digest[:16])
            yield Contestant("olive", bundle, _accuracy(task, bundle), len(content))
        except ShoalError:
            continue


def _bundle(task: Task, content: bytes, precision: str, folder: Path) -> Bundle:
    shutil.rmtree(folder, ignore_errors=True)
    need = RuntimeNeed("onnxruntime", "model.onnx", precision=precision)
    config = BundleConfig(signature=task.signature, runtime=need)
    return open_bundle(folder, write_bundle(folder, config, {"model.onnx": content}))


def _accuracy(task: Task, bundle: Bundle) -> float:
    with runtimes.find(bundle.config.runtime.name).load(bundle, Options(threads=1)) as instance:
        return evaluation.evaluate_instance(task, instance).value


def _time(side: list[Contestant], say: Callable[[str], None]) -> dict[str, float]:
    """Median over the rounds of p50, with whichever number of threads is faster; all take turns."""
    found: dict[str, list[float]] = {c.key: [] for c in side}
    for number in range(ROUNDS):
        say(f"measuring, round {number + 1} of {ROUNDS}")
        order = list(side)
        random.Random(number).shuffle(order)
        for contestant in order:
            budget = bench.Budget(seconds=SECONDS, warm_up_seconds=SECONDS / 4)
            times = [
                bench.time_bundles(
                    contestant.bundle, None, Options(threads=n), budget=budget
                ).candidate.p50_ms
                for n in THREADS
            ]
            found[contestant.key].append(min(times))
    return {key: statistics.median(times) for key, times in found.items()}
