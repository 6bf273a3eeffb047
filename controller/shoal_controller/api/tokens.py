"""Join tokens."""

from __future__ import annotations

from fastapi import APIRouter
from sqlalchemy import select

from shoal_controller import enrolment
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
    """A new join token. Its text is in this answer only."""
    enrolment_address, agents_address = _addresses(services)
    with services.store.write() as session:
        row, secret = enrolment.create_token(
            session,
            uses=body.uses,
            ttl_s=body.ttl_s,
            labels=body.labels,
            actor=actor,
            now_ms=services.clock(),
        )
    text = enrolment.token_text(services.keys, secret, [enrolment_address], [agents_address])
    return schemas.TokenCreated(**_token(row).model_dump(), token=text)


@router.delete("/tokens/{key}")
def revoke_token(key: str, services: ServicesDep, actor: ActorDep) -> schemas.Token:
    """Nobody joins with it any more; devices that joined stay."""
    with services.store.write() as session:
        return _token(enrolment.revoke_token(session, find(session, JoinToken, key), actor=actor))


def _addresses(services: Services) -> tuple[str, str]:
    found = services.addresses.get("enrolment"), services.addresses.get("agents")
    if not found[0] or not found[1]:
        raise Unavailable("The controller's doors for devices are not open yet.", "Try again in a moment.")
    return found[0], found[1]


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
