"""`Agents.Connect`, one stream a device from its hello to its end, and `Agents.Leave`."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import grpc
from sqlalchemy.orm import Session

from shoal_controller import desired_publish, devices
from shoal_controller.classes import class_reason
from shoal_controller.gateway.connections import Connection
from shoal_controller.services import Services
from shoal_controller.store.tables import Desired, Device
from shoal_protos import __version__
from shoal_protos.errors import InvalidInput, ShoalError
from shoal_protos.v1 import agents_pb2, agents_pb2_grpc, desired_pb2
from shoal_protos.v1.profile_pb2 import Profile

if TYPE_CHECKING:
    from shoal_controller.gateway.admission import Admission, Peer

log = logging.getLogger("shoal.gateway")

HELLO_SECONDS = 15.0
IN_FLIGHT = 64  # spooled messages of one stream whose commit is awaited
OUT_QUEUE = 256  # messages that wait to be written to one stream
FEATURES = ("blobs.v1", "requests.v1", "trials.v1")
UNTOLD_SILENCE_SECONDS = 65.0  # an agent begins at its own pace and adopts ours with its desired state
MAX_REASON = 200  # characters
CLOCK_DRIFT_MS = 1000  # a stored mapping is rewritten only when it moved by more


class AgentsServicer(agents_pb2_grpc.AgentsServicer):
    """Serves the streams and remembers the tasks that outlive them."""

    admission: Admission

    def __init__(self, services: Services) -> None:
        self._services = services
        self._after: set[asyncio.Task[None]] = set()

    async def Connect(  # noqa: N802
        self, requests: AsyncIterator[agents_pb2.Up], context: Any
    ) -> AsyncIterator[agents_pb2.Down]:
        peer = self.admission.peer(context)
        stream = _Stream(self._services, peer)
        try:
            async for message in stream.run(requests):
                yield message
        finally:
            task = asyncio.create_task(stream.ended())
            self._after.add(task)
            task.add_done_callback(self._after.discard)
        if stream.reason:
            code = (
                grpc.StatusCode.PERMISSION_DENIED
                if stream.reason == "revoked"
                else grpc.StatusCode.UNAVAILABLE
            )
            await context.abort(code, f"The controller ended the stream: {stream.reason}.")

    async def Leave(self, request: agents_pb2.LeaveRequest, context: Any) -> agents_pb2.LeaveReply:  # noqa: N802
        """The device shuts itself out. Answered also when it is shut out already: it may ask again."""
        peer = self.admission.peer(context, revoked=True)
        services = self._services

        def leave(session: Session) -> str:
            device = session.get(Device, peer.device)
            if device is None:
                return peer.serial  # this database never knew it, or no longer does
            reason = request.reason[:MAX_REASON] or "the device left"
            devices.revoke(session, device, actor=f"device:{device.id}", reason=reason)
            return device.certificate_serial

        serial = await services.store.submit(leave)
        services.connections.revoke(peer.device, serial)
        return agents_pb2.LeaveReply(device=peer.device)

    async def drain(self) -> None:
        """Waits until every ended stream's last facts are stored."""
        await asyncio.gather(*self._after, return_exceptions=True)


