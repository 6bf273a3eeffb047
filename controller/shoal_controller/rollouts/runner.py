"""Carries rollouts out: reads, lets `machine` decide, writes, and publishes, again and again.

Every step is one transaction, so a controller killed at any moment goes on from the last one: what
devices should have follows from the rows, and publishing twice changes nothing.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from shoal_controller import endpoints, holding
from shoal_controller.rollouts import machine, observe, records, service
from shoal_controller.rollouts.gates import Gates
from shoal_controller.rollouts.machine import MOVED, Observations, RolloutState, Step
from shoal_controller.rollouts.statistics import Period
from shoal_controller.services import Services
from shoal_controller.store.repositories import record
from shoal_controller.store.tables import Assignment, Device, Endpoint, Rollout, RolloutDevice

log = logging.getLogger("shoal.rollouts")

TICK_SECONDS = 1.0
ACTOR = "controller"
LATE_DAYS = 7  # how long a device that was offline when a rollout stopped is still followed


class RolloutRunner:
    """Steps every open rollout each second, and at once after `kick()`."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._wake = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._services.intake.on_reported.append(self._on_reported)
        self._task = asyncio.create_task(self._run(), name="rollouts")

    async def stop(self) -> None:
        if self._on_reported in self._services.intake.on_reported:
            self._services.intake.on_reported.remove(self._on_reported)
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None

    def kick(self) -> None:
        """Steps soon instead of at the next second. Thread-safe."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._wake.set)

    def _on_reported(self, *_: Any) -> None:
        self.kick()

    async def _run(self) -> None:
        while True:
            try:
                await asyncio.to_thread(self.tick)
            except Exception:
                log.exception("A step of the rollouts failed; it is tried again")
            try:
                async with asyncio.timeout(TICK_SECONDS):
                    await self._wake.wait()
            except TimeoutError:
                pass
            self._wake.clear()
            await asyncio.sleep(0.1)  # many devices report at once; one look serves them all

    # ------------------------------------------------------------------ one look

    def tick(self) -> None:
        """Takes every step that is due now."""
        with self._services.store.read() as session:
            rollouts = list(
                session.scalars(
                    select(Rollout.id).where(Rollout.state.in_(machine.OPEN)).order_by(Rollout.id)
                )
            )
            late = self._late(session)
        for rollout in rollouts:
            self.step(rollout)
        for rollout in late:
            self._follow_up(rollout)

    def step(self, rollout: str) -> None:
        """One step of one rollout: a transaction, then the devices that it moved are told."""
        with self._services.store.read() as session:
            before = self._decide(session, rollout)
        if before is None or not self._worth_writing(*before):
            return
        with self._services.store.write() as session:
            step = self._apply(session, rollout)
        if step is not None and (step.moved or step.happened):
            self._services.publish(step.moved or None)
            self.kick()  # the next step may be due already

    def _decide(self, session: Session, rollout: str) -> tuple[RolloutState, Step] | None:
        row = session.get(Rollout, rollout)
        if row is None or row.state not in machine.OPEN:
            return None
        look = _Look(session, self._services, row)
        return look.state, look.advance()

    def _worth_writing(self, before: RolloutState, step: Step) -> bool:
        """A verdict whose numbers crawl is not written each second: only what changed counts."""
        if step.happened or step.moved or before.devices != step.state.devices:
            return True
        return before.sentence != step.state.sentence or before.state != step.state.state

    def _apply(self, session: Session, rollout: str) -> Step | None:
        """Decides again inside the writing transaction: a person may have acted meanwhile."""
        row = session.get(Rollout, rollout)
        if row is None or row.state not in machine.OPEN:
            return None
        look = _Look(session, self._services, row)
        step = look.advance()
        look.write(step)
        return step

    # ------------------------------------------------------------------ devices that return late

    def _late(self, session: Session) -> list[str]:
        since = self._services.clock() - LATE_DAYS * 86_400_000
        query = (
            select(RolloutDevice.rollout)
            .join(Rollout, Rollout.id == RolloutDevice.rollout)
            .where(
                Rollout.state.in_(("rolled_back", "aborted", "promoted")),
                Rollout.finished_ms > since,
                RolloutDevice.state == "silent",
            )
            .distinct()
        )
        return list(session.scalars(query))

    def _follow_up(self, rollout: str) -> None:
        """A device that was offline at the end: its outcome is stored when it returns."""
        with self._services.store.read() as session:
            row = session.get(Rollout, rollout)
            assert row is not None
            found = _Look(session, self._services, row).returned()
        if not found:
            return
        with self._services.store.write() as session:
            for device, state in found.items():
                entry = session.get(RolloutDevice, (rollout, device))
                if entry is not None and entry.state == "silent":
                    entry.state, entry.reason, entry.updated_ms = (
                        state,
                        "after it returned",
                        self._services.clock(),
                    )


class _Look:
    """Everything one step needs, read in one transaction."""

    def __init__(self, session: Session, services: Services, row: Rollout) -> None:
        self.session = session
        self.services = services
        self.row = row
        self.now = services.clock()
        endpoint = session.get(Endpoint, row.endpoint)
        assert endpoint is not None
        self.endpoint = endpoint
        self.gates = Gates.from_json(row.gates)
        self.state, self.rows = records.load(session, row)
        self.old, self.new = (
            endpoints.Wanted(session, services.blobs, session.get(Assignment, key) if key else None)
            for key in (row.from_assignment, row.to_assignment)
        )
        self.members = {d.id: d for d in endpoints.members(session, endpoint)}
        self.devices = {**self.members, **self._former(session)}
        reasons = ((key, holding.why_held(device, endpoint.name)) for key, device in self.devices.items())
        self.held = {key: why for key, why in reasons if why}
        self.observations = self._observe()

    def _former(self, session: Session) -> dict[str, Device]:
        """Devices of the rollout that the endpoint no longer has, revoked ones among them."""
        missing = [key for key in self.state.devices if key not in self.members]
        found: dict[str, Device] = {}
        for start in range(0, len(missing), 500):
            rows = session.scalars(select(Device).where(Device.id.in_(missing[start : start + 500])))
            found |= {row.id: row for row in rows}
        return found

    def _observe(self) -> Observations:
        moved = {k: r for k, r in self.state.devices.items() if r.state in MOVED and k in self.devices}
        since = {k: r.started_ms for k, r in moved.items()}
        bundles = {k: self.new.bundle(self.devices[k]) for k in moved}
        after = observe.periods(self.session, self.endpoint.name, since, bundles)
        nothing = Period()
        return {
            key: observe.observe(
                self.devices[key],
                record_,
                self.rows.get(key),
                endpoint=self.endpoint.name,
                attempt=self.row.attempt,
                old=self.old,
                new=self.new,
                after=after.get(key, nothing),
                presence=self.services.connections,
            )
            for key, record_ in self.state.devices.items()
            if key in self.devices and key not in self.held
        }

    def _without_held(self) -> RolloutState:
        """Devices that were quarantined or pinned meanwhile are out: neither moved nor judged."""
        devices = dict(self.state.devices)
        for key, why in self.held.items():
            if key in devices and devices[key].state in ("waiting", *machine.BUSY):
                devices[key] = replace(devices[key], state="left_out", reason=why)
        return replace(self.state, devices=devices)

    def advance(self) -> Step:
        labels = {k: {n: str(v) for n, v in d.labels.items()} for k, d in self.devices.items()}
        newcomers = [
            key
            for key, device in self.members.items()
            if key not in self.state.devices
            and key not in self.held
            and self.new.bundle(device)
            and self.new.bundle(device) != self.old.bundle(device)
        ]
        step = machine.advance(
            self._without_held(), self.observations, self.gates, self.now, newcomers=newcomers, labels=labels
        )
        if newcomers and step.state.devices != self.state.devices:
            # They are observed from the next look on.
            self.observations = {k: v for k, v in self.observations.items() if k in self.state.devices}
        return step

    def write(self, step: Step) -> None:
        before = self.state
        records.save(self.session, self.row, self.rows, step.state, self.now)
        self.session.flush()
        rows = records.load(self.session, self.row)[1]
        starting = [
            self.devices[key]
            for key, r in step.state.devices.items()
            if r.state == "updating" and (key not in before.devices or before.devices[key].state == "waiting")
        ]
        observe.note_baselines(self.session, self.endpoint.name, self.old, starting, rows, self.now)
        observe.note_reports(rows, step.state.devices, self.devices, self.observations, self.endpoint.name)
        self._record(before, step)

    def _record(self, before: RolloutState, step: Step) -> None:
        for key, device in step.state.devices.items():
            old = before.devices.get(key)
            if device.state == "failed" and (old is None or old.state != "failed"):
                self._event("device_failed", {"device": key, "reason": device.reason}, device.reason)
        for verb in step.happened:
            if verb == "promoted":
                service.adopt(self.session, self.row, actor=ACTOR, reason=step.state.sentence)
                continue
            after = {"state": step.state.state, "wave": step.state.wave, "endpoint": self.endpoint.id}
            self._event(verb, after, step.state.sentence)

    def _event(self, verb: str, after: dict[str, Any], reason: str) -> None:
        record(
            self.session,
            project=self.row.project,
            actor=ACTOR,
            verb=verb,
            kind="rollout",
            object=self.row.id,
            after=after,
            reason=reason,
        )

    def returned(self) -> dict[str, str]:
        """Silent devices of an ended rollout that have what they should by now -> their last state."""
        promoted = self.row.state == "promoted"
        found = {}
        for key, record_ in self.state.devices.items():
            observation = self.observations.get(key)
            if record_.state != "silent" or observation is None or not observation.connected:
                continue
            if promoted and observation.serving:
                found[key] = "switched"
            elif not promoted and observation.back:
                found[key] = "rolled_back"
        return found
