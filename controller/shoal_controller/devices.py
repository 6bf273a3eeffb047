"""Devices as people see them: one view a device, changing and removing."""

from __future__ import annotations

import math
import re
import threading
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from shoal_controller import holding
from shoal_controller.blobs import BlobStore
from shoal_controller.clock import Clock
from shoal_controller.device_status import FindingFacts, PlacementFacts, StatusFacts, judge
from shoal_controller.enrolment import unique_name
from shoal_controller.gateway.connections import Connections
from shoal_controller.query import stable_facts
from shoal_controller.settings import Settings
from shoal_controller.store.repositories import Store, record
from shoal_controller.store.tables import Desired, Device, Endpoint, Finding, Model, Variant, Version
from shoal_protos.errors import Conflict, InvalidInput
from shoal_protos.v1 import agents_pb2, desired_pb2, profile_pb2

FRESH_SECONDS = 900  # older figures are not shown as current
LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9_./-]{0,62}\Z")
MAX_LABELS = 32

# ---------------------------------------------------------------------------- views


@dataclass(frozen=True)
class DeviceView:
    """A device as API, filters and pages see it. Latencies in ms, times in Unix ms."""

    id: str
    name: str
    project: str
    profile_class: str
    status: str
    status_reason: str
    labels: Mapping[str, str]
    version: str
    p50_ms: float | None
    p95_ms: float | None
    error_share: float | None
    requests_per_s: float
    temperature_celsius: float | None
    last_seen_ms: int
    joined_ms: int
    agent_version: str
    placements: tuple[PlacementFacts, ...]
    quarantined: bool
    pins: Mapping[str, str]
    desired_ms: int
    judged: StatusFacts = field(repr=False)
    profile: profile_pb2.Profile = field(repr=False)
    facts: Mapping[str, Any] = field(repr=False, default_factory=dict)  # what filters look at


@dataclass(frozen=True)
class _Published:
    """What one device should have, as signed last."""

    number: tuple[int, int]  # epoch, generation
    issued_ms: int
    placements: Mapping[str, desired_pb2.Placement]  # primary ones by endpoint


_NOTHING = _Published((0, 0), 0, {})


def _published(session: Session, only: str) -> dict[str, _Published]:
    query = select(Desired.device, Desired.epoch, Desired.generation, Desired.issued_ms, Desired.signed)
    if only:
        query = query.where(Desired.device == only)
    found = {}
    for row in session.execute(query):
        payload = desired_pb2.Signed.FromString(row.signed).payload
        state = desired_pb2.DesiredState.FromString(payload)
        placements = {p.endpoint: p for p in state.placements if p.role in (0, desired_pb2.ROLE_PRIMARY)}
        found[row.device] = _Published((row.epoch, row.generation), row.issued_ms, placements)
    return found


@dataclass(frozen=True)
class _Names:
    """Bundle -> (variant name, "digits v1")."""

    variants: Mapping[str, tuple[str, str]]

    def of(self, bundle: str) -> tuple[str, str]:
        return self.variants.get(bundle, (bundle.removeprefix("sha256:")[:12], "")) if bundle else ("", "")


def bundle_names(session: Session) -> Mapping[str, tuple[str, str]]:
    """Bundle digest -> (variant name, "MODEL vNUMBER")."""
    rows = session.execute(
        select(Variant.bundle, Variant.name, Model.name, Version.number)
        .join(Version, Variant.version == Version.id)
        .join(Model, Version.model == Model.id)
    )
    return {bundle: (name, f"{model} v{number}") for bundle, name, model, number in rows}


def load_views(
    session: Session,
    *,
    now_ms: int,
    settings: Settings,
    connections: Connections | None = None,
    only: str = "",
) -> list[DeviceView]:
    """All devices (or `only` one), by name."""
    query = select(Device).order_by(Device.name)
    if only:
        query = query.where(Device.id == only)
    names = _Names(bundle_names(session))
    published = _published(session, only)
    findings = _findings(session)
    return [
        _view(device, names, published.get(device.id, _NOTHING), findings, now_ms, settings, connections)
        for device in session.scalars(query)
    ]


def _findings(session: Session) -> dict[str, list[FindingFacts]]:
    """Subject ("device:ID", "ENDPOINT NAME/CLASS") -> its open findings."""
    found: dict[str, list[FindingFacts]] = defaultdict(list)
    names = {row[0]: row[1] for row in session.execute(select(Endpoint.id, Endpoint.name))}
    for row in session.scalars(select(Finding).where(Finding.state.in_(("open", "acting")))):
        subject = row.subject
        if subject.startswith("endpoint:"):
            endpoint, _, profile_class = subject.removeprefix("endpoint:").partition("/")
            subject = f"{names.get(endpoint, endpoint)}/{profile_class}"
        found[subject].append(FindingFacts(row.kind, row.sentence))
    return found


