"""Devices, their classes, and the fleet at a glance."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Annotated, Any

from fastapi import APIRouter, Query
from sqlalchemy import select
from sqlalchemy.orm import Session

from shoal_agent.telemetry import histograms
from shoal_controller import device_detail, devices, metrics, query, windows
from shoal_controller.api import schemas
from shoal_controller.api.deps import ActorDep, ServicesDep
from shoal_controller.api.events import event_view
from shoal_controller.device_status import STATUS_LETTERS, STATUSES, likely_causes, next_step, step_name
from shoal_controller.devices import DeviceView
from shoal_controller.events import list_events
from shoal_controller.services import Services
from shoal_controller.store.repositories import find, new_id, record
from shoal_controller.store.tables import Desired, Device, DeviceRequest, Window
from shoal_protos.errors import Conflict, InvalidInput, NotFound
from shoal_protos.v1 import agents_pb2, telemetry_pb2

router = APIRouter(tags=["devices"])

MAX_NAMES = 2000  # above so many devices the map carries no names
MAX_POINTS = 120
REQUEST_SECONDS = 24 * 3600

_SORTS: Mapping[str, Callable[[DeviceView], Any]] = {
    "name": lambda v: v.name,
    "id": lambda v: v.id,
    "status": lambda v: STATUSES.index(v.status),
    "class": lambda v: v.profile_class,
    "version": lambda v: v.version,
    "p95": lambda v: v.p95_ms,
    "temperature": lambda v: v.temperature_celsius,
    "last_seen": lambda v: v.last_seen_ms,
    "joined": lambda v: v.joined_ms,
}
_ALIASES = {
    "p95_ms": "p95",
    "profile_class": "class",
    "temperature_celsius": "temperature",
    "last_seen_ms": "last_seen",
    "joined_ms": "joined",
}


# ---------------------------------------------------------------------------- lists


@router.get("/devices")
def list_devices(
    services: ServicesDep,
    filter: str = "",
    sort: str = "name",
    offset: Annotated[int, Query(ge=0)] = 0,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
) -> schemas.Page[schemas.Device]:
    """A window of the fleet. `sort` is a column, with `-` before it the other way round."""
    found = _sorted(_matching(services, filter), sort)
    page = found[offset : offset + limit]
    return schemas.Page(items=[device_view(view) for view in page], total=len(found), offset=offset)


def _matching(services: Services, filter: str) -> list[DeviceView]:
    """Removed devices are listed only where the filter asks for a status."""
    wanted = query.parse(filter)
    removed = "status" in wanted.fields
    views = services.fleet.views()
    return [v for v in views if (removed or v.status != "revoked") and wanted.matches(v.facts)]


def _sorted(views: list[DeviceView], sort: str) -> list[DeviceView]:
    name = _ALIASES.get(sort.lstrip("-"), sort.lstrip("-")) or "name"
    key = _SORTS.get(name)
    if key is None:
        raise InvalidInput(f"Devices cannot be sorted by '{name[:40]}'.", f"Use {', '.join(_SORTS)}.")
    measured = sorted(
        (view for view in views if key(view) is not None), key=key, reverse=sort.startswith("-")
    )
    return measured + [view for view in views if key(view) is None]


def device_view(view: DeviceView) -> schemas.Device:
    return schemas.Device(**_device_fields(view))


def _device_fields(view: DeviceView) -> dict[str, Any]:
    return {
        "id": view.id,
        "name": view.name,
        "project": view.project,
        "profile_class": view.profile_class,
        "status": view.status,
        "status_reason": view.status_reason,
        "labels": dict(view.labels),
        "version": view.version,
        "p95_ms": view.p95_ms,
        "temperature_celsius": view.temperature_celsius,
        "emulated": view.profile.emulated,
        "quarantined": view.quarantined,
        "pins": dict(view.pins),
        "class_reason": device_detail.class_reason(view.profile, view.profile_class),
        "last_seen_ms": view.last_seen_ms,
        "joined_ms": view.joined_ms,
        "agent_version": view.agent_version,
        "placements": [
            schemas.PlacementView(
                endpoint=p.endpoint,
                wanted=p.wanted_name,
                serving=p.serving,
                variant=p.serving_name,
                step=step_name(p.step),
                reason=p.reason,
                detail=p.detail,
                fallback=p.fallback,
                pinned=p.pinned,
                current=p.current,
            )
            for p in view.placements
        ],
    }


@router.get("/classes")
def list_classes(services: ServicesDep) -> list[schemas.ClassSummary]:
    """Every profile class with its devices and their recent latency."""
    by_class: dict[str, list[DeviceView]] = defaultdict(list)
    for view in services.fleet.views():
        by_class[view.profile_class].append(view)
    figures = metrics.by(1, services.recent.figures())
    return [
        schemas.ClassSummary(
            name=name,
            devices=len(members),
            by_status=_counts(members),
            p95_ms=figures[name].p95_ms if name in figures else None,
            requests_per_s=figures[name].requests_per_s if name in figures else 0.0,
        )
        for name, members in sorted(by_class.items())
    ]


def _counts(views: list[DeviceView]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for view in views:
        counts[view.status] = counts.get(view.status, 0) + 1
    return counts


@router.get("/fleet/map")
def fleet_map(services: ServicesDep, filter: str = "") -> schemas.FleetMap:
    """One character a device: 10,000 devices are 10 kB."""
    by_class: dict[str, list[DeviceView]] = defaultdict(list)
    found = _matching(services, filter)
    for view in found:
        by_class[view.profile_class].append(view)
    classes = sorted(by_class)
    named = len(found) < MAX_NAMES
    return schemas.FleetMap(
        classes=classes,
        states=["".join(STATUS_LETTERS[view.status] for view in by_class[name]) for name in classes],
        names=[[view.name for view in by_class[name]] for name in classes] if named else None,
    )


@router.get("/fleet/latency")
def fleet_latency(
    services: ServicesDep, minutes: Annotated[int, Query(ge=1, le=43200)] = 60, endpoint: str = ""
) -> schemas.FleetLatency:
    """95th percentile of latency by class over time, from the devices' own histograms."""
    now = services.clock()
    step = max(services.settings.telemetry_seconds * 1000, minutes * 60_000 // MAX_POINTS)
    first = (now - minutes * 60_000) // step
    conditions = [Window.endpoint == endpoint] if endpoint else [Window.endpoint != ""]
    with services.store.read() as session:
        rows = session.execute(
            select(Device.profile_class, Window.end_ms, Window.latency)
            .join(Device, Device.id == Window.device)
            .where(*conditions, Window.end_ms > first * step, Window.role == "primary")
            .where(Window.latency.is_not(None))
            .order_by(Window.end_ms.desc())
            .limit(metrics.MAX_ROWS)
        ).all()
    cells: dict[tuple[str, int], list[telemetry_pb2.Histogram]] = defaultdict(list)
    for profile_class, end_ms, latency in rows:
        histogram = telemetry_pb2.Histogram.FromString(latency or b"")
        cells[(profile_class, end_ms // step - first)].append(histogram)
    count = now // step - first + 1
    series: dict[str, list[float | None]] = {}
    for (profile_class, at), parts in cells.items():
        line = series.setdefault(profile_class, [None] * count)
        if 0 <= at < count:
            line[at] = windows.quantile_ms(histograms.merge_all(parts), 0.95)
    return schemas.FleetLatency(
        times_ms=[(first + at) * step for at in range(count)], series=dict(sorted(series.items()))
    )


# ---------------------------------------------------------------------------- one device


@router.get("/devices/{key}")
def get_device(key: str, services: ServicesDep) -> schemas.DeviceDetail:
    """Everything about one device, by id, name or a unique prefix of its id."""
    with services.store.read() as session:
        row = find(session, Device, key)
        view = _view_of(services, session, row.id)
        desired = session.get(Desired, row.id)
        reported = agents_pb2.Reported.FromString(row.reported or b"")
        logs = device_detail.failure_logs(session, row.id, reported)
        heartbeat_ms = services.settings.heartbeat_seconds * 1000
        never = not view.judged.last_seen_ms and not view.judged.revoked
        return schemas.DeviceDetail(
            **_device_fields(view),
            profile=windows.message_json(view.profile),
            system=row.system,
            generation=desired.generation if desired is not None else 0,
            reported_generation=reported.generation,
            desired_ms=view.desired_ms,
            connected=view.judged.connected,
            expected_ms=view.last_seen_ms + heartbeat_ms if view.judged.connected else 0,
            windows=device_detail.recent_windows(session, row.id, emulated=view.profile.emulated),
            drift=device_detail.drift(session, services.blobs, view, services.clock()),
            events=[event_view(e) for e in list_events(session, kind="device", object=row.id, limit=50)],
            logs=logs,
            next_step=next_step(view.name, view.judged, logs=bool(logs)),
            causes=likely_causes(services.addresses.get("agents", "")) if never else [],
        )


def _view_of(services: Services, session: Session, device: str) -> DeviceView:
    views = devices.load_views(
        session,
        now_ms=services.clock(),
        settings=services.settings,
        connections=services.connections,
        only=device,
    )
    if not views:
        raise NotFound(f"There is no device '{device}'.")
    return views[0]


@router.patch("/devices/{key}")
def patch_device(
    key: str, body: schemas.DevicePatch, services: ServicesDep, actor: ActorDep
) -> schemas.Device:
    """Changes name, labels (an empty text removes one), quarantine or pins."""
    change = devices.Change(**body.model_dump())
    with services.store.write() as session:
        row = devices.patch(session, services.blobs, find(session, Device, key), change, actor=actor)
        session.flush()
        return device_view(_view_of(services, session, row.id))


@router.delete("/devices/{key}")
def revoke_device(key: str, services: ServicesDep, actor: ActorDep, reason: str = "") -> schemas.Device:
    """Shuts the device out: its stream ends within a second, its certificate is refused for good."""
    with services.store.write() as session:
        row = devices.revoke(session, find(session, Device, key), actor=actor, reason=reason)
        session.flush()
        view = device_view(_view_of(services, session, row.id))
    services.connections.revoke(row.id, row.certificate_serial)
    return view


@router.post("/devices/{key}/requests", status_code=202)
def ask_device(
    key: str, body: schemas.DeviceRequestCreate, services: ServicesDep, actor: ActorDep
) -> schemas.DeviceRequest:
    """Asks for logs, a diagnosis or a new profile; the device answers when it is there, within a day."""
    with services.store.write() as session:
        device = find(session, Device, key)
        if device.revoked:
            raise Conflict(
                f"The device {device.name} was removed; it answers nothing.", "Let the machine join again."
            )
        now = services.clock()
        row = DeviceRequest(
            id=new_id(session, "q"),
            device=device.id,
            kind=body.kind,
            state="open",
            body=None,
            created_ms=now,
            not_after_ms=now + REQUEST_SECONDS * 1000,
            answered_ms=0,
        )
        session.add(row)
        record(
            session,
            project=device.project,
            actor=actor,
            verb="asked",
            kind="request",
            object=row.id,
            after={"device": device.id, "kind": row.kind},
        )
    return _request_view(row)


@router.get("/devices/{key}/requests")
def list_requests(key: str, services: ServicesDep) -> list[schemas.DeviceRequest]:
    """What was asked of a device, newest first."""
    with services.store.read() as session:
        device = find(session, Device, key)
        rows = session.scalars(
            select(DeviceRequest)
            .where(DeviceRequest.device == device.id)
            .order_by(DeviceRequest.created_ms.desc(), DeviceRequest.id.desc())
            .limit(50)
        )
        return [_request_view(row) for row in rows]


def _request_view(row: DeviceRequest) -> schemas.DeviceRequest:
    return schemas.DeviceRequest(
        id=row.id,
        device=row.device,
        kind=row.kind,
        state=row.state,
        body=(row.body or b"").decode(errors="replace"),
        created_ms=row.created_ms,
        answered_ms=row.answered_ms,
    )
