"""What a rollout's devices report and did: rows -> `DeviceObservation`s."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

from google.protobuf.json_format import MessageToDict
from sqlalchemy import select
from sqlalchemy.orm import Session

from shoal_controller.endpoints import Wanted
from shoal_controller.rollouts import records
from shoal_controller.rollouts.machine import MOVED, DeviceRecord
from shoal_controller.rollouts.statistics import Period, merge_histograms
from shoal_controller.rollouts.verdict import DeviceObservation
from shoal_controller.store.tables import Device, RolloutDevice, Window
from shoal_protos.v1 import agents_pb2
from shoal_protos.v1.profile_pb2 import Profile
from shoal_protos.v1.telemetry_pb2 import Histogram

BASELINE_SECONDS = 900  # how far back "before" looks
PLANNED_OFFLINE = "planned_offline"  # a device with this label is not waited for


class Presence(Protocol):
    """Which devices are connected now; implemented by gateway.connections."""

    def is_connected(self, device: str) -> bool: ...

    def last_heard(self, device: str) -> int: ...


def observe(
    device: Device,
    record: DeviceRecord,
    row: RolloutDevice | None,
    *,
    endpoint: str,
    attempt: int,
    old: Wanted,
    new: Wanted,
    after: Period,
    presence: Presence,
) -> DeviceObservation:
    """Everything known of one device under one rollout."""
    wanted, before = new.bundle(device), old.bundle(device)
    emulated = Profile.FromString(device.profile).emulated
    before_period = records.period_of(row.baseline if row is not None else {})
    if emulated:  # its times are no device's: they are no evidence for or against anything
        before_period, after = untimed(before_period), untimed(after)
    status = placement_status(device, endpoint)
    mine = status is not None and status.wanted == wanted and status.attempt >= attempt
    serving = status.serving if status is not None else ""
    return DeviceObservation(
        device=device.id,
        name=device.name,
        profile_class=device.profile_class,
        state=record.state,
        started_ms=record.started_ms,
        switched_ms=record.switched_ms,
        last_seen_ms=max(device.last_seen_ms, presence.last_heard(device.id)),
        connected=presence.is_connected(device.id) and not device.revoked,
        planned_offline=bool(device.labels.get(PLANNED_OFFLINE)) or device.revoked,
        wanted=mine,
        step=step_name(status) if mine and status is not None else "",
        serving=bool(wanted) and serving == wanted,
        reason=status.reason if mine and status is not None else "",
        detail=status.detail if mine and status is not None else "",
        before=before_period,
        after=after,
        emulated=emulated,
        back=serving == before and (status is None or status.wanted != wanted or wanted == before),
    )


def untimed(period: Period) -> Period:
    """The period without its latencies."""
    return dataclasses.replace(period, latency=None)


def placement_status(device: Device, endpoint: str) -> agents_pb2.PlacementStatus | None:
    """The device's latest report on the endpoint's primary placement, if any."""
    for status in agents_pb2.Reported.FromString(device.reported or b"").placements:
        if status.endpoint == endpoint and status.role in (0, 1):
            return status
    return None


def step_name(status: agents_pb2.PlacementStatus) -> str:
    return agents_pb2.Step.Name(status.step).removeprefix("STEP_").lower()


def periods(
    session: Session,
    endpoint: str,
    since_ms: Mapping[str, int],
    bundles: Mapping[str, str],
    until_ms: int = 1 << 62,
) -> dict[str, Period]:
    """Device -> what it did under its bundle from its own moment on (windows that began before are
    left out).

    Args:
        since_ms: device -> Unix milliseconds.
        bundles: device -> the bundle whose windows count.
    """
    if not since_ms:
        return {}
    rows = session.scalars(
        select(Window).where(
            Window.endpoint == endpoint,
            Window.bundle.in_(set(bundles.values())),
            Window.end_ms > min(since_ms.values()),
            Window.end_ms <= until_ms,
        )
    )
    found: dict[str, list[Window]] = defaultdict(list)
    for row in rows:
        since = since_ms.get(row.device)
        if since is not None and row.end_ms > since and row.bundle == bundles.get(row.device):
            found[row.device].append(row)
    return {device: merge_windows(windows) for device, windows in found.items()}


def merge_windows(rows: Sequence[Window]) -> Period:
    """Sums windows into one period."""
    return Period(
        sum(r.requests for r in rows),
        sum(r.errors for r in rows),
        sum(r.labelled for r in rows),
        sum(r.correct for r in rows),
        merge_histograms(Histogram.FromString(r.latency) for r in rows if r.latency),
    )


def note_baselines(
    session: Session,
    endpoint: str,
    old: Wanted,
    devices: Iterable[Device],
    rows: Mapping[str, RolloutDevice],
    now_ms: int,
) -> None:
    """Stores what the devices did before, under the bundle that they have had so far."""
    starting = {device.id: old.bundle(device) for device in devices}
    since = dict.fromkeys(starting, now_ms - BASELINE_SECONDS * 1000)
    found = periods(session, endpoint, since, starting)
    for device in starting:
        rows[device].baseline = records.period_json(found.get(device, Period()))


def note_reports(
    rows: Mapping[str, RolloutDevice],
    records_: Mapping[str, DeviceRecord],
    devices: Mapping[str, Device],
    observations: Mapping[str, DeviceObservation],
    endpoint: str,
) -> None:
    """Keeps per device what happened: the probe's figures, the logs of a failure, the figures after."""
    for key, observation in observations.items():
        row, record = rows.get(key), records_.get(key)
        if row is None or record is None or record.state not in MOVED:
            continue
        status = placement_status(devices[key], endpoint)
        if status is not None and observation.wanted:
            if status.HasField("probe"):
                probe = MessageToDict(status.probe, preserving_proto_field_name=True)
                if probe != row.probe:
                    row.probe = probe
            if status.logs and status.logs != row.logs:
                row.logs = status.logs
        figures = {k: v for k, v in records.period_json(observation.after).items() if k != "latency"}
        merged = {**row.after, **figures}
        if observation.after.requests and merged != row.after:
            row.after = merged
