"""FleetMeter: trials that a job asked for, each on one real device of its class.

A trial is published through the device's desired state, so it survives being offline; its result
carries the trial's id, so it counts once however often it arrives. One that nobody answered in time
is "no data", and the search goes on without it.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from shoal_controller import optimizations, registry
from shoal_controller.clock import Clock
from shoal_controller.services import Services
from shoal_controller.store.repositories import record
from shoal_controller.store.tables import Device, Optimization, Rollout, RolloutDevice, Trial, Variant
from shoal_protos.v1 import telemetry_pb2
from shoal_protos.v1.profile_pb2 import Profile

log = logging.getLogger("shoal.trials")

TICK_SECONDS = 1.0
ACTOR = "controller"
WAITING = ("pending", "published")
MAX_A_DEVICE = 4  # outstanding at once: a device has other work


@dataclass(frozen=True)
class Idle:
    """A device that could take a trial. `outstanding` = trials that it has not answered."""

    device: str
    profile_class: str
    outstanding: int
    emulated: bool = False


def pick(
    devices: Sequence[Idle], profile_class: str, kind: str = "timing", *, real: bool = False
) -> str | None:
    """The device of a class with the least to do; None = all are busy or away. Pure.

    A real device goes before an emulated one, whose times are no figures.

    Args:
        kind: "timing" or "outputs".
        real: the fleet has a real device of the class, also if it is away now: a timing waits for it.
    """
    fitting = [d for d in devices if d.profile_class == profile_class and d.outstanding < MAX_A_DEVICE]
    if kind == "timing" and real:
        fitting = [d for d in fitting if not d.emulated]
    return min(fitting, key=lambda d: (d.emulated, d.outstanding, d.device)).device if fitting else None


def place(session: Session, connected: Collection[str], clock: Clock) -> list[str]:
    """Gives pending trials to idle devices; returns the devices that have news.

    A device that updates in a rollout's wave just now is not idle: its figures would lie.
    """
    pending = list(
        session.scalars(select(Trial).where(Trial.state == "pending").order_by(Trial.created_ms, Trial.id))
    )
    if not pending:
        return []
    busy = set(
        session.scalars(
            select(RolloutDevice.device)
            .join(Rollout, Rollout.id == RolloutDevice.rollout)
            .where(
                Rollout.state.in_(("running", "stopping")), RolloutDevice.state.in_(("updating", "settling"))
            )
        )
    )
    outstanding = Counter(session.scalars(select(Trial.device).where(Trial.state == "published")))
    usable = select(Device).where(Device.revoked.is_(False), Device.quarantined.is_(False))
    rows = list(session.scalars(usable))
    emulated = {row.id: Profile.FromString(row.profile).emulated for row in rows}
    real = {row.profile_class for row in rows if not emulated[row.id]}
    classes = {row.id: row.profile_class for row in rows if row.id in connected and row.id not in busy}
    placed = []
    for trial in pending:
        idle = [Idle(key, name, outstanding[key], emulated[key]) for key, name in classes.items()]
        device = pick(idle, trial.profile_class, trial.kind, real=trial.profile_class in real)
        if device is None:
            continue
        trial.device, trial.state = device, "published"
        outstanding[device] += 1
        placed.append(device)
        after = {"device": device, "class": trial.profile_class, "optimization": trial.optimization}
        record(session, actor=ACTOR, verb="published", kind="trial", object=trial.id, after=after)
    return placed


def expire(session: Session, clock: Clock) -> list[str]:
    """Ends trials whose time is over as "no data"; returns their devices."""
    now = clock()
    devices = []
    for trial in session.scalars(select(Trial).where(Trial.state.in_(WAITING), Trial.not_after_ms <= now)):
        reason = (
            "nobody of this class was idle in time" if trial.state == "pending" else "not answered in time"
        )
        trial.state = "no_data"
        if trial.device:
            devices.append(trial.device)
        record(
            session,
            actor=ACTOR,
            verb="expired",
            kind="trial",
            object=trial.id,
            after={"state": "no_data"},
            reason=reason,
        )
    return devices


def resume(session: Session) -> list[str]:
    """Queues optimizations again whose trials are all answered or expired."""
    resumed = []
    for row in session.scalars(select(Optimization).where(Optimization.state == "waiting")):
        open_ = session.scalar(
            select(Trial.id).where(Trial.optimization == row.id, Trial.state.in_(WAITING)).limit(1)
        )
        if open_ is None:
            optimizations.requeue(session, row, actor=ACTOR, reason="its trials are answered")
            resumed.append(row.id)
    return resumed


def note_result(session: Session, clock: Clock, device: Device, result: telemetry_pb2.TrialResult) -> None:
    """Turns a result into measurements of the variant, if its bundle is one already. The trial row
    itself was written by intake, once per trial id."""
    trial = session.get(Trial, result.trial)
    if trial is None or not result.ok or trial.options:
        return  # with other options it is the job that says which of them are taken
    variants = session.scalars(select(Variant).where(Variant.bundle == trial.bundle)).all()
    figures = figures_of(result)
    for variant in variants:
        for kind, values in figures.items():
            registry.add_measurement(
                session,
                variant,
                trial.profile_class,
                kind,
                values,
                clock,
                source="trial",
                device=device.id,
                context=dict(result.context),
            )


def figures_of(result: telemetry_pb2.TrialResult) -> dict[str, dict[str, Any]]:
    """Kind -> figures of a timing trial's candidate; none of an emulated device's. Pure."""
    series = result.timing.candidate
    if not result.HasField("timing") or not series.runs:
        return {}
    figures: dict[str, dict[str, Any]] = {
        "latency": {
            "p50_ms": series.p50_ms,
            "p50_low_ms": series.p50_low_ms,
            "p50_high_ms": series.p50_high_ms,
            "p95_ms": series.p95_ms,
            "p95_low_ms": series.p95_low_ms,
            "p95_high_ms": series.p95_high_ms,
            "n": series.runs,
        }
    }
    if series.rss_bytes:
        figures["memory"] = {"bytes": series.rss_bytes}
    share = result.timing.int8_share
    if share == share:  # NaN = unmeasured
        figures["int8_share"] = {"value": share}
    return figures


class TrialRunner:
    """Places, expires and resumes, each second."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._task: asyncio.Task[None] | None = None
        self._wake = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None

    async def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._services.intake.on_trial_result.append(self._on_result)
        self._task = asyncio.create_task(self._run(), name="trials")

    async def stop(self) -> None:
        if self._on_result in self._services.intake.on_trial_result:
            self._services.intake.on_trial_result.remove(self._on_result)
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None

    def _on_result(self, session: Session, device: Device, result: telemetry_pb2.TrialResult) -> None:
        note_result(session, self._services.clock, device, result)
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._wake.set)

    async def _run(self) -> None:
        while True:
            try:
                await asyncio.to_thread(self.tick)
            except Exception:
                log.exception("A look at the trials failed; it is tried again")
            try:
                async with asyncio.timeout(TICK_SECONDS):
                    await self._wake.wait()
            except TimeoutError:
                pass
            self._wake.clear()
            await asyncio.sleep(0.1)

    def tick(self) -> None:
        """One look at all trials."""
        with self._services.store.read() as session:
            waiting = session.scalar(select(Trial.id).where(Trial.state.in_(WAITING)).limit(1))
            stuck = session.scalar(select(Optimization.id).where(Optimization.state == "waiting").limit(1))
        if waiting is None and stuck is None:
            return
        with self._services.store.write() as session:
            changed = expire(session, self._services.clock)
            changed += place(session, set(self._services.connections.connected()), self._services.clock)
            session.flush()
            resume(session)
        if changed:
            self._services.publish(sorted(set(changed)))
