"""A browser without a screen: synchronous requests to an application in process."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
from starlette.types import ASGIApp


class Client:
    """Follows redirects, as a browser does. Works beside Playwright, whose loop owns the main thread."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._threads = ThreadPoolExecutor(1)

    def get(self, address: str, **request: Any) -> httpx.Response:
        return self._threads.submit(lambda: asyncio.run(self._send("GET", address, **request))).result()

    def post(self, address: str, **request: Any) -> httpx.Response:
        return self._threads.submit(lambda: asyncio.run(self._send("POST", address, **request))).result()

    def patch(self, address: str, **request: Any) -> httpx.Response:
        return self._threads.submit(lambda: asyncio.run(self._send("PATCH", address, **request))).result()

    async def _send(self, method: str, address: str, **request: Any) -> httpx.Response:
        request.setdefault("follow_redirects", True)
        transport = httpx.ASGITransport(app=self._app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.request(method, address, **request)
