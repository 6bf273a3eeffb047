"""The front as SVG: one pane for each pair of axes, drawn here so that it works without any script."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shoal_optimizer.objective import Constraint, show
from shoal_optimizer.reporting import text

WIDTH, HEIGHT = 760, 380
_LEFT, _RIGHT, _TOP, _BOTTOM = 72, 24, 20, 48


@dataclass(frozen=True)
class Axis:
    """A metric as an axis; `logarithmic` where ratios are what matters."""

    key: str
    label: str
    short: str
    logarithmic: bool = True
    better: str = "lower"


@dataclass(frozen=True)
class Dot:
    """A candidate: per axis (value, low, high); `kind` is chosen, front, original or other."""

    name: str
    values: Mapping[str, tuple[float, float, float]]
    kind: str
    tip: str


@dataclass(frozen=True)
class Pane:
    """A pair of axes and its drawing."""

    key: str
    title: str
    svg: str


def axes(metric: str) -> dict[str, Axis]:
    label = text.metric_label(metric)
    return {
        "accuracy": Axis("accuracy", label, label, False, "higher"),
        "latency_p95": Axis("latency_p95", "Latency, 95th percentile", "latency"),
        "size": Axis("size", "Size of the model file", "size"),
        "memory": Axis("memory", "Memory", "memory"),
    }


PAIRS = (
    ("latency_p95", "accuracy"),
    ("size", "accuracy"),
    ("memory", "accuracy"),
    ("latency_p95", "size"),
    ("latency_p95", "memory"),
    ("size", "memory"),
)


def dots(entry: Mapping[str, Any], metric: str, base: str = "") -> list[Dot]:
    """All candidates of a class; `base` is the original's name."""
    kept = {item["name"] for item in entry["front"]}
    found = []
    for row in entry["candidates"]:
        name = row["name"]
        kind = (
            "chosen" if name == entry["chosen"]
            else "front" if name in kept
            else "original" if name == base
            else "other"
        )  # fmt: skip
        found.append(Dot(name, _values(row), kind, _tip(row, metric, kind)))
    return found


def _values(row: Mapping[str, Any]) -> dict[str, tuple[float, float, float]]:
    found = {}
    for key in ("accuracy", "latency_p95", "memory"):
        figure = row.get(key)
        if figure is not None:
            found[key] = figure["value"], figure["low"], figure["high"]
    size = float(row["size_bytes"])
    return {**found, "size": (size, size, size)}


def _tip(row: Mapping[str, Any], metric: str, kind: str) -> str:
    said = {"chosen": "chosen", "front": "on the front", "original": "the original", "other": ""}[kind]
    return "\n".join(
        [
            f"{row['name']}{f': {said}' if said else ''}",
            f"{text.metric_label(metric)}: {text.figure(row.get('accuracy'), 'accuracy')}",
            f"Latency p95: {text.figure(row.get('latency_p95'), 'latency_p95')}",
            f"Size: {show('size', float(row['size_bytes']))}",
            f"Memory: {text.figure(row.get('memory'), 'memory')}",
        ]
    )


def panes(points: Sequence[Dot], metric: str, limits: Sequence[Constraint] = ()) -> list[Pane]:
    """A pane for each pair of axes in which at least two candidates are measured."""
    known, found = axes(metric), []
    for x, y in PAIRS:
        svg = plot(points, known[x], known[y], limits)
        if svg:
            first = known[y].short
            title = f"{first[0].upper()}{first[1:]} by {known[x].short}"
            found.append(Pane(f"{x}-{y}", title, svg))
    return found


def plot(points: Sequence[Dot], x_axis: Axis, y_axis: Axis, limits: Sequence[Constraint] = ()) -> str:
    """SVG of one pair of axes, with 95 % intervals where they matter; "" below two points."""
    shown = [p for p in points if x_axis.key in p.values and y_axis.key in p.values]
    if len(shown) < 2:
        return ""
    wanted = {c.metric: c.bound for c in limits}
    x = _scale(x_axis, shown, (_LEFT, WIDTH - _RIGHT))
    y = _scale(y_axis, shown, (HEIGHT - _BOTTOM, _TOP))
    order = {"other": 0, "original": 1, "front": 2, "chosen": 3}
    drawn = sorted(shown, key=lambda p: (order[p.kind], p.values[x_axis.key][0]))
    better = f"{x_axis.label} (lower is better), {y_axis.label} ({y_axis.better} is better)"
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="group" class="plot" '
        f'aria-label="{len(shown)} candidates: {html.escape(better)}">',
        *(_x_tick(x(v), show(x_axis.key, v)) for v in x.ticks),
        *(_y_tick(y(v), show(y_axis.key, v)) for v in y.ticks),
        _text((_LEFT + WIDTH - _RIGHT) / 2, HEIGHT - 6, "middle", f"{x_axis.label} →", "axis"),
        _text(_LEFT, 12, "start", f"↑ {y_axis.label}", "axis"),
        *_limits(x_axis, y_axis, x, y, wanted),
        _front(drawn, x_axis, y_axis, x, y),
        *(_dot(p, p.values[x_axis.key], p.values[y_axis.key], x, y) for p in drawn),
        *_labels(drawn, x_axis, y_axis, x, y),
    ]
    return "".join([*parts, "</svg>"])