class _Stream:
    """One device's stream. A reader task fills the out queue; `run` yields from it."""

    def __init__(self, services: Services, peer: Peer) -> None:
        self._services = services
        self._peer = peer
        self._out: asyncio.Queue[agents_pb2.Down | None] = asyncio.Queue(OUT_QUEUE)
        self._connection: Connection | None = None
        self._boot_id = ""
        self._zero_ms: int | None = None  # Unix ms at which the device's monotonic clock was zero
        self._stored_zero_ms: int | None = None
        self._spools: set[str] = set()
        self._pending: deque[tuple[str, asyncio.Future[int]]] = deque()
        self._pending_news = asyncio.Event()
        self._slots = asyncio.Semaphore(IN_FLIGHT)
        self._sent: tuple[int, int, int] = (0, 0, 0)  # epoch, generation, not_after of the last one sent
        self._heartbeat_ms = 0  # when the last one came
        self._at_pace = False  # heartbeats come as often as this controller asks for
        self._failure: ShoalError | None = None
        self.reason = ""  # why the controller ended it

    async def run(self, requests: AsyncIterator[agents_pb2.Up]) -> AsyncIterator[agents_pb2.Down]:
        hello = await self._hello(requests)
        yield await self._welcome(hello)
        tasks = [
            asyncio.create_task(self._guard(work))
            for work in (self._read(requests), self._acknowledge(), self._tell_desired())
        ]
        try:
            while (message := await self._out.get()) is not None:
                yield message
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        if self._failure is not None and not self.reason:
            raise self._failure

    async def _guard(self, work: Any) -> None:
        """Any part's end ends the stream."""
        try:
            await work
        except ShoalError as error:
            self._failure = error
        except Exception:
            if not self.reason:
                log.exception("The stream of device %s failed", self._peer.device)
                self.reason = "an internal error"
        self._close()

    def end(self, reason: str) -> None:
        """Called by the registry: revoked, replaced, or the controller stops."""
        self.reason = self.reason or reason
        self._close()

    def _close(self) -> None:
        while self._out.full():  # the end must fit; what is dropped is sent again on the next stream
            self._out.get_nowait()
        self._out.put_nowait(None)

    # ------------------------------------------------------------------ opening

    async def _hello(self, requests: AsyncIterator[agents_pb2.Up]) -> agents_pb2.Hello:
        try:
            async with asyncio.timeout(HELLO_SECONDS):
                first = await anext(aiter(requests), None)
        except TimeoutError:
            first = None
        if first is None or first.WhichOneof("message") != "hello":
            raise InvalidInput("A stream begins with a hello.", "Update the agent.")
        return first.hello

    async def _welcome(self, hello: agents_pb2.Hello) -> agents_pb2.Down:
        services, peer = self._services, self._peer
        now = services.clock()
        self._boot_id = hello.boot_id
        self._note_clock(hello.boot_id, hello.monotonic_ns, now)

        def greet(session: Session) -> tuple[str, str, str]:
            device = services.intake.hello(session, peer.device, hello)
            if desired_publish.outrank(session, device.id, hello.epoch, hello.generation):
                log.warning("Device %s has a newer state than this database; a new epoch begins", device.id)
            reason = class_reason(Profile.FromString(device.profile), device.profile_class)
            return device.profile_class, device.name, reason

        profile_class, name, reason = await services.store.submit(greet)
        await self._store_clock()
        self._connection = Connection(peer.device, peer.serial, since_ms=now, end=self.end, last_heard_ms=now)
        services.connections.add(self._connection)
        services.connections.check(peer.device, peer.serial)  # revoked while it was being greeted
        return agents_pb2.Down(
            welcome=agents_pb2.Welcome(
                controller_version=__version__,
                features=FEATURES,
                server_time_ms=services.clock(),
                profile_class=profile_class,
                display_name=name,
                class_reason=reason,
            )
        )

    # ------------------------------------------------------------------ reading

    async def _read(self, requests: AsyncIterator[agents_pb2.Up]) -> None:
        messages = aiter(requests)
        while True:
            silence = self._services.settings.offline_after_seconds
            silence = silence if self._at_pace else max(silence, UNTOLD_SILENCE_SECONDS)
            try:
                async with asyncio.timeout(silence):
                    message = await anext(messages, None)
            except TimeoutError:
                self.reason = f"nothing heard for {silence:.0f} s"
                return
            if message is None:
                return
            assert self._connection is not None
            self._connection.last_heard_ms = self._services.clock()
            if self._services.clock() > self._peer.not_after_ms:
                self.reason = "the certificate has expired"
                return
            await self._take(message)

    async def _take(self, message: agents_pb2.Up) -> None:
        kind = message.WhichOneof("message")
        services, device = self._services, self._peer.device
        if kind == "heartbeat":
            self._note_pace(services.clock())
            self._note_clock(message.heartbeat.boot_id, message.heartbeat.monotonic_ns, services.clock())
            await self._store_clock()
            reply = agents_pb2.HeartbeatReply(
                number=message.heartbeat.number, server_time_ms=services.clock()
            )
            await self._out.put(agents_pb2.Down(heartbeat=reply))
        elif kind == "reported":
            reported = message.reported
            await services.store.submit(lambda s: services.intake.reported(s, device, reported))
        elif kind == "spooled":
            await self._take_spooled(message.spooled)
        elif kind == "hello":
            raise InvalidInput("A stream has one hello.", "Open a new stream.")

    def _note_pace(self, now_ms: int) -> None:
        told_ms = self._services.settings.heartbeat_seconds * 1000
        self._at_pace = bool(self._heartbeat_ms) and now_ms - self._heartbeat_ms <= 1.5 * told_ms
        self._heartbeat_ms = now_ms

    async def _take_spooled(self, spooled: agents_pb2.Spooled) -> None:
        """Submits without waiting for the commit, in order; `_acknowledge` waits."""
        await self._slots.acquire()
        first = spooled.spool_id not in self._spools
        self._spools.add(spooled.spool_id)
        services, device, zero, boot = self._services, self._peer.device, self._zero_ms, self._boot_id
        future = asyncio.ensure_future(
            services.store.submit(
                lambda s: services.intake.spooled(s, device, spooled, zero_ms=zero, boot_id=boot, first=first)
            )
        )
        # Where the stream ends first nobody asks for it any more: the device sends it again.
        future.add_done_callback(lambda f: f.cancelled() or f.exception())
        self._pending.append((spooled.spool_id, future))
        self._pending_news.set()

    async def _acknowledge(self) -> None:
        """Acknowledges after the commit, one message for all that were committed together."""
        while True:
            while not self._pending:
                self._pending_news.clear()
                await self._pending_news.wait()
            through: dict[str, int] = {}
            spool, future = self._pending[0]
            try:
                await future
                while self._pending and self._pending[0][1].done():
                    spool, future = self._pending.popleft()
                    self._slots.release()
                    through[spool] = max(through.get(spool, 0), future.result())
            finally:
                for spool_id, highest in through.items():
                    ack = agents_pb2.Ack(spool_id=spool_id, through=highest)
                    await self._out.put(agents_pb2.Down(ack=ack))

    # ------------------------------------------------------------------ clocks

    def _note_clock(self, boot_id: str, monotonic_ns: int, now_ms: int) -> None:
        """Keeps the earliest mapping of this boot: a delayed message can only make it later."""
        zero = now_ms - monotonic_ns // 1_000_000
        if boot_id != self._boot_id:
            self._boot_id, self._zero_ms = boot_id, zero
        elif self._zero_ms is None or zero < self._zero_ms or zero - self._zero_ms > 60_000:
            # More than a minute later is no delay: the device slept, or this clock was set.
            self._zero_ms = zero

    async def _store_clock(self) -> None:
        zero, stored = self._zero_ms, self._stored_zero_ms
        if zero is None or (stored is not None and abs(zero - stored) < CLOCK_DRIFT_MS):
            return
        self._stored_zero_ms = zero
        services, device, boot = self._services, self._peer.device, self._boot_id
        await services.store.submit(lambda s: services.intake.clock_of(s, device, boot, zero))

    # ------------------------------------------------------------------ desired state

    async def _tell_desired(self) -> None:
        """Sends the stored desired state at once and after every change."""
        assert self._connection is not None
        news, device = self._connection.news, self._peer.device
        # A device that just joined, came back with another profile, or outranked the store.
        await asyncio.to_thread(self._services.publish, [device])
        while True:
            news.clear()
            row = await asyncio.to_thread(self._load_desired)
            if row is not None:
                stamp = (row.epoch, row.generation, row.not_after_ms)
                if stamp > self._sent:
                    self._sent = stamp
                    signed = desired_pb2.Signed.FromString(row.signed)
                    await self._out.put(agents_pb2.Down(desired=signed))
            await news.wait()

    def _load_desired(self) -> Desired | None:
        with self._services.store.read() as session:
            return session.get(Desired, self._peer.device)

    # ------------------------------------------------------------------ the end

    async def ended(self) -> None:
        """Unregisters; a device that has no newer stream is disconnected."""
        connection, services = self._connection, self._services
        if connection is None or not services.connections.remove(connection):
            return
        reason = self.reason or (self._failure.message if self._failure else "")
        try:
            await services.store.submit(
                lambda s: services.intake.gone(s, connection.device, connection.last_heard_ms, reason)
            )
        except ShoalError:
            log.warning("The end of device %s's stream could not be stored", connection.device)
