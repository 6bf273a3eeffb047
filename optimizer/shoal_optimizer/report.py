"""The report of a search: one self-contained HTML page, and the same as JSON.

The page asks nothing of the network, prints well, follows the reader's light or dark setting and works
without its one small script, which adds tooltips and arrow keys.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from markupsafe import Markup, escape

from shoal_optimizer import objective
from shoal_optimizer.jobstate import write_atomic
from shoal_optimizer.objective import Constraint, show
from shoal_optimizer.reporting import charts, facts, text
from shoal_protos.errors import InvalidInput

SCHEMA = 2
_TEMPLATES = Path(__file__).parent / "templates"


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


@cache
def script() -> str:
    """The page's one script."""
    return (_TEMPLATES / "report.js").read_text()


def policy() -> str:
    """The Content-Security-Policy under which a server should give the page: it reaches nothing, and runs
    this version's script alone."""
    digest = base64.b64encode(hashlib.sha256(script().encode()).digest()).decode()
    return (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; img-src data:; "
        "sandbox allow-scripts"
    )


# ---------------------------------------------------------------------------- the page


@dataclass(frozen=True)
class View:
    """One profile class as the page shows it."""

    entry: Mapping[str, Any]
    tiles: Sequence[facts.Tile]
    panes: Sequence[charts.Pane]
    limits: Sequence[Constraint]
    original: str
    changes: Sequence[facts.Change]
    who: str
    lowest: float  # where the scale of the recalls begins
    techniques: Sequence[facts.Technique]
    rows: Sequence[Mapping[str, Any]]


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
    environment.filters.update(
        figure=text.figure, spread=spread, percent=text.percent, points=text.points, times=text.times,
        number=text.number, when=text.when, ago=text.seconds, step=text.step, predicted=predicted,
        context=context, lost=lost,
    )  # fmt: skip
    environment.filters["metric_of"] = lambda value, metric: show(metric, value)
    metric = str(data.get("metric", "accuracy"))
    graph = data.get("graph")
    sensitivity = sensitivity_table(data.get("sensitivity"))
    return environment.get_template("report.html.j2").render(
        report=data,
        views=[view(entry, metric, limits(str(data["objective"]))) for entry in data["classes"]],
        metric=text.metric_label(metric),
        style=(_TEMPLATES / "report.css").read_text(),
        script=script(),
        interval=charts.interval,
        layers=facts.layers(graph) if graph else [],
        own_share=facts.own_share(graph) if graph else 0.0,
        sensitivity=sensitivity,
        heat=lambda loss: min(80, max(0, round(400 * (loss or 0.0)))),
    )


def view(entry: Mapping[str, Any], metric: str, bounds: Sequence[Constraint]) -> View:
    """What the page shows of one class."""
    base, mine = facts.original(entry), facts.chosen(entry)
    name = "" if base is None else str(base["name"])
    changes = [] if mine is None else facts.per_class(mine, base)
    lows = [row["low"] for c in changes for row in (c.before, c.after) if row is not None]
    panes = charts.panes(charts.dots(entry, metric, name), metric, bounds)
    return View(
        entry,
        facts.tiles(entry, metric),
        panes,
        bounds,
        name,
        changes,
        facts.who(changes),
        min(lows, default=0.0) - 0.02,
        facts.techniques(entry) if len(entry["candidates"]) > 1 else [],
        entry["candidates"],
    )


def spread(value: Mapping[str, Any] | None, metric: str) -> Markup:
    """A figure with its interval in a line of its own below."""
    lead, bracket, rest = text.figure(value, metric).partition(" (")
    return Markup("{}<small>{}</small>").format(lead, rest.removesuffix(")")) if bracket else escape(lead)


def limits(text_: str) -> list[Constraint]:
    """The objective's bounds; none where this version cannot read it."""
    try:
        return [c for c in objective.parse(text_).constraints if c.metric in charts.axes("accuracy")]
    except InvalidInput:
        return []


def predicted(row: Mapping[str, Any]) -> str:
    """What a table predicted for a candidate, with the prediction's error: "0.8 ms ± 12 %, was 9 % off"."""
    found = row.get("predicted")
    if not found:
        return ""
    said = f"{show('latency_p50', found['ms'])} ± {100 * found['relative_error']:.2g} %"
    measured = facts.value(row, "latency_p50")
    if measured:
        said += f", was {100 * abs(found['ms'] / measured - 1):.2g} % off"
    return said


def context(found: Mapping[str, str]) -> str:
    """Under what a figure was measured, in a few words."""
    parts = [f"{found.get('runtime', '')} {found.get('runtime_version', '')}".strip()]
    threads = found.get("threads", "")
    parts += [f"{threads} thread{'' if threads == '1' else 's'}"] if threads else []
    parts += [f"load {found['load']}"] if found.get("load") else []
    return ", ".join(part for part in parts if part)


def lost(loss: float | None) -> str:
    return "" if loss is None else f"{100 * loss:.2g}"


def sensitivity_table(found: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Rows of (layer, loss at each ratio) from a `SensitivityMap`'s JSON."""
    if not found or not found.get("layers"):
        return None
    layers: Mapping[str, Mapping[str, float]] = found["layers"]
    ratios = sorted({float(ratio) for losses in layers.values() for ratio in losses})
    rows = [
        (name, [{float(r): loss for r, loss in losses.items()}.get(ratio) for ratio in ratios])
        for name, losses in layers.items()
    ]
    return {"ratios": ratios, "rows": rows}
