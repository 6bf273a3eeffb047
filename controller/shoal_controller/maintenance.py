"""What the controller does by the clock and by the event log: publish, remember who was heard, tidy up."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from shoal_controller import windows
from shoal_controller.services import Services
from shoal_controller.store.repositories import record
from shoal_controller.store.tables import Device, DeviceRequest, Event, JoinToken

log = logging.getLogger("shoal.controller")

HEARD_SECONDS = 10.0
PUBLISH_SECONDS = 60.0  # also without events: dates are renewed, trials and requests expire
COMPACT_SECONDS = 300.0
SWEEP_SECONDS = 86400.0
TOKEN_KEEP_MS = 30 * 86400 * 1000

# A change of one of these can change what devices should have.
PUBLISHED_KINDS = frozenset({"assignment", "device", "endpoint", "request", "rollout", "trial"})
# Verbs of devices that cannot: they come often.
QUIET_VERBS = frozenset({"connected", "disconnected", "reported", "renewed"})


class Maintenance:
    """Background tasks of one controller. A task that fails says so and goes on."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._tasks: list[asyncio.Task[None]] = []
        self._wanted = asyncio.Event()
        self._heard: dict[str, int] = {}
        self._remove: Callable[[], None] | None = None

    async def start(self) -> None:
        self._remove = self._services.feed.listen(self._on_events)
        jobs: tuple[tuple[str, float, Callable[[], Awaitable[object]]], ...] = (
            ("heard", HEARD_SECONDS, self._save_heard),
            ("compact", COMPACT_SECONDS, self._compact),
            ("sweep", SWEEP_SECONDS, self._sweep),
            ("expire", PUBLISH_SECONDS, self._expire),
        )
        self._tasks = [asyncio.create_task(self._every(*job), name=job[0]) for job in jobs]
        self._tasks.append(asyncio.create_task(self._publish(), name="publish"))

    async def stop(self) -> None:
        if self._remove is not None:
            self._remove()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks = []
        await self._save_heard()

    async def _every(self, name: str, seconds: float, work: Callable[[], Awaitable[object]]) -> None:
        while True:
            await asyncio.sleep(seconds)
            try:
                await work()
            except Exception:
                log.exception("The background task '%s' failed; it runs again in %.0f s", name, seconds)

    # ------------------------------------------------------------------ events

    def _on_events(self, events: Sequence[Event]) -> None:
        for event in events:
            if event.kind == "device" and event.verb == "revoked":
                self._revoked(event.object)
        if any(e.kind in PUBLISHED_KINDS and e.verb not in QUIET_VERBS for e in events):
            self._wanted.set()

    def _revoked(self, device_id: str) -> None:
        """Also for a revocation that another process wrote."""
        connections = self._services.connections
        with self._services.store.read() as session:
            device = session.get(Device, device_id)
        if device is not None:
            connections.revoke(device.id, device.certificate_serial)

    async def _publish(self) -> None:
        while True:
            self._wanted.clear()
            try:
                await asyncio.to_thread(self._services.publish)
            except Exception:
                log.exception("Publishing failed; it is tried again")
                await asyncio.sleep(1.0)
                self._wanted.set()
            try:
                async with asyncio.timeout(PUBLISH_SECONDS):
                    await self._wanted.wait()
            except TimeoutError:
                pass

    # ------------------------------------------------------------------ the clock

    async def _save_heard(self) -> None:
        heard = self._services.connections.heard()
        news = {device: at for device, at in heard.items() if self._heard.get(device) != at}
        self._heard = heard
        if news:
            await self._services.store.submit(lambda s: self._services.intake.heard(s, news))

    async def _compact(self) -> None:
        now = self._services.clock()
        while await self._services.store.submit(lambda s: windows.compact(s, now)):
            await asyncio.sleep(0.05)

    async def _sweep(self) -> None:
        removed = await self._services.store.submit(self._services.blobs.sweep)
        if removed:
            log.info("Removed %d blobs that nothing refers to", len(removed))

    async def _expire(self) -> None:
        await self._services.store.submit(lambda s: expire(s, self._services.clock()))


def expire(session: Session, now_ms: int) -> None:
    """Closes requests that nobody answered and forgets tokens long past their date."""
    rows = session.scalars(
        select(DeviceRequest).where(DeviceRequest.state == "open", DeviceRequest.not_after_ms <= now_ms)
    )
    for row in rows:
        row.state = "expired"
        record(session, actor="controller", verb="expired", kind="request", object=row.id)
    for token in session.scalars(select(JoinToken).where(JoinToken.expires_ms < now_ms - TOKEN_KEEP_MS)):
        session.delete(token)


def reset_presence(session: Session) -> None:
    """At start nobody is connected, whatever the controller before left in the table."""
    session.execute(update(Device).where(Device.connected.is_(True)).values(connected=False))
