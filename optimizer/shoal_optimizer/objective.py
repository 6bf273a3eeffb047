"""What an endpoint asks for: constraints and what to minimise. Pure, no torch, no IO.

    accuracy>=0.97, latency_p95<=5ms, memory<=64MB; minimise size

Metrics: `accuracy` (the task's metric, 1 = perfect, `%` allowed), `recall[LABEL]` of one class of the
data, `latency_p50`, `latency_p95` (us, ms, s; plain numbers are ms), `memory`, `size` and `wire`, the
size as it is sent, compressed (B, kB, MB, GB, KiB, MiB, GiB; plain numbers are bytes). Constraints are
joined by commas; after the semicolon comes the goal, or several in order of importance: `minimise
latency_p95, size; maximise accuracy`. Naming `wire` makes the search prune single weights too.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import groupby

from shoal_protos.errors import InvalidInput

ACCURACY = "accuracy"
METRICS = (ACCURACY, "latency_p50", "latency_p95", "memory", "size", "wire")
DEFAULT = "accuracy>=0; minimise latency_p95"
_TIE_BREAK = ("accuracy", "latency_p95", "size", "memory")

_TIME = {"us": 1e-3, "µs": 1e-3, "ms": 1.0, "s": 1e3, "": 1.0}
_BYTES = {
    "": 1.0, "b": 1.0, "kb": 1e3, "mb": 1e6, "gb": 1e9,
    "kib": 1024.0, "mib": 1024.0**2, "gib": 1024.0**3,
}  # fmt: skip
_SHARE = {"": 1.0, "%": 0.01}
_UNITS = {
    "accuracy": _SHARE,
    "latency_p50": _TIME,
    "latency_p95": _TIME,
    "memory": _BYTES,
    "size": _BYTES,
    "wire": _BYTES,
}

_CONSTRAINT = re.compile(
    r"([a-z][a-z0-9_]*(?:\[[^\]]*\])?)\s*(>=|<=|==|=|>|<)\s*([^\s<>=]+(?:\s*[^\s<>=]+)?)"
)
_QUANTITY = re.compile(r"([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*([a-zA-Zµ%]*)")
_RECALL = re.compile(r"recall\[\s*([^\[\]]*?)\s*\]")
_SPLIT = re.compile(r",(?![^\[]*\])")  # commas inside of a label's brackets do not count
_PARTS = re.compile(r"[;\n](?![^\[]*\])")
_GOAL = re.compile(r"(minimi[sz]e|maximi[sz]e)\s+(.+)", re.DOTALL)
_EXAMPLE = "Write it like: accuracy>=0.97, latency_p95<=5ms; minimise size"


@dataclass(frozen=True)
class Constraint:
    """A bound on one metric, in ms, bytes or the metric's own unit: a floor for accuracy and recall, else a
    ceiling."""

    metric: str
    bound: float

    @property
    def operator(self) -> str:
        return ">=" if is_share(self.metric) else "<="

    def excess(self, value: float) -> float:
        """How far `value` misses the bound, as a share of it; 0 when it is met."""
        return self.miss(value) / max(abs(self.bound), 1e-12)

    def miss(self, value: float) -> float:
        """How far `value` misses the bound, in the metric's unit; 0 when it is met."""
        return max(0.0, self.bound - value if is_share(self.metric) else value - self.bound)

    def __str__(self) -> str:
        return f"{self.metric} {self.operator} {show(self.metric, self.bound)}"


@dataclass(frozen=True)
class Point:
    """One candidate: metric -> value (ms, bytes); None or absent = unmeasured."""

    key: str
    values: Mapping[str, float | None] = field(default_factory=dict)

    def get(self, metric: str) -> float | None:
        value = self.values.get(metric)
        return None if value is None or math.isnan(value) else value


