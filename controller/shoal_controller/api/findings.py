"""Findings: what monitoring saw, and what is done about it."""

from __future__ import annotations

from fastapi import APIRouter
from sqlalchemy import select
from sqlalchemy.orm import Session

from shoal_controller.api import schemas
from shoal_controller.api.deps import ActorDep, ServicesDep
from shoal_controller.loop import actions
from shoal_controller.store.repositories import find
from shoal_controller.store.tables import Endpoint, Finding
from shoal_protos.errors import Conflict

router = APIRouter(tags=["findings"])


@router.get("/findings")
def list_findings(services: ServicesDep, state: str = "") -> list[schemas.Finding]:
    """Newest first; `state` may name several, joined by commas (open, acting, resolved, dismissed)."""
    with services.store.read() as session:
        query = select(Finding).order_by(Finding.opened_ms.desc(), Finding.id.desc())
        if state:
            query = query.where(Finding.state.in_(state.split(",")))
        return [finding_view(session, row) for row in session.scalars(query.limit(500))]


@router.get("/findings/{key}")
def get_finding(key: str, services: ServicesDep) -> schemas.Finding:
    with services.store.read() as session:
        return finding_view(session, find(session, Finding, key))


@router.post("/findings/{key}/dismiss")
def dismiss(
    key: str, services: ServicesDep, actor: ActorDep, body: schemas.Reason | None = None
) -> schemas.Finding:
    """A person says that nothing needs to be done; what acts on it already goes on."""
    with services.store.write() as session:
        row = find(session, Finding, key)
        if row.state in ("resolved", "dismissed"):
            raise Conflict(f"The finding {row.id} is {row.state} already.")
        reason = body.reason[:1000] if body is not None else ""
        actions.close(session, row, services.clock, reason, state="dismissed", actor=actor)
        return finding_view(session, row)


def finding_view(session: Session, row: Finding) -> schemas.Finding:
    endpoint = session.get(Endpoint, row.endpoint) if row.endpoint else None
    return schemas.Finding(
        id=row.id,
        kind=row.kind,
        subject=row.subject,
        endpoint=endpoint.name if endpoint is not None else "",
        profile_class=row.profile_class,
        state=row.state,
        severity=row.severity,
        sentence=row.sentence,
        evidence=row.evidence,
        action=row.action,
        opened_ms=row.opened_ms,
        closed_ms=row.closed_ms,
    )
