"""Every point of one search space, made and measured once: what grid, random and Shoal then play against.

A point is a network (a recipe's training part), an export of it, and the runtime's threads. Networks are
trained, exported and judged by Shoal's own workshop; timings are taken in rounds over all points in a new
order each time, so that no point profits from a quiet moment. Everything is kept by content and resumed.
"""

from __future__ import annotations

import hashlib
import io
import json
import random
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shoal_agent.runtimes.base import Options
from shoal_optimizer import cli
from shoal_optimizer.analysis import analyse
from shoal_optimizer.candidates import Candidate, Network, Workshop
from shoal_optimizer.jobspec import JobSpec, ProfileClass
from shoal_optimizer.jobstate import State, Voice, write_atomic
from shoal_optimizer.search import space
from shoal_optimizer.search.space import Export, Params
from shoal_optimizer.task import load_task
from shoal_protos.bundle import open_bundle

THREADS = (1, 2)
ROUNDS = 5
SECONDS = 0.15  # of timed calls of one point in one round
RUNTIMES = ("onnxruntime", "openvino")


@dataclass(frozen=True)
class Place:
    """Where a point lies in the space. `params` None: the original as it is."""

    params: Params | None
    target: str
    precision: str
    threads: int

    @property
    def key(self) -> str:
        network = "plain" if self.params is None else space.network(self.params).name
        return f"{network}/{self.target}/{self.precision}/{self.threads}"


@dataclass(frozen=True)
class Measured:
    """What was found at a place: accuracy as a share, p50 of a call in ms as the median of the rounds,
    its relative standard error, bytes of the model files."""

    place: Place
    accuracy: float
    accuracy_error: float
    latency: float
    latency_error: float
    size: int
    rounds: tuple[float, ...]
    model: str = ""  # path of the model file


@dataclass
class World:
    """The whole space with its measurements, and the space as Shoal's sampler sees it."""

    space: space.Space
    points: dict[str, Measured]

    def __iter__(self) -> Iterator[Measured]:
        return iter(self.points.values())


def this_machine() -> ProfileClass:
    """The machine's own class, restricted to the runtimes of the benchmark."""
    (own,) = cli.machine_classes([])
    kept = {name: version for name, version in own.runtimes.items() if name in RUNTIMES}
    return ProfileClass(f"{own.name.partition('+')[0]}+{'+'.join(kept)}", own.isa, kept, local=True)


def collect(task_file: Path, cache: Path, *, quick: bool = False, say: Any = print) -> World:
    """Makes and measures what is missing below `cache`; a second call reads it.

    Args:
        quick: a fifth of the networks and two rounds.
    """
    profile_class = this_machine()
    folder = cache / _key(task_file, profile_class, quick)
    task = load_task(task_file, seed=0)
    stored = task.save(folder / "files")
    spec = JobSpec(
        kind="optimize", id="exhaustive", source=task_file.parent, task=task_file.name,
        weights=stored.weights, data=stored.data, classes=(profile_class,),
    )  # fmt: skip
    task = load_task(task_file, seed=0, weights=stored.weights, data=stored.data)
    workshop = Workshop(task, spec, folder, State(folder / "state.json"), Voice(io.StringIO()))
    opened = space.build(analyse(task), (profile_class,), trainable=True)
    exports = tuple(e for e in opened.exports if e.precision in ("fp32", "int8"))
    opened = space.Space(opened.ratios[::2] if quick else opened.ratios, opened.teacher,
                         opened.epochs[:1] if quick else opened.epochs, exports)  # fmt: skip
    made = list(_make(workshop, opened, exports, say))
    rounds = _time(folder / "timings.json", made, 2 if quick else ROUNDS, say)
    points = [_measured(place, candidate, rounds[place.key]) for place, candidate in made]
    return World(opened, {p.place.key: p for p in points})


def networks(opened: space.Space) -> list[Params]:
    """Every network of the space."""
    return list(opened.every())


def _key(task_file: Path, profile_class: ProfileClass, quick: bool) -> str:
    text = [task_file.read_bytes().hex(), profile_class.name, sorted(profile_class.runtimes.items()), quick]
    return hashlib.sha256(json.dumps([*text, THREADS, SECONDS]).encode()).hexdigest()[:16]


def _make(
    workshop: Workshop, opened: space.Space, exports: Sequence[Export], say: Any
) -> Iterator[tuple[Place, Candidate]]:
    every: list[Params | None] = [None, *networks(opened)]
    for number, params in enumerate(every):
        say(f"network {number + 1} of {len(every)}")
        network: Network | None = None
        for export in exports:
            key = _candidate_key(params, export)
            saved = workshop.state.candidates.get(key)
            if saved is None:
                network = network or (
                    workshop.plain() if params is None else workshop.train(space.network(params), params)
                )
                candidate = workshop.candidate(network, export)
            else:
                candidate = Candidate.from_json(saved)
            if candidate is not None:
                for threads in THREADS:
                    yield Place(params, export.target, export.precision, threads), candidate


def _candidate_key(params: Params | None, export: Export) -> str:
    recipe = space.PLAIN if params is None else space.network(params).training
    return f"{Network(recipe, None).key}-{export.key}"


def _time(
    path: Path, made: Sequence[tuple[Place, Candidate]], rounds: int, say: Any
) -> dict[str, list[float]]:
    """p50 in ms of each point in each round, in a new order each round."""
    from shoal_agent import bench

    found: list[dict[str, float]] = json.loads(path.read_bytes()) if path.is_file() else []
    for number in range(len(found), rounds):
        say(f"timing round {number + 1} of {rounds}")
        order = list(made)
        random.Random(number).shuffle(order)
        times: dict[str, float] = {}
        for place, candidate in order:
            opened = open_bundle(Path(candidate.layout), candidate.bundle, verify=False)
            budget = bench.Budget(seconds=SECONDS, warm_up_seconds=SECONDS / 4)
            result = bench.time_bundles(opened, None, Options(threads=place.threads), budget=budget)
            times[place.key] = result.candidate.p50_ms
        found.append(times)
        write_atomic(path, json.dumps(found).encode())
    return {place.key: [times[place.key] for times in found[:rounds]] for place, _ in made}


def _measured(place: Place, candidate: Candidate, rounds: Sequence[float]) -> Measured:
    assert candidate.accuracy is not None
    middle = statistics.median(rounds)
    # The median's standard error for near-normal rounds; a floor where rounds agree by chance.
    spread = 1.25 * statistics.stdev(rounds) / len(rounds) ** 0.5 if len(rounds) > 1 else 0.05 * middle
    return Measured(
        place, candidate.accuracy.value, candidate.accuracy.estimate.error, middle,
        max(spread / middle, 0.005), candidate.size_bytes, tuple(rounds),
        str(open_bundle(Path(candidate.layout), candidate.bundle, verify=False).model_file),
    )  # fmt: skip
