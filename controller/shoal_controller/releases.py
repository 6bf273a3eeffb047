"""Releases: one version's variants, class -> variants best first. Immutable once made."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from shoal_controller.clock import Clock
from shoal_controller.registry import VariantPoint, known_classes, points
from shoal_controller.store.repositories import new_id, record
from shoal_controller.store.tables import Model, Release, Variant, Version
from shoal_optimizer import objective as objectives
from shoal_optimizer.search import frontier
from shoal_optimizer.search.frontier import Estimate
from shoal_protos.errors import Conflict, InvalidInput


def order_by_objective(candidates: Sequence[VariantPoint], text: str) -> list[VariantPoint]:
    """Best first by the objective; a feasible point goes before any infeasible one, and what nobody has
    judged yet comes last."""
    by_key = {c.variant: c for c in candidates}
    ranked = objectives.parse(text).rank(objectives.Point(c.variant, c.metrics) for c in candidates)
    return sorted((by_key[point.key] for point in ranked), key=lambda p: not p.proven)


def best_fronts(
    session: Session, version: Version, objective: str, classes: Iterable[str] | None = None
) -> dict[str, list[str]]:
    """Class -> variant ids, best first, of all variants known for that class."""
    fronts = {}
    for name in known_classes(session, version.id) if classes is None else classes:
        found = points(session, version.id, name)
        if found:
            kept = _undominated(found, frontier.metrics_for(objectives.parse(objective)))
            fronts[name] = [p.variant for p in order_by_objective(kept, objective)]
    return fronts


def _undominated(candidates: Sequence[VariantPoint], metrics: Sequence[str]) -> list[VariantPoint]:
    """The front in the metrics that the objective asks for. What nobody has judged yet keeps nothing out
    that is proven."""
    proven = [frontier.Point(c.variant, _estimates(c)) for c in candidates if c.proven]
    everything = [frontier.Point(c.variant, _estimates(c)) for c in candidates]
    fronts = (frontier.front(proven, metrics=metrics), frontier.front(everything, metrics=metrics))
    kept = {point.key for front in fronts for point in front}
    return [c for c in candidates if c.variant in kept]


def _estimates(point: VariantPoint) -> dict[str, Estimate | None]:
    def estimate(value: Any, low: Any, high: Any) -> Estimate | None:
        if value is None:
            return None
        return Estimate(value) if low is None or high is None else Estimate.from_interval(value, low, high)

    accuracy, latency = point.accuracy or {}, point.latency or {}
    return {
        "accuracy": estimate(accuracy.get("value"), accuracy.get("low"), accuracy.get("high")),
        "latency_p95": estimate(latency.get("p95_ms"), latency.get("p95_low_ms"), latency.get("p95_high_ms")),
        "size": Estimate(float(point.size_bytes)),
        "wire": estimate(point.metrics.get("wire"), None, None),
        "memory": estimate(point.memory_bytes, None, None),
    }


def create_release(
    session: Session,
    version: Version,
    clock: Clock,
    *,
    actor: str,
    fronts: Mapping[str, Sequence[str]] | None = None,
    objective: str = objectives.DEFAULT,
    note: str = "",
) -> Release:
    """Makes a release: class -> variants best first. None = the best front known per class.

    Raises:
        InvalidInput: an unknown variant, one of another version, or an empty front.
        Conflict: the version has no variants yet.
    """
    model = session.get(Model, version.model)
    assert model is not None
    if fronts is None:
        fronts = best_fronts(session, version, objective)
    chosen = {name: [own_variant(session, version, key).id for key in keys] for name, keys in fronts.items()}
    if not chosen or not all(chosen.values()):
        raise Conflict(
            f"'{model.name}' v{version.number} has no variants to release.",
            "Wait for its ingest, or start an optimization.",
        )
    number = session.scalar(
        select(func.max(Release.number))
        .join(Version, Version.id == Release.version)
        .where(Version.model == model.id)
    )
    row = Release(
        id=new_id(session, "l"),
        project=model.project,
        version=version.id,
        number=(number or 0) + 1,
        fronts=chosen,
        note=note,
        created_ms=clock(),
    )
    session.add(row)
    session.flush()
    record(
        session,
        project=model.project,
        actor=actor,
        verb="created",
        kind="release",
        object=row.id,
        after={
            "model": model.name,
            "version": version.number,
            "number": row.number,
            "classes": sorted(chosen),
        },
        reason=note,
    )
    return row


def own_variant(session: Session, version: Version, key: str) -> Variant:
    """The variant of this version with this id, bundle or name. Raises InvalidInput."""
    row = session.get(Variant, key)
    if row is None and key.startswith("sha256:"):
        row = session.scalar(select(Variant).where(Variant.version == version.id, Variant.bundle == key))
    if row is None:
        row = session.scalar(select(Variant).where(Variant.version == version.id, Variant.name == key))
    if row is None or row.version != version.id:
        raise InvalidInput(
            f"'{key[:80]}' is no variant of version {version.number}.", "List them with: shoal variant list"
        )
    return row


def latest_release(session: Session, model: str) -> Release | None:
    """The newest release of a model (by id)."""
    return session.scalar(
        select(Release)
        .join(Version, Version.id == Release.version)
        .where(Version.model == model)
        .order_by(Release.number.desc())
        .limit(1)
    )
