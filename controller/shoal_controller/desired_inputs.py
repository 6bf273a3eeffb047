"""Loads what `desired.merge` decides on: a few queries for the whole fleet, then one value a device."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import String, cast, select
from sqlalchemy.orm import Session

from shoal_controller import query
from shoal_controller.blobs import BlobStore
from shoal_controller.desired import (
    ACTIVE,
    AgentFacts,
    AssignmentFacts,
    DeviceInputs,
    EndpointFacts,
    EnvelopeFacts,
    OptionFacts,
    RequestFacts,
    RolloutFacts,
    TrialFacts,
    VariantFacts,
)
from shoal_controller.store.repositories import get_meta, set_meta
from shoal_controller.store.tables import (
    Assignment,
    Device,
    DeviceRequest,
    Endpoint,
    Measurement,
    Model,
    Release,
    Rollout,
    RolloutDevice,
    Trial,
    Variant,
    Version,
)
from shoal_protos.errors import ShoalError
from shoal_protos.v1 import profile_pb2

PUBLISHED = "published_settings"
SHARE_TOLERANCE = 0.02  # two builds of a runtime count a graph's operations slightly differently


@dataclass(frozen=True)
class PublishedSettings:
    """What the controller tells every agent; kept in the database so that every caller of
    `publish` tells the same."""

    addresses: tuple[str, ...] = ()
    telemetry_seconds: int = 30
    heartbeat_seconds: int = 30
    desired_seconds: int = 14 * 86400

    @classmethod
    def load(cls, session: Session) -> PublishedSettings:
        raw = get_meta(session, PUBLISHED)
        if not raw:
            return cls()
        values = json.loads(raw)
        return cls(**{**values, "addresses": tuple(values.get("addresses", ()))})

    def save(self, session: Session) -> None:
        value = json.dumps({**self.__dict__, "addresses": list(self.addresses)}, sort_keys=True)
        if get_meta(session, PUBLISHED) != value:
            set_meta(session, PUBLISHED, value)


@dataclass
class _Facts:
    """What is the same for all devices."""

    agent: AgentFacts
    endpoints: list[Endpoint] = field(default_factory=list)
    attempts: Mapping[str, int] = field(default_factory=dict)  # assignment -> attempt that led to it
    assignments: Mapping[str, AssignmentFacts] = field(default_factory=dict)
    variants: Mapping[str, VariantFacts] = field(default_factory=dict)
    rollouts: Mapping[str, Rollout] = field(default_factory=dict)  # endpoint -> the active one
    device_states: Mapping[tuple[str, str], str] = field(default_factory=dict)  # (rollout, device)
    trials: Mapping[str, list[TrialFacts]] = field(default_factory=dict)  # by device
    requests: Mapping[str, list[RequestFacts]] = field(default_factory=dict)


def load(
    session: Session,
    blobs: BlobStore,
    fleet: str,
    now_ms: int,
    devices: Iterable[str] | None = None,
) -> Iterator[DeviceInputs]:
    """One value for each device that may have a desired state (not for revoked ones)."""
    facts = _load_facts(session, blobs, now_ms)
    rows = select(Device).where(Device.revoked.is_(False)).order_by(Device.id)
    if devices is not None:
        rows = rows.where(Device.id.in_(list(devices)))
    for device in session.scalars(rows):
        yield _device_inputs(device, facts, fleet)


def _load_facts(session: Session, blobs: BlobStore, now_ms: int) -> _Facts:
    published = PublishedSettings.load(session)
    endpoints = list(session.scalars(select(Endpoint)))
    rollouts = {
        row.endpoint: row for row in session.scalars(select(Rollout).where(Rollout.state.in_(ACTIVE)))
    }
    wanted = {endpoint.assignment for endpoint in endpoints}
    for rollout in rollouts.values():
        wanted |= {rollout.from_assignment, rollout.to_assignment}
    assignments, variants = _load_assignments(session, blobs, wanted - {""}, _kept_variants(session))
    states = select(RolloutDevice.rollout, RolloutDevice.device, RolloutDevice.state).where(
        RolloutDevice.rollout.in_([rollout.id for rollout in rollouts.values()])
    )
    return _Facts(
        agent=AgentFacts(published.addresses, published.telemetry_seconds, published.heartbeat_seconds),
        endpoints=endpoints,
        attempts=_attempts(session, wanted),
        assignments=assignments,
        variants=variants,
        rollouts=rollouts,
        device_states={(row[0], row[1]): row[2] for row in session.execute(states)},
        trials=_load_trials(session, now_ms),
        requests=_load_requests(session, now_ms),
    )


def _kept_variants(session: Session) -> set[str]:
    """Variants that pinned and quarantined devices keep, assigned or not."""
    some = (cast(Device.pins, String) != "{}") | (cast(Device.held, String) != "{}")
    rows = session.execute(select(Device.pins, Device.held).where(Device.revoked.is_(False), some))
    return {variant for row in rows for kept in row for variant in kept.values()}


def _attempts(session: Session, assignments: set[str]) -> dict[str, int]:
    """A promoted assignment keeps its rollout's attempt: promotion changes nothing on the device."""
    rows = session.execute(
        select(Rollout.to_assignment, Rollout.attempt).where(
            Rollout.state == "promoted", Rollout.to_assignment.in_(assignments)
        )
    )
    found: dict[str, int] = {}
    for assignment, attempt in rows:
        found[assignment] = max(attempt, found.get(assignment, 1))
    return found


