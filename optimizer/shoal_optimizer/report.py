"""The report of a search: one self-contained HTML page, and the same as JSON.

The page asks nothing of the network, prints well and follows the reader's light or dark setting.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from shoal_optimizer.jobstate import write_atomic
from shoal_optimizer.objective import show

SCHEMA = 1
WIDTH, HEIGHT = 720, 320
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 16, 16, 44


@dataclass(frozen=True)
class Dot:
    """A candidate in the plot. `low`/`high` bound the latency, `accuracy_low`/`_high` the accuracy."""

    name: str
    latency: float
    low: float
    high: float
    accuracy: float
    accuracy_low: float
    accuracy_high: float
    kept: bool
    chosen: bool


def write(data: Mapping[str, Any], folder: Path) -> dict[str, str]:
    """Writes `report.html` and `report.json` into `folder`.

    Args:
        data: see `shoal_optimizer.summary.build`; everything JSON can hold.

    Returns:
        {"html": path, "json": path}.
    """
    paths = {"html": folder / "report.html", "json": folder / "report.json"}
    write_atomic(paths["json"], json.dumps(data, indent=1, sort_keys=True).encode())
    write_atomic(paths["html"], render(data).encode())
    return {name: str(path) for name, path in paths.items()}


def render(data: Mapping[str, Any]) -> str:
    """The page."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("shoal_optimizer", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(figure=figure, percent=percent, when=when, ago=seconds)
    environment.filters["metric_of"] = lambda value, metric: show(metric, value)
    template = environment.get_template("report.html.j2")
    plots = {entry["name"]: plot(dots(entry)) for entry in data["classes"]}
    return template.render(report=data, plots=plots)


# ---------------------------------------------------------------------------- figures for people


def figure(value: Mapping[str, Any] | None, metric: str) -> str:
    """A figure with its interval: "0.984 (0.96 to 0.994, n 250)"; "unmeasured" when there is none."""
    if value is None or value.get("value") is None:
        return "unmeasured"
    text = show(metric, value["value"])
    low, high, n = value.get("low"), value.get("high"), value.get("n")
    if low is None or high is None or low == high:
        return text
    spread = f"{show(metric, low)} to {show(metric, high)}"
    return f"{text} ({spread}, n {n})" if n else f"{text} ({spread})"


def percent(value: float | None) -> str:
    return "unmeasured" if value is None else f"{100 * value:.3g} %"


def when(milliseconds: float) -> str:
    return datetime.fromtimestamp(milliseconds / 1000, UTC).strftime("%Y-%m-%d %H:%M UTC")


def seconds(value: float) -> str:
    return f"{value:.1f} s" if value < 90 else f"{value / 60:.1f} min"


# ---------------------------------------------------------------------------- the plot


def dots(entry: Mapping[str, Any]) -> list[Dot]:
    """The candidates of one class that have both latency and accuracy."""
    kept = {item["name"] for item in entry["front"]}
    found = []
    for candidate in entry["candidates"]:
        latency, accuracy = candidate["latency_p95"], candidate["accuracy"]
        if latency is None or accuracy is None:
            continue
        found.append(
            Dot(
                candidate["name"],
                latency["value"],
                latency["low"],
                latency["high"],
                accuracy["value"],
                accuracy["low"],
                accuracy["high"],
                candidate["name"] in kept,
                candidate["name"] == entry["chosen"],
            )
        )
    return found


def plot(points: Sequence[Dot]) -> str:
    """SVG of accuracy over latency (logarithmic) with error bars; "" below two points."""
    if len(points) < 2:
        return ""
    left, right = _log_range([p.low for p in points], [p.high for p in points])
    bottom = min(p.accuracy_low for p in points)
    top = max(p.accuracy_high for p in points)
    margin = 0.06 * max(top - bottom, 1e-3)
    bottom, top = bottom - margin, top + margin

    def x(value: float) -> float:
        share = (math.log(max(value, left)) - math.log(left)) / (math.log(right) - math.log(left))
        return _LEFT + share * (WIDTH - _LEFT - _RIGHT)

    def y(value: float) -> float:
        return HEIGHT - _BOTTOM - (value - bottom) / (top - bottom) * (HEIGHT - _TOP - _BOTTOM)

    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="Accuracy over latency of {len(points)} '
        'candidates" class="plot">'
    ]
    parts += [_x_tick(x(v), show("latency_p95", v)) for v in _log_ticks(left, right)]
    parts += [_y_tick(y(v), f"{v:.3g}") for v in _ticks(bottom, top)]
    parts.append(
        f'<text class="axis" x="{WIDTH / 2:.0f}" y="{HEIGHT - 6}" text-anchor="middle">latency p95</text>'
    )
    for p in sorted(points, key=lambda p: (p.chosen, p.kept)):
        kind = "chosen" if p.chosen else "kept" if p.kept else "other"
        parts.append(
            f'<g class="{kind}"><title>{html.escape(p.name)}</title>'
            f"{_line('', x(p.low), y(p.accuracy), x(p.high), y(p.accuracy))}"
            f"{_line('', x(p.latency), y(p.accuracy_low), x(p.latency), y(p.accuracy_high))}"
            f'<circle cx="{x(p.latency):.1f}" cy="{y(p.accuracy):.1f}" r="{6 if p.chosen else 4.5}"/></g>'
        )
    chosen = next((p for p in points if p.chosen), None)
    if chosen is not None:
        side, offset = ("end", -10) if x(chosen.latency) > WIDTH / 2 else ("start", 10)
        parts.append(
            f'<text class="label" x="{x(chosen.latency) + offset:.1f}" y="{y(chosen.accuracy) - 10:.1f}" '
            f'text-anchor="{side}">{html.escape(chosen.name)}</text>'
        )
    return "".join([*parts, "</svg>"])


def _line(kind: str, x1: float, y1: float, x2: float, y2: float) -> str:
    name = f' class="{kind}"' if kind else ""
    return f'<line{name} x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _text(x: float, y: float, anchor: str, text: str) -> str:
    return f'<text class="axis" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(text)}</text>'


def _x_tick(place: float, text: str) -> str:
    foot = HEIGHT - _BOTTOM
    return _line("grid", place, _TOP, place, foot) + _text(place, foot + 16, "middle", text)


def _y_tick(place: float, text: str) -> str:
    return _line("grid", _LEFT, place, WIDTH - _RIGHT, place) + _text(_LEFT - 8, place + 4, "end", text)


def _log_range(lows: Sequence[float], highs: Sequence[float]) -> tuple[float, float]:
    low, high = max(min(lows), 1e-6), max(max(highs), 2e-6)
    return low * 0.85, max(high, low * 1.05) * 1.15


def _log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 of each decade inside the range."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found = [m * 10.0**d for d in decades for m in (1, 2, 5) if low <= m * 10.0**d <= high]
    return found or [math.sqrt(low * high)]


def _ticks(low: float, high: float) -> list[float]:
    """About five round values inside the range."""
    step = 10.0 ** math.floor(math.log10((high - low) / 3))
    step *= next(m for m in (1, 2, 5, 10) if (high - low) / (step * m) <= 6)
    first = math.ceil(low / step)
    return [i * step for i in range(first, math.floor(high / step) + 1)]
