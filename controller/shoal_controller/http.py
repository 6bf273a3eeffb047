"""The HTTP door: uvicorn inside the controller's loop, on a socket that is bound first."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator
from typing import Any

import uvicorn

from shoal_protos.errors import Unavailable

GRACE_SECONDS = 2  # streams end by themselves at shutdown; nothing else is waited for longer


class _Server(uvicorn.Server):
    """Leaves signals to the process that holds the controller."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class HttpDoor:
    """Serves one ASGI application."""

    def __init__(
        self, application: Any, option: str = "--http-port", *, connections: int | None = None
    ) -> None:
        """`option` chooses the port on the command line; `connections`: more at once are refused."""
        self._application = application
        self._option = option
        self._connections = connections
        self._server: _Server | None = None
        self._task: asyncio.Task[None] | None = None

    async def start(self, host: str, port: int) -> int:
        """Opens the door; returns the bound port.

        Raises:
            Unavailable: the port is taken.
        """
        door = bind_socket(host, port, self._option)
        config = uvicorn.Config(
            self._application,
            lifespan="off",
            log_config=None,
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=GRACE_SECONDS,
            h11_max_incomplete_event_size=64 << 10,
            limit_concurrency=self._connections,
            # Only h11 bounds a request's head; a door for strangers needs that more than speed.
            http="auto" if self._connections is None else "h11",
        )
        self._server = _Server(config)
        self._task = asyncio.create_task(self._server.serve(sockets=[door]), name="http")
        while not self._server.started:
            if self._task.done():
                self._task.result()
            await asyncio.sleep(0.005)
        bound: int = door.getsockname()[1]
        return bound

    async def stop(self) -> None:
        if self._server is None or self._task is None:
            return
        self._server.should_exit = True
        await self._task
        self._server = self._task = None


def bind_socket(host: str, port: int, option: str) -> socket.socket:
    """A listening socket. Raises Unavailable, naming the port and the option."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    door = socket.socket(family, socket.SOCK_STREAM)
    door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        door.bind((host, port))
        door.listen(256)
    except OSError as error:
        door.close()
        raise Unavailable(
            f"Port {port} on {host} cannot be used: {error.strerror}.",
            f"Stop what uses it, or choose another with {option} (0 = free).",
        ) from error
    door.setblocking(False)
    return door