def _load_assignments(
    session: Session, blobs: BlobStore, ids: set[str], kept: set[str]
) -> tuple[dict[str, AssignmentFacts], dict[str, VariantFacts]]:
    assignments: dict[str, AssignmentFacts] = {}
    created: dict[str, int] = {}  # variant -> when it was first assigned
    rows = session.execute(
        select(Assignment, Release.fronts)
        .join(Release, Release.id == Assignment.release)
        .where(Assignment.id.in_(ids))
    )
    for row, fronts in rows:
        assignments[row.id] = AssignmentFacts(row.id, row.choice, frozenset(fronts))
        for variant in row.choice.values():
            created[variant] = min(row.created_ms, created.get(variant, row.created_ms))
    # A variant that was never assigned has the figures of its first measurements, which stay the same too.
    return assignments, _load_variants(session, blobs, dict.fromkeys(kept, 0) | created)


def _load_variants(session: Session, blobs: BlobStore, created: Mapping[str, int]) -> dict[str, VariantFacts]:
    rows = session.execute(
        select(Variant, Version.number, Model.name)
        .join(Version, Variant.version == Version.id)
        .join(Model, Version.model == Model.id)
        .where(Variant.id.in_(created))
    ).all()
    figures = _load_figures(session, created)
    return {
        row.id: _variant(row, number, model, figures.get(row.id, {}), blobs) for row, number, model in rows
    }


def _load_figures(session: Session, created: Mapping[str, int]) -> dict[str, dict[str, dict[str, Any]]]:
    """variant -> class -> kind -> figures, as known when the variant was first assigned: a later
    measurement must not change the state of devices that already serve it."""
    rows = session.scalars(
        select(Measurement)
        .where(
            Measurement.variant.in_(created),
            Measurement.kind.in_(("latency", "memory", "accuracy", "int8_share", "options")),
        )
        .order_by(Measurement.time_ms, Measurement.id)
    )
    found: dict[str, dict[str, dict[str, Any]]] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        assigned = created[row.variant]
        if row.time_ms <= assigned:
            found[row.variant][row.profile_class][row.kind] = row.figures
        elif not assigned:
            found[row.variant][row.profile_class].setdefault(row.kind, row.figures)
    return found


def _variant(
    row: Variant, number: int, model: str, figures: Mapping[str, dict[str, Any]], blobs: BlobStore
) -> VariantFacts:
    try:
        need = blobs.bundle(row.bundle).config.runtime
        isa, low, high = frozenset(need.isa), need.version_min, need.version_max
    except ShoalError:  # a lost bundle: the device will say so when it fetches
        isa, low, high = frozenset(), "", ""
    return VariantFacts(
        id=row.id,
        bundle=row.bundle,
        runtime=row.target,
        model=model,
        model_version=number,
        isa=isa,
        version_min=low,
        version_max=high,
        promised_int8_share={
            name: max(0.0, _number(kinds, "int8_share", "value") - SHARE_TOLERANCE)
            for name, kinds in figures.items()
        },
        envelopes={
            name: EnvelopeFacts(
                latency_p95_ms=_number(kinds, "latency", "p95_ms"),
                memory_bytes=int(_number(kinds, "memory", "bytes")),
                accuracy=_number(kinds, "accuracy", "value"),
            )
            for name, kinds in figures.items()
        },
        options={
            name: OptionFacts.of(kinds["options"]) for name, kinds in figures.items() if "options" in kinds
        },
    )


