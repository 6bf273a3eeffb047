"""The queue of work for the worker: ingest, optimize, adapt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from shoal_controller.clock import Clock
from shoal_controller.store.repositories import new_id, record
from shoal_controller.store.tables import Optimization, Trial, Version
from shoal_optimizer import objective as objectives
from shoal_protos.errors import Conflict

ENDED = ("done", "failed", "cancelled")


def enqueue(
    session: Session,
    clock: Clock,
    *,
    kind: str,
    version: Version,
    actor: str,
    endpoint: str = "",
    objective: str = "",
    spec: Mapping[str, Any] | None = None,
    reason: str = "",
    project: str = "default",
) -> Optimization:
    """Queues work on a version.

    Args:
        spec: `classes` (None = every class of the fleet when it starts), `minutes` (0 = plain
            variants only), `seed`, `finding`, `field` (digests of field data), `task`.

    Raises:
        InvalidInput: the objective cannot be read.
        Conflict: the version is not ready for it.
    """
    if objective:
        objectives.parse(objective)
    if kind != "ingest" and version.state != "ready":
        raise Conflict(
            f"Version {version.number} is {version.state}, not ready.",
            version.error or "Wait for its ingest to end.",
        )
    row = Optimization(
        id=new_id(session, "o"),
        project=project,
        kind=kind,
        version=version.id,
        endpoint=endpoint,
        objective=objective,
        state="queued",
        spec=dict(spec or {}),
        created_ms=clock(),
    )
    session.add(row)
    session.flush()
    record(
        session,
        project=project,
        actor=actor,
        verb="queued",
        kind="optimization",
        object=row.id,
        after={"kind": kind, "version": version.id, "endpoint": endpoint, "objective": objective},
        reason=reason,
    )
    return row


def cancel(session: Session, row: Optimization, clock: Clock, *, actor: str, reason: str = "") -> None:
    """Cancels; the worker ends the job's process within a second.

    Raises:
        Conflict: it has ended already.
    """
    if row.state in ENDED:
        raise Conflict(f"The optimization {row.id} is {row.state} already.", "Start a new one.")
    finish(session, row, clock, "cancelled", actor=actor, reason=reason)
    for trial in session.scalars(
        select(Trial).where(Trial.optimization == row.id, Trial.state.in_(("pending", "published")))
    ):
        trial.state = "no_data"


def finish(
    session: Session,
    row: Optimization,
    clock: Clock,
    state: str,
    *,
    actor: str,
    error: str = "",
    reason: str = "",
) -> None:
    """Moves to an end state, once."""
    before = row.state
    row.state, row.error, row.finished_ms = state, error, clock()
    row.lease_owner, row.lease_until_ms = "", 0
    record(
        session,
        project=row.project,
        actor=actor,
        verb=state,
        kind="optimization",
        object=row.id,
        before={"state": before},
        after={"state": state, "error": error},
        reason=reason or error,
    )


def requeue(session: Session, row: Optimization, *, actor: str, reason: str) -> None:
    """Queues a waiting or interrupted optimization again."""
    before = row.state
    row.state, row.lease_owner, row.lease_until_ms = "queued", "", 0
    record(
        session,
        project=row.project,
        actor=actor,
        verb="queued",
        kind="optimization",
        object=row.id,
        before={"state": before},
        after={"state": "queued"},
        reason=reason,
    )


def note(session: Session, row: Optimization, verb: str, *, actor: str, reason: str = "") -> None:
    """Records a change of state that the caller has made."""
    record(
        session,
        project=row.project,
        actor=actor,
        verb=verb,
        kind="optimization",
        object=row.id,
        after={"state": row.state},
        reason=reason,
    )
