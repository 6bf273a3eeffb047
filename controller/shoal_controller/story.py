"""The loop as a story: finding -> optimization -> rollout -> effect, each with its figures."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from shoal_controller.rollouts import service, statistics
from shoal_controller.store.tables import (
    Assignment,
    Endpoint,
    Finding,
    Optimization,
    Rollout,
    RolloutDevice,
    Variant,
    Version,
    Window,
)

MAX_ITEMS = 400
TITLES = {
    "input_drift": "Inputs drifted",
    "accuracy_drop": "Accuracy fell",
    "latency": "Too slow",
    "error_rate": "Requests fail",
    "new_class": "A new kind of device",
    "device_failed": "A device failed",
    "clock_wrong": "A clock is wrong",
}


@dataclass(frozen=True)
class Item:
    """One paragraph. kind: finding, optimization, rollout, effect. Times in Unix milliseconds."""

    time_ms: int
    kind: str
    title: str
    text: str
    link: str
    actor: str
    figures: dict[str, float | None] = field(default_factory=dict)


def tell(session: Session, endpoint: Endpoint | None = None) -> list[Item]:
    """All paragraphs, oldest first; of one endpoint, or of the fleet."""
    items = [
        *_findings(session, endpoint),
        *_optimizations(session, endpoint),
        *_rollouts(session, endpoint),
        *_effects(session, endpoint),
    ]
    return sorted(items, key=lambda item: item.time_ms)[-MAX_ITEMS:]


# ------------------------------------------------------------------ findings


def _findings(session: Session, endpoint: Endpoint | None) -> Iterable[Item]:
    query = select(Finding).order_by(Finding.opened_ms.desc()).limit(MAX_ITEMS)
    if endpoint is not None:
        query = query.where(Finding.endpoint == endpoint.id)
    for row in session.scalars(query):
        action = str(row.action.get("sentence", ""))
        yield Item(
            row.opened_ms,
            "finding",
            TITLES.get(row.kind, row.kind.replace("_", " ")),
            f"{row.sentence} {action}".strip(),
            f"/findings/{row.id}",
            "loop",
            _numbers(row.evidence),
        )


def _numbers(values: dict[str, Any]) -> dict[str, float | None]:
    return {
        k: float(v)
        for k, v in values.items()
        if isinstance(v, (int, float)) and not isinstance(v, bool) and not k.endswith("_ms")
    }


# ------------------------------------------------------------------ optimizations


def _optimizations(session: Session, endpoint: Endpoint | None) -> Iterable[Item]:
    query = select(Optimization).order_by(Optimization.created_ms.desc()).limit(MAX_ITEMS)
    if endpoint is not None:
        own = select(Version.id).where(Version.model == endpoint.model)
        query = query.where(Optimization.version.in_(own), Optimization.endpoint.in_(("", endpoint.id)))
    for row in session.scalars(query):
        yield Item(
            row.finished_ms or row.started_ms or row.created_ms,
            "optimization",
            _optimization_title(session, row),
            _optimization_text(session, row),
            f"/optimizations/{row.id}",
            "loop" if row.spec.get("finding") else "worker",
            _optimization_figures(session, row),
        )


def _optimization_title(session: Session, row: Optimization) -> str:
    version = session.get(Version, row.version)
    number = version.number if version is not None else 0
    verb = {
        "ingest": f"Version {number} taken in",
        "optimize": f"Version {number} optimized",
        "adapt": f"Version {number} adapted to the field",
    }.get(row.kind, row.kind)
    return verb if row.state == "done" else f"{verb}: {row.state}"


def _optimization_text(session: Session, row: Optimization) -> str:
    if row.state == "failed":
        return row.error.splitlines()[0] if row.error else "It failed."
    if row.state != "done":
        step = str(row.progress.get("message") or row.progress.get("step") or "")
        return f"{row.id} is {row.state}{f': {step}' if step else ''}."
    parts = []
    if row.kind == "adapt":
        parts.append(str(row.result.get("sentence") or ""))
    version = session.get(Version, str(row.result.get("version") or row.version))
    if version is not None and version.baseline.get("value") is not None:
        b = version.baseline
        interval = f" ({100 * b['low']:.1f} to {100 * b['high']:.1f})" if b.get("low") is not None else ""
        parts.append(f"The original of version {version.number} reaches {100 * b['value']:.1f} %{interval}.")
    count = len(
        session.scalars(select(Variant.id).where(Variant.version == version.id)).all()
        if version is not None
        else []
    )
    fronts = row.result.get("fronts") or {}
    if fronts:
        parts.append(f"{count} variants for {len(fronts)} class{'es' if len(fronts) != 1 else ''}.")
    seconds = (row.finished_ms - row.started_ms) / 1000 if row.started_ms else 0
    if seconds > 0:
        parts.append(f"It took {seconds:.0f} s.")
    return " ".join(part for part in parts if part)


def _optimization_figures(session: Session, row: Optimization) -> dict[str, float | None]:
    figures: dict[str, float | None] = {}
    if row.started_ms and row.finished_ms:
        figures["seconds"] = (row.finished_ms - row.started_ms) / 1000
    evidence = row.result.get("evidence") or {}
    for name in ("before", "after", "labels"):
        value = evidence.get(name)
        value = value.get("value") if isinstance(value, dict) else value
        if isinstance(value, (int, float)):
            figures[name] = float(value)
    return figures


# ------------------------------------------------------------------ rollouts


def _rollouts(session: Session, endpoint: Endpoint | None) -> Iterable[Item]:
    for row in _rollout_rows(session, endpoint):
        old, new = service.labels_of(session, row)
        verb = {
            "promoted": "was promoted",
            "rolled_back": "went back",
            "aborted": "was aborted",
            "running": "is under way",
            "paused": "is paused",
            "stopping": "is going back",
        }.get(row.state, row.state)
        yield Item(
            row.finished_ms or row.created_ms,
            "rollout",
            f"Rollout of {new} {verb}",
            f"From {old} to {new}. {row.reason} {row.verdict.get('sentence', '')}".strip(),
            f"/rollouts/{row.id}",
            row.actor,
            {
                effect["name"]: effect["value"]
                for effect in row.verdict.get("effects") or []
                if effect.get("value") is not None
            },
        )


def _rollout_rows(session: Session, endpoint: Endpoint | None) -> list[Rollout]:
    query = select(Rollout).order_by(Rollout.created_ms.desc()).limit(MAX_ITEMS)
    if endpoint is not None:
        query = query.where(Rollout.endpoint == endpoint.id)
    return list(session.scalars(query))


# ------------------------------------------------------------------ effects


def _effects(session: Session, endpoint: Endpoint | None) -> Iterable[Item]:
    """What a promoted rollout that answers a finding changed, from labels posted before and after."""
    for row in _rollout_rows(session, endpoint):
        if row.state != "promoted" or not row.finding:
            continue
        finding, own = session.get(Finding, row.finding), session.get(Endpoint, row.endpoint)
        assert own is not None
        since = finding.opened_ms if finding is not None else row.created_ms
        before = _accuracy(session, own.name, row.from_assignment, 0, since)
        during = _accuracy(session, own.name, row.from_assignment, since, 1 << 62)
        after = _accuracy(session, own.name, row.to_assignment, row.created_ms, 1 << 62)
        found = {"before": before, "during": during, "after": after}
        known = {name: e for name, e in found.items() if e is not None}
        if "after" not in known:
            text = (
                "No labels were posted since, so the accuracy of the new version in the field is unmeasured."
            )
        else:
            text = (
                "Accuracy on posted labels: "
                + ", ".join(
                    f"{name} {100 * e.value:.1f} % ({100 * e.low:.1f} to {100 * e.high:.1f}, {e.n} labels)"
                    for name, e in known.items()
                )
                + "."
            )
        devices = session.scalars(select(RolloutDevice.device).where(RolloutDevice.rollout == row.id)).all()
        yield Item(
            (row.finished_ms or row.created_ms) + 1,
            "effect",
            f"The effect on {len(devices)} device{'s' if len(devices) != 1 else ''}",
            text,
            f"/endpoints/{own.name}",
            "loop",
            {f"accuracy_{name}": e.value for name, e in known.items()},
        )


def _accuracy(
    session: Session, endpoint: str, assignment: str, since_ms: int, until_ms: int
) -> statistics.Estimate | None:
    row = session.get(Assignment, assignment) if assignment else None
    if row is None:
        return None
    variants = [session.get(Variant, key) for key in row.choice.values()]
    bundles = {v.bundle for v in variants if v is not None}
    sums = session.execute(
        select(Window.correct, Window.labelled).where(
            Window.endpoint == endpoint,
            Window.bundle.in_(bundles),
            Window.end_ms > since_ms,
            Window.end_ms <= until_ms,
            Window.labelled > 0,
        )
    ).all()
    return statistics.share(sum(r[0] for r in sums), sum(r[1] for r in sums))
