"""Runs the loop: looks at the telemetry every two seconds, keeps findings, acts on them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from sqlalchemy import select
from sqlalchemy.orm import Session

from shoal_controller.loop import actions, facts, monitor, policy
from shoal_controller.loop.actions import Hands
from shoal_controller.loop.facts import References
from shoal_controller.loop.monitor import Changes, MonitorSettings, OpenFinding, Signal
from shoal_controller.loop.policy import PolicySettings
from shoal_controller.services import Services
from shoal_controller.store.tables import Endpoint, Finding, Release
from shoal_protos.errors import ShoalError

log = logging.getLogger("shoal.loop")

TICK_SECONDS = 2.0
REFRESH_MS = 10_000  # an open finding's sentence follows the figures no faster
ACTIVE = ("open", "acting")


def _outdated(row: Finding, subjects: set[str], bundles: set[tuple[str, str]]) -> str | None:
    """Why an open finding says nothing any more: a question about a bundle ends with the bundle."""
    if row.state != "open" or not row.subject.startswith("endpoint:"):
        return None
    if row.subject not in subjects:
        return "Nothing serves there any more."
    bundle = row.evidence.get("bundle")
    if bundle and (row.subject, bundle) not in bundles:
        return "Another bundle serves there now; it is judged anew."
    return None


class LoopRunner:
    """Findings and policies, in the controller's process."""

    def __init__(
        self,
        services: Services,
        monitor_settings: MonitorSettings | None = None,
        policy_settings: PolicySettings | None = None,
    ) -> None:
        self._services = services
        self._monitor = monitor_settings or MonitorSettings()
        self._policy = policy_settings or PolicySettings()
        self._references = References(services.blobs)
        self._refreshed: dict[str, int] = {}
        self._refused: dict[str, str] = {}
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self._task = asyncio.create_task(self._run(), name="loop")

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None

    async def _run(self) -> None:
        while True:
            try:
                await asyncio.to_thread(self.tick)
            except Exception:
                log.exception("A look at the telemetry failed; it is tried again")
            await asyncio.sleep(TICK_SECONDS)

    def tick(self) -> None:
        """One look: monitor, then policy, then what has become of earlier actions."""
        self._first_rollouts()
        with self._services.store.read() as session:
            changes = self.look(session)
        if changes.opened or changes.closed or changes.refreshed:
            with self._services.store.write() as session:
                actions.apply_changes(session, self._services.clock, changes)
        self._act()

    # ------------------------------------------------------------------ monitor

    def look(self, session: Session) -> Changes:
        """What the monitor finds now, against the findings that are open."""
        now = self._services.clock()
        signals: list[Signal] = []
        subjects: set[str] = set()
        bundles: set[tuple[str, str]] = set()
        for endpoint in session.scalars(select(Endpoint)):
            found = facts.load_endpoint(session, self._services.blobs, endpoint)
            if found is None:
                continue
            settings = facts.settings_of(self._monitor, endpoint, "monitor")
            since = now - int(settings.recent_s * 1000)
            for served in facts.served(session, found, self._references, since):
                subjects.add(served.subject)
                bundles.add((served.subject, served.bundle))
                signals += monitor.evaluate(served, settings, now)
            coverage = [monitor.coverage_signal(c) for c in facts.coverage(session, found)]
            subjects |= {signal.subject for signal in coverage}
            signals += coverage
        for health in facts.device_health(session):
            signals += monitor.device_signals(health)
        open_rows = list(session.scalars(select(Finding).where(Finding.state.in_(ACTIVE))))
        changes = monitor.reconcile(
            signals, [OpenFinding(f.id, f.kind, f.subject, f.state) for f in open_rows]
        )
        gone = tuple(
            (row.id, why) for row in open_rows if (why := _outdated(row, subjects, bundles)) is not None
        )
        left = {key for key, _ in gone}
        closed = tuple(change for change in changes.closed if change[0] not in left)
        return Changes(changes.opened, (*closed, *gone), self._due(changes, now))

    def _due(self, changes: Changes, now: int) -> tuple[tuple[str, Signal], ...]:
        due = tuple(
            (key, signal)
            for key, signal in changes.refreshed
            if now - self._refreshed.get(key, 0) >= REFRESH_MS
        )
        self._refreshed.update({key: now for key, _ in due})
        return due

    # ------------------------------------------------------------------ policy

    def _hands(self) -> Hands:
        services = self._services
        return Hands(
            services.blobs, services.clock, services.connections, float(services.settings.telemetry_seconds)
        )

    def _first_rollouts(self) -> None:
        with self._services.store.read() as session:
            waiting = [
                endpoint.id for endpoint in session.scalars(select(Endpoint).where(Endpoint.assignment == ""))
            ]
            released = session.scalar(select(Release.id).limit(1)) is not None
        for key in waiting if released else ():
            self._safely(key, self._first_rollout)

    def _act(self) -> None:
        with self._services.store.read() as session:
            pending = [
                row.id
                for row in session.scalars(
                    select(Finding).where(Finding.state.in_(ACTIVE)).order_by(Finding.id)
                )
                if not (row.state == "open" and row.action.get("final"))
            ]
        for key in pending:
            self._safely(key, self._act_on)

    def _safely(self, key: str, function: Callable[[Session, str], None]) -> None:
        """One object's transaction; a refusal of one does not keep the loop from the others."""
        try:
            with self._services.store.write() as session:
                function(session, key)
        except ShoalError as error:
            if self._refused.get(key) != str(error):
                log.warning("%s: %s", key, error)
            self._refused[key] = str(error)

    def _first_rollout(self, session: Session, key: str) -> None:
        endpoint = session.get(Endpoint, key)
        if endpoint is not None:
            actions.first_rollout(session, self._hands(), endpoint)

    def _act_on(self, session: Session, key: str) -> None:
        finding = session.get(Finding, key)
        if finding is None or finding.state not in ACTIVE:
            return
        if finding.state == "acting":
            actions.follow(session, self._hands(), finding)
            return
        endpoint = session.get(Endpoint, finding.endpoint) if finding.endpoint else None
        found = facts.load_endpoint(session, self._services.blobs, endpoint) if endpoint is not None else None
        now = self._services.clock()
        if found is None:
            decided = policy.decide(actions.view(finding), policy.Situation(), self._policy, now)
            if decided.act == "ask":
                actions.say(session, finding, decided)
            return
        since = actions.field_since(session, found.endpoint, self._services.clock)
        labelled = sum(s.labelled for s in facts.samples_since(session, found.endpoint, since))
        situation = facts.situation(session, found, finding, labelled)
        settings = facts.settings_of(self._policy, found.endpoint, "policy")
        decided = policy.decide(actions.view(finding), situation, settings, now)
        actions.execute(session, self._hands(), finding, found, decided)