def _view(
    device: Device,
    names: _Names,
    published: _Published,
    findings: Mapping[str, list[FindingFacts]],
    now_ms: int,
    settings: Settings,
    connections: Connections | None,
) -> DeviceView:
    reported = agents_pb2.Reported.FromString(device.reported or b"")
    profile = profile_pb2.Profile.FromString(device.profile)
    placements = _placements(device, reported, published, names)
    live = connections is not None and connections.is_connected(device.id)
    last_seen = max(device.last_seen_ms, connections.last_heard(device.id) if connections else 0)
    own = [*findings.get(f"device:{device.id}", ())]
    for placement in placements if not device.quarantined else ():  # its class's findings are not about it
        own += findings.get(f"{placement.endpoint}/{device.profile_class}", ())
    judged = StatusFacts(
        revoked=device.revoked,
        connected=live or (connections is None and device.connected),
        last_seen_ms=last_seen,
        now_ms=now_ms,
        offline_after_s=settings.offline_after_seconds,
        behind=(reported.epoch, reported.generation) < published.number,
        clock_wrong=reported.clock_wrong,
        throttled=bool(device.system.get("throttled")),
        refusal=reported.refusals[-1].reason if reported.refusals else "",
        placements=placements,
        findings=own,
    )
    status, reason = judge(judged)
    figures = _current(device.figures, now_ms)
    requests = figures.get("requests", 0)
    seconds = figures.get("seconds") or 0
    view = DeviceView(
        id=device.id,
        name=device.name,
        project=device.project,
        profile_class=device.profile_class,
        status=status,
        status_reason=reason,
        labels=device.labels,
        version=next((p.serves for p in placements if p.serves), ""),
        # An emulator's times say nothing about the hardware: unmeasured.
        p50_ms=None if profile.emulated else figures.get("p50_ms"),
        p95_ms=None if profile.emulated else figures.get("p95_ms"),
        error_share=figures["errors"] / requests if requests else None,
        requests_per_s=requests / seconds if seconds else 0.0,
        temperature_celsius=_finite(device.system.get("temperature_celsius")),
        last_seen_ms=last_seen,
        joined_ms=device.joined_ms,
        agent_version=device.agent_version,
        placements=placements,
        quarantined=device.quarantined,
        pins=device.pins,
        desired_ms=published.issued_ms,
        judged=judged,
        profile=profile,
    )
    facts = stable_facts(device, profile) | {
        "status": status,
        "endpoint": [p.endpoint for p in placements],
        "version": [p.serves for p in placements],
        "variant": [p.serving_name for p in placements],
        "agent": device.agent_version,
        "p50": view.p50_ms,
        "p95": view.p95_ms,
        "errors": view.error_share,
        "temperature": view.temperature_celsius,
        "seen": now_ms - last_seen,
        "is": _marks(view),
    }
    object.__setattr__(view, "facts", facts)
    return view


def _marks(view: DeviceView) -> list[str]:
    """What the filter field `is` looks at."""
    marks = {
        "quarantined": view.quarantined,
        "pinned": bool(view.pins),
        "fallback": any(p.fallback for p in view.placements),
        "emulated": view.profile.emulated,
    }
    return [name for name, so in marks.items() if so]


def _placements(
    device: Device, reported: agents_pb2.Reported, published: _Published, names: _Names
) -> tuple[PlacementFacts, ...]:
    """What was reported, then what was published and is not reported yet."""
    found = [
        _placement(device, status, published.placements.get(status.endpoint), names)
        for status in reported.placements
        if status.role in (0, desired_pb2.ROLE_PRIMARY)
    ]
    known = {placement.endpoint for placement in found}
    missing = [p for name, p in sorted(published.placements.items()) if name not in known]
    nothing = agents_pb2.PlacementStatus
    found += [_placement(device, nothing(endpoint=p.endpoint), p, names) for p in missing]
    return tuple(found)


