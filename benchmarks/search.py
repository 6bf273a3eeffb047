"""How many looks at a device a search needs, against grid and random; and the front beside Microsoft Olive's.

    python benchmarks/search.py [--quick] [--json FILE] [--cache DIR]

First every point of one space (recipe x format x precision x threads, of examples/digits.py) is made and
measured once. Then grid, random and Shoal play against the record: a trial is one look at the device, its
answer one recorded round, and a game ends when the points that were looked at dominate 98 % of the volume
that the whole space dominates. Then Shoal and Olive search the same model on the same data for the same
time, and both fronts are measured in the same rounds. What was made is kept in the cache and not made again.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from search_parts import duel, game, world
from search_parts.duel import Duel
from search_parts.game import Course
from search_parts.world import World
from shoal_controller.demo.figures import context
from shoal_optimizer.evaluation import bootstrap
from shoal_optimizer.search import looks

TASK = Path(__file__).resolve().parents[1] / "examples" / "digits.py"
SEEDS, QUICK_SEEDS = 20, 10
DUELS, QUICK_DUELS = 3, 1
DUEL_SECONDS = 60.0
AIMS = {"trials_over_random": 1 / 3, "trials_over_grid": 1 / 3}
LEAST = {"hypervolume_over_exhaustive": 0.98, "hypervolume_over_olive": 1.0}
Figures = dict[str, dict[str, Any]]


def default_cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "shoal" / "benchmarks" / "search"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smaller space and fewer seeds")
    parser.add_argument("--json", type=Path, help="write the figures there, and the tables beside them")
    parser.add_argument("--cache", type=Path, default=default_cache())
    parser.add_argument("--no-olive", action="store_true", help="leave the peer out")
    options = parser.parse_args()
    torch.set_num_threads(1)
    recorded = world.collect(TASK, options.cache, quick=options.quick, say=say)
    courses = play(recorded, QUICK_SEEDS if options.quick else SEEDS)
    duels: list[Duel] = []
    reason = "left out"
    if not options.no_olive:
        try:
            count = QUICK_DUELS if options.quick else DUELS
            for seed in range(count):
                found = duel.fight(TASK, options.cache, seconds=DUEL_SECONDS, seed=seed, say=say)
                duels += [found]
        except OSError as error:
            reason = f"could not be installed or started: {error}"
    values = figures(recorded, courses, duels)
    text = tables(recorded, courses, duels, values, reason)
    print(text)
    if options.json:
        whole = {"benchmark": "search", "figures": values, "context": context()}
        options.json.write_text(json.dumps(whole, indent=1) + "\n")
        options.json.with_suffix(".md").write_text(f"# search\n\n{text}\n")


def say(line: str) -> None:
    print(f"  {line}", flush=True)


def play(recorded: World, seeds: int) -> dict[str, list[Course]]:
    """Each player's games, one a seed."""
    found: dict[str, list[Course]] = {}
    for name in game.PLAYERS:
        say(f"{name} plays {seeds} games")
        found[name] = [game.play(recorded, name, seed) for seed in range(seeds)]
    return found


# ---------------------------------------------------------------------------- figures


def figures(recorded: World, courses: dict[str, list[Course]], duels: Sequence[Duel]) -> Figures:
    """All keys, ratios of means over seeds with bootstrap intervals."""
    trials = {name: [c.looks for c in games] for name, games in courses.items()}
    networks = {name: [c.networks for c in games] for name, games in courses.items()}
    budget = max(1, int(statistics.mean(trials["random"]) / 3))
    shares = [share_at(c, budget) for c in courses["shoal"]]
    found: Figures = {
        "trials_over_random": ratio(trials["shoal"], trials["random"]),
        "trials_over_grid": ratio(trials["shoal"], trials["grid"]),
        "networks_over_random": ratio(networks["shoal"], networks["random"]),
        "hypervolume_over_exhaustive": mean(shares),
        **{f"trials_{name}": mean(values, "looks") for name, values in trials.items()},
        "points": {"value": len(recorded.points), "unit": "points"},
    }
    measured = [d.ratio for d in duels if d.ratio == d.ratio]
    if measured:
        found["hypervolume_over_olive"] = mean(measured)
    return found


def share_at(course: Course, budget: int) -> float:
    """The share of the volume after at most so many looks."""
    return course.shares[min(budget, len(course.shares)) - 1]


def ratio(mine: Sequence[float], other: Sequence[float]) -> dict[str, Any]:
    """Ratio of the means; seeds of both sides are drawn again for the interval."""
    a, b = np.asarray(mine, np.float64), np.asarray(other, np.float64)
    n = min(len(a), len(b))
    low, high = bootstrap(lambda picks: float(a[picks].mean() / b[picks].mean()), n)
    return {"value": float(a.mean() / b.mean()), "unit": "ratio", "low": low, "high": high, "n": n}


def mean(values: Sequence[float], unit: str = "ratio") -> dict[str, Any]:
    array = np.asarray(values, np.float64)
    if len(array) < 2:
        return {"value": float(array.mean()), "unit": unit, "n": len(array)}
    low, high = bootstrap(lambda picks: float(array[picks].mean()), len(array))
    return {"value": float(array.mean()), "unit": unit, "low": low, "high": high, "n": len(array)}


# ---------------------------------------------------------------------------- for people


def tables(
    recorded: World, courses: dict[str, list[Course]], duels: Sequence[Duel], found: Figures, reason: str
) -> str:
    lines = [
        "| player | looks until 98 % (mean) | fewest | most | networks trained |",
        "|---|---|---|---|---|",
    ]
    for name, games in courses.items():
        counts = [c.looks for c in games]
        trained = statistics.mean(c.networks for c in games)
        lines.append(
            f"| {name} | {statistics.mean(counts):.1f} | {min(counts)} | {max(counts)} | {trained:.1f} |"
        )
    lines += ["", "| figure | value | 95 % interval | n | aim | met |", "|---|---|---|---|---|---|"]
    for key, figure in found.items():
        lines.append(_figure_row(key, figure))
    lines += ["", *_duel_lines(duels, reason), "", _front(recorded), "", note(recorded, courses)]
    return "\n".join(lines)


def _figure_row(key: str, figure: dict[str, Any]) -> str:
    low, high = figure.get("low"), figure.get("high")
    interval = "" if low is None or high is None else f"{low:.3f} to {high:.3f}"
    aim, met = "", ""
    if key in AIMS:
        aim, met = f"<= {AIMS[key]:.3f}", "yes" if figure["value"] <= AIMS[key] else "no"
    elif key in LEAST:
        aim, met = f">= {LEAST[key]:g}", "yes" if figure["value"] >= LEAST[key] else "no"
    return f"| {key} | {figure['value']:.3f} | {interval} | {figure.get('n', '')} | {aim} | {met} |"


def _duel_lines(duels: Sequence[Duel], reason: str) -> list[str]:
    if not duels:
        return [f"Olive: {reason}."]
    lines = [
        "| seed | Shoal's volume over Olive's | Shoal's front | models that Olive made | its evaluations |",
        "|---|---|---|---|---|",
    ]
    for seed, found in enumerate(duels):
        lines.append(
            f"| {seed} | {found.ratio:.3f} | {found.our_models} | {found.their_models} "
            f"{found.their_reason} | {found.their_evaluations} |"
        )
    return lines


def _front(recorded: World) -> str:
    """The points of the space that nothing dominates, as they were measured."""
    corner = game.corner(recorded)
    whole = looks.volume([game.gains(p, corner) for p in recorded])
    lines = ["| on the front | accuracy | p50 | size | share of the volume alone |", "|---|---|---|---|---|"]
    kept = [
        p for p in recorded
        if not any(
            q.accuracy >= p.accuracy and q.latency <= p.latency and q.size <= p.size and q is not p
            and (q.accuracy, q.latency, q.size) != (p.accuracy, p.latency, p.size)
            for q in recorded
        )
    ]  # fmt: skip
    for p in sorted(kept, key=lambda p: p.latency):
        alone = looks.volume([game.gains(p, corner)]) / whole
        lines.append(
            f"| {p.place.key} | {p.accuracy:.3f} | {1000 * p.latency:.1f} µs | {p.size / 1000:.1f} kB "
            f"| {alone:.2f} |"
        )
    return "\n".join(lines)


def note(recorded: World, courses: dict[str, list[Course]]) -> str:
    corner = game.corner(recorded)
    return (
        f"The space has {len(recorded.points)} points. The volume is counted from the original in fp32 in "
        f"its slowest form ({1000 * corner.latency:.0f} µs, {corner.size / 1000:.0f} kB) and from an "
        f"accuracy of {corner.accuracy:.3f}, 5 points below it; latency and size count by their logarithms. "
        "A look's "
        "answer is one of the recorded rounds. Shoal knows size and accuracy of what it made, since those "
        "need no device, and has no table of latencies at the start of a game: it learns one from its looks. "
        "Its first two networks are the known-good ones that every search begins with. The nesting of grid's "
        "loops is drawn for each seed. Olive searches static and dynamic quantization and session parameters "
        "by its TPE sampler, 5 points of accuracy allowed; every model that it made counts, not only its "
        "choice. Both sides are timed with one and with two threads, whichever is faster. Olive neither "
        "prunes nor trains, which is most of the difference. The original counts for both sides. The load "
        f"of the machine at the end was {os.getloadavg()[0]:.1f}: read ratios, not times."
    )


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
