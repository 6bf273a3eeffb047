"""One server-sent stream of what changed; pages and commands read again what interests them.

Messages, at most one of each kind every two seconds (the first after a quiet time goes out at once, and
so do joins and answers, which people wait for):

- `change` `{"kinds": ["rollout", ...], "objects": {"rollout": ["r-0001"]}, "last": EVENT ID, "time_ms"}`:
  objects of these kinds changed;
- `tick` `{"kinds": ["window"], "windows": N, "time_ms"}`: telemetry arrived;
- `resync` `{}`: this client was too slow and lost messages; read everything again. The stream ends.

`?topics=rollout,finding,window` keeps the kinds of interest. Nothing is replayed: on (re)connect, read.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import StreamingResponse

from shoal_controller.services import Services
from shoal_controller.store.tables import Event
from shoal_protos.errors import Overloaded

router = APIRouter(tags=["events"])

PERIOD_SECONDS = 2.0
URGENT_SECONDS = 0.25  # the shortest time between two messages, for what people wait for
URGENT_VERBS = frozenset({"joined", "answered"})
QUEUE = 8  # messages that wait for one client
KEEP_ALIVE_SECONDS = 15.0
MAX_OBJECTS = 200  # ids of one kind in a message; above it the list is left out
MAX_CLIENTS = 500


class Client:
    """One open stream with its bounded queue."""

    def __init__(self, topics: frozenset[str]) -> None:
        self.topics = topics
        self.queue: asyncio.Queue[str] = asyncio.Queue(QUEUE)
        self.slow = False

    def offer(self, text: str) -> None:
        if self.queue.full():
            self.slow = True
        else:
            self.queue.put_nowait(text)


class Hub:
    """Gathers changes and hands each message, serialised once, to every client."""

    def __init__(self, services: Services, stopping: asyncio.Event) -> None:
        self._services = services
        self._stopping = stopping
        self._clients: set[Client] = set()
        self._task: asyncio.Task[None] | None = None
        self._remove: Callable[[], None] | None = None
        self._objects: dict[str, set[str]] = {}
        self._last = 0
        self._windows = 0
        self._news = asyncio.Event()
        self._urgent = asyncio.Event()

    @property
    def clients(self) -> int:
        return len(self._clients)

    @property
    def full(self) -> bool:
        return len(self._clients) >= MAX_CLIENTS

    def open(self, topics: frozenset[str]) -> Client:
        """Adds a client; the first one starts the gathering."""
        client = Client(topics)
        self._clients.add(client)
        if self._task is None:
            self._windows = self._services.intake.windows_total
            self._remove = self._services.feed.listen(self._on_events)
            self._task = asyncio.create_task(self._work(), name="stream")
        return client

    def close(self, client: Client) -> None:
        """Removes a client; the last one ends the gathering."""
        self._clients.discard(client)
        if not self._clients and self._task is not None:
            self._task.cancel()
            self._task = None
            if self._remove is not None:
                self._remove()

    def _on_events(self, events: Sequence[Event]) -> None:
        for event in events:
            self._objects.setdefault(event.kind, set()).add(event.object)
            self._last = event.id
            if event.verb in URGENT_VERBS:
                self._urgent.set()
        self._news.set()

    async def _work(self) -> None:
        while True:
            quiet = not await _happens(self._news, PERIOD_SECONDS)
            self._news.clear()
            self._urgent.clear()
            self._send_changes()
            self._send_tick()
            if not quiet:  # otherwise the next message is the first after a quiet time
                await asyncio.sleep(URGENT_SECONDS)
                await _happens(self._urgent, PERIOD_SECONDS - URGENT_SECONDS)

    def _send_changes(self) -> None:
        objects, self._objects = self._objects, {}
        cache: dict[frozenset[str], str] = {}
        for client in list(self._clients):
            kinds = frozenset(objects) & client.topics if client.topics else frozenset(objects)
            if not kinds:
                continue
            if kinds not in cache:
                cache[kinds] = _message("change", self._change(objects, kinds))
            client.offer(cache[kinds])

    def _change(self, objects: dict[str, set[str]], kinds: frozenset[str]) -> dict[str, Any]:
        few = {kind: sorted(objects[kind]) for kind in sorted(kinds) if len(objects[kind]) <= MAX_OBJECTS}
        return {
            "kinds": sorted(kinds),
            "objects": few,
            "last": self._last,
            "time_ms": self._services.clock(),
        }

    def _send_tick(self) -> None:
        total = self._services.intake.windows_total
        arrived, self._windows = total - self._windows, total
        if not arrived:
            return
        text = _message("tick", {"kinds": ["window"], "windows": arrived, "time_ms": self._services.clock()})
        for client in list(self._clients):
            if not client.topics or client.topics & {"window", "tick"}:
                client.offer(text)

    async def messages(self, client: Client) -> AsyncIterator[str]:
        """What one client's connection sends, until the controller stops or the client is too slow."""
        try:
            yield ": hello\nretry: 1000\n\n"
            stopping = asyncio.ensure_future(self._stopping.wait())
            try:
                while not self._stopping.is_set():
                    if client.slow:
                        yield _message("resync", {})
                        return
                    yield await self._next(client, stopping)
            finally:
                stopping.cancel()
        finally:
            self.close(client)

    async def _next(self, client: Client, stopping: asyncio.Future[Any]) -> str:
        getting = asyncio.ensure_future(client.queue.get())
        try:
            await asyncio.wait(
                {getting, stopping}, timeout=KEEP_ALIVE_SECONDS, return_when=asyncio.FIRST_COMPLETED
            )
            return getting.result() if getting.done() else ": alive\n\n"
        finally:
            getting.cancel()


async def _happens(event: asyncio.Event, seconds: float) -> bool:
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        return False
    return True


def _message(name: str, data: dict[str, Any]) -> str:
    return f"event: {name}\ndata: {json.dumps(data, separators=(',', ':'))}\n\n"


@router.get(
    "/stream",
    response_class=StreamingResponse,
    responses={200: {"content": {"text/event-stream": {}}, "description": "Server-sent events."}},
)
async def get_stream(request: Request, topics: str = "") -> StreamingResponse:
    """Changes as they happen; see the module's description for the messages."""
    hub: Hub = request.app.state.hub
    wanted = frozenset(part.strip() for part in topics.split(",") if part.strip())
    if hub.full:
        raise Overloaded("Too many streams are open.", "Close some dashboards, or poll instead.")
    return StreamingResponse(
        hub.messages(hub.open(wanted)),
        media_type="text/event-stream",
        headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
    )
