"""Models and versions."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, File, Form, UploadFile
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from shoal_controller import registry, sources
from shoal_controller.api import schemas
from shoal_controller.api.deps import ActorDep, ServicesDep
from shoal_controller.services import Services
from shoal_controller.store.tables import Endpoint, Finding, Model, Optimization, Variant, Version
from shoal_protos.errors import InvalidInput, NotFound

router = APIRouter(tags=["models"])

CHUNK = 1 << 20


@router.get("/models")
def list_models(services: ServicesDep) -> list[schemas.Model]:
    """All models, by name."""
    with services.store.read() as session:
        return [model_view(session, row) for row in session.scalars(select(Model).order_by(Model.name))]


@router.get("/models/{name}")
def get_model(name: str, services: ServicesDep) -> schemas.ModelDetail:
    with services.store.read() as session:
        row = registry.model_by_name(session, name)
        versions = [version_view(session, v, row.name) for v in reversed(registry.versions(session, row))]
        return schemas.ModelDetail(**model_view(session, row).model_dump(), version_list=versions)


@router.post("/models/{name}/versions", status_code=201)
def push_version(
    name: str,
    services: ServicesDep,
    actor: ActorDep,
    source: Annotated[
        UploadFile | None, File(description="tar: the task file first, then the files it names")
    ] = None,
    upload: Annotated[str, Form(description="digest of a finished upload, instead of `source`")] = "",
    note: Annotated[str, Form()] = "",
) -> schemas.Version:
    """Takes a task's source as the model's next version and queues its ingest."""
    if (source is None) == (not upload):
        raise InvalidInput(
            "A push has either a `source` or the digest of an `upload`.", "Send it with: shoal model push"
        )
    found, digest, size = _sent(services, source) if source is not None else _uploaded(services, upload)
    with services.store.write() as session:
        version, _ = registry.push_version(
            session,
            services.blobs,
            services.clock,
            model=name,
            source=found,
            digest=digest,
            size=size,
            actor=actor,
            note=note[:1000],
        )
        session.flush()
        return version_view(session, version, name)


def _sent(services: Services, source: UploadFile) -> tuple[sources.Source, str, int]:
    """A source that came with the request: what it holds, its blob's digest and size."""
    limit = services.settings.max_upload_bytes
    with tempfile.TemporaryDirectory(dir=services.settings.run_dir, prefix="push-") as room:
        path = Path(room) / "source.tar"
        _save(source, path, limit)
        found = sources.inspect(path, max_bytes=4 * limit)
        return found, *services.blobs.store(path)


def _uploaded(services: Services, digest: str) -> tuple[sources.Source, str, int]:
    """The same for a source that was uploaded before."""
    try:
        path = services.blobs.path(digest)
    except NotFound as error:
        raise NotFound(
            f"There is no upload {digest[:19]}, or it is unfinished.", "Send it with: shoal model push"
        ) from error
    found = sources.inspect(path, max_bytes=4 * services.settings.max_upload_bytes)
    return found, digest, path.stat().st_size


def _save(upload: UploadFile, path: Path, limit: int) -> None:
    size = 0
    with path.open("wb") as target:
        while data := upload.file.read(CHUNK):
            size += len(data)
            if size > limit:
                raise InvalidInput(
                    f"The push is larger than {limit} bytes.",
                    "Leave out files that the task does not need, or raise max_upload_bytes.",
                )
            target.write(data)


@router.get("/models/{name}/versions/{number}")
def get_version(name: str, number: int, services: ServicesDep) -> schemas.Version:
    with services.store.read() as session:
        model = registry.model_by_name(session, name)
        return version_view(session, registry.version_by_number(session, model, number), model.name)


# ------------------------------------------------------------------ views


def figure(
    values: Mapping[str, Any] | None, source: str = "", *, key: str = "value"
) -> schemas.Figure | None:
    """A stored figure with its interval; None when there is none at all."""
    if not values or (values.get(key) is None and not source):
        return None
    prefix = "" if key == "value" else key.removesuffix("_ms")
    low, high = ("low", "high") if not prefix else (f"{prefix}_low_ms", f"{prefix}_high_ms")
    return schemas.Figure(
        value=values.get(key), low=values.get(low), high=values.get(high), n=values.get("n"), source=source
    )


def version_view(session: Session, row: Version, model: str) -> schemas.Version:
    ingest = session.scalar(
        select(Optimization.id)
        .where(Optimization.version == row.id, Optimization.kind == "ingest")
        .order_by(Optimization.created_ms.desc())
        .limit(1)
    )
    return schemas.Version(
        id=row.id,
        model=model,
        number=row.number,
        state=row.state,
        error=row.error,
        parent=row.parent,
        note=row.note,
        metric=row.metric,
        baseline=figure(row.baseline),
        signature=row.signature,
        analysis=row.analysis,
        created_ms=row.created_ms,
        optimization=ingest or "",
    )


def model_view(session: Session, row: Model) -> schemas.Model:
    versions = registry.versions(session, row)
    ready = [v for v in versions if v.state == "ready"]
    endpoints = list(
        session.execute(
            select(Endpoint.id, Endpoint.name).where(Endpoint.model == row.id).order_by(Endpoint.name)
        )
    )
    findings = session.scalar(
        select(func.count())
        .select_from(Finding)
        .where(Finding.endpoint.in_([e[0] for e in endpoints]), Finding.state.in_(("open", "acting")))
    )
    variants = session.scalar(
        select(func.count())
        .select_from(Variant)
        .join(Version, Version.id == Variant.version)
        .where(Version.model == row.id)
    )
    return schemas.Model(
        id=row.id,
        name=row.name,
        project=row.project,
        versions=len(versions),
        latest=versions[-1].number if versions else 0,
        state=versions[-1].state if versions else "",
        accuracy=figure(ready[-1].baseline) if ready else None,
        variants=variants or 0,
        endpoints=[e[1] for e in endpoints],
        findings_open=findings or 0,
        created_ms=row.created_ms,
    )