@dataclass(frozen=True)
class Choice:
    """The point to use, why, and all points best first.

    `feasible` is True only when every constraint is measured and met. `missed` maps the constraints that
    the chosen point does not meet to the excess as a share of the bound (NaN = unmeasured).
    """

    key: str
    feasible: bool
    sentence: str
    ranked: tuple[str, ...]
    missed: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Objective:
    """Constraints, then goals in order of importance."""

    constraints: tuple[Constraint, ...] = ()
    goals: tuple[str, ...] = ("latency_p95",)

    def names(self, metric: str) -> bool:
        """True when a constraint or a goal is about the metric."""
        return metric in self.goals or self.bounds(metric)

    def bounds(self, metric: str) -> bool:
        """True when a constraint is about the metric."""
        return any(c.metric == metric for c in self.constraints)

    @property
    def labels(self) -> tuple[str, ...]:
        """Classes of the data whose recall is bounded."""
        return tuple(label for c in self.constraints if (label := label_of(c.metric)) is not None)

    def __str__(self) -> str:
        bounds = ", ".join(f"{c.metric}{c.operator}{_exact(c.metric, c.bound)}" for c in self.constraints)
        goals = (f"{verb} {', '.join(names)}" for verb, names in groupby(self.goals, _verb))
        return "; ".join([bounds, *goals] if bounds else goals)

    def missed(self, point: Point) -> dict[str, float]:
        """metric -> excess of each constraint that the point does not meet; NaN = unmeasured."""
        found = {}
        for constraint in self.constraints:
            value = point.get(constraint.metric)
            excess = math.nan if value is None else constraint.excess(value)
            if excess != 0.0:
                found[constraint.metric] = excess
        return found

    def feasible(self, point: Point) -> bool:
        """True when every constraint is measured and met."""
        return not self.missed(point)

    def distance(self, point: Point) -> float:
        """0 for feasible points; else the sum of excesses, unmeasured ones not counted."""
        return sum(excess for excess in self.missed(point).values() if not math.isnan(excess))

    def rank(self, points: Iterable[Point]) -> list[Point]:
        """Feasible points first, then those with unmeasured constraints, then by distance."""
        return sorted(points, key=self._order)

    def _order(self, point: Point) -> tuple[float | int | str, ...]:
        missed, distance = self.missed(point), self.distance(point)
        group = 0 if not missed else 1 if distance == 0.0 else 2
        by_goal = (_cost(point, metric) for metric in (*self.goals, *_TIE_BREAK))
        return (group, distance, *by_goal, point.key)

    def choose(self, points: Iterable[Point]) -> Choice:
        """The feasible point that is best by the goals, else the nearest infeasible one with the reason.

        Raises:
            InvalidInput: there are no points.
        """
        ranked = self.rank(points)
        if not ranked:
            raise InvalidInput("There is nothing to choose from.", "Convert or search variants first.")
        best = ranked[0]
        missed = self.missed(best)
        return Choice(best.key, not missed, self._sentence(best, missed, len(ranked)), _keys(ranked), missed)

    def _sentence(self, best: Point, missed: Mapping[str, float], count: int) -> str:
        goal = self.goals[0]
        figure = show(goal, best.get(goal))
        if not missed:
            met = " and meets " + ", ".join(map(str, self.constraints)) if self.constraints else ""
            extreme = "highest" if goal == ACCURACY else "lowest"
            return f"{best.key} has the {extreme} {goal} of {count} ({figure}){met}."
        if all(math.isnan(excess) for excess in missed.values()):
            lead = "No variant is known to meet the objective yet"
        else:
            lead = f"None of {count} meets the objective"
        return f"{lead}; closest: {best.key}, {self._misses(best, missed)}."

    def _misses(self, point: Point, missed: Mapping[str, float]) -> str:
        """What a point misses and by how much, each in its own unit."""
        reasons = []
        for constraint in self.constraints:
            if constraint.metric not in missed:
                continue
            value = point.get(constraint.metric)
            if value is None:
                reasons.append(f"its {constraint.metric} is unmeasured, wanted {constraint}")
            else:
                by = show(constraint.metric, constraint.miss(value))
                reasons.append(f"misses {constraint} by {by} (it is {show(constraint.metric, value)})")
        return "; ".join(reasons)


def _keys(points: list[Point]) -> tuple[str, ...]:
    return tuple(point.key for point in points)


def _cost(point: Point, metric: str) -> float:
    value = point.get(metric)
    if value is None:
        return math.inf
    return -value if is_share(metric) else value


def recall_metric(label: str) -> str:
    """The metric's name for the recall of one class of the data."""
    return f"recall[{label}]"


def label_of(metric: str) -> str | None:
    """The class of the data that a metric is about; None = all of them."""
    match = _RECALL.fullmatch(metric)
    return match.group(1) if match else None


def is_share(metric: str) -> bool:
    """True for metrics of which more is better and 1 is perfect."""
    return metric == ACCURACY or metric.startswith("recall[")


def show(metric: str, value: float | None) -> str:
    """A figure with its unit, for people: '0.97', '4.2 ms', '64 MB', 'unmeasured'."""
    if value is None:
        return "unmeasured"
    if is_share(metric):
        return f"{value:.4g}"
    if metric.startswith("latency"):
        return f"{value * 1e3:.3g} µs" if value < 1 else f"{value:.4g} ms"
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= factor:
            return f"{value / factor:.4g} {unit}"
    return f"{value:.0f} B"


def _exact(metric: str, value: float) -> str:
    unit = "" if is_share(metric) else "ms" if metric.startswith("latency") else "B"
    return f"{value!r}{unit}"


# ---------------------------------------------------------------------------- parsing


