"""Models, versions, variants and their measurements. Releases are in `releases`.

A version never changes once it is made; measurements are only added, and the newest of a kind
counts. Functions take a session of the caller's transaction.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from shoal_controller import sources
from shoal_controller.blobs import BlobStore
from shoal_controller.clock import Clock
from shoal_controller.store.repositories import find, new_id, record
from shoal_controller.store.tables import Measurement, Model, Optimization, Variant, Version
from shoal_optimizer.objective import recall_metric
from shoal_protos.bundle import check_digest
from shoal_protos.errors import Conflict, InvalidInput, NotFound

NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{0,62}\Z")
MEASUREMENT_KINDS = ("accuracy", "latency", "memory", "int8_share", "probe", "options")


# ------------------------------------------------------------------ models and versions


def model_by_name(session: Session, name: str, project: str = "default") -> Model:
    """The model with this name (or id, or unique prefix of an id). Raises NotFound."""
    return find(session, Model, name, project=project)


def versions(session: Session, model: Model) -> list[Version]:
    """All versions, oldest first."""
    return list(session.scalars(select(Version).where(Version.model == model.id).order_by(Version.number)))


def version_by_number(session: Session, model: Model, number: int | None) -> Version:
    """One version of a model; None = the latest that is ready.

    Raises:
        NotFound: there is no such version.
        Conflict: none is ready yet.
    """
    if number is None:
        ready = [v for v in versions(session, model) if v.state == "ready"]
        if not ready:
            raise Conflict(
                f"The model '{model.name}' has no ready version yet.", "Wait for its ingest to end."
            )
        return ready[-1]
    found = session.scalar(select(Version).where(Version.model == model.id, Version.number == number))
    if found is None:
        raise NotFound(
            f"The model '{model.name}' has no version {number}.", "List them with: shoal model get"
        )
    return found


def add_version(
    session: Session,
    model: Model,
    clock: Clock,
    *,
    source_blob: str,
    actor: str,
    state: str = "ingesting",
    parent: str = "",
    note: str = "",
    reason: str = "",
) -> Version:
    """Adds the next version of a model."""
    latest = session.scalar(select(func.max(Version.number)).where(Version.model == model.id)) or 0
    version = Version(
        id=new_id(session, "v"),
        model=model.id,
        number=latest + 1,
        state=state,
        parent=parent,
        note=note,
        source_blob=source_blob,
        created_ms=clock(),
    )
    session.add(version)
    session.flush()
    record(
        session,
        project=model.project,
        actor=actor,
        verb="created",
        kind="version",
        object=version.id,
        after={"model": model.name, "number": version.number, "parent": parent, "state": state},
        reason=reason or note,
    )
    return version


def push_version(
    session: Session,
    blobs: BlobStore,
    clock: Clock,
    *,
    model: str,
    source: sources.Source,
    digest: str,
    size: int,
    actor: str,
    note: str = "",
    project: str = "default",
) -> tuple[Version, Optimization]:
    """Registers a pushed source, whose tar is stored already, as the model's next version and
    queues its ingest. The model is made with its first version.

    Raises:
        InvalidInput: not a model's name.
    """
    if not NAME.match(model):
        raise InvalidInput(
            f"'{model[:80]}' is not a model's name.",
            "Use lower-case letters, digits, '.', '_' and '-', at most 63.",
        )
    row = session.scalar(select(Model).where(Model.project == project, Model.name == model))
    if row is None:
        row = Model(id=new_id(session, "m"), project=project, name=model, created_ms=clock())
        session.add(row)
        session.flush()
        record(
            session,
            project=project,
            actor=actor,
            verb="created",
            kind="model",
            object=row.id,
            after={"name": model},
        )
    blobs.adopt(session, digest, size, purpose="source")
    version = add_version(session, row, clock, source_blob=digest, actor=actor, note=note)
    from shoal_controller import optimizations

    job = optimizations.enqueue(
        session,
        clock,
        kind="ingest",
        version=version,
        actor=actor,
        spec={"task": source.task},
        project=project,
    )
    return version, job


# ------------------------------------------------------------------ variants and measurements


def add_variant(
    session: Session, version: Version, clock: Clock, event: Mapping[str, Any], *, actor: str
) -> Variant:
    """Registers a variant that a job reported; the same bundle again adds only measurements.

    Args:
        event: the fields of a job's `variant` line; its blobs are stored already.
    """
    digest = check_digest(str(event["bundle"]))
    row = session.scalar(select(Variant).where(Variant.version == version.id, Variant.bundle == digest))
    if row is None:
        row = Variant(
            id=new_id(session, "k"),
            version=version.id,
            bundle=digest,
            name=str(event.get("name") or digest[7:19]),
            target=str(event.get("target", "")),
            precision=str(event.get("precision", "")),
            recipe=list(event.get("recipe") or []),
            size_bytes=int(event.get("size_bytes") or 0),
            wire_bytes=int(event.get("wire_bytes") or 0),
            plain=bool(event.get("plain")),
            created_ms=clock(),
        )
        session.add(row)
        session.flush()
        record(
            session,
            actor=actor,
            verb="created",
            kind="variant",
            object=row.id,
            after={
                "version": version.id,
                "name": row.name,
                "bundle": digest,
                "classes": sorted(event.get("classes") or {}),
            },
        )
    for name, figures in (event.get("classes") or {}).items():
        source = str(figures.get("source", "local"))
        add_figures(session, row, name, figures, clock, source=source)
    return row


def add_figures(
    session: Session,
    variant: Variant,
    profile_class: str,
    figures: Mapping[str, Any],
    clock: Clock,
    *,
    source: str,
    device: str = "",
    context: Mapping[str, Any] | None = None,
) -> None:
    """Adds a measurement per kind that has figures.

    Of a class that could not be measured, a row says so: the variant is meant for that class.
    """
    added = False
    sources = figures.get("sources") or {}  # of single kinds, where they differ
    for kind in MEASUREMENT_KINDS:
        value, said = figures.get(kind), str(sources.get(kind) or source)
        if value is None and kind == "latency" and source.startswith("unmeasured ("):
            value = {"value": None}  # why it is unmeasured
        if value is None:
            continue
        if not isinstance(value, Mapping):
            value = {"bytes": value} if kind == "memory" else {"value": value}
        add_measurement(
            session, variant, profile_class, kind, value, clock, source=said, device=device, context=context
        )
        added = added or value.get("value", 0) is not None
    if not added:
        add_measurement(
            session, variant, profile_class, "accuracy", {"value": None}, clock, source="unmeasured"
        )


def add_measurement(
    session: Session,
    variant: Variant,
    profile_class: str,
    kind: str,
    figures: Mapping[str, Any],
    clock: Clock,
    *,
    source: str,
    device: str = "",
    context: Mapping[str, Any] | None = None,
) -> Measurement | None:
    """Adds one measurement, unless the newest of its kind says exactly the same (a job that was
    started again repeats itself)."""
    newest = session.scalar(
        select(Measurement)
        .where(
            Measurement.variant == variant.id,
            Measurement.profile_class == profile_class,
            Measurement.kind == kind,
        )
        .order_by(Measurement.time_ms.desc(), Measurement.id.desc())
        .limit(1)
    )
    if newest is not None and newest.source == source and newest.figures == dict(figures):
        return None
    if newest is not None and figures.get("value", 0) is None:
        return None  # "unmeasured" never hides a figure
    row = Measurement(
        id=new_id(session, "q"),
        variant=variant.id,
        profile_class=profile_class,
        kind=kind,
        source=source,
        device=device,
        figures=dict(figures),
        context=dict(context or {}),
        time_ms=clock(),
    )
    session.add(row)
    session.flush()
    return row


def newest_measurements(
    session: Session, variants: Iterable[str]
) -> dict[tuple[str, str], dict[str, Measurement]]:
    """(variant id, class) -> kind -> the measurement that counts. A device's figure counts more
    than one that is only guessed from the optimizer's machine."""
    result: dict[tuple[str, str], dict[str, Measurement]] = defaultdict(dict)
    ids = list(variants)
    for start in range(0, len(ids), 500):
        rows = session.scalars(
            select(Measurement)
            .where(Measurement.variant.in_(ids[start : start + 500]))
            .order_by(Measurement.time_ms, Measurement.id)
        )
        for row in rows:
            result[row.variant, row.profile_class][row.kind] = row
    return dict(result)