# ---------------------------------------------------------------------------- scales


@dataclass(frozen=True)
class Scale:
    """Maps values to pixels; everything is kept inside."""

    at: Callable[[float], float]
    ticks: tuple[float, ...]
    low: float
    high: float

    def __call__(self, value: float) -> float:
        return self.at(min(max(value, self.low), self.high))


def _scale(axis: Axis, points: Sequence[Dot], pixels: tuple[float, float]) -> Scale:
    lows, highs = zip(*((p.values[axis.key][1], p.values[axis.key][2]) for p in points), strict=True)
    low, high = (_log_range if axis.logarithmic else _range)(min(lows), max(highs))
    start, end = pixels

    def linear(value: float) -> float:
        return start + (value - low) / (high - low) * (end - start)

    def logarithmic(value: float) -> float:
        return start + math.log(value / low) / math.log(high / low) * (end - start)

    ticks = (_log_ticks if axis.logarithmic else _ticks)(low, high)
    return Scale(logarithmic if axis.logarithmic else linear, tuple(ticks), low, high)


def _range(low: float, high: float) -> tuple[float, float]:
    margin = 0.06 * max(high - low, 1e-3)
    return low - margin, high + margin


def _log_range(low: float, high: float) -> tuple[float, float]:
    low = max(low, 1e-9)
    return low * 0.85, max(high, low * 1.05) * 1.15


def _log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 of each decade inside the range; powers of ten alone over many decades."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1, 2, 5) if len(decades) <= 4 else (1,)
    found = [m * 10.0**d for d in decades for m in steps if low <= m * 10.0**d <= high]
    return found if len(found) >= 2 else [low * 1.1, math.sqrt(low * high), high / 1.1]


def _ticks(low: float, high: float) -> list[float]:
    """About five round values inside the range."""
    step = 10.0 ** math.floor(math.log10((high - low) / 3))
    step *= next(m for m in (1, 2, 5, 10) if (high - low) / (step * m) <= 6)
    first = math.ceil(low / step)
    return [i * step for i in range(first, math.floor(high / step) + 1)]


# ---------------------------------------------------------------------------- marks


def _line(kind: str, x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _text(x: float, y: float, anchor: str, value: str, kind: str) -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(value)}</text>'


def _x_tick(place: float, value: str) -> str:
    foot = HEIGHT - _BOTTOM
    return _line("grid", place, _TOP, place, foot) + _text(place, foot + 17, "middle", value, "tick")


def _y_tick(place: float, value: str) -> str:
    return _line("grid", _LEFT, place, WIDTH - _RIGHT, place) + _text(
        _LEFT - 8, place + 4, "end", value, "tick"
    )


def _limits(x_axis: Axis, y_axis: Axis, x: Scale, y: Scale, wanted: Mapping[str, float]) -> list[str]:
    """The objective's bounds as lines, with what lies outside tinted."""
    parts = []
    right, foot = WIDTH - _RIGHT, HEIGHT - _BOTTOM
    bound = wanted.get(x_axis.key)
    if bound is not None and x.low < bound < x.high:
        at = x(bound)
        parts.append(
            f'<rect class="outside" x="{at:.1f}" y="{_TOP}" width="{right - at:.1f}" height="{foot - _TOP}"/>'
        )
        parts.append(_line("limit", at, _TOP, at, foot))
    bound = wanted.get(y_axis.key)
    if bound is not None and y.low < bound < y.high:
        at = y(bound)
        top, height = (at, foot - at) if y_axis.better == "higher" else (_TOP, at - _TOP)
        parts.append(
            f'<rect class="outside" x="{_LEFT}" y="{top:.1f}" width="{right - _LEFT}" height="{height:.1f}"/>'
        )
        parts.append(_line("limit", _LEFT, at, right, at))
    return parts