def parse(text: str) -> Objective:
    """Reads an objective; "" gives the default.

    Raises:
        InvalidInput: unknown metric or unit, wrong direction, a bound that nothing can meet, or two parts
            that contradict or repeat each other; the message names both.
    """
    if not text.strip():
        text = DEFAULT
    if len(text) > 1000:
        raise InvalidInput("The objective is longer than 1000 characters.", _EXAMPLE)
    parts = [part.strip() for part in _PARTS.split(text.strip())]
    wishes = [(part, goal) for part in parts if (goal := _GOAL.fullmatch(part))]
    bounds = [
        item.strip()
        for part in parts
        if not _GOAL.fullmatch(part)
        for item in _SPLIT.split(part)
        if item.strip()
    ]
    _refuse_contradictions(bounds, [(goal.group(1), goal.group(2)) for _, goal in wishes])
    constraints = [_parse_constraint(item) for item in bounds]
    goals = [metric for _, goal in wishes for metric in _parse_goals(goal.group(1), goal.group(2))]
    return Objective(tuple(constraints), tuple(goals) or ("latency_p95",))


def _refuse_contradictions(bounds: list[str], wishes: list[tuple[str, str]]) -> None:
    """Raises InvalidInput for two bounds of one metric, or two goals, naming both parts."""
    seen: dict[str, str] = {}
    for item in bounds:
        match = _CONSTRAINT.fullmatch(_ascii(item))
        if match is None:
            continue  # refused with its own message
        name, other = match.group(1), seen.setdefault(match.group(1), item)
        if other is not item:
            problem = f"The objective bounds {name} twice: '{other}' and '{item}'"
            known = _CONSTRAINT.fullmatch(_ascii(other))
            assert known is not None
            if {known.group(2)[0], match.group(2)[0]} == {"<", ">"}:
                raise InvalidInput(f"{problem} contradict each other.", "Keep the one that you mean.")
            raise InvalidInput(f"{problem}.", "Keep one.")
    wanted: dict[str, str] = {}
    for verb, names in wishes:
        for name in (part.strip() for part in names.split(",")):
            other = wanted.setdefault(name, verb)
            if other[:3] != verb[:3]:
                raise InvalidInput(
                    f"'{other} {name}' and '{verb} {name}' contradict each other.", "Keep one."
                )
    goals = [part.strip() for _, names in wishes for part in names.split(",")]
    for name in goals:
        if goals.count(name) > 1:
            raise InvalidInput(f"The objective names {name} as a goal twice.", "Keep one.")


def _parse_goals(verb: str, names: str) -> list[str]:
    goals = [_metric(name.strip()) for name in names.split(",")]
    for metric in goals:
        if label_of(metric) is not None:
            raise InvalidInput(f"{metric} is no goal.", f"Bound it: {metric}>=0.98.")
        if not verb.startswith(_verb(metric)[:6]):
            raise InvalidInput(f"'{verb} {metric}' makes models worse.", f"Write {_verb(metric)} {metric}.")
    return goals


def _parse_constraint(text: str) -> Constraint:
    match = _CONSTRAINT.fullmatch(_ascii(text))
    if match is None:
        raise InvalidInput(f"'{text.strip()[:80]}' is neither a constraint nor a goal.", _EXAMPLE)
    metric, operator, quantity = _metric(match.group(1)), match.group(2), match.group(3)
    wanted = ">=" if is_share(metric) else "<="
    if operator != wanted:
        raise InvalidInput(f"'{text.strip()}' cannot be used.", f"Write {metric}{wanted}{quantity}.")
    bound = _quantity(metric, quantity)
    if is_share(metric) and bound > 1:
        raise InvalidInput(f"No model reaches {metric} {bound:g}.", "1 is perfect; write 0.97 or 97%.")
    if not is_share(metric) and bound <= 0:
        raise InvalidInput(f"No model reaches {metric} <= {quantity.strip()}.", "Give a bound above 0.")
    return Constraint(metric, bound)


def _ascii(text: str) -> str:
    return text.strip().replace("≥", ">=").replace("≤", "<=")


def _verb(metric: str) -> str:
    return "maximise" if is_share(metric) else "minimise"


def _metric(name: str) -> str:
    label = label_of(name)
    if label:
        return recall_metric(label)
    if name not in METRICS:
        raise InvalidInput(
            f"'{name[:40]}' is not a metric.", f"Use one of {', '.join(METRICS)} or recall[LABEL]."
        )
    return name


def _quantity(metric: str, text: str) -> float:
    match = _QUANTITY.fullmatch(text.strip())
    units = _SHARE if is_share(metric) else _UNITS[metric]
    unit = match.group(2).lower() if match else ""
    if match is None or unit not in units:
        known = "%" if units is _SHARE else "us, ms, s" if units is _TIME else "B, kB, MB, GB, KiB, MiB, GiB"
        raise InvalidInput(
            f"'{text.strip()[:40]}' is no value of {metric}.", f"Use a number, or one with: {known}."
        )
    value = float(match.group(1)) * units[unit]
    if not math.isfinite(value):
        raise InvalidInput(f"'{text.strip()[:40]}' is too large.", "Give a finite bound.")
    return value
