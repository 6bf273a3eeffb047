"""Follows the event log: every recorded change, in order, whichever process wrote it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from shoal_controller.store.repositories import Store
from shoal_controller.store.tables import Event

log = logging.getLogger("shoal.events")

POLL_SECONDS = 1.0  # how soon another process's events are seen
BATCH = 500

Listener = Callable[[Sequence[Event]], None]


def list_events(
    session: Session,
    *,
    kind: str = "",
    object: str = "",
    after: int = 0,
    limit: int = 100,
    newest_first: bool = True,
) -> list[Event]:
    """Events with an id above `after`."""
    query = select(Event).where(Event.id > after)
    if kind:
        query = query.where(Event.kind == kind)
    if object:
        query = query.where(Event.object == object)
    query = query.order_by(Event.id.desc() if newest_first else Event.id).limit(limit)
    return list(session.scalars(query))


class EventFeed:
    """Calls listeners, in the event loop, with each batch of new events.

    Wakes at once for this process's commits and polls the table's ids for other processes'.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._listeners: list[Listener] = []
        self._task: asyncio.Task[None] | None = None
        self._wake = asyncio.Event()
        self._remove: Callable[[], None] | None = None
        self.last_id = 0

    def listen(self, listener: Listener) -> Callable[[], None]:
        """Registers; returns a remover. A listener must be quick and never block."""
        self._listeners.append(listener)

        def remove() -> None:
            if listener in self._listeners:
                self._listeners.remove(listener)

        return remove

    async def start(self) -> None:
        loop = asyncio.get_running_loop()
        with self._store.read() as session:
            self.last_id = session.scalar(select(func.max(Event.id))) or 0

        def wake() -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(self._wake.set)

        self._remove = self._store.listen(wake)
        self._task = asyncio.create_task(self._follow(), name="event-feed")

    async def stop(self) -> None:
        if self._remove is not None:
            self._remove()
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None

    async def _follow(self) -> None:
        while True:
            try:
                async with asyncio.timeout(POLL_SECONDS):
                    await self._wake.wait()
            except TimeoutError:
                pass
            self._wake.clear()
            try:
                await self._deliver()
            except Exception:
                log.exception("The event feed could not read the store; it tries again")

    async def _deliver(self) -> None:
        while True:
            batch = await asyncio.to_thread(self._read)
            if not batch:
                return
            self.last_id = batch[-1].id
            for listener in list(self._listeners):
                _call(listener, batch)

    def _read(self) -> list[Event]:
        with self._store.read() as session:
            return list_events(session, after=self.last_id, limit=BATCH, newest_first=False)


def _call(listener: Listener, batch: Sequence[Event]) -> None:
    try:
        listener(batch)
    except Exception:
        log.exception("An event listener failed")