def _placement(
    device: Device,
    status: agents_pb2.PlacementStatus,
    published: desired_pb2.Placement | None,
    names: _Names,
) -> PlacementFacts:
    serving_name, serves = names.of(status.serving)
    wanted = published.bundle if published is not None else status.wanted
    return PlacementFacts(
        endpoint=status.endpoint,
        wanted=wanted,
        serving=status.serving,
        step=status.step,
        reason=status.reason,
        detail=status.detail,
        fallback=published is not None and published.settings.fallback,
        pinned=status.endpoint in device.pins,
        current=status.wanted == wanted,
        wanted_name=names.of(wanted)[0],
        serving_name=serving_name,
        serves=serves,
    )


def _current(figures: Mapping[str, Any], now_ms: int) -> Mapping[str, Any]:
    return figures if figures and now_ms - figures.get("end_ms", 0) < FRESH_SECONDS * 1000 else {}


def _finite(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


class Fleet:
    """All views, kept for a moment: pages, API and stream of one second share one reading."""

    def __init__(
        self, store: Store, settings: Settings, connections: Connections, clock: Clock, max_age_ms: int = 1000
    ) -> None:
        self._store, self._settings, self._connections, self._clock = store, settings, connections, clock
        self._max_age_ms = max_age_ms
        self._lock = threading.Lock()
        self._views: list[DeviceView] = []
        self._read_ms = 0
        self._stale = True
        store.listen(self.invalidate)

    def invalidate(self) -> None:
        self._stale = True

    def views(self) -> list[DeviceView]:
        """All devices by name; at most a second old, and never older than the last recorded event."""
        with self._lock:
            now = self._clock()
            if self._stale or not 0 <= now - self._read_ms <= self._max_age_ms:
                self._stale = False
                with self._store.read() as session:
                    self._views = load_views(
                        session, now_ms=now, settings=self._settings, connections=self._connections
                    )
                self._read_ms = now
            return self._views


# ---------------------------------------------------------------------------- changes


@dataclass(frozen=True)
class Change:
    """What somebody wants of a device; None = leave it. An empty label's text removes the label."""

    labels: Mapping[str, str] | None = None
    name: str | None = None
    quarantined: bool | None = None
    pins: Mapping[str, str] | None = None  # all of them: endpoint -> variant id or name
    reason: str = ""


def patch(session: Session, blobs: BlobStore, device: Device, change: Change, *, actor: str) -> Device:
    """Changes a device; each act is an event of its own.

    Raises:
        InvalidInput: a label or name that cannot be typed, a pin that names something wrong.
        Conflict: another device has the name, or the device cannot run what it should be pinned to.
    """
    if change.labels is not None or change.name is not None:
        _describe(session, device, change, actor)
    if change.quarantined is not None:
        act = holding.quarantine if change.quarantined else holding.release
        act(session, device, actor=actor, reason=change.reason)
    if change.pins is not None:
        holding.pin(session, blobs, device, change.pins, actor=actor, reason=change.reason)
    return device


def _describe(session: Session, device: Device, change: Change, actor: str) -> None:
    before = {"name": device.name, "labels": dict(device.labels)}
    if change.labels is not None:
        device.labels = _merged_labels(device.labels, change.labels)
    if change.name is not None and change.name != device.name:
        if unique_name(session, change.name, but=device.id) != change.name:
            raise Conflict(
                f"A device cannot be called '{change.name[:60]}'.",
                "Use lower-case letters, digits, dots and dashes, and a name that no other device has.",
            )
        device.name = change.name
    after = {"name": device.name, "labels": dict(device.labels)}
    if after != before:
        record(
            session,
            project=device.project,
            actor=actor,
            verb="changed",
            kind="device",
            object=device.id,
            before=before,
            after=after,
            reason=change.reason,
        )


def _merged_labels(old: Mapping[str, Any], changes: Mapping[str, str]) -> dict[str, Any]:
    merged = dict(old)
    for key, value in changes.items():
        if not LABEL.match(key) or len(value) > 120:
            raise InvalidInput(
                f"'{key[:60]}' is not a label.",
                "Use letters, digits, '_', '.', '/' and '-', values up to 120.",
            )
        if value:
            merged[key] = value
        else:
            merged.pop(key, None)
    if len(merged) > MAX_LABELS:
        raise InvalidInput(f"A device has at most {MAX_LABELS} labels.")
    return merged


def revoke(session: Session, device: Device, *, actor: str, reason: str = "") -> Device:
    """Shuts a device out for good. After the commit call `connections.revoke(device, serial)`."""
    if not device.revoked:
        device.revoked = True
        device.connected = False
        record(
            session,
            project=device.project,
            actor=actor,
            verb="revoked",
            kind="device",
            object=device.id,
            after={"name": device.name},
            reason=reason,
        )
    return device
