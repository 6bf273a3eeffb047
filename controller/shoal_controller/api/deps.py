"""What route functions ask for."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Request

from shoal_controller.services import Services


def get_services(request: Request) -> Services:
    services: Services = request.app.state.services
    return services


def get_actor(request: Request) -> str:
    """Who acts, for events and audit. Loopback only until operators can sign in: one local person."""
    name: str = getattr(request.state, "person", "local")
    return f"person:{name}"


ServicesDep = Annotated[Services, Depends(get_services)]
ActorDep = Annotated[str, Depends(get_actor)]
