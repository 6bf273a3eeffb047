"""Endpoints: the names that applications call."""

from __future__ import annotations

from fastapi import APIRouter
from sqlalchemy import select
from sqlalchemy.orm import Session

from shoal_controller import endpoints
from shoal_controller.api import schemas
from shoal_controller.api.deps import ActorDep, ServicesDep
from shoal_controller.endpoints import EndpointSettings
from shoal_controller.rollouts import observe, statistics
from shoal_controller.services import Services
from shoal_controller.store.tables import (
    Assignment,
    Device,
    Endpoint,
    Model,
    Release,
    Variant,
    Version,
    Window,
)

router = APIRouter(tags=["endpoints"])

FIGURES_MS = 300_000  # how far back an endpoint's figures look
LABELS_MS = 1_800_000


@router.get("/endpoints")
def list_endpoints(services: ServicesDep) -> list[schemas.Endpoint]:
    with services.store.read() as session:
        rows = session.scalars(select(Endpoint).order_by(Endpoint.name))
        return [endpoint_view(session, services, row) for row in rows]


@router.get("/endpoints/{name}")
def get_endpoint(name: str, services: ServicesDep) -> schemas.Endpoint:
    with services.store.read() as session:
        return endpoint_view(session, services, endpoints.by_name(session, name))


@router.post("/endpoints", status_code=201)
def create_endpoint(body: schemas.EndpointCreate, services: ServicesDep, actor: ActorDep) -> schemas.Endpoint:
    """An automatic endpoint whose model has a release gets it at once, by a rollout."""
    with services.store.write() as session:
        row = endpoints.create(
            session,
            services.clock,
            name=body.name,
            model=body.model,
            objective=body.objective,
            filter=body.filter,
            settings=EndpointSettings(body.sampling_share, body.settle_s, body.automatic),
            actor=actor,
        )
        return endpoint_view(session, services, row)


@router.patch("/endpoints/{name}")
def change_endpoint(
    name: str, body: schemas.EndpointPatch, services: ServicesDep, actor: ActorDep
) -> schemas.Endpoint:
    with services.store.write() as session:
        row = endpoints.by_name(session, name)
        endpoints.change(session, row, actor=actor, **body.model_dump())
        view = endpoint_view(session, services, row)
    services.publish()
    return view


def endpoint_view(session: Session, services: Services, row: Endpoint) -> schemas.Endpoint:
    model = session.get(Model, row.model)
    assert model is not None
    assignment = session.get(Assignment, row.assignment) if row.assignment else None
    release = session.get(Release, assignment.release) if assignment is not None else None
    version = session.get(Version, release.version) if release is not None else None
    variants = {
        name: session.get(Variant, key) for name, key in (assignment.choice if assignment else {}).items()
    }
    rollout = endpoints.open_rollout(session, row)
    settings = EndpointSettings.of(row)
    now = services.clock()
    recent, seconds = _recent(session, row.name, now)
    latency = recent.latency
    labels = _labels(session, row.name, {v.bundle for v in variants.values() if v is not None}, now)
    p50, p95 = (statistics.quantile(latency, q) if latency is not None else None for q in (0.5, 0.95))
    return schemas.Endpoint(
        id=row.id,
        name=row.name,
        project=row.project,
        model=model.name,
        objective=row.objective,
        filter=row.filter,
        signature=row.signature,
        settings={
            "sampling_share": settings.sampling_share,
            "settle_s": settings.settle_s,
            "automatic": settings.automatic,
        },
        assignment=row.assignment,
        release=release.id if release is not None else "",
        version=version.number if version is not None else None,
        choice={name: v.name for name, v in variants.items() if v is not None},
        devices=len(endpoints.members(session, row)),
        p50_ms=p50.value if p50 else None,
        p95_ms=p95.value if p95 else None,
        error_share=recent.error_share if recent.requests else None,
        accuracy=labels,
        requests_per_s=recent.requests / seconds if seconds else 0.0,
        rollout=rollout.id if rollout is not None else "",
        created_ms=row.created_ms,
    )


def _recent(session: Session, endpoint: str, now_ms: int) -> tuple[statistics.Period, float]:
    """(what its devices did lately, over how many seconds)."""
    rows = list(
        session.scalars(
            select(Window).where(Window.endpoint == endpoint, Window.end_ms > now_ms - FIGURES_MS)
        )
    )
    span = (max(r.end_ms for r in rows) - min(r.start_ms for r in rows)) / 1000 if rows else 0.0
    return observe.merge_windows(rows), span


def _labels(session: Session, endpoint: str, bundles: set[str], now_ms: int) -> schemas.Figure | None:
    rows = session.execute(
        select(Window.correct, Window.labelled)
        .join(Device, Device.id == Window.device)
        .where(
            Device.quarantined.is_(False),
            Window.endpoint == endpoint,
            Window.bundle.in_(bundles),
            Window.end_ms > now_ms - LABELS_MS,
            Window.labelled > 0,
        )
    ).all()
    found = statistics.share(sum(r[0] for r in rows), sum(r[1] for r in rows))
    if found is None:
        return None
    return schemas.Figure(value=found.value, low=found.low, high=found.high, n=found.n, source="telemetry")
