"""The event log: what changed, who did it, why."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query

from shoal_controller import events
from shoal_controller.api import schemas
from shoal_controller.api.deps import ServicesDep
from shoal_controller.store.tables import Event

router = APIRouter(tags=["events"])


@router.get("/events")
def list_events(
    services: ServicesDep,
    kind: str = "",
    object: str = "",
    after: int | None = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
) -> list[schemas.Event]:
    """Newest first; with `after` (an event id) the ones that followed it, oldest first."""
    with services.store.read() as session:
        rows = events.list_events(
            session, kind=kind, object=object, after=after or 0, limit=limit, newest_first=after is None
        )
        return [event_view(row) for row in rows]


def event_view(row: Event) -> schemas.Event:
    return schemas.Event.model_validate(row)
