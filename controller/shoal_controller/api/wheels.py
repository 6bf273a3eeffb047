"""What bare devices install from."""

from __future__ import annotations

from fastapi import APIRouter

from shoal_controller import wheels
from shoal_controller.api import schemas
from shoal_controller.api.deps import ServicesDep

router = APIRouter(tags=["tokens"])


@router.get("/wheels")
def list_wheels(services: ServicesDep) -> list[schemas.WheelSet]:
    """The sets of wheels, by name; `shoal controller wheels add` fills them."""
    return [schemas.WheelSet(**wheels.facts(item)) for item in wheels.sets(services.settings.wheels_dir)]
