"""The story of the loop."""

from __future__ import annotations

from fastapi import APIRouter

from shoal_controller import endpoints, story
from shoal_controller.api import schemas
from shoal_controller.api.deps import ServicesDep

router = APIRouter(tags=["story"])


@router.get("/story")
def get_story(services: ServicesDep, endpoint: str = "") -> list[schemas.StoryItem]:
    """What the loop saw and did, oldest first; of one endpoint or of all."""
    with services.store.read() as session:
        row = endpoints.by_name(session, endpoint) if endpoint else None
        return [schemas.StoryItem(**vars(item)) for item in story.tell(session, row)]
