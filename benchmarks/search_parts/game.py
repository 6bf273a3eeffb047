"""Grid, random and Shoal against the recorded space: how many looks at the device until the front is had.

A look is one timing of one point on the device; its answer is one recorded round, noise included. What a
player has found is judged by the volume that the points it looked at dominate, by their true figures.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path

from search_parts.world import THREADS, Measured, Place, World
from shoal_optimizer import objective
from shoal_optimizer.search import frontier, looks, sampler
from shoal_optimizer.search.frontier import Estimate, Point
from shoal_optimizer.search.latency import Kernel, LatencyTable, kernels
from shoal_optimizer.search.looks import Bounds
from shoal_optimizer.search.sampler import Told
from shoal_optimizer.search.space import Params

ENOUGH = 0.98  # of the volume of the whole space
FLOOR = 0.05  # accuracy below the original's at which a model is worth nothing here
MOST_LOOKS = 4  # that Shoal takes after one network before it trains another


@dataclass(frozen=True)
class Course:
    """What one player needed: looks and networks until `ENOUGH`, and the share of the volume after each
    look."""

    looks: int
    networks: int
    shares: tuple[float, ...]


class Device:
    """Answers looks from the record, and keeps the score."""

    def __init__(self, world: World, bounds: Bounds, seed: int) -> None:
        self.world = world
        self.bounds = bounds
        self._random = random.Random(seed)
        self._all = looks.volume([gains(p, bounds) for p in world])
        self._found: list[tuple[float, float, float]] = []
        self._networks: set[str] = set()
        self.shares: list[float] = []
        self.networks_at: list[int] = []

    def look(self, place: Place) -> float:
        """Milliseconds, as one round saw it."""
        point = self.world.points[place.key]
        self._found.append(gains(point, self.bounds))
        self._networks.add(network_of(place))
        self.shares.append(looks.volume(self._found) / self._all)
        self.networks_at.append(len(self._networks))
        return self._random.choice(point.rounds)

    @property
    def done(self) -> bool:
        return bool(self.shares) and self.shares[-1] >= ENOUGH

    def course(self) -> Course:
        reached = next((n for n, share in enumerate(self.shares, 1) if share >= ENOUGH), None)
        if reached is None:
            return Course(len(self.world.points), 0, tuple(self.shares))
        return Course(reached, self.networks_at[reached - 1], tuple(self.shares))


def gains(point: Measured, bounds: Bounds) -> tuple[float, float, float]:
    return bounds.gains(point.accuracy, point.latency, float(point.size))


def corner(world: World) -> Bounds:
    """The original in fp32 in its slowest form, and an accuracy that is a clear loss."""
    plain = [p for p in world if p.place.params is None and p.place.precision == "fp32"]
    return Bounds(
        max(p.accuracy for p in plain) - FLOOR,
        1.001 * max(p.latency for p in plain),
        1.001 * max(p.size for p in plain),
    )


def network_of(place: Place) -> str:
    return place.key.partition("/")[0]


# ---------------------------------------------------------------------------- players


def play_random(device: Device, seed: int) -> None:
    """Every point is as likely as any other; none is taken twice."""
    order = sorted(device.world.points)
    random.Random(seed).shuffle(order)
    for key in order:
        device.look(device.world.points[key].place)
        if device.done:
            return


def play_grid(device: Device, seed: int) -> None:
    """Nested loops over all dimensions; their nesting and directions are drawn, since nobody's order is
    the right one."""
    draw = random.Random(seed)
    opened = device.world.space
    dimensions: list[list[tuple[str, object]]] = [
        [("ratio", value) for value in opened.ratios],
        [("teacher", value) for value in opened.teacher],
        [("epochs", value) for value in opened.epochs],
        [("form", form) for form in dict.fromkeys((e.target, e.precision) for e in opened.exports)],
        [("threads", value) for value in THREADS],
    ]
    draw.shuffle(dimensions)
    for values in dimensions:
        if draw.random() < 0.5:
            values.reverse()
    by_values = {_values(p.place): p.place for p in device.world if p.place.params is not None}
    plain = [p.place for p in device.world if p.place.params is None]
    for place in [
        *plain,
        *(by_values[key] for key in map(_sorted, product(*dimensions)) if key in by_values),
    ]:
        device.look(place)
        if device.done:
            return


def _sorted(values: tuple[tuple[str, object], ...]) -> tuple[object, ...]:
    found = dict(values)
    return tuple(found[name] for name in ("ratio", "teacher", "epochs", "form", "threads"))


def _values(place: Place) -> tuple[object, ...]:
    assert place.params is not None
    params = place.params
    form = place.target, place.precision
    return params["ratio"], params["teacher"], params["epochs"], form, place.threads


def play_shoal(device: Device, seed: int) -> None:
    """Shoal's sampler proposes networks, its latency table predicts, and only what could still change the
    front is looked at."""
    player = Shoal(device, seed)
    for params in [None, *player.proposals()]:
        player.make(params)
        player.take(MOST_LOOKS)
        if device.done:
            return
    player.take(len(device.world.points))


class Shoal:
    """Plays with what a search knows: accuracy and size of what was made, a table learned from looks."""

    def __init__(self, device: Device, seed: int) -> None:
        self.device = device
        self.seed = seed
        self.objective = objective.parse("minimise latency_p95, size")
        self.table = LatencyTable()
        self.made: dict[str, Measured] = {}  # candidates that exist: their latency is not looked into
        self.seen: dict[str, float] = {}
        self.told: list[Told] = []

    def proposals(self) -> Iterator[Params]:
        """Networks until there are none left; each was told what the ones before gave."""
        while True:
            params = sampler.propose(
                self.device.world.space, self.objective, self.told, seed=self.seed, networks=24
            )
            if params is None:
                return
            yield params
            self.told.append(Told(params, self._best(params)))

    def make(self, params: Params | None) -> None:
        """Trains and exports a network: no look at the device."""
        for point in self.device.world:
            if _same(point.place.params, params):
                self.made[point.place.key] = point

    def take(self, count: int) -> None:
        """Looks at up to `count` candidates that could still change the front."""
        for _ in range(count):
            unseen = [self._point(p) for key, p in self.made.items() if key not in self.seen]
            chosen = self._next(unseen)
            if chosen is None or self.device.done:
                return
            place = self.made[chosen.key].place
            ms = self.device.look(place)
            self.seen[chosen.key] = ms
            self.table.observe(_class(place), place.target, _kernels(self.made[chosen.key]), ms)

    def _next(self, unseen: list[Point]) -> Point | None:
        seen = [self._point(self.made[key]) for key in self.seen]
        found = looks.worth(seen, unseen, self.device.bounds)
        return found[0] if found else None

    def _point(self, point: Measured) -> Point:
        key = point.place.key
        latency = Estimate(self.seen[key]) if key in self.seen else self._predicted(point)
        figures: dict[str, Estimate | None] = {
            frontier.ACCURACY: Estimate(point.accuracy, point.accuracy_error),
            frontier.LATENCY: latency,
            frontier.SIZE: Estimate(float(point.size)),
        }
        return Point(key, figures)

    def _predicted(self, point: Measured) -> Estimate | None:
        found = self.table.predict(_class(point.place), point.place.target, _kernels(point))
        return None if found is None else Estimate(found.ms, found.relative_error * found.ms)

    def _best(self, params: Params) -> dict[str, float | None]:
        """The best of a network's candidates under the objective, as far as they are known."""
        mine = [self._point(p) for p in self.made.values() if _same(p.place.params, params)]
        points = [frontier.as_objective_point(p) for p in mine if p.get(frontier.LATENCY) is not None]
        if not points:
            return {}
        best = self.objective.choose(points).key
        return dict(next(p for p in points if p.key == best).values)


def _same(a: Params | None, b: Params | None) -> bool:
    if a is None or b is None:
        return a is b
    return {**a, "family": "pruned"} == {**b, "family": "pruned"}


def _class(place: Place) -> str:
    return f"this machine, {place.threads}"


def _kernels(point: Measured) -> tuple[Kernel, ...]:
    return _read(point.model)


@cache
def _read(model: str) -> tuple[Kernel, ...]:
    return kernels(Path(model).read_bytes())


PLAYERS: dict[str, Callable[[Device, int], None]] = {
    "grid": play_grid,
    "random": play_random,
    "shoal": play_shoal,
}


def play(world: World, name: str, seed: int) -> Course:
    """One game of one player."""
    device = Device(world, corner(world), seed)
    PLAYERS[name](device, seed)
    return device.course()
