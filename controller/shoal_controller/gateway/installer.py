"""Door 8441: installer and wheels for bare devices. Plain HTTP, GET and HEAD only, nothing else behind it.

Every file is named by its SHA-256, which the join line and the installer check: whoever changes bytes on
the way is noticed, and nothing secret passes. Slow or greedy clients cannot take the door from others.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from shoal_controller import installer, wheels
from shoal_protos import __version__
from shoal_protos.errors import NotFound, ShoalError

MAX_CONNECTIONS = 256
MAX_TRANSFERS = 64
MAX_TRANSFERS_AN_ADDRESS = 8
STALLED_S = 60.0  # a client that takes nothing for so long is let go
HEADER = (b"x-shoal-installer", __version__.encode())  # tells the installer that no proxy answered
HELP = (
    "Shoal: this door installs agents on devices of this fleet.\n"
    "Make the line that uses it on the controller: shoal token create --join\n"
)


def create(directory: Path) -> ASGIApp:
    """The application over the wheel store `directory`."""

    def front(_: Request) -> Response:
        return PlainTextResponse(HELP)

    def get_installer(request: Request) -> Response:
        path = installer.find(directory, request.path_params["sha256"])
        return FileResponse(path, media_type="text/x-python")

    def get_wheel(request: Request) -> Response:
        found = wheels.find_file(directory, request.path_params["sha256"], request.path_params["name"])
        return FileResponse(found, media_type="application/octet-stream")

    async def missing(_: Request, error: Exception) -> Response:
        text = str(error) if isinstance(error, ShoalError) else "There is nothing here."
        return PlainTextResponse(text + "\n", 404)

    app = Starlette(
        routes=[
            Route("/", front),
            Route("/installer/{sha256}", get_installer),
            Route("/wheels/{sha256}/{name}", get_wheel),
        ],
        exception_handlers={NotFound: missing, 404: missing},
    )
    return Bounded(app)


class Bounded:
    """Counts transfers, ends stalled ones, and marks every answer as the controller's."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._open: Counter[str] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        client = (scope.get("client") or ("", 0))[0]

        async def bounded(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), HEADER]
            await asyncio.wait_for(send(message), STALLED_S)

        if self._open.total() >= MAX_TRANSFERS or self._open[client] >= MAX_TRANSFERS_AN_ADDRESS:
            busy: Any = PlainTextResponse("Busy; try again in a moment.\n", 503, {"Retry-After": "2"})
            await busy(scope, receive, bounded)
            return
        self._open[client] += 1
        try:
            await self._app(scope, receive, bounded)
        finally:
            self._open[client] -= 1
            if self._open[client] <= 0:
                del self._open[client]
