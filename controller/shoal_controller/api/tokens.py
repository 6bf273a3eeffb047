"""Join tokens."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from sqlalchemy import select

from shoal_controller import enrolment, installer, wheels
from shoal_controller.addresses import bracketed
from shoal_controller.api import schemas
from shoal_controller.api.deps import ActorDep, ServicesDep
from shoal_controller.services import Services
from shoal_controller.store.repositories import find
from shoal_controller.store.tables import JoinToken
from shoal_protos.errors import Unavailable

router = APIRouter(tags=["tokens"])


@router.get("/tokens")
def list_tokens(services: ServicesDep) -> list[schemas.Token]:
    """All join tokens, newest first; secrets are never shown again."""
    with services.store.read() as session:
        rows = session.scalars(select(JoinToken).order_by(JoinToken.created_ms.desc(), JoinToken.id.desc()))
        return [_token(row) for row in rows]


@router.post("/tokens", status_code=201)
def create_token(body: schemas.TokenCreate, services: ServicesDep, actor: ActorDep) -> schemas.TokenCreated:
    """A new join token. Its text, and the line for a bare device, are in this answer only."""
    doors = _doors(services)
    with services.store.write() as session:
        row, secret = enrolment.create_token(
            session,
            uses=body.uses,
            ttl_s=body.ttl_s,
            labels=body.labels,
            actor=actor,
            now_ms=services.clock(),
        )
    text = enrolment.token_text(services.keys, secret, *doors)
    return schemas.TokenCreated(**_token(row).model_dump(), token=text, **_line(services, text))


@router.delete("/tokens/{key}")
def revoke_token(key: str, services: ServicesDep, actor: ActorDep) -> schemas.Token:
    """Nobody joins with it any more; devices that joined stay."""
    with services.store.write() as session:
        return _token(enrolment.revoke_token(session, find(session, JoinToken, key), actor=actor))


def _doors(services: Services) -> tuple[tuple[str, ...], tuple[str, ...]]:
    found = services.door_addresses("enrolment"), services.door_addresses("agents")
    if not all(found):
        raise Unavailable("The controller's doors for devices are not open yet.", "Try again in a moment.")
    return found


def _line(services: Services, token: str) -> dict[str, Any]:
    """The line for a bare device, or what has to be done first for there to be one."""
    missing = []
    if not wheels.sets(services.settings.wheels_dir):
        missing.append(f"{installer.FIRST_SET} (the wheels that devices install from)")
    if not services.installer_port:
        missing.append("shoal up --lan (opens the doors for devices to the network)")
    if missing:
        return {"note": "For a line that works on a bare device, run first: " + "; ".join(missing)}
    digest = installer.publish(services.settings.wheels_dir)
    url = f"http://{bracketed(services.hosts[0])}:{services.installer_port}"
    return {"join_line": installer.line(url, digest, token), "installer_sha256": digest}


def _token(row: JoinToken) -> schemas.Token:
    return schemas.Token(
        id=row.id,
        uses=row.uses,
        uses_left=row.uses_left,
        created_ms=row.created_ms,
        expires_ms=row.expires_ms,
        revoked=row.revoked,
        labels=row.labels,
    )