def _front(points: Sequence[Dot], x_axis: Axis, y_axis: Axis, x: Scale, y: Scale) -> str:
    """A thin line through the kept candidates that are best in this pair of axes."""
    sign = 1.0 if y_axis.better == "higher" else -1.0
    kept = sorted(
        (p.values[x_axis.key][0], -sign * p.values[y_axis.key][0])
        for p in points
        if p.kind in ("front", "chosen")
    )
    line, best = [], math.inf
    for across, cost in kept:
        if cost < best:
            best = cost
            line.append((across, -sign * cost))
    if len(line) < 2:
        return ""
    path = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in line)
    return f'<polyline class="frontline" points="{path}"/>'


def _dot(
    p: Dot, across: tuple[float, float, float], up: tuple[float, float, float], x: Scale, y: Scale
) -> str:
    cx, cy = x(across[0]), y(up[0])
    bars = ""
    if p.kind != "other":  # grey ones would only hide the others
        bars = _line("bar", x(across[1]), cy, x(across[2]), cy) + _line("bar", cx, y(up[1]), cx, y(up[2]))
    tip = html.escape(p.tip, quote=True).replace("\n", "&#10;")
    return (
        f'<g class="dot {p.kind}" tabindex="0" role="img" aria-label="{tip}"><title>{tip}</title>{bars}'
        f"{_mark(p.kind, cx, cy)}</g>"
    )


def _mark(kind: str, cx: float, cy: float) -> str:
    """Shape as well as colour says what a candidate is."""
    if kind == "original":
        d = 6.5
        return f'<path d="M{cx:.1f} {cy - d:.1f}l{d} {d}l-{d} {d}l-{d} -{d}z"/>'
    ring = f'<circle class="ring" cx="{cx:.1f}" cy="{cy:.1f}" r="11"/>' if kind == "chosen" else ""
    radius = {"chosen": 6.5, "front": 5.5}.get(kind, 4.5)
    return f'{ring}<circle class="point" cx="{cx:.1f}" cy="{cy:.1f}" r="{radius}"/>'


def _labels(points: Sequence[Dot], x_axis: Axis, y_axis: Axis, x: Scale, y: Scale) -> list[str]:
    """Names of the chosen, the original and of kept ones, where they hide nothing; the chosen one's first."""
    taken = [(x(p.values[x_axis.key][0]), y(p.values[y_axis.key][0])) for p in points]
    boxes: list[tuple[float, float, float, float]] = [(cx - 7, cy - 7, cx + 7, cy + 7) for cx, cy in taken]
    parts = []
    for p in sorted((p for p in points if p.kind != "other"), key=lambda p: p.kind != "chosen"):
        cx, cy = x(p.values[x_axis.key][0]), y(p.values[y_axis.key][0])
        name = "the original" if p.kind == "original" else p.name
        width = 7.2 * len(name)
        for anchor, dx, dy in (("start", 14, 4), ("end", -14, 4), ("start", 10, -14), ("end", -10, -14),
                               ("start", 10, 22), ("end", -10, 22)):  # fmt: skip
            left = cx + dx - (width if anchor == "end" else 0)
            box = (left, cy + dy - 12, left + width, cy + dy + 3)
            inside = box[0] >= _LEFT and box[2] <= WIDTH - 4 and box[1] >= _TOP and box[3] <= HEIGHT - _BOTTOM
            if inside and not any(_overlap(box, other) for other in boxes):
                boxes.append(box)
                parts.append(_text(cx + dx, cy + dy, anchor, name, f"label {p.kind}"))
                break
    return parts


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


# ---------------------------------------------------------------------------- small ones


def interval(before: Mapping[str, Any] | None, after: Mapping[str, Any], low: float) -> str:
    """Two bars with their intervals on a scale from `low` to 1: the original above, the variant below."""
    width, height = 240, 26

    def x(value: float) -> float:
        return 2 + (max(value, low) - low) / max(1 - low, 1e-9) * (width - 4)

    said = f"{text.figure(after, 'accuracy')}"
    if before is not None:
        said = f"before {text.figure(before, 'accuracy')}, after {said}"
    parts = [f'<svg viewBox="0 0 {width} {height}" class="interval" role="img" aria-label="{said}">']
    for figure, place, kind in ((before, 8, "before"), (after, 18, "after")):
        if figure is not None:
            parts.append(_line(kind, x(figure["low"]), place, x(figure["high"]), place))
            parts.append(f'<circle class="{kind}" cx="{x(figure["value"]):.1f}" cy="{place}" r="3.5"/>')
    return "".join([*parts, "</svg>"])
