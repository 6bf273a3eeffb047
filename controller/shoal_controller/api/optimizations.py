"""Optimizations: queued work, its progress and its report."""

from __future__ import annotations

import base64
from typing import Any

from fastapi import APIRouter
from fastapi.responses import Response
from sqlalchemy import select
from sqlalchemy.orm import Session

from shoal_controller import endpoints, optimizations, registry
from shoal_controller.api import schemas
from shoal_controller.api.deps import ActorDep, ServicesDep
from shoal_controller.store.repositories import find
from shoal_controller.store.tables import Device, Endpoint, Model, Optimization, Trial, Version
from shoal_controller.trials import figures_of
from shoal_optimizer.report import policy as report_policy
from shoal_protos.errors import InvalidInput, NotFound
from shoal_protos.v1 import telemetry_pb2

router = APIRouter(tags=["optimizations"])

# A report is one self-contained page; nothing in it may reach out, and of scripts only its own runs.
REPORT_POLICY = report_policy()


@router.get("/optimizations")
def list_optimizations(services: ServicesDep) -> list[schemas.Optimization]:
    """Newest first."""
    with services.store.read() as session:
        query = select(Optimization).order_by(Optimization.created_ms.desc(), Optimization.id.desc())
        return [optimization_view(session, row) for row in session.scalars(query.limit(500))]


@router.get("/optimizations/{key}")
def get_optimization(key: str, services: ServicesDep) -> schemas.Optimization:
    with services.store.read() as session:
        return optimization_view(session, find(session, Optimization, key))


@router.post("/optimizations", status_code=201)
def start_optimization(
    body: schemas.OptimizationCreate, services: ServicesDep, actor: ActorDep
) -> schemas.Optimization:
    with services.store.write() as session:
        model = registry.model_by_name(session, body.model)
        version = registry.version_by_number(session, model, body.version)
        endpoint = endpoints.by_name(session, body.endpoint) if body.endpoint else None
        if endpoint is not None:
            endpoints.check_signature(session, endpoint, version)
        _check_classes(session, body.classes)
        row = optimizations.enqueue(
            session,
            services.clock,
            kind="optimize",
            version=version,
            actor=actor,
            endpoint=endpoint.id if endpoint is not None else "",
            objective=body.objective
            or (endpoint.objective if endpoint is not None else _objective(session, model)),
            spec={"minutes": body.minutes, "seed": body.seed, "classes": body.classes},
        )
        return optimization_view(session, row)


def _check_classes(session: Session, classes: list[str] | None) -> None:
    known = set(session.scalars(select(Device.profile_class).distinct()))
    for name in classes or []:
        if name not in known:
            raise InvalidInput(
                f"No device of this fleet is of the class '{name[:80]}'.",
                f"Classes: {', '.join(sorted(known))}.",
            )


def _objective(session: Session, model: Model) -> str:
    """The objective of the model's only endpoint, else the default."""
    found = session.scalars(select(Endpoint.objective).where(Endpoint.model == model.id)).all()
    return found[0] if len(found) == 1 else ""


@router.post("/optimizations/{key}/cancel")
def cancel_optimization(
    key: str, services: ServicesDep, actor: ActorDep, body: schemas.Reason | None = None
) -> schemas.Optimization:
    with services.store.write() as session:
        row = find(session, Optimization, key)
        optimizations.cancel(
            session, row, services.clock, actor=actor, reason=body.reason if body is not None else ""
        )
        view = optimization_view(session, row)
    services.publish()
    return view


@router.get("/optimizations/{key}/report", response_class=Response)
def report(key: str, services: ServicesDep) -> Response:
    """The HTML report that the job wrote."""
    with services.store.read() as session:
        row = find(session, Optimization, key)
        digest = (row.result.get("report") or {}).get("html")
    if not digest:
        raise NotFound(f"The optimization {row.id} has no report.", "It has one when it is done.")
    return Response(
        services.blobs.read(digest),
        media_type="text/html",
        headers={"Content-Security-Policy": REPORT_POLICY},
    )


def optimization_view(session: Session, row: Optimization) -> schemas.Optimization:
    version = session.get(Version, row.version)
    assert version is not None
    model = session.get(Model, version.model)
    assert model is not None
    endpoint = session.get(Endpoint, row.endpoint) if row.endpoint else None
    trials = session.scalars(
        select(Trial).where(Trial.optimization == row.id).order_by(Trial.created_ms, Trial.id)
    )
    return schemas.Optimization(
        id=row.id,
        kind=row.kind,
        model=model.name,
        version=version.number,
        endpoint=endpoint.name if endpoint is not None else "",
        objective=row.objective,
        state=row.state,
        progress={k: v for k, v in row.progress.items() if k != "read"},
        result=row.result,
        error=row.error,
        release=str(row.result.get("release") or ""),
        trials=[_trial(session, trial) for trial in trials],
        created_ms=row.created_ms,
        started_ms=row.started_ms,
        finished_ms=row.finished_ms,
    )


def _trial(session: Session, row: Trial) -> dict[str, Any]:
    device = session.get(Device, row.device) if row.device else None
    found: dict[str, Any] = {
        "id": row.id,
        "bundle": row.bundle,
        "profile_class": row.profile_class,
        "kind": row.kind,
        "state": row.state,
        "device": device.name if device is not None else "",
        "created_ms": row.created_ms,
    }
    if row.result:
        result = telemetry_pb2.TrialResult.FromString(row.result)
        found["figures"] = figures_of(result)
        found["winner"] = result.timing.winner if result.HasField("timing") else ""
        found["error"] = result.error
        found["result"] = base64.b64encode(row.result).decode() if len(row.result) < 4096 else ""
    return found
