"""Variants with what is known of them for each class."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Query
from sqlalchemy import select
from sqlalchemy.orm import Session

from shoal_controller import registry
from shoal_controller.api import schemas
from shoal_controller.api.deps import ServicesDep
from shoal_controller.api.models import figure
from shoal_controller.store.repositories import find
from shoal_controller.store.tables import (
    Assignment,
    Device,
    Endpoint,
    Measurement,
    Model,
    Release,
    Variant,
    Version,
)
from shoal_protos.v1 import agents_pb2

router = APIRouter(tags=["variants"])


@router.get("/variants")
def list_variants(
    services: ServicesDep,
    model: str = "",
    version: int | None = None,
    class_: Annotated[str, Query(alias="class")] = "",
) -> list[schemas.Variant]:
    """Variants, newest version first; of one model, version or class."""
    with services.store.read() as session:
        query = select(Variant).join(Version, Version.id == Variant.version)
        if model:
            query = query.where(Version.model == registry.model_by_name(session, model).id)
        if version is not None:
            query = query.where(Version.number == version)
        rows = list(session.scalars(query.order_by(Version.number.desc(), Variant.id)))
        views = variant_views(session, rows)
    return [v for v in views if not class_ or any(c.profile_class == class_ for c in v.classes)]


@router.get("/variants/{key}")
def get_variant(key: str, services: ServicesDep) -> schemas.Variant:
    with services.store.read() as session:
        return variant_views(session, [find(session, Variant, key)])[0]


def variant_views(session: Session, rows: Sequence[Variant]) -> list[schemas.Variant]:
    """Views of many variants with a handful of queries."""
    measured = registry.newest_measurements(session, [row.id for row in rows])
    versions = {
        v.id: v for v in session.scalars(select(Version).where(Version.id.in_({r.version for r in rows})))
    }
    models = {m.id: m.name for m in session.scalars(select(Model))}
    fronts = _fronts(session, set(versions))
    chosen = _chosen(session)
    serving = _serving(session)
    result = []
    for row in rows:
        version = versions[row.version]
        classes = [
            _class_view(row, name, figures, fronts, chosen, serving)
            for (variant, name), figures in sorted(measured.items())
            if variant == row.id
        ]
        result.append(
            schemas.Variant(
                id=row.id,
                model=models.get(version.model, ""),
                version=version.number,
                name=row.name,
                bundle=row.bundle,
                target=row.target,
                precision=row.precision,
                recipe=[s if isinstance(s, dict) else {"technique": str(s)} for s in row.recipe],
                size_bytes=row.size_bytes,
                wire_bytes=row.wire_bytes,
                plain=row.plain,
                created_ms=row.created_ms,
                classes=classes,
            )
        )
    return result


def _fronts(session: Session, versions: set[str]) -> set[tuple[str, str]]:
    """(variant, class) on the front of its version's newest release."""
    newest: dict[str, Release] = {}
    for release in session.scalars(
        select(Release).where(Release.version.in_(versions)).order_by(Release.number)
    ):
        newest[release.version] = release
    return {(v, name) for release in newest.values() for name, front in release.fronts.items() for v in front}


def _chosen(session: Session) -> set[tuple[str, str]]:
    """(variant, class) that an endpoint's present assignment chooses."""
    rows = session.scalars(select(Assignment).join(Endpoint, Endpoint.assignment == Assignment.id))
    return {(variant, name) for row in rows for name, variant in row.choice.items()}


def _serving(session: Session) -> Counter[tuple[str, str]]:
    """(bundle, class) -> devices that serve it now."""
    counts: Counter[tuple[str, str]] = Counter()
    for device in session.scalars(select(Device).where(Device.revoked.is_(False))):
        reported = agents_pb2.Reported.FromString(device.reported or b"")
        for bundle in {status.serving for status in reported.placements if status.serving}:
            counts[bundle, device.profile_class] += 1
    return counts


def _class_view(
    row: Variant,
    name: str,
    measured: Mapping[str, Measurement],
    fronts: set[tuple[str, str]],
    chosen: set[tuple[str, str]],
    serving: Counter[tuple[str, str]],
) -> schemas.VariantFigures:
    def of(kind: str, key: str = "value") -> schemas.Figure | None:
        found = measured.get(kind)
        return None if found is None else figure(found.figures, found.source, key=key)

    memory: Any = measured.get("memory")
    return schemas.VariantFigures(
        profile_class=name,
        accuracy=of("accuracy"),
        latency_p50_ms=of("latency", "p50_ms"),
        latency_p95_ms=of("latency", "p95_ms"),
        memory_bytes=None
        if memory is None
        else schemas.Figure(value=memory.figures.get("bytes"), source=memory.source),
        int8_share=of("int8_share"),
        device=next((m.device for m in measured.values() if m.device), ""),
        on_front=(row.id, name) in fronts,
        chosen=(row.id, name) in chosen,
        serving=serving[row.bundle, name],
    )
