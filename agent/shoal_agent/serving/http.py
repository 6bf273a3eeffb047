"""HTTP: uvicorn's httptools protocol, whose hot route is answered without ASGI.

A plain `POST /v2/models/NAME/infer` is answered inside the protocol object, which saves a task, an
event and four calls a request. Whatever is not plain (chunked or compressed bodies, `Expect`,
pipelining, a slow reader) takes uvicorn's own way to the same handler. The answers are equal byte for
byte, which a test checks.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import re
import ssl
import urllib.parse
from pathlib import Path
from typing import Any

from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol
from uvicorn.server import ServerState

from shoal_agent.serving import peers
from shoal_agent.serving.asgi import App
from shoal_agent.serving.dataplane import DataPlane
from shoal_agent.serving.requests import HEADER_LENGTH, Reply, infer
from shoal_protos.errors import Conflict, InvalidInput

KEEP_ALIVE_S = 75
FRESH_S = 0.2  # what a connection without a request yet gets when the server stops
MAX_UNIX_PATH = 100  # the kernel's limit is 107 bytes
_INFER = re.compile(rb"/v2/models/([^/?#]+)(?:/versions/([^/?#]+))?/infer\Z")
_MAX_TARGETS = 256
_JOIN_BELOW = 1 << 16  # larger answers are handed over in pieces instead of copied once more


class _NobodyWaits:
    """Stands for the event that uvicorn sets when a connection is lost."""

    def set(self) -> None:
        """Nothing waits on the fast path."""


_NOBODY_WAITS = _NobodyWaits()


class _FastCycle:
    """Stands where uvicorn keeps its request-response cycle, so that pipelining, shutdown and lost
    connections are handled by uvicorn's code."""

    __slots__ = ("disconnected", "keep_alive", "message_event", "response_complete")

    def __init__(self, keep_alive: bool) -> None:
        self.keep_alive = keep_alive
        self.response_complete = False
        self.disconnected = False
        self.message_event = _NOBODY_WAITS


class InferProtocol(HttpToolsProtocol):
    """One connection. Relies on uvicorn attributes that are no public API; a test guards them."""

    def __init__(
        self,
        config: Config,
        state: ServerState,
        loop: asyncio.AbstractEventLoop,
        plane: DataPlane,
        limit: int,
    ) -> None:
        super().__init__(config=config, server_state=state, app_state={}, _loop=loop)
        self._plane, self._limit = plane, limit
        self._chunks: list[bytes] | None = None  # body of a request on the fast path
        self._target: tuple[str, str] = ("", "")
        self._header_length: bytes | None = None
        self._peer = peers.Peer()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._peer = peers.of_transport(transport)
        self.app_state["peer"] = self._peer  # the same for requests that take ASGI's way

    def on_headers_complete(self) -> None:
        target = _targets.get(self.url) or _remember(self.url)
        if target is not _NOT_INFER and self._is_plain():
            self._target = target
            self._chunks = []
            self.cycle = _FastCycle(self.parser.should_keep_alive())  # type: ignore[assignment]
            return
        super().on_headers_complete()

    def _is_plain(self) -> bool:
        """Whether the fast path may answer; also keeps the header length."""
        cycle = self.cycle
        if (cycle is not None and not cycle.response_complete) or self.flow.write_paused:
            return False
        length: bytes | None = None
        header_length: bytes | None = None
        for name, value in self.headers:
            if name == b"content-length":
                length = value
            elif name == HEADER_LENGTH:
                header_length = value
            elif name in (b"transfer-encoding", b"content-encoding", b"expect", b"upgrade"):
                return False
        if length is None or not length.isdigit() or int(length) > self._limit:
            return False
        if self.parser.get_method() != b"POST" or self.parser.get_http_version() != "1.1":
            return False
        self._header_length = header_length
        return True

    def on_body(self, body: bytes) -> None:
        if self._chunks is None:
            super().on_body(body)
        else:
            self._chunks.append(body)

    def on_message_complete(self) -> None:
        chunks = self._chunks
        if chunks is None:
            super().on_message_complete()
            return
        self._chunks = None
        cycle = self.cycle
        body = chunks[0] if len(chunks) == 1 else b"".join(chunks)
        name, version = self._target

        def reply(value: Reply) -> None:
            self._write(value, cycle)  # type: ignore[arg-type]

        infer(self._plane, name, version, self._header_length, body, reply, self._peer)

    def _write(self, reply: Reply, cycle: _FastCycle) -> None:
        transport = self.transport
        if not cycle.disconnected and not transport.is_closing():
            head = [STATUS_LINE[reply.status]]
            for name, value in reply.headers:
                head += (name, b": ", value, b"\r\n")
            size = sum(map(len, reply.body))
            head.append(b"content-length: %d\r\n" % size)
            if not cycle.keep_alive:
                head.append(b"connection: close\r\n")
            head.append(b"\r\n")
            if size < _JOIN_BELOW:
                transport.write(b"".join(head + reply.body))
            else:
                transport.writelines([b"".join(head), *reply.body])
        cycle.response_complete = True
        if not cycle.keep_alive:
            transport.close()
        self.on_response_complete()


