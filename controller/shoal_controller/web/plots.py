"""Geometry of the SVG plots: pure functions from figures to coordinates; the macros only print them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from shoal_controller.api import schemas as s


@dataclass(frozen=True)
class Tick:
    at: float  # px
    label: str


@dataclass(frozen=True)
class Point:
    """One variant: `kind` is serving, front, other or plain."""

    name: str
    href: str
    x: float  # latency, ms
    y: float  # metric
    size: int  # bytes
    kind: str = "other"
    on_front: bool = False
    note: str = ""
    x_low: float | None = None
    x_high: float | None = None
    y_low: float | None = None
    y_high: float | None = None


@dataclass
class Mark:
    """A point with its place and its label's place, in px."""

    point: Point
    cx: float
    cy: float
    r: float
    x1: float
    x2: float
    y1: float
    y2: float
    label: str = ""
    lx: float = 0.0
    ly: float = 0.0
    anchor: str = "start"
    leader: bool = False


@dataclass
class Pareto:
    width: int
    height: int
    left: int
    right: int
    top: int
    bottom: int
    xticks: list[Tick] = field(default_factory=list)
    yticks: list[Tick] = field(default_factory=list)
    marks: list[Mark] = field(default_factory=list)
    front: str = ""  # points of the polyline
    limit_x: float | None = None  # the objective's latency bound, px
    limit_y: float | None = None
    limit_x_label: str = ""
    limit_y_label: str = ""


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers that cover [low, high]."""
    span = high - low or 1.0
    raw = span / max(1, count)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    ticks = []
    while first * step <= high + step * 1e-6:
        ticks.append(first * step)
        first += 1
    return ticks


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2, 5 per decade within [low, high]."""
    ticks = [
        m * 10.0**e
        for e in range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
        for m in (1, 2, 5)
    ]
    return [t for t in ticks if low * 0.999 <= t <= high * 1.001]


def _plain(value: float) -> str:
    return f"{value:.6f}".rstrip("0").rstrip(".") if value else "0"


def _metric_label(value: float, step: float, percent: bool) -> str:
    if percent:
        value, step = value * 100, step * 100
    places = max(0, -math.floor(math.log10(step) + 1e-9)) if step else 0
    return f"{value:.{places}f}{' %' if percent else ''}"


def pareto(
    points: Sequence[Point],
    *,
    width: int = 1120,
    height: int = 400,
    limit_x: float | None = None,
    limit_y: float | None = None,
    size_label: Callable[[int], str] = str,
) -> Pareto:
    """Accuracy against latency; area is size, the line joins the front. `points` must not be empty."""
    narrow = width < 600
    plot = Pareto(width, height, 56, 24 if narrow else 40, 28, 44)
    sx = _x_scale(plot, points, limit_x)
    sy = _y_scale(plot, points, limit_y)
    largest = max(p.size for p in points) or 1
    for p in points:
        r = max(5.0, (13 if narrow else 19) * math.sqrt(p.size / largest))
        mark = Mark(
            p, sx(p.x), sy(p.y), r,
            sx(p.x_low if p.x_low is not None else p.x), sx(p.x_high if p.x_high is not None else p.x),
            sy(p.y_low if p.y_low is not None else p.y), sy(p.y_high if p.y_high is not None else p.y),
        )  # fmt: skip
        mark.label = p.name if not p.note else f"{p.name} · {p.note}"
        plot.marks.append(mark)
    on_front = sorted((m for m in plot.marks if m.point.on_front), key=lambda m: m.cx)
    plot.front = " ".join(f"{m.cx:.1f},{m.cy:.1f}" for m in on_front)
    if limit_x is not None:
        plot.limit_x, plot.limit_x_label = sx(limit_x), f"at most {_plain(limit_x)} ms"
    if limit_y is not None:
        percent = max(p.y for p in points) <= 1
        plot.limit_y, plot.limit_y_label = sy(limit_y), f"at least {_metric_label(limit_y, 0.001, percent)}"
    _place_labels(plot, narrow)
    plot.marks.sort(key=lambda m: -m.r)  # small ones on top
    return plot


