"""The gRPC carrier: one mutual-TLS channel to door 8443 with one bidirectional stream on it.

The channel is this device's only one, so blobs share its connection. gRPC's own keep-alive pings and
bandwidth probes stay off: heartbeats show that the other side lives, and an idle device must cost
few bytes.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Coroutine, Sequence
from typing import Any

import grpc

from shoal_agent.clock import Clock, SystemClock
from shoal_agent.identity import Identity
from shoal_agent.link.base import Backoff, Content, Events, Outbox, Part
from shoal_agent.link.status import to_domain
from shoal_protos.errors import ShoalError, TamperedData, Unavailable
from shoal_protos.tokens import server_name
from shoal_protos.v1 import agents_pb2, agents_pb2_grpc, blobs_pb2, blobs_pb2_grpc

log = logging.getLogger(__name__)

WELCOME_TIMEOUT_S = 10.0
SILENT_BEATS, SILENT_EXTRA_S = 2.5, 10.0  # unanswered for so long the other side is gone
BLOB_STALL_S = 60.0  # longest silence inside a transfer
PUSH_CHUNK = 64 * 1024  # bytes
MAX_MESSAGE = 16 * 1024 * 1024  # bytes; a desired state with many placements


class _Moved(Exception):
    """The stream ends because a channel with a newer certificate is ready."""


class GrpcLink:
    """A `Link` over gRPC.

    Args:
        addresses: `host:port` of door 8443, tried in order.
        outbox: spooled messages.
    """

    def __init__(
        self,
        identity: Identity,
        addresses: Sequence[str],
        outbox: Outbox,
        *,
        heartbeat_s: float = 20.0,
        clock: Clock | None = None,
        backoff: Backoff | None = None,
    ) -> None:
        self._identity = identity
        self._addresses = list(addresses)
        self._outbox = outbox
        self._heartbeat_s = heartbeat_s
        self._clock = clock or SystemClock()
        self._backoff = backoff or Backoff()
        self._reported: agents_pb2.Reported | None = None
        self._report_news = asyncio.Event()
        self._channel: grpc.aio.Channel | None = None  # of the welcomed stream
        self._address = ""
        self._successor: Identity | None = None
        self._succession = asyncio.Event()
        self._prepared: tuple[str, grpc.aio.Channel] | None = None

    @property
    def connected(self) -> bool:
        return self._channel is not None

    @property
    def address(self) -> str:
        """The controller's address in use, "" while there is none."""
        return self._address if self.connected else ""

    def set_addresses(self, addresses: Sequence[str]) -> None:
        self._addresses = list(addresses)

    def set_heartbeat(self, seconds: float) -> None:
        self._heartbeat_s = seconds

    def set_identity(self, identity: Identity) -> None:
        """Moves to a renewed certificate: the new channel stands before the old one is closed."""
        self._successor = identity
        self._succession.set()

    def greet_again(self) -> None:
        """Says hello anew: the profile has changed. Without a connection the next one does so anyway."""
        if self.connected:
            self.set_identity(self._identity)

    def report(self, reported: agents_pb2.Reported) -> None:
        self._reported = reported
        self._report_news.set()

    # ------------------------------------------------------------------ connection

    async def run(self, events: Events) -> None:
        try:
            while True:
                moved = await self._round(events)
                if not moved:
                    await self._clock.sleep(self._backoff.next())
        finally:
            await self.close()

    async def _round(self, events: Events) -> bool:
        """Tries each address once; True if a prepared channel waits to be used at once."""
        for address in list(self._addresses):
            if await self._attempt(address, events):
                return True
        return False

    async def _attempt(self, address: str, events: Events) -> bool:
        try:
            await self._session(address, events)
        except _Moved:
            return True
        except ShoalError as reason:
            events.on_lost(reason)
        return False

    async def _session(self, address: str, events: Events) -> None:
        """One stream, from hello to its end, which is always an exception."""
        if self._prepared is not None:
            address, channel = self._prepared
            self._prepared = None
        else:
            channel = self._open(address, self._identity)
        try:
            call = agents_pb2_grpc.AgentsStub(channel).Connect()  # type: ignore[no-untyped-call]
            try:
                await self._converse(call, address, channel, events)
            except grpc.aio.AioRpcError as error:
                raise to_domain(error, address) from error
            except asyncio.InvalidStateError as error:  # write after the stream's end
                raise Unavailable(f"{address}: the stream ended.") from error
            finally:
                call.cancel()
        finally:
            self._channel = None
            await channel.close()

    def _open(self, address: str, identity: Identity) -> grpc.aio.Channel:
        credentials = grpc.ssl_channel_credentials(
            identity.ca_pem, identity.key_pem, identity.certificate_pem
        )
        options = [
            ("grpc.ssl_target_name_override", server_name(identity.fleet)),
            ("grpc.use_local_subchannel_pool", 1),  # a new certificate needs a new connection
            ("grpc.http2.bdp_probe", 0),
            ("grpc.enable_retries", 0),
            ("grpc.max_receive_message_length", MAX_MESSAGE),
        ]
        return grpc.aio.secure_channel(address, credentials, options)

    async def _converse(self, call: Any, address: str, channel: grpc.aio.Channel, events: Events) -> None:
        lock = asyncio.Lock()  # a stream takes one write at a time

        async def send(message: agents_pb2.Up) -> None:
            async with lock:
                await call.write(message)

        await self._greet(call, send, events)
        self._channel, self._address = channel, address
        self._backoff.reset()
        self._outbox.rewind()
        self._report_news.set()
        await _first_failure(
            self._receive(call, address, events),
            self._send_heartbeats(send, events),
            self._send_reports(send),
            self._send_outbox(send),
            self._prepare_successor(address),
        )

    async def _greet(self, call: Any, send: Any, events: Events) -> None:
        await _bounded(send(agents_pb2.Up(hello=events.hello())), WELCOME_TIMEOUT_S, "no answer to the hello")
        first = await _bounded(call.read(), WELCOME_TIMEOUT_S, "no answer to the hello")
        if first is grpc.aio.EOF:
            await _raise_status(call)
        if first.WhichOneof("message") != "welcome":
            raise Unavailable("The controller's first message was no welcome.", "Update the agent.")
        await events.on_welcome(first.welcome)

    async def _receive(self, call: Any, address: str, events: Events) -> None:
        while True:
            # A half-open connection looks silent; each heartbeat is answered, so silence ends it.
            patience = SILENT_BEATS * self._heartbeat_s + SILENT_EXTRA_S
            message = await _bounded(call.read(), patience, f"{address}: silent for {patience:.0f} s")
            if message is grpc.aio.EOF:
                await _raise_status(call)
            await self._dispatch(message, events)

    async def _dispatch(self, message: agents_pb2.Down, events: Events) -> None:
        kind = message.WhichOneof("message")
        if kind == "desired":
            await events.on_desired(message.desired)
        elif kind == "ack":
            self._outbox.acknowledge(message.ack)
        elif kind == "heartbeat":
            await events.on_heartbeat(message.heartbeat)
        elif kind == "welcome":
            await events.on_welcome(message.welcome)
        # Anything else comes from a newer controller and may be ignored: what an agent must
        # understand is named in the desired state's `requires`.

    async def _send_heartbeats(self, send: Any, events: Events) -> None:
        while True:
            await send(agents_pb2.Up(heartbeat=events.heartbeat()))
            await self._clock.sleep(self._heartbeat_s)

    async def _send_reports(self, send: Any) -> None:
        while True:
            await self._report_news.wait()
            self._report_news.clear()
            if self._reported is not None:
                await send(agents_pb2.Up(reported=self._reported))

    async def _send_outbox(self, send: Any) -> None:
        while True:
            await send(agents_pb2.Up(spooled=await self._outbox.next()))

    async def _prepare_successor(self, address: str) -> None:
        while True:
            await self._succession.wait()
            self._succession.clear()
            identity = self._successor
            if identity is None:
                continue
            self._identity = identity  # also for every later connection
            channel = self._open(address, identity)
            try:
                await asyncio.wait_for(channel.channel_ready(), WELCOME_TIMEOUT_S)
            except asyncio.TimeoutError:
                log.warning("a second connection was not accepted yet; keeping the open one")
                await channel.close()
                continue
            except BaseException:
                await channel.close()
                raise
            self._prepared = (address, channel)
            raise _Moved

    async def close(self) -> None:
        """Ends what is left open; `run` calls it when cancelled."""
        if self._prepared is not None:
            await self._prepared[1].close()
            self._prepared = None

    # ------------------------------------------------------------------ blobs

    def _blobs(self) -> tuple[Any, str]:
        if self._channel is None:
            raise Unavailable("Not connected to the controller.", "Waiting for the connection.")
        stub = blobs_pb2_grpc.BlobsStub(self._channel)  # type: ignore[no-untyped-call]
        return stub, self._address

    async def fetch(self, digest: str, offset: int = 0, length: int = 0) -> AsyncIterator[Part]:
        stub, address = self._blobs()
        call = stub.Fetch(blobs_pb2.FetchRequest(digest=digest, offset=offset, length=length))
        try:
            while True:
                chunk = await _bounded(call.read(), BLOB_STALL_S, f"{address}: the transfer stalled")
                if chunk is grpc.aio.EOF:
                    await _raise_unless_ok(call)
                    return
                yield Part(chunk.offset, chunk.data, chunk.total)
        except grpc.aio.AioRpcError as error:
            raise to_domain(error, address) from error
        finally:
            call.cancel()

    async def push(self, content: Content, purpose: str) -> None:
        stub, address = self._blobs()
        try:
            request = blobs_pb2.StatRequest(digest=content.digest)
            state = await _bounded(stub.Stat(request), BLOB_STALL_S, f"{address}: no answer in time")
            if not state.complete:
                state = await _bounded(stub.Push(_parts(content, purpose, state.received)), None, address)
        except grpc.aio.AioRpcError as error:
            raise to_domain(error, address) from error
        if not state.complete:
            raise TamperedData(f"The controller holds {state.received} of {content.size} bytes after a push.")


