"""The fleet in one sentence, and what to do next."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from shoal_controller import metrics
from shoal_controller.api import schemas
from shoal_controller.api.deps import ServicesDep
from shoal_controller.device_status import STATUSES
from shoal_controller.devices import DeviceView
from shoal_controller.services import Services
from shoal_controller.store.tables import Endpoint, Finding, Model, Optimization, Rollout, Version
from shoal_optimizer import objective as objectives
from shoal_protos import __version__
from shoal_protos.errors import ShoalError

router = APIRouter(tags=["status"])

WORST = ("degraded", "offline", "drifting", "updating")


@dataclass(frozen=True)
class Counts:
    """What the sentence is made of."""

    devices: dict[str, int]
    findings: int
    critical: int
    rollouts: int
    paused: int
    optimizations: int
    failed_versions: int
    models: int
    endpoints: int
    assigned: int

    @property
    def total(self) -> int:
        """Devices that belong to the fleet."""
        return sum(count for status, count in self.devices.items() if status != "revoked")


@router.get("/status")
def get_status(services: ServicesDep) -> schemas.Status:
    """Counts, every endpoint against its objective, one sentence, and the next step."""
    views = services.fleet.views()
    with services.store.read() as session:
        counts = _counts(session, views)
        endpoints = _endpoints(session, services)
    return schemas.Status(
        fleet=services.keys.fleet,
        version=__version__,
        devices=counts.devices,
        findings_open=counts.findings,
        rollouts_running=counts.rollouts,
        optimizations_running=counts.optimizations,
        endpoints=endpoints,
        sentence=sentence(counts),
        next_step=next_step(counts),
        needs_attention=needs_attention(counts, endpoints),
    )


def _counts(session: Session, views: list[DeviceView]) -> Counts:
    def number(column: Any, *conditions: Any) -> int:
        return session.scalar(select(func.count(column)).where(*conditions)) or 0

    devices = dict.fromkeys(STATUSES, 0)
    for view in views:
        devices[view.status] += 1
    unresolved = Finding.state.in_(("open", "acting"))
    return Counts(
        devices=devices,
        findings=number(Finding.id, unresolved),
        critical=number(Finding.id, unresolved, Finding.severity == "critical"),
        rollouts=number(Rollout.id, Rollout.state.in_(("running", "stopping"))),
        paused=number(Rollout.id, Rollout.state == "paused"),
        optimizations=number(Optimization.id, Optimization.state.in_(("queued", "running", "waiting"))),
        failed_versions=number(Version.id, Version.state == "failed"),
        models=number(Model.id),
        endpoints=number(Endpoint.id),
        assigned=number(Endpoint.id, Endpoint.assignment != ""),
    )


def _endpoints(session: Session, services: Services) -> list[dict[str, Any]]:
    figures = metrics.by(0, services.recent.figures())
    found = []
    for row in session.scalars(select(Endpoint).order_by(Endpoint.name)):
        current = figures.get(row.name, metrics.Figures())
        accuracy = current.accuracy()
        found.append(
            {
                "name": row.name,
                "objective": row.objective,
                "met": objective_met(row.objective, current),
                "p95_ms": current.p95_ms,
                "error_share": current.error_share,
                "accuracy": accuracy["value"] if accuracy else None,
            }
        )
    return found


def objective_met(text: str, figures: metrics.Figures) -> bool | None:
    """Whether what was measured lately meets the objective; None = nothing measured that it bounds."""
    accuracy = figures.accuracy()
    measured: dict[str, float | None] = {
        "latency_p50": figures.p50_ms,
        "latency_p95": figures.p95_ms,
        # A promise is broken only when the whole interval lies below it.
        "accuracy": accuracy["high"] if accuracy else None,
    }
    try:
        constraints = objectives.parse(text).constraints
    except ShoalError:
        return None
    judged = [c.excess(value) == 0 for c in constraints if (value := measured.get(c.metric)) is not None]
    return all(judged) if judged else None


def sentence(counts: Counts) -> str:
    """What a person should know first. Pure."""
    if not counts.total:
        return "No device has joined yet."
    if counts.devices.get("healthy") == counts.total:
        parts = [f"All {counts.total} devices are healthy" if counts.total > 1 else "The device is healthy"]
    else:
        worse = [f"{counts.devices[name]} {name}" for name in WORST if counts.devices.get(name)]
        parts = [f"{counts.devices.get('healthy', 0)} of {counts.total} devices healthy", *worse]
    if counts.rollouts:
        parts.append(_many(counts.rollouts, "rollout") + " running")
    if counts.findings:
        parts.append(_many(counts.findings, "open finding"))
    return ", ".join(parts) + "."


def _many(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def next_step(counts: Counts) -> str:
    """One command, the most useful now; "" when there is nothing to do. Pure."""
    steps = (
        (not counts.total, "shoal token create --join"),
        (not counts.models, "shoal model push NAME TASK.py"),
        (counts.failed_versions > 0 and not counts.endpoints, "shoal model get NAME"),
        (counts.models > 0 and not counts.endpoints, "shoal endpoint create NAME --model MODEL"),
        (counts.paused > 0, "shoal rollout list"),
        (counts.findings > 0, "shoal finding list"),
        (counts.devices.get("degraded", 0) > 0, "shoal device list --filter status:degraded"),
        (counts.devices.get("offline", 0) > 0, "shoal device list --filter status:offline"),
        (counts.assigned < counts.endpoints and not counts.rollouts, "shoal rollout create ENDPOINT"),
        (counts.rollouts > 0, "shoal rollout list"),
    )
    return next((command for needed, command in steps if needed), "")


def needs_attention(counts: Counts, endpoints: list[dict[str, Any]]) -> bool:
    """Whether a person should look now. Pure."""
    return bool(
        counts.devices.get("degraded")
        or counts.devices.get("offline")
        or counts.findings
        or counts.paused
        or any(endpoint["met"] is False for endpoint in endpoints)
    )