_NOT_INFER = ("", "")
_targets: dict[bytes, tuple[str, str]] = {}


def _remember(url: bytes) -> tuple[str, str]:
    """(model, version) of an infer path, kept by its bytes; `_NOT_INFER` for anything else."""
    match = _INFER.match(url)
    target = _NOT_INFER
    if match is not None:
        with contextlib.suppress(UnicodeDecodeError):
            name, version = (urllib.parse.unquote((part or b"").decode("ascii")) for part in match.groups())
            target = (name, version) if "/" not in name else _NOT_INFER
    if target is not _NOT_INFER:
        if len(_targets) >= _MAX_TARGETS:
            _targets.clear()
        _targets[url] = target
    return target


class Listener:
    """One socket with its application, and its graceful end."""

    def __init__(self, server: asyncio.AbstractServer, state: ServerState) -> None:
        self._server, self._state = server, state

    @property
    def port(self) -> int:
        """The bound port; 0 for a Unix socket."""
        name: Any = self._server.sockets[0].getsockname()  # type: ignore[attr-defined]
        return int(name[1]) if isinstance(name, tuple) else 0

    async def close(self, grace_s: float) -> None:
        """Accepts no more, lets running requests end, then cuts what is left."""
        self._server.close()
        end = asyncio.get_running_loop().time() + grace_s
        fresh = [part for part in self._state.connections if getattr(part, "cycle", None) is None]
        for connection in list(self._state.connections):
            if connection not in fresh:
                connection.shutdown()
        if fresh:  # their first request may be on its way
            await asyncio.sleep(min(grace_s, FRESH_S))
            for connection in fresh:
                connection.shutdown()
        while (self._state.connections or self._state.tasks) and asyncio.get_running_loop().time() < end:
            await asyncio.sleep(0.02)
        for connection in list(self._state.connections):
            transport = getattr(connection, "transport", None)
            if transport is not None:
                transport.abort()


def _factory(app: App, loop: asyncio.AbstractEventLoop, state: ServerState) -> Any:
    config = Config(
        app,
        http=InferProtocol,
        ws="none",
        lifespan="off",
        interface="asgi3",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        date_header=False,
        timeout_keep_alive=KEEP_ALIVE_S,
    )
    config.load()
    return lambda: InferProtocol(config, state, loop, app.plane, app.max_body)


async def listen_tcp(app: App, host: str, port: int, tls: ssl.SSLContext | None = None) -> Listener:
    """Listens on a TCP port, 0 = a free one.

    Raises:
        Conflict: the port is in use.
        InvalidInput: the address cannot be bound.
    """
    loop, state = asyncio.get_running_loop(), ServerState()
    try:
        server = await loop.create_server(_factory(app, loop, state), host, port, ssl=tls, backlog=1024)
    except OSError as error:
        raise bind_error(error, host, port) from error
    return Listener(server, state)


async def listen_unix(app: App, path: Path, mode: int) -> Listener:
    """Listens on a Unix socket with the given file mode, replacing a dead one.

    Raises:
        InvalidInput: the path is too long for a socket, or cannot be made.
    """
    if len(os.fsencode(path)) > MAX_UNIX_PATH:
        raise InvalidInput(
            f"The socket path {path} is longer than {MAX_UNIX_PATH} bytes.",
            "Use a shorter --state directory.",
        )
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
    loop, state = asyncio.get_running_loop(), ServerState()
    before = os.umask(0o777 & ~mode)
    try:
        server = await loop.create_unix_server(_factory(app, loop, state), str(path), backlog=1024)
    except OSError as error:
        raise InvalidInput(f"The socket {path} cannot be made: {error.strerror or error}.") from error
    finally:
        os.umask(before)
    return Listener(server, state)


def bind_error(error: OSError, host: str, port: int) -> Conflict | InvalidInput:
    if error.errno == errno.EADDRINUSE:
        return Conflict(
            f"Port {port} on {host} is in use.",
            "Stop the other program or choose another port, 0 for a free one.",
        )
    return InvalidInput(f"Cannot listen on {host}:{port}: {error.strerror or error}.")
