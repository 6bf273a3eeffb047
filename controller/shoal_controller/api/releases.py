"""Releases: immutable, class -> variants best first."""

from __future__ import annotations

from fastapi import APIRouter
from sqlalchemy import select
from sqlalchemy.orm import Session

from shoal_controller import registry, releases
from shoal_controller.api import schemas
from shoal_controller.api.deps import ActorDep, ServicesDep
from shoal_controller.store.repositories import find
from shoal_controller.store.tables import Endpoint, Model, Release, Version

router = APIRouter(tags=["releases"])


@router.get("/releases")
def list_releases(services: ServicesDep, model: str = "") -> list[schemas.Release]:
    """Newest first."""
    with services.store.read() as session:
        query = select(Release).join(Version, Version.id == Release.version)
        if model:
            query = query.where(Version.model == registry.model_by_name(session, model).id)
        rows = session.scalars(query.order_by(Release.created_ms.desc(), Release.id.desc()))
        return [release_view(session, row) for row in rows]


@router.get("/releases/{key}")
def get_release(key: str, services: ServicesDep) -> schemas.Release:
    with services.store.read() as session:
        return release_view(session, find(session, Release, key))


@router.post("/releases", status_code=201)
def create_release(body: schemas.ReleaseCreate, services: ServicesDep, actor: ActorDep) -> schemas.Release:
    with services.store.write() as session:
        model = registry.model_by_name(session, body.model)
        version = registry.version_by_number(session, model, body.version)
        objective = (
            session.scalar(select(Endpoint.objective).where(Endpoint.model == model.id).limit(1)) or ""
        )
        row = releases.create_release(
            session,
            version,
            services.clock,
            actor=actor,
            fronts=body.fronts,
            objective=objective,
            note=body.note,
        )
        return release_view(session, row)


def release_view(session: Session, row: Release) -> schemas.Release:
    version = session.get(Version, row.version)
    assert version is not None
    model = session.get(Model, version.model)
    assert model is not None
    return schemas.Release(
        id=row.id,
        model=model.name,
        version=version.number,
        number=row.number,
        fronts=row.fronts,
        note=row.note,
        created_ms=row.created_ms,
    )
