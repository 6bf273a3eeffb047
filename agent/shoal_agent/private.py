"""The supervisor's side of the private socket: HTTP over a Unix socket to the server process."""

from __future__ import annotations

import asyncio
import base64
import http.client
import json
import socket
from pathlib import Path
from typing import Any
from urllib.parse import quote

from google.protobuf.message import DecodeError

from shoal_agent.update.machine import Wanted
from shoal_protos.errors import Conflict, InvalidInput, NotFound, ShoalError, Unavailable
from shoal_protos.v1 import desired_pb2, telemetry_pb2

LOAD_TIMEOUT_S = 300.0  # a large model on a slow device, engines built at load
CALL_TIMEOUT_S = 10.0
ROLE_NAMES: dict[int, str] = {desired_pb2.ROLE_PRIMARY: "primary", desired_pb2.ROLE_SHADOW: "shadow"}


class _Connection(http.client.HTTPConnection):
    def __init__(self, path: Path, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


def call(path: Path, method: str, target: str, body: bytes = b"", timeout: float = CALL_TIMEOUT_S) -> bytes:
    """One request. Blocking; the body of a 2xx answer.

    Raises:
        Unavailable: nobody listens, or no answer in time.
        ShoalError: the server refused; the message is its own.
    """
    connection = _Connection(path, timeout)
    try:
        connection.request(method, target, body or None, {"Content-Type": "application/json"})
        response = connection.getresponse()
        data = response.read()
    except (OSError, http.client.HTTPException) as error:
        raise Unavailable(f"The server process does not answer: {error}.") from error
    finally:
        connection.close()
    if 200 <= response.status < 300:
        return data
    raise _refusal(response.status, data)


def _refusal(status: int, data: bytes) -> ShoalError:
    try:
        message = str(json.loads(data)["error"])
    except (ValueError, KeyError, TypeError):
        message = data[:200].decode(errors="replace") or f"status {status}"
    kinds: dict[int, type[ShoalError]] = {400: InvalidInput, 404: NotFound, 409: Conflict, 503: Unavailable}
    return kinds.get(status, ShoalError)(message)


class PrivateClient:
    """Asynchronous calls of the private socket (docs/architecture.md). Implements `executor.Server`."""

    def __init__(self, path: Path, store: Path) -> None:
        self.path, self._store = path, store

    async def _call(
        self, method: str, target: str, value: Any = None, timeout: float = CALL_TIMEOUT_S
    ) -> bytes:
        body = b"" if value is None else json.dumps(value).encode()
        return await asyncio.to_thread(call, self.path, method, target, body, timeout)

    async def load(self, endpoint: str, role: int, wanted: Wanted) -> None:
        parameters = {
            "store": str(self._store),
            "bundle": wanted.bundle,
            "version": str(wanted.parsed.model_version or 1),
            "role": ROLE_NAMES[role],
            "settings": base64.b64encode(wanted.settings).decode(),
        }
        target = f"/v2/repository/models/{quote(endpoint, safe='')}/load"
        await self._call("POST", target, {"parameters": parameters}, LOAD_TIMEOUT_S)

    async def unload(self, endpoint: str, role: int) -> None:
        parameters = {"role": ROLE_NAMES[role]}
        target = f"/v2/repository/models/{quote(endpoint, safe='')}/unload"
        await self._call("POST", target, {"parameters": parameters})

    async def live(self) -> bool:
        try:
            await self._call("GET", "/v2/health/live", timeout=2.0)
        except ShoalError:
            return False
        return True

    async def telemetry(self) -> telemetry_pb2.TelemetryWindow:
        """What the server counted since the last call. Raises Unavailable."""
        data = await self._call("POST", "/shoal/telemetry")
        try:
            return telemetry_pb2.TelemetryWindow.FromString(data)
        except DecodeError as error:
            raise Unavailable("The server process answered something else than telemetry.") from error

    async def samples(self, directory: Path) -> list[dict[str, Any]]:
        """New sample files that the server wrote into `directory`. Raises Unavailable."""
        data = await self._call("POST", "/shoal/samples", {"directory": str(directory)})
        try:
            value = json.loads(data)
        except ValueError as error:
            raise Unavailable("The server process answered something else than samples.") from error
        return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []
