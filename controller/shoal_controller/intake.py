"""Takes what devices send into the store. Functions over a session; the gateway submits them.

Everything spooled is at least once: `(spool id, sequence)` makes it once. Latest-wins messages
(hello, heartbeat, reported) overwrite. Other rooms register hooks, called in the same transaction.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, TypeVar

from sqlalchemy import select
from sqlalchemy.orm import Session

from shoal_agent.profile import class_of
from shoal_controller import windows
from shoal_controller.clock import Clock, now_ms
from shoal_controller.enrolment import MAX_PROFILE_BYTES
from shoal_controller.metrics import TrafficCounters
from shoal_controller.store.repositories import new_id, record
from shoal_controller.store.tables import Device, DeviceRequest, Sample, Spool, Trial, Window
from shoal_protos.bundle import check_digest
from shoal_protos.errors import Denied, InvalidInput, ShoalError
from shoal_protos.v1 import agents_pb2, profile_pb2, telemetry_pb2

log = logging.getLogger("shoal.intake")

MAX_CLOCKS = 4  # boots remembered per device
MAX_GAPS = 100  # per spool
MAX_SPOOLS = 64  # per device
MAX_SPOOL_ID = 64
MAX_SEQUENCE = 1 << 62
MAX_REPORTED_BYTES = 2 << 20

H = TypeVar("H", bound=Callable[..., None])


class Hook(list[Callable[..., None]]):
    """Functions called when something arrives: `hook.append(f)`, or `@hook` above `f`."""

    def __call__(self, function: H) -> H:
        self.append(function)
        return function

    def run(self, *arguments: Any) -> None:
        for function in list(self):
            function(*arguments)


class Intake:
    """The controller's side of what devices report.

    Hooks, each called in the arriving message's transaction with the session first:

    - `on_reported(session, device, reported)`: a `Device` row and a `Reported` message;
    - `on_trial_result(session, device, result)`: a `TrialResult` of a trial of this device;
    - `on_sample(session, device, sample)`: a `Sample` row just added.
    """

    def __init__(self, clock: Clock = now_ms) -> None:
        self.clock = clock
        self.on_reported = Hook()
        self.on_trial_result = Hook()
        self.on_sample = Hook()
        # counters for /metrics
        self.traffic = TrafficCounters()
        self.windows_total = 0
        self.duplicates_total = 0
        self.refused_total = 0

    # ------------------------------------------------------------------ latest wins

    def hello(self, session: Session, device_id: str, hello: agents_pb2.Hello) -> Device:
        """A stream was opened. Raises Denied for an unknown or revoked device."""
        device = _device(session, device_id)
        if hello.profile.ByteSize() > MAX_PROFILE_BYTES:
            raise InvalidInput("The profile is too large.")
        profile_class = class_of(hello.profile)
        if profile_class != device.profile_class:
            record(
                session,
                project=device.project,
                actor=f"device:{device.id}",
                verb="reclassified",
                kind="device",
                object=device.id,
                before={"profile_class": device.profile_class},
                after={"profile_class": profile_class},
            )
            device.profile_class = profile_class
        if not device.connected:
            self._connection_event(session, device, "connected")
        device.profile = hello.profile.SerializeToString(deterministic=True)
        device.agent_version = hello.agent_version[:64]
        device.features = [feature[:64] for feature in hello.features][:64]
        device.boot_id = hello.boot_id[:64]
        device.connected = True
        device.last_seen_ms = self.clock()
        return device

    def heard(self, session: Session, times: dict[str, int]) -> None:
        """Device -> Unix ms of its last message; gathered, so that heartbeats cost no transaction."""
        for device in session.scalars(select(Device).where(Device.id.in_(list(times)))):
            device.last_seen_ms = max(device.last_seen_ms, times[device.id])

    def clock_of(self, session: Session, device_id: str, boot_id: str, zero_ms: int) -> None:
        """Remembers at which controller's Unix ms a boot's monotonic clock was zero."""
        device = _device(session, device_id)
        clocks = {key: value for key, value in device.clocks.items() if key != boot_id}
        kept = dict(list(clocks.items())[-(MAX_CLOCKS - 1) :])
        device.clocks = kept | {boot_id[:64]: zero_ms}

    def gone(self, session: Session, device_id: str, last_heard_ms: int, reason: str = "") -> None:
        """A device's stream ended."""
        device = session.get(Device, device_id)
        if device is None or not device.connected:
            return
        device.connected = False
        device.last_seen_ms = max(device.last_seen_ms, last_heard_ms)
        self._connection_event(session, device, "disconnected", reason)

    def _connection_event(self, session: Session, device: Device, verb: str, reason: str = "") -> None:
        record(
            session,
            project=device.project,
            actor=f"device:{device.id}",
            verb=verb,
            kind="device",
            object=device.id,
            reason=reason,
        )

    def reported(self, session: Session, device_id: str, reported: agents_pb2.Reported) -> None:
        """What the device really has."""
        if reported.ByteSize() > MAX_REPORTED_BYTES:
            raise InvalidInput("The reported state is too large.")
        device = _device(session, device_id)
        before = _outline(agents_pb2.Reported.FromString(device.reported or b""))
        for result in reported.requests:
            self._request_result(session, device, result)
        kept = agents_pb2.Reported()
        kept.CopyFrom(reported)
        kept.ClearField("requests")
        device.reported = kept.SerializeToString(deterministic=True)
        device.profile = _with_ports(device.profile, reported)
        device.last_seen_ms = self.clock()
        if (after := _outline(reported)) != before:
            record(
                session,
                project=device.project,
                actor=f"device:{device.id}",
                verb="reported",
                kind="device",
                object=device.id,
                before=before,
                after=after,
            )
        self.on_reported.run(session, device, reported)

    def _request_result(self, session: Session, device: Device, result: agents_pb2.RequestResult) -> None:
        row = session.get(DeviceRequest, result.id)
        if row is None or row.device != device.id or row.state != "open":
            return
        row.state, row.body, row.answered_ms = "answered", result.body[: 64 << 10], self.clock()
        record(
            session,
            project=device.project,
            actor=f"device:{device.id}",
            verb="answered",
            kind="request",
            object=row.id,
            after={"device": device.id, "kind": row.kind},
        )

    # ------------------------------------------------------------------ exactly once

    def spooled(
        self,
        session: Session,
        device_id: str,
        spooled: agents_pb2.Spooled,
        *,
        zero_ms: int | None,
        boot_id: str,
        first: bool = False,
    ) -> int:
        """Takes one spooled item; returns the spool's highest contiguous sequence: what to acknowledge.

        Args:
            zero_ms: the controller's Unix ms at which the monotonic clock of `boot_id` was zero.
            first: it is the first item of its spool on this stream. A device begins at its lowest
                unacknowledged item, so a hole before it is lost for good and noted as a gap.
        """
        spool = self._spool(session, device_id, spooled.spool_id)
        if not 0 < spooled.sequence < MAX_SEQUENCE or spooled.gap.to_sequence >= MAX_SEQUENCE:
            raise InvalidInput("A spool's sequence is out of range.")
        last = max(spooled.sequence, spooled.gap.to_sequence)  # a gap stands for all up to its end
        if last <= spool.through:
            self.duplicates_total += 1
            return spool.through
        if spooled.sequence > spool.through + 1:
            if not first:
                return spool.through  # something between is still on its way
            self._gap(spool, spool.through + 1, spooled.sequence - 1, "never received")
        kind = spooled.WhichOneof("item")
        if kind == "gap":
            begin = max(spool.through + 1, spooled.gap.from_sequence)
            self._gap(spool, begin, last, spooled.gap.reason[:200])
        spool.through = last
        try:
            with session.begin_nested():
                self._item(session, device_id, spooled, kind, zero_ms, boot_id)
        except ShoalError as error:
            # It will not get better by sending it again.
            self.refused_total += 1
            log.warning("A %s of device %s was refused: %s", kind, device_id, error)
            self._gap(spool, spooled.sequence, spooled.sequence, f"refused: {error.message[:200]}")
        session.flush()
        return spool.through

    def _spool(self, session: Session, device_id: str, spool_id: str) -> Spool:
        if not 0 < len(spool_id) <= MAX_SPOOL_ID:
            raise InvalidInput("A spool id has 1 to 64 characters.")
        spool = session.get(Spool, spool_id)
        if spool is None:
            spool = Spool(id=spool_id, device=device_id, through=0, gaps=[])
            session.add(spool)
            session.flush()
            self._drop_old_spools(session, device_id)
        elif spool.device != device_id:
            raise Denied("This spool belongs to another device.")
        return spool

    def _drop_old_spools(self, session: Session, device_id: str) -> None:
        rows = session.scalars(select(Spool).where(Spool.device == device_id)).all()
        for row in rows[: max(0, len(rows) - MAX_SPOOLS)]:
            session.delete(row)

    def _gap(self, spool: Spool, first: int, last: int, reason: str) -> None:
        # Assigned anew, since changes inside a JSON value go unseen.
        spool.gaps = [*spool.gaps, {"from": first, "to": last, "reason": reason}][-MAX_GAPS:]

    def _item(
        self,
        session: Session,
        device_id: str,
        spooled: agents_pb2.Spooled,
        kind: str | None,
        zero_ms: int | None,
        boot_id: str,
    ) -> None:
        device = _device(session, device_id)
        if kind == "telemetry":
            zero = zero_ms if spooled.telemetry.boot_id == boot_id else None
            self._telemetry(session, device, spooled.telemetry, zero)
        elif kind == "trial":
            self._trial(session, device, spooled.trial)
        elif kind == "sample":
            self._sample(session, device, spooled.sample)
        elif kind != "gap":
            raise InvalidInput("The item is of a kind that this controller does not know.")

    def _telemetry(
        self, session: Session, device: Device, window: telemetry_pb2.TelemetryWindow, zero_ms: int | None
    ) -> None:
        windows.check_window(window)
        start_ms, end_ms = self._times(device, window, zero_ms)
        rows = windows.rows_of(window, device.id, start_ms, end_ms)
        self.traffic.add(device.project, device.profile_class, rows)
        for row in rows:
            key = (row.device, row.endpoint, row.bundle, row.start_ms)
            earlier = session.get(Window, key)
            if earlier is None:
                session.add(row)
            else:
                merged = windows.merge_rows(
                    [earlier, row], row.start_ms, max(earlier.end_ms, row.end_ms), earlier.resolution
                )
                session.delete(earlier)
                session.flush()
                session.add(merged)
            session.flush()
        self.windows_total += 1
        if end_ms >= device.figures.get("end_ms", 0):
            device.system = windows.system_json(window.system)
            if figures := windows.figures_of(window, start_ms, end_ms):
                device.figures = figures

    def _times(
        self, device: Device, window: telemetry_pb2.TelemetryWindow, zero_ms: int | None
    ) -> tuple[int, int]:
        """(start, end) on the controller's clock, never in its future."""
        now = self.clock()
        zero = zero_ms if zero_ms is not None else device.clocks.get(window.boot_id)
        length = (window.monotonic_end_ns - window.monotonic_start_ns) // 1_000_000
        if zero is not None:
            end = zero + window.monotonic_end_ns // 1_000_000
        else:
            # A boot that this controller never met: only the device's own clock is left.
            end = window.wall_end_ms if window.wall_end_ms > 0 else now
        end = min(end, now)
        return end - length, end

    def _trial(self, session: Session, device: Device, result: telemetry_pb2.TrialResult) -> None:
        trial = session.get(Trial, result.trial)
        if trial is None or trial.device != device.id:
            raise InvalidInput(f"The device was not asked for the trial '{result.trial[:40]}'.")
        if trial.state in ("done", "no_data"):
            return
        if result.outputs_blob:
            check_digest(result.outputs_blob)
        trial.result = result.SerializeToString(deterministic=True)
        trial.state = "done" if result.ok else "no_data"
        record(
            session,
            project=device.project,
            actor=f"device:{device.id}",
            verb="answered" if result.ok else "failed",
            kind="trial",
            object=trial.id,
            after={"device": device.id, "optimization": trial.optimization},
            reason=result.error[:500],
        )
        self.on_trial_result.run(session, device, result)

    def _sample(self, session: Session, device: Device, notice: telemetry_pb2.SampleNotice) -> None:
        check_digest(notice.blob)
        check_digest(notice.bundle)
        sample = Sample(
            id=new_id(session, "s"),
            device=device.id,
            endpoint=notice.endpoint[:128],
            bundle=notice.bundle,
            blob=notice.blob,
            size=notice.size,
            count=notice.count,
            labelled=notice.labelled,
            received_ms=self.clock(),
        )
        session.add(sample)
        session.flush()
        self.on_sample.run(session, device, sample)


def _device(session: Session, device_id: str) -> Device:
    device = session.get(Device, device_id)
    if device is None:
        raise Denied("This fleet does not know the device.", "Join again with a token.")
    if device.revoked:
        raise Denied(f"The device {device.name} was revoked.", "Join again with a new token.")
    return device


def _with_ports(profile: bytes, reported: agents_pb2.Reported) -> bytes:
    """The profile with the ports that are bound now: a server binds them after the device said hello."""
    facts = profile_pb2.Profile.FromString(profile)
    if not reported.ports.http or facts.ports == reported.ports:
        return profile
    facts.ports.CopyFrom(reported.ports)
    return facts.SerializeToString(deterministic=True)


def _outline(reported: agents_pb2.Reported) -> dict[str, Any]:
    """What of a reported state is worth an event: steps and bundles, not progress."""
    return {
        "generation": reported.generation,
        "placements": [
            {
                "endpoint": status.endpoint,
                "wanted": status.wanted,
                "serving": status.serving,
                "step": status.step,
                "reason": status.reason,
            }
            for status in reported.placements
        ],
        "refusals": [refusal.reason for refusal in reported.refusals],
    }
