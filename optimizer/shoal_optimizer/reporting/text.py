"""Figures for people."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from shoal_optimizer.objective import show

METRICS = {"accuracy": "Accuracy", "map50": "mAP at IoU 0.5", "r2": "R²", "metric": "The task's metric"}
UNMEASURED = "unmeasured"


def metric_label(name: str) -> str:
    """The task's metric as a column's name."""
    return METRICS.get(name, name)


def figure(value: Mapping[str, Any] | None, metric: str) -> str:
    """A figure with its interval: "0.984 (0.96 to 0.994, n 250)"; "unmeasured" when there is none."""
    if value is None or value.get("value") is None:
        return UNMEASURED
    text = show(metric, value["value"])
    low, high, n = value.get("low"), value.get("high"), value.get("n")
    if low is None or high is None or low == high:
        return text
    spread = f"{show(metric, low)} to {show(metric, high)}"
    return f"{text} ({spread}, n {n})" if n else f"{text} ({spread})"


def percent(value: float | None) -> str:
    return UNMEASURED if value is None else f"{100 * value:.3g} %"


def points(difference: float | None) -> str:
    """A difference of shares in points: "+0.4 points", "no change"."""
    if difference is None:
        return UNMEASURED
    if abs(difference) < 5e-5:
        return "no change"
    return f"{'+' if difference > 0 else '−'}{abs(100 * difference):.3g} points"


def times(ratio: float | None, better: str, worse: str) -> str:
    """A ratio above 1 as "4.2x smaller", below 1 as "1.3x larger"."""
    if ratio is None or ratio <= 0:
        return ""
    if 0.995 < ratio < 1.005:
        return "the same"
    return f"{ratio:.3g}x {better}" if ratio > 1 else f"{1 / ratio:.3g}x {worse}"


def number(value: float) -> str:
    """A count with a short unit: 1.23 M."""
    for unit, factor in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= factor:
            return f"{value / factor:.3g} {unit}"
    return f"{value:.0f}"


def when(milliseconds: float) -> str:
    return datetime.fromtimestamp(milliseconds / 1000, UTC).strftime("%Y-%m-%d %H:%M UTC")


def seconds(value: float) -> str:
    return f"{value:.1f} s" if value < 90 else f"{value / 60:.1f} min"


def step(raw: Mapping[str, Any]) -> str:
    """One step of a recipe: "channel_pruning(ratio=0.5)"."""
    params = ", ".join(f"{name}={value}" for name, value in raw.get("params", {}).items())
    return f"{raw['technique']}({params})"