def _x_scale(plot: Pareto, points: Sequence[Point], limit: float | None) -> Callable[[float], float]:
    values = [v for p in points for v in (p.x, p.x_low, p.x_high) if v is not None and v > 0]
    values += [limit] if limit else []
    low, high = min(values), max(values)
    inner = plot.width - plot.left - plot.right
    if high / low > 5:
        a, b = math.log10(low / 1.35), math.log10(high * 1.5)

        def scale(v: float) -> float:
            return plot.left + inner * (math.log10(max(v, 1e-9)) - a) / (b - a)

        chosen = log_ticks(10**a, 10**b)
        if len(chosen) < 3:
            chosen = nice_ticks(10**a, 10**b)
    else:
        pad = (high - low) * 0.18 or high * 0.25
        a, b = max(0.0, low - pad), high + pad * 1.6

        def scale(v: float) -> float:
            return plot.left + inner * (v - a) / (b - a)

        chosen = nice_ticks(a, b, 4 if plot.width < 600 else 7)
    if len(chosen) > 10:
        chosen = [t for t in chosen if math.isclose(math.log10(t), round(math.log10(t)), abs_tol=1e-6)]
    if plot.width < 600 and len(chosen) > 5:
        chosen = chosen[:: math.ceil(len(chosen) / 5)]
    plot.xticks = [Tick(scale(t), f"{_plain(t)} ms") for t in chosen]
    return scale


def _y_scale(plot: Pareto, points: Sequence[Point], limit: float | None) -> Callable[[float], float]:
    centres = [p.y for p in points]
    values = centres + [v for p in points for v in (p.y_low, p.y_high) if v is not None]
    values += [limit] if limit is not None else []
    percent = max(centres) <= 1 and min(centres) >= 0
    low, high = min(values), max(values)
    pad = (high - low) * 0.12 or abs(high) * 0.02 or 1.0
    a, b = low - pad, min(high + pad, 1.004) if percent else high + pad
    inner = plot.height - plot.top - plot.bottom

    def scale(v: float) -> float:
        return plot.top + inner * (1 - (v - a) / (b - a))

    ticks = nice_ticks(a, b, 5)
    step = ticks[1] - ticks[0] if len(ticks) > 1 else 0.01
    plot.yticks = [Tick(scale(t), _metric_label(t, step, percent)) for t in ticks]
    return scale


# ------------------------------------------------------------------ labels

Box = tuple[float, float, float, float]


def _overlap(a: Box, b: Box) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def _place_labels(plot: Pareto, narrow: bool) -> None:
    """Give each label the free place nearest to its point; one that fits nowhere is left to the table."""
    per_char, line = (6.3, 15.0) if narrow else (6.8, 17.0)
    circles = [(m.cx - m.r, m.cy - m.r, m.cx + m.r, m.cy + m.r) for m in plot.marks]
    taken: list[Box] = []
    if plot.limit_x is not None:
        taken.append((plot.limit_x - 2, plot.top - 8, plot.limit_x + 2, float(plot.height - plot.bottom)))
        taken.append((plot.limit_x, plot.top - 20.0, plot.limit_x + 110, plot.top - 2.0))
    if plot.limit_y is not None:
        taken.append((float(plot.left), plot.limit_y - 2, plot.left + 100.0, plot.limit_y + 20))
    order = {"serving": 0, "front": 1, "plain": 2, "other": 3}
    for mark in sorted(plot.marks, key=lambda m: (order.get(m.point.kind, 3), m.cx)):
        if narrow:  # names are as wide as the plot: only what serves or is chosen is marked
            mark.label = mark.point.note
            if not mark.label:
                continue
        own = plot.marks.index(mark)
        others = [c for i, c in enumerate(circles) if i != own]
        best = _best_place(plot, mark, len(mark.label) * per_char, line, taken, others)
        if best is None:
            mark.label = ""
            continue
        mark.lx, mark.ly, mark.anchor, mark.leader, box = best
        taken.append(box)