def _number(kinds: Mapping[str, Any], kind: str, name: str) -> float:
    value = (kinds.get(kind) or {}).get(name)
    return float(value) if isinstance(value, (int, float)) and value == value else 0.0


def _load_trials(session: Session, now_ms: int) -> dict[str, list[TrialFacts]]:
    found: dict[str, list[TrialFacts]] = defaultdict(list)
    rows = select(Trial).where(
        Trial.state.in_(("pending", "published")), Trial.device != "", Trial.not_after_ms > now_ms
    )
    for row in session.scalars(rows):
        options = OptionFacts.of(row.options)
        found[row.device].append(
            TrialFacts(
                row.id,
                row.bundle,
                row.kind,
                row.dataset,
                row.incumbent,
                row.not_after_ms,
                threads=options.threads,
                extra=options.extra,
            )
        )
    return found


def _load_requests(session: Session, now_ms: int) -> dict[str, list[RequestFacts]]:
    found: dict[str, list[RequestFacts]] = defaultdict(list)
    rows = select(DeviceRequest).where(DeviceRequest.state == "open", DeviceRequest.not_after_ms > now_ms)
    for row in session.scalars(rows):
        found[row.device].append(RequestFacts(row.id, row.kind, row.not_after_ms))
    return found


def _device_inputs(device: Device, facts: _Facts, fleet: str) -> DeviceInputs:
    profile = profile_pb2.Profile.FromString(device.profile)
    stable = query.stable_facts(device, profile)
    held = device.held if device.quarantined else {}
    return DeviceInputs(
        fleet=fleet,
        device=device.id,
        profile_class=device.profile_class,
        isa=frozenset(profile.isa_features),
        runtimes={runtime.name: runtime.version for runtime in profile.runtimes},
        endpoints=[
            _endpoint(endpoint, device.id, facts)
            for endpoint in facts.endpoints
            if endpoint.project == device.project
            and (endpoint.name in held or query.parse(endpoint.filter).matches(stable))
        ],
        assignments=facts.assignments,
        variants=facts.variants,
        trials=facts.trials.get(device.id, ()),
        requests=facts.requests.get(device.id, ()),
        agent=facts.agent,
        pins=device.pins,
        held=held if device.quarantined else None,
    )


def _endpoint(endpoint: Endpoint, device: str, facts: _Facts) -> EndpointFacts:
    rollout = facts.rollouts.get(endpoint.id)
    settle = endpoint.settings.get("settle") or {}
    sampling = endpoint.settings.get("sampling") or {}
    return EndpointFacts(
        name=endpoint.name,
        project=endpoint.project,
        assignment=endpoint.assignment,
        attempt=facts.attempts.get(endpoint.assignment, 1),
        rollout=None
        if rollout is None
        else RolloutFacts(
            state=rollout.state,
            from_assignment=rollout.from_assignment,
            to_assignment=rollout.to_assignment,
            attempt=rollout.attempt,
            device_state=facts.device_states.get((rollout.id, device), ""),
        ),
        settle_seconds=int(settle.get("seconds", EndpointFacts.settle_seconds)),
        max_error_share=float(settle.get("max_error_share", EndpointFacts.max_error_share)),
        max_latency_ratio=float(settle.get("max_latency_ratio", EndpointFacts.max_latency_ratio)),
        min_requests=int(settle.get("min_requests", EndpointFacts.min_requests)),
        sampling_share=float(sampling.get("share", 0.0)),
        max_samples_per_window=int(
            sampling.get("max_samples_per_window", EndpointFacts.max_samples_per_window)
        ),
        max_bytes_per_day=int(sampling.get("max_bytes_per_day", EndpointFacts.max_bytes_per_day)),
        threads=int((endpoint.settings.get("options") or {}).get("threads", 0)),
    )
