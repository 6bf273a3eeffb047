"""The client's one kept HTTP connection, over TCP or a Unix socket."""

from __future__ import annotations

import http.client
import ipaddress
import json
import os
import socket
import threading
from collections.abc import Mapping
from typing import Any, NamedTuple

from shoal_protos.errors import (
    Conflict,
    Denied,
    InvalidInput,
    NotFound,
    Overloaded,
    ShoalError,
    Unavailable,
    Unsupported,
)

PORT = 8000
_JOIN_BELOW = 1 << 16  # bytes; what is smaller is sent in one piece
_MAX_HEAD = 1 << 16
_ERRORS: Mapping[int, type[ShoalError]] = {
    400: InvalidInput,
    403: Denied,
    404: NotFound,
    409: Conflict,
    413: InvalidInput,
    501: Unsupported,
    503: Overloaded,
}


class Address(NamedTuple):
    """Where a server listens: a Unix socket's path, or a host and a port."""

    path: str
    host: str
    port: int

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return self.path or f"{host}:{self.port}"


def parse_address(text: str) -> Address:
    """ "host", "host:port", "http://host:port", "[::1]:8000" or the path of a Unix socket.

    Raises:
        InvalidInput: none of these.
    """
    text = text.strip()
    if text.startswith("unix:"):
        path = text.removeprefix("unix:")
        return Address(path.removeprefix("//") if path.startswith("///") else path, "", 0)
    text = text.removeprefix("http://")
    if text.startswith("https://"):
        raise InvalidInput(f"The client does not speak TLS: {text[:100]}.", "Use the device's own agent.")
    text = text.rstrip("/") if not text.startswith("/") else text
    if "/" in text:
        return Address(text, "", 0)
    host, colon, port = text.rpartition(":")
    if not colon or text.endswith("]") or (":" in host and not host.startswith("[")):
        host, port = text, ""
    if not host or (port and not (port.isdigit() and int(port) <= 65535)):
        raise InvalidInput(f"'{text[:100]}' is no address.", "Use HOST, HOST:PORT or a Unix socket's path.")
    return Address("", host.strip("[]"), int(port or PORT))


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


class Transport:
    """Requests over one kept connection; `lock` guards it and whatever belongs to a request."""

    def __init__(self, address: Address, timeout: float) -> None:
        self.address, self._timeout = address, timeout
        self.lock = threading.RLock()
        self.connection: http.client.HTTPConnection | None = None
        self._local: bool | None = True if address.path else None
        self._lean = True
        self._host = "localhost" if address.path else str(address)

    def is_local(self) -> bool:
        """Whether the server is on this machine; known after the first answer."""
        return bool(self._local)

    def call(
        self, method: str, target: str, body: bytes = b"", headers: Mapping[str, str] | None = None
    ) -> tuple[bytes, int | None]:
        """(body, length of its JSON header or None) of a 2xx answer.

        Raises:
            ShoalError: what the server refused, by its status.
            Unavailable: nobody answers.
        """
        with self.lock:
            kept = self.connection is not None
            try:
                return self._exchange(method, target, body, headers or {})
            except (ConnectionError, http.client.RemoteDisconnected) as error:
                if not kept:
                    raise self._unavailable(error) from error
            except (OSError, http.client.HTTPException) as error:
                raise self._unavailable(error) from error
            try:  # a kept connection may have been closed since: once more on a fresh one
                return self._exchange(method, target, body, headers or {})
            except (OSError, http.client.HTTPException) as error:
                raise self._unavailable(error) from error

    def _unavailable(self, error: Exception) -> Unavailable:
        return Unavailable(
            f"{self.address} does not answer: {error}.",
            "Is the agent running there? Look with: shoal-agent doctor",
        )

    def _exchange(
        self, method: str, target: str, body: bytes, headers: Mapping[str, str]
    ) -> tuple[bytes, int | None]:
        if self.connection is None:
            self.connection = self._open()
        connection = self.connection
        try:
            if self._lean and connection.sock is not None:
                status, size, data = self._lean_exchange(connection.sock, method, target, body, headers)
            else:
                connection.request(method, target, body, dict(headers))
                if self._local is None:
                    self._local = _is_loopback(connection)
                response = connection.getresponse()
                status, data = response.status, response.read()
                size = response.headers.get("Inference-Header-Content-Length")
        except _NotLean:
            self._lean, self.connection = False, None
            connection.close()
            return self._exchange(method, target, body, headers)
        except BaseException:
            self.connection = None
            connection.close()
            raise
        if status >= 300:
            raise _ERRORS.get(status, ShoalError)(_message(data, status))
        return data, None if size is None else int(size)

    def _lean_exchange(
        self, sock: socket.socket, method: str, target: str, body: bytes, headers: Mapping[str, str]
    ) -> tuple[int, str | None, bytes]:
        """One exchange on a kept connection in one write and, mostly, one read: the standard library's
        client takes a tenth of a millisecond more, which is much beside a small model.

        Raises:
            _NotLean: the answer is not of the plain form that Shoal's server writes.
        """
        extra = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        head = f"{method} {target} HTTP/1.1\r\nHost: {self._host}\r\n{extra}"
        head += f"Content-Length: {len(body)}\r\n\r\n"
        if len(body) < _JOIN_BELOW:
            sock.sendall(head.encode("latin-1") + body)
        else:
            sock.sendall(head.encode("latin-1"))
            sock.sendall(body)
        data = sock.recv(_JOIN_BELOW)
        while b"\r\n\r\n" not in data:
            more = sock.recv(_JOIN_BELOW) if data and len(data) <= _MAX_HEAD else b""
            if not more:
                raise ConnectionResetError("the connection was closed")
            data += more
        text, _, rest = data.partition(b"\r\n\r\n")
        first, *lines = text.decode("latin-1").split("\r\n")
        found = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        length = found.get("content-length", "")
        if not first.startswith("HTTP/1.1 ") or not length.isdigit() or "transfer-encoding" in found:
            raise _NotLean
        if found.get("connection", "").lower() == "close":
            raise _NotLean
        return int(first[9:12]), found.get("inference-header-content-length"), _rest(sock, rest, int(length))

    def _open(self) -> http.client.HTTPConnection:
        if self.address.path:
            return _UnixConnection(self.address.path, self._timeout)
        return http.client.HTTPConnection(self.address.host, self.address.port, timeout=self._timeout)

    def close(self) -> None:
        with self.lock:
            if self.connection is not None:
                self.connection.close()
                self.connection = None


class _NotLean(Exception):
    """The server writes HTTP in a way that the standard library shall read."""


def _rest(sock: socket.socket, start: bytes, length: int) -> bytes:
    """The body, of which `start` has come already."""
    if len(start) >= length:
        return start[:length]
    body = bytearray(length)
    body[: len(start)] = start
    view = memoryview(body)
    place = len(start)
    while place < length:
        count = sock.recv_into(view[place:])
        if not count:
            raise ConnectionResetError("the connection was closed in the middle of an answer")
        place += count
    return bytes(body)


def _is_loopback(connection: http.client.HTTPConnection) -> bool:
    try:
        name: Any = connection.sock.getpeername()
        return ipaddress.ip_address(name[0].partition("%")[0]).is_loopback
    except (OSError, ValueError, IndexError, AttributeError):
        return False


def _message(data: bytes, status: int) -> str:
    try:
        return str(json.loads(data)["error"])
    except (ValueError, KeyError, TypeError):
        return data[:200].decode(errors="replace") or f"The server answered with status {status}."


def random_text() -> str:
    """Distinguishes this process and client from others."""
    return f"{os.getpid():x}-{os.urandom(6).hex()}"
