"""What the model and endpoint pages print: pure functions over the API's answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from shoal_controller.api import schemas as s
from shoal_controller.web import plots, view


@dataclass(frozen=True)
class Row:
    """A variant with its figures for the class on show."""

    variant: s.Variant
    figures: s.VariantFigures
    kind: str  # serving, front, plain, other
    marks: tuple[str, ...]  # what the state column says


def choose_version(model: s.ModelDetail, number: int | None) -> s.Version | None:
    """The asked version, else the newest ready one, else the newest."""
    newest = sorted(model.version_list, key=lambda v: -v.number)
    if number is not None:
        return next((v for v in newest if v.number == number), None)
    return next((v for v in newest if v.state == "ready"), newest[0] if newest else None)


def _row(variant: s.Variant, figures: s.VariantFigures) -> Row:
    kind = (
        "serving"
        if figures.serving
        else "front"
        if figures.on_front
        else "plain"
        if variant.plain
        else "other"
    )
    marks = []
    if figures.serving:
        marks.append(f"serving on {figures.serving:,}")
    if figures.chosen:
        marks.append("chosen")
    if variant.plain:
        marks.append("converted only")
    if figures.on_front and not figures.serving:
        marks.append("on the front")
    if not figures.on_front and _measured(figures):
        marks.append("dominated")
    return Row(variant, figures, kind, tuple(marks))


def _measured(figures: s.VariantFigures) -> bool:
    accuracy, latency = figures.accuracy, figures.latency_p95_ms
    return bool(accuracy and latency and accuracy.value is not None and latency.value is not None)


def _point(row: Row) -> plots.Point:
    accuracy, latency = row.figures.accuracy, row.figures.latency_p95_ms
    assert accuracy is not None and latency is not None
    assert accuracy.value is not None and latency.value is not None
    return plots.Point(
        name=row.variant.name, href=f"#{row.variant.id}", x=latency.value, y=accuracy.value,
        size=row.variant.wire_bytes or row.variant.size_bytes, kind=row.kind, on_front=row.figures.on_front,
        note="serving" if row.figures.serving else "chosen" if row.figures.chosen else "",
        x_low=latency.low, x_high=latency.high, y_low=accuracy.low, y_high=accuracy.high,
    )  # fmt: skip


def context(
    model: s.ModelDetail,
    version: s.Version | None,
    variants: Sequence[s.Variant],
    endpoints: Sequence[s.Endpoint],
    wanted: str | None,
) -> dict[str, Any]:
    """Template context of `/models/{name}`: class tabs, plots (wide and narrow), rows of the table."""
    counts = Counter(f.profile_class for v in variants for f in v.classes)
    classes = sorted(counts)
    shown = wanted if wanted in counts else classes[0] if classes else ""
    rows = [_row(v, f) for v in variants for f in v.classes if f.profile_class == shown]
    rows.sort(key=_order)
    points = [_point(row) for row in rows if _measured(row.figures)]
    objective = endpoints[0].objective if endpoints else ""
    latency, metric = view.limit(objective, "latency_p95"), view.limit(objective, "accuracy")
    limit_x = latency[1] if latency else None
    limit_y = metric[1] if metric and metric[1] > 0 else None
    return {
        "model": model, "version": version, "classes": classes, "counts": counts, "shown": shown,
        "rows": rows, "objective": objective, "endpoints": endpoints,
        "plots_drawn": [
            ("wide", plots.pareto(points, limit_x=limit_x, limit_y=limit_y)),
            ("narrow", plots.pareto(points, width=360, height=340, limit_x=limit_x, limit_y=limit_y)),
        ] if points else [],
    }  # fmt: skip


def _order(row: Row) -> tuple[int, float]:
    latency = row.figures.latency_p95_ms
    unmeasured = latency is None or latency.value is None
    return (int(unmeasured), latency.value or 0.0 if latency and latency.value is not None else 0.0)


def version_split(variants: Sequence[s.Variant]) -> list[tuple[int, int]]:
    """Which version how many devices serve now, newest first."""
    split: Counter[int] = Counter()
    for variant in variants:
        split[variant.version] += sum(f.serving for f in variant.classes)
    return sorted(((v, n) for v, n in split.items() if n), reverse=True)


def chosen_rows(endpoint: s.Endpoint, variants: Sequence[s.Variant]) -> list[dict[str, Any]]:
    """Per class of the endpoint: the chosen variant and its figures."""
    rows = []
    for profile_class, name in sorted(endpoint.choice.items()):
        fitting = [v for v in variants if v.name == name and v.version == endpoint.version] or [
            v for v in variants if v.name == name
        ]
        variant = fitting[0] if fitting else None
        figures = (
            next((f for f in variant.classes if f.profile_class == profile_class), None) if variant else None
        )
        rows.append({"profile_class": profile_class, "name": name, "variant": variant, "figures": figures})
    return rows
