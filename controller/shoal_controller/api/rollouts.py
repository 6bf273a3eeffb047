"""Rollouts: create, watch, pause, resume, abort, promote."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import APIRouter
from sqlalchemy import select
from sqlalchemy.orm import Session

from shoal_controller.api import schemas
from shoal_controller.api.deps import ActorDep, ServicesDep
from shoal_controller.rollouts import service
from shoal_controller.rollouts.verdict import DONE_STATES
from shoal_controller.services import Services
from shoal_controller.store.repositories import find
from shoal_controller.store.tables import Device, Endpoint, Rollout, RolloutDevice

router = APIRouter(tags=["rollouts"])


@router.get("/rollouts")
def list_rollouts(services: ServicesDep) -> list[schemas.Rollout]:
    """Newest first, without their devices."""
    with services.store.read() as session:
        query = select(Rollout).order_by(Rollout.created_ms.desc(), Rollout.id.desc()).limit(500)
        return [rollout_view(session, row, devices=False) for row in session.scalars(query)]


@router.get("/rollouts/{key}")
def get_rollout(key: str, services: ServicesDep) -> schemas.Rollout:
    with services.store.read() as session:
        return rollout_view(session, find(session, Rollout, key))


@router.post("/rollouts", status_code=201)
def create_rollout(body: schemas.RolloutCreate, services: ServicesDep, actor: ActorDep) -> schemas.Rollout:
    """Starts a rollout; with `dry_run` only shows its waves."""
    service.check_waves(body.waves)
    request = service.Request(body.endpoint, actor, body.release, body.choice, body.waves, reason=body.reason)
    try:
        with services.store.write() as session:
            row = _create(session, services, request)
            session.flush()
            view = rollout_view(session, row)
            if body.dry_run:
                raise service.DryRun(view)
    except service.DryRun as planned:
        shown: schemas.Rollout = planned.result
        return shown.model_copy(update={"state": "planned", "id": ""})
    return view


def _create(session: Session, services: Services, request: service.Request) -> Rollout:
    return service.create(
        session,
        services.blobs,
        services.clock,
        request,
        presence=services.connections,
        telemetry_s=float(services.settings.telemetry_seconds),
    )


@router.post("/rollouts/{key}/pause")
def pause(
    key: str, services: ServicesDep, actor: ActorDep, body: schemas.Reason | None = None
) -> schemas.Rollout:
    """Starts nothing new; harm still stops it."""
    with services.store.write() as session:
        return rollout_view(session, service.pause(session, key, actor=actor, reason=_reason(body)))


@router.post("/rollouts/{key}/resume")
def resume(
    key: str, services: ServicesDep, actor: ActorDep, body: schemas.Reason | None = None
) -> schemas.Rollout:
    with services.store.write() as session:
        return rollout_view(session, service.resume(session, key, actor=actor, reason=_reason(body)))


@router.post("/rollouts/{key}/abort")
def abort(
    key: str, services: ServicesDep, actor: ActorDep, body: schemas.Reason | None = None
) -> schemas.Rollout:
    """All devices go back."""
    with services.store.write() as session:
        row = service.abort(session, services.clock, key, actor=actor, reason=_reason(body))
        view = rollout_view(session, row)
    services.publish()
    return view


@router.post("/rollouts/{key}/promote")
def promote(
    key: str, services: ServicesDep, actor: ActorDep, body: schemas.Reason | None = None
) -> schemas.Rollout:
    """Gives the new assignment to all devices now, without further judging."""
    with services.store.write() as session:
        row = service.promote(session, services.clock, key, actor=actor, reason=_reason(body))
        view = rollout_view(session, row)
    services.publish()
    return view


def _reason(body: schemas.Reason | None) -> str:
    return body.reason[:1000] if body is not None else ""


# ------------------------------------------------------------------ views


def rollout_view(session: Session, row: Rollout, *, devices: bool = True) -> schemas.Rollout:
    endpoint = session.get(Endpoint, row.endpoint)
    assert endpoint is not None
    states = {
        entry.device: entry.state
        for entry in session.execute(
            select(RolloutDevice.device, RolloutDevice.state).where(RolloutDevice.rollout == row.id)
        )
    }
    old, new = service.labels_of(session, row)
    return schemas.Rollout(
        id=row.id,
        endpoint=endpoint.name,
        from_label=old,
        to_label=new,
        state=row.state,
        sentence=str(row.verdict.get("sentence", "")),
        waves=[_wave(wave, states) for wave in row.waves],
        gates=row.gates,
        devices=_devices(session, row) if devices else [],
        left_out=row.verdict.get("left_out") or {},
        actor=row.actor,
        reason=row.reason,
        finding=row.finding,
        created_ms=row.created_ms,
        finished_ms=row.finished_ms,
    )


def _wave(wave: Mapping[str, Any], states: Mapping[str, str]) -> schemas.Wave:
    verdict = wave.get("verdict") or {}
    own: Sequence[str] = [states.get(device, "waiting") for device in wave["devices"]]
    decision = {"passed": "go", "carried": "go", "stopped": "stop", "waiting": "waiting"}.get(wave["state"])
    return schemas.Wave(
        name=wave["name"],
        state=wave["state"],
        devices=len(own),
        switched=sum(state in DONE_STATES for state in own),
        failed=sum(state == "failed" for state in own),
        effects=[schemas.Effect(**effect) for effect in verdict.get("effects") or []],
        decision=decision or str(verdict.get("decision", "collecting")),
        sentence=str(verdict.get("sentence", "")),
        started_ms=wave.get("started_ms", 0),
        decided_ms=wave.get("decided_ms", 0),
    )


def _devices(session: Session, row: Rollout) -> list[schemas.RolloutDevice]:
    rows = session.execute(
        select(RolloutDevice, Device.name, Device.profile_class)
        .join(Device, Device.id == RolloutDevice.device)
        .where(RolloutDevice.rollout == row.id)
        .order_by(RolloutDevice.wave, Device.name)
    )
    return [
        schemas.RolloutDevice(
            device=entry.device,
            name=name,
            profile_class=profile_class,
            wave=entry.wave,
            state=entry.state,
            reason=entry.reason,
            detail=entry.detail,
            logs=(entry.logs or b"").decode(errors="replace"),
        )
        for entry, name, profile_class in rows
    ]
