"""Rows -> what `monitor` and `policy` decide on."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from sqlalchemy import select
from sqlalchemy.orm import Session

from shoal_controller import endpoints, holding, registry
from shoal_controller.blobs import BlobStore
from shoal_controller.endpoints import EndpointSettings
from shoal_controller.loop.monitor import ClassCoverage, DeviceHealth, MonitorSettings, Served, Span
from shoal_controller.loop.policy import FrontPoint, Past, PolicySettings, Situation
from shoal_controller.optimizations import ENDED
from shoal_controller.store.tables import (
    Assignment,
    Device,
    Endpoint,
    Finding,
    Optimization,
    Release,
    Rollout,
    Sample,
    Variant,
    Version,
    Window,
)
from shoal_optimizer import objective as objectives
from shoal_protos.errors import ShoalError
from shoal_protos.v1 import agents_pb2, telemetry_pb2
from shoal_protos.v1.profile_pb2 import Profile

MAX_WINDOWS = 400  # newest of one bundle; older ones say nothing more
FAILED_STEPS = (agents_pb2.STEP_FAILED, agents_pb2.STEP_ROLLED_BACK)

S = TypeVar("S", MonitorSettings, PolicySettings)


def settings_of(base: S, endpoint: Endpoint, room: str) -> S:
    """Settings with what the endpoint says of itself under `room`."""
    own = endpoint.settings.get(room) or {}
    known = {f.name: type(getattr(base, f.name)) for f in dataclasses.fields(base)}
    return dataclasses.replace(base, **{k: known[k](v) for k, v in own.items() if k in known})


class References:
    """Reference sketches and thresholds of bundles, read once."""

    def __init__(self, blobs: BlobStore) -> None:
        self._blobs = blobs
        self._known: dict[str, tuple[telemetry_pb2.SketchSet | None, Mapping[str, Mapping[str, float]]]] = {}

    def of(self, bundle: str) -> tuple[telemetry_pb2.SketchSet | None, Mapping[str, Mapping[str, float]]]:
        """(inputs' reference, thresholds by window size); (None, {}) if the bundle has none."""
        if bundle not in self._known:
            if len(self._known) > 256:
                self._known.clear()
            self._known[bundle] = self._read(bundle)
        return self._known[bundle]

    def _read(self, bundle: str) -> tuple[telemetry_pb2.SketchSet | None, Mapping[str, Mapping[str, float]]]:
        try:
            opened = self._blobs.bundle(bundle)
            reference = opened.config.reference
            if not reference.inputs:
                return None, {}
            data = opened.file(reference.inputs).read_bytes()
        except (ShoalError, OSError):
            return None, {}
        return telemetry_pb2.SketchSet.FromString(data), reference.thresholds


@dataclasses.dataclass(frozen=True)
class EndpointFacts:
    """An endpoint with an assignment, its devices and what each of them should serve."""

    endpoint: Endpoint
    assignment: Assignment
    release: Release
    version: Version
    devices: Sequence[Device]
    wanted: endpoints.Wanted

    @property
    def objective(self) -> objectives.Objective:
        return objectives.parse(self.endpoint.objective)


def load_endpoint(session: Session, blobs: BlobStore, endpoint: Endpoint) -> EndpointFacts | None:
    """None while the endpoint has no assignment."""
    assignment = session.get(Assignment, endpoint.assignment) if endpoint.assignment else None
    if assignment is None:
        return None
    release = session.get(Release, assignment.release)
    assert release is not None
    version = session.get(Version, release.version)
    assert version is not None
    return EndpointFacts(
        endpoint,
        assignment,
        release,
        version,
        holding.counted(endpoints.members(session, endpoint), endpoint.name),
        endpoints.Wanted(session, blobs, assignment),
    )


def served(session: Session, facts: EndpointFacts, references: References, since_ms: int) -> list[Served]:
    """One value per class and bundle that the endpoint's devices should serve now."""
    classes: dict[tuple[str, str], list[str]] = defaultdict(list)
    emulated = {d.id for d in facts.devices if Profile.FromString(d.profile).emulated}
    for device in facts.devices:
        bundle = facts.wanted.bundle(device)
        if bundle:
            classes[device.profile_class, bundle].append(device.id)
    spans = _spans(session, facts.endpoint.name, {bundle for _, bundle in classes}, since_ms)
    limit, metric = _latency_limit(facts.objective)
    result = []
    for (name, bundle), devices in sorted(classes.items()):
        reference, thresholds = references.of(bundle)
        own = set(devices)
        result.append(
            Served(
                endpoint=facts.endpoint.id,
                endpoint_name=facts.endpoint.name,
                profile_class=name,
                bundle=bundle,
                spans=tuple(
                    # Times of an emulated device say nothing about its class.
                    dataclasses.replace(span, latency=None) if device in emulated else span
                    for device, span in spans[bundle]
                    if device in own
                ),
                reference=reference,
                thresholds=thresholds,
                accuracy=_promised(session, facts, name, bundle),
                latency_limit_ms=limit,
                latency_metric=metric,
            )
        )
    return result


def _spans(
    session: Session, endpoint: str, bundles: set[str], since_ms: int
) -> dict[str, list[tuple[str, Span]]]:
    found: dict[str, list[tuple[str, Span]]] = defaultdict(list)
    for bundle in bundles:
        rows = session.scalars(
            select(Window)
            .where(Window.endpoint == endpoint, Window.bundle == bundle, Window.end_ms >= since_ms)
            .order_by(Window.end_ms.desc())
            .limit(MAX_WINDOWS)
        )
        found[bundle] = [(row.device, span_of(row)) for row in rows][::-1]
    return found


def span_of(row: Window) -> Span:
    return Span(
        row.end_ms,
        row.requests,
        row.errors,
        row.labelled,
        row.correct,
        telemetry_pb2.Histogram.FromString(row.latency) if row.latency else None,
        telemetry_pb2.SketchSet.FromString(row.inputs) if row.inputs else None,
    )


def _latency_limit(objective: objectives.Objective) -> tuple[float | None, str]:
    for metric in ("latency_p95", "latency_p50"):
        for constraint in objective.constraints:
            if constraint.metric == metric:
                return constraint.bound, metric
    return None, "latency_p95"


def _promised(
    session: Session, facts: EndpointFacts, profile_class: str, bundle: str
) -> Mapping[str, Any] | None:
    """The accuracy that the variant was measured to have for the class; the original's, if unmeasured."""
    variant = session.scalar(
        select(Variant).where(Variant.version == facts.version.id, Variant.bundle == bundle)
    )
    if variant is None:
        return None
    measured = registry.newest_measurements(session, [variant.id])
    own = measured.get((variant.id, profile_class), {}).get("accuracy")
    found = (
        own.figures if own is not None and own.figures.get("value") is not None else facts.version.baseline
    )
    return found or None


def coverage(session: Session, facts: EndpointFacts) -> list[ClassCoverage]:
    """One value per class of the endpoint's devices."""
    classes: dict[str, list[Device]] = defaultdict(list)
    for device in facts.devices:
        classes[device.profile_class].append(device)
    result = []
    for name, devices in sorted(classes.items()):
        fallback = facts.wanted.of(devices[0])
        variant = session.get(Variant, fallback[0].id) if fallback is not None else None
        covered = name in facts.release.fronts and fallback is not None and not fallback[1]
        result.append(
            ClassCoverage(
                facts.endpoint.id,
                facts.endpoint.name,
                name,
                len(devices),
                covered,
                variant.name if variant is not None and not covered else "",
            )
        )
    return result


def device_health(session: Session) -> list[DeviceHealth]:
    """What devices report outside rollouts: a device in an open one is its rollout's business."""
    rolling = (
        select(Endpoint.name)
        .join(Rollout, Rollout.endpoint == Endpoint.id)
        .where(Rollout.state.in_(endpoints.OPEN_ROLLOUTS))
    )
    busy = set(session.scalars(rolling))
    result = []
    for device in session.scalars(select(Device).where(Device.revoked.is_(False))):
        if not device.reported:
            continue
        reported = agents_pb2.Reported.FromString(device.reported)
        judged = [s for s in reported.placements if s.endpoint not in busy]
        if len(judged) < len(reported.placements) and not judged and not reported.clock_wrong:
            continue  # nothing can be said about it now, neither good nor bad
        failures = tuple((s.endpoint, s.reason, s.detail) for s in judged if s.step in FAILED_STEPS)
        result.append(
            DeviceHealth(device.id, device.name, device.profile_class, failures, reported.clock_wrong)
        )
    return result


# ------------------------------------------------------------------ for the policy


def situation(session: Session, facts: EndpointFacts, finding: Finding, labelled: int) -> Situation:
    """What surrounds an open finding of this endpoint."""
    rollout = endpoints.open_rollout(session, facts.endpoint)
    active = session.scalar(
        select(Optimization)
        .where(Optimization.endpoint == facts.endpoint.id, Optimization.state.not_in(ENDED))
        .order_by(Optimization.created_ms)
        .limit(1)
    )
    front = [
        FrontPoint(p.variant, p.name, p.metrics.get("accuracy"), p.metrics.get("latency_p95"), p.size_bytes)
        for p in registry.points(session, facts.version.id, finding.profile_class)
        if p.variant in facts.release.fronts.get(finding.profile_class, ())
    ]
    floor = next((c.bound for c in facts.objective.constraints if c.metric == "accuracy"), None)
    return Situation(
        automatic=EndpointSettings.of(facts.endpoint).automatic,
        rollout_running=rollout.id if rollout is not None else "",
        optimization_active=active.id if active is not None else "",
        optimization_kind=active.kind if active is not None else "",
        version_ready=facts.version.state == "ready",
        front=tuple(front),
        chosen=endpoints.variant_for(facts.assignment, finding.profile_class),
        accuracy_floor=floor,
        labelled=labelled,
        past=past(session, facts.endpoint),
        fallback=str(finding.evidence.get("fallback", "")),
    )


def past(session: Session, endpoint: Endpoint) -> tuple[Past, ...]:
    """What the loop did for this endpoint before, oldest first."""
    done: list[Past] = []
    for row in session.scalars(select(Optimization).where(Optimization.endpoint == endpoint.id)):
        if row.spec.get("finding"):
            act: Any = "adapt" if row.kind == "adapt" else "optimize"
            done.append(Past(act, row.created_ms, str(row.spec.get("finding_class", ""))))
    steps = session.execute(
        select(Rollout.created_ms, Finding.profile_class)
        .join(Finding, Finding.id == Rollout.finding)
        .where(Rollout.endpoint == endpoint.id, Finding.kind == "latency")
    )
    done += [Past("step", created, name) for created, name in steps]
    return tuple(sorted(done, key=lambda p: p.time_ms))


def samples_since(session: Session, endpoint: Endpoint, since_ms: int) -> list[Sample]:
    """Recorded inputs of an endpoint, those with labels first, then the newest."""
    rows = session.scalars(
        select(Sample)
        .join(Device, Device.id == Sample.device)
        .where(
            Sample.endpoint == endpoint.name,
            Sample.received_ms >= since_ms,
            Device.quarantined.is_(False),
        )
    )
    return sorted(rows, key=lambda s: (s.labelled == 0, -s.received_ms))