@dataclass(frozen=True)
class VariantPoint:
    """A variant with what is known of it for one class. None = unmeasured."""

    variant: str
    name: str
    bundle: str
    plain: bool
    size_bytes: int
    accuracy: Mapping[str, Any] | None = None
    latency: Mapping[str, Any] | None = None
    memory_bytes: float | None = None
    metrics: Mapping[str, float | None] = field(default_factory=dict)  # as objectives name them

    @property
    def key(self) -> str:
        return self.variant

    @property
    def proven(self) -> bool:
        """Plain, or of known accuracy: anything else is chosen only where there is nothing else."""
        return self.plain or self.metrics.get("accuracy") is not None


def points(session: Session, version: str, profile_class: str) -> list[VariantPoint]:
    """Every variant of a version that is meant for a class, in the order they came."""
    rows = list(session.scalars(select(Variant).where(Variant.version == version).order_by(Variant.id)))
    measured = newest_measurements(session, [row.id for row in rows])
    found = []
    for row in rows:
        figures = measured.get((row.id, profile_class))
        if figures is not None:
            found.append(_point(row, figures))
    return found


def _point(row: Variant, measured: Mapping[str, Measurement]) -> VariantPoint:
    accuracy, latency = _figures(measured, "accuracy"), _figures(measured, "latency")
    memory = (_figures(measured, "memory") or {}).get("bytes")
    if accuracy is not None and accuracy.get("value") is None:
        accuracy = None
    return VariantPoint(
        row.id,
        row.name,
        row.bundle,
        row.plain,
        row.size_bytes,
        accuracy,
        latency,
        memory,
        {
            "accuracy": (accuracy or {}).get("value"),
            "latency_p50": (latency or {}).get("p50_ms"),
            "latency_p95": (latency or {}).get("p95_ms"),
            "memory": memory,
            "size": float(row.size_bytes),
            "wire": float(row.wire_bytes or row.size_bytes),
            **{
                recall_metric(label): value
                for label, value in ((accuracy or {}).get("recalls") or {}).items()
            },
        },
    )


def _figures(measured: Mapping[str, Measurement], kind: str) -> Mapping[str, Any] | None:
    row = measured.get(kind)
    return None if row is None else row.figures


def known_classes(session: Session, version: str) -> list[str]:
    """Classes for which the version has at least one variant."""
    query = select(Measurement.profile_class).join(Variant, Variant.id == Measurement.variant)
    return sorted(set(session.scalars(query.where(Variant.version == version).distinct())))