async def _bounded(work: Awaitable[Any], timeout_s: float | None, problem: str) -> Any:
    """Awaits in a task of its own. gRPC raises CancelledError also when the other side, or a channel
    that closes, ends a call: to the caller that must not look as if it were itself being cancelled.

    Raises:
        Unavailable: not done in time, or ended from outside.
    """
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait([task], timeout=timeout_s)
        if task.cancelled():
            raise Unavailable("The connection was closed.")
        if not task.done():
            raise Unavailable(f"{problem}.")
        return task.result()
    finally:
        task.cancel()


async def _parts(content: Content, purpose: str, offset: int) -> AsyncIterator[blobs_pb2.PushRequest]:
    header = blobs_pb2.PushHeader(digest=content.digest, size=content.size, offset=offset, purpose=purpose)
    yield blobs_pb2.PushRequest(header=header)
    while offset < content.size:
        data = content.read(offset, PUSH_CHUNK)
        if not data:
            raise TamperedData(f"The blob {content.digest[:19]} is shorter than {content.size} bytes.")
        offset += len(data)
        yield blobs_pb2.PushRequest(data=data)


async def _raise_unless_ok(call: Any) -> None:
    code = await call.code()
    if code is not grpc.StatusCode.OK:
        raise grpc.aio.AioRpcError(
            code, await call.initial_metadata(), await call.trailing_metadata(), details=await call.details()
        )


async def _raise_status(call: Any) -> None:
    """Turns the stream's end into an error: a stream never ends well."""
    await _raise_unless_ok(call)
    raise Unavailable("The controller closed the stream.")


async def _first_failure(*parts: Coroutine[Any, Any, None]) -> None:
    """Runs endless coroutines together until one ends; the others are cancelled, then its error is raised."""
    tasks = [asyncio.ensure_future(part) for part in parts]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            if task.cancelled():
                raise Unavailable("The connection was closed.")
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