def _best_place(
    plot: Pareto, mark: Mark, width: float, line: float, taken: list[Box], others: list[Box]
) -> tuple[float, float, str, bool, Box] | None:
    best: tuple[float, float, float, str, bool, Box] | None = None
    for gap in (5.0, 16.0, 30.0, 46.0):
        d = mark.r + gap
        for dx, dy, anchor in (
            (d, 0, "start"), (-d, 0, "end"), (0, -d, "middle"), (0, d + 4, "middle"),
            (d * 0.8, -d * 0.8, "start"), (d * 0.8, d * 0.8, "start"),
            (-d * 0.8, -d * 0.8, "end"), (-d * 0.8, d * 0.8, "end"),
        ):  # fmt: skip
            x, y = mark.cx + dx, mark.cy + dy
            left = x if anchor == "start" else x - width if anchor == "end" else x - width / 2
            box = (left, y - line / 2, left + width, y + line / 2)
            if box[0] < plot.left or box[2] > plot.width - 2:
                continue
            if box[1] < 2 or box[3] > plot.height - plot.bottom + 4:
                continue
            clash = sum(_overlap(box, b) for b in taken) * 3 + sum(_overlap(box, b) for b in others)
            cost = clash * 10 + gap + (2 if anchor == "middle" else 0)
            if best is None or cost < best[0]:
                best = (cost, x, y, anchor, gap > 10, box)
        if best is not None and best[0] < gap + 3:
            break
    if best is None or best[0] > 200:
        return None
    return best[1], best[2] + line * 0.3, best[3], best[4], best[5]


# ------------------------------------------------------------------ intervals and lines


@dataclass(frozen=True)
class Forest:
    """One interval on a scale that its column shares; all in px of a `width` x 28 drawing."""

    width: int
    zero: float
    gate: float | None
    value: float | None
    low: float | None
    high: float | None
    beyond: bool  # the interval lies wholly beyond the gate


def forest(effects: Sequence[s.Effect], width: int = 170) -> list[Forest]:
    """Effects of one name in several waves on one shared scale that shows 0 and the gate."""
    values = [0.0]
    for e in effects:
        values += [v for v in (e.value, e.low, e.high, e.gate) if v is not None and math.isfinite(v)]
    low, high = min(values), max(values)
    pad = (high - low) * 0.08 or 1.0
    low, high = low - pad, high + pad

    def at(v: float | None) -> float | None:
        if v is None or not math.isfinite(v):
            return None
        return round((v - low) / (high - low) * width, 1)

    return [
        Forest(width, at(0.0) or 0.0, at(e.gate), at(e.value), at(e.low), at(e.high), breaks(e))
        for e in effects
    ]


def breaks(effect: s.Effect) -> bool:
    """Whether the whole interval is on the bad side of the gate."""
    if effect.gate is None or effect.low is None or effect.high is None:
        return False
    return effect.low > effect.gate if effect.gate > 0 else effect.high < effect.gate


def spark(
    values: Sequence[float | None], width: int = 240, height: int = 48
) -> tuple[str, str, float, float] | None:
    """A line for the newest windows: (path, area path, x and y of the last value); None below two values.

    Missing windows break the line.
    """
    known = [v for v in values if v is not None and math.isfinite(v)]
    if len(known) < 2:
        return None
    low, high = min(known), max(known)
    low, high = (low - 1, high + 1) if low == high else (low, high)
    step = (width - 6) / max(1, len(values) - 1)
    path, x, y, pen = "", 0.0, 0.0, "M"
    first_x = None
    for index, value in enumerate(values):
        if value is None or not math.isfinite(value):
            pen = "M"
            continue
        x, y = 2 + index * step, height - 4 - (value - low) / (high - low) * (height - 10)
        first_x = x if first_x is None else first_x
        path += f"{pen}{x:.1f} {y:.1f}"
        pen = "L"
    area = f"{path}L{x:.1f} {height}L{first_x:.1f} {height}Z" if path.count("M") == 1 else ""
    return path, area, round(x, 1), round(y, 1)
