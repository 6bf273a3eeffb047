"""The row `architecture_search`: candidates of the product's own space, few trained, the fastest kept."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from compression_parts.recipes import RECOVERY, SEARCH_CANDIDATES, SEARCH_KEEPS, SEARCH_SHARE
from compression_parts.rows import Subject, made
from shoal_optimizer import recipe as recipes
from shoal_optimizer import targets
from shoal_optimizer.evaluation import evaluate_model
from shoal_optimizer.recipe import Recipe, Step
from shoal_optimizer.targets.base import load_exported
from shoal_optimizer.techniques.architecture import space_of

ROW = "architecture_search"
RUNS = 300


def recipe_of(width: float, depth: float) -> Recipe:
    return Recipe((Step("architecture", {"width": width, "depth": depth}), RECOVERY), ROW)


def known(subject: Subject) -> Recipe | None:
    """What an earlier search took."""
    if not _path(subject).is_file():
        return None
    chosen = json.loads(_path(subject).read_text())
    return recipe_of(chosen["width"], chosen["depth"])


def spent(subject: Subject, counted: set[str]) -> float:
    """CPU seconds of the candidates, without those rows that are counted elsewhere."""
    found = (subject.folder / "rows").glob(f"{subject.network}-seed{subject.seed}-candidate-*/row.json")
    return sum(
        float(json.loads(path.read_text())["cpu_s"]) for path in found if path.parent.name not in counted
    )


def _path(subject: Subject) -> Path:
    return subject.folder / "rows" / f"search-{subject.network}-{subject.key}.json"


def searched(subject: Subject, say: Callable[[str], None] = print) -> Recipe:
    """The recipe of the network that the search takes; looks at validation data and latencies only.

    Every network of the space with at most `SEARCH_SHARE` of the parameters is built and timed untrained;
    `SEARCH_CANDIDATES` of them, spread from the fastest to the slowest, are trained for one epoch.
    """
    found = known(subject)
    if found is not None:
        return found
    space = space_of(subject.task)
    whole = sum(p.numel() for p in subject.task.original.parameters())
    timed: list[tuple[float, float, float]] = []
    for width in space.widths:
        for depth in space.depths:
            untrained = Recipe(recipe_of(width, depth).steps[:1], ROW)
            model = recipes.apply(untrained, subject.task).model
            assert model is not None
            if sum(p.numel() for p in model.parameters()) <= SEARCH_SHARE * whole:
                exported = targets.base.find("onnxruntime").export(model, subject.task)
                timed.append((_microseconds(exported, subject), width, depth))
                say(f"  width {width:g}, depth {depth:g}: {timed[-1][0]:.0f} us untrained")
    timed.sort()
    places = np.unique(np.linspace(0, len(timed) - 1, SEARCH_CANDIDATES).round().astype(int))
    wanted = SEARCH_KEEPS * evaluate_model(subject.task, subject.task.original).value
    tried = []
    for place in places:
        latency, width, depth = timed[place]
        row = made(subject, f"candidate-{width:g}-{depth:g}", recipe_of(width, depth), say)
        tried.append((row["forms"]["onnxruntime"]["validation"], -latency, width, depth))
    good = [candidate for candidate in tried if candidate[0] >= wanted]
    accuracy, _, width, depth = max(good, key=lambda c: c[1]) if good else max(tried)
    say(f"  taken: width {width:g}, depth {depth:g}, validation {accuracy:.4f} (wanted {wanted:.4f})")
    path = _path(subject)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"width": width, "depth": depth, "tried": tried, "wanted": wanted}))
    return recipe_of(width, depth)


def _microseconds(exported: targets.base.Exported, subject: Subject) -> float:
    instance = load_exported(exported)
    item = {exported.signature.inputs[0].name: np.ascontiguousarray(subject.test.inputs[:1])}
    readings = []
    try:
        for _ in range(RUNS):
            begun = time.perf_counter_ns()
            instance.run(item)
            readings.append((time.perf_counter_ns() - begun) / 1e3)
    finally:
        instance.close()
    return statistics.median(readings)
