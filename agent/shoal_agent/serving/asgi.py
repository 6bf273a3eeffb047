"""Everything over HTTP besides the hot route: a small raw ASGI application.

The private application (Unix socket of the supervisor) is the public one plus load, unload, telemetry
and samples.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
import re
import urllib.parse
import zlib
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError

from shoal_agent.serving import describe, metrics
from shoal_agent.serving.dataplane import DataPlane
from shoal_agent.serving.errors import TooLarge
from shoal_agent.serving.peers import Peer
from shoal_agent.serving.requests import HEADER_LENGTH, Reply, error_reply, infer, json_reply
from shoal_protos.errors import Denied, InvalidInput, NotFound, ShoalError, Unsupported
from shoal_protos.v1.desired_pb2 import PlacementSettings

MAX_BODY = 64 << 20
MAX_LABELS = 10_000

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]
Handler = Callable[["App", "Request"], Awaitable[Reply]]


class Request:
    """A request with its body read."""

    def __init__(
        self,
        parts: dict[str, str],
        headers: dict[bytes, bytes],
        query: dict[str, str],
        body: bytes,
        peer: Peer,
    ) -> None:
        self.parts, self.headers, self.query, self.body, self.peer = parts, headers, query, body, peer

    def json(self) -> Any:
        if not self.body.strip():
            return {}
        try:
            return json.loads(self.body)
        except (ValueError, RecursionError) as error:
            raise InvalidInput(f"The body is not JSON: {str(error)[:200]}.") from error

    def parameters(self) -> dict[str, Any]:
        message = self.json()
        parameters = message.get("parameters", {}) if isinstance(message, dict) else None
        if not isinstance(parameters, dict):
            raise InvalidInput("The body has no object 'parameters'.")
        return parameters


class App:
    """The application; `private` opens the supervisor's calls."""

    def __init__(self, plane: DataPlane, *, private: bool = False, max_body: int = MAX_BODY) -> None:
        self.plane, self.private, self.max_body = plane, private, max_body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        close = False
        try:
            handler, parts = self._route(scope["method"], scope["path"])
            headers = dict(scope["headers"])
            body = await self._body(headers, receive)
            query = dict(urllib.parse.parse_qsl(scope["query_string"].decode("latin-1")))
            peer = scope.get("state", {}).get("peer") or Peer()
            reply = await handler(self, Request(parts, headers, query, body, peer))
        except _Disconnected:
            return
        except TooLarge as error:
            reply, close = error_reply(error), True  # the rest of the body is not read
        except Exception as error:
            reply = error_reply(error)
        await _send(reply, send, close)

    def _route(self, method: str, path: str) -> tuple[Handler, dict[str, str]]:
        known = False
        for route_method, pattern, handler, private in _ROUTES:
            match = pattern.fullmatch(path)
            if match is None:
                continue
            known = True
            if method == route_method or (method == "HEAD" and route_method == "GET"):
                if private and not self.private:
                    raise Denied(
                        "This call is open to the device's own supervisor only.",
                        "Change what a device serves through its fleet's controller.",
                    )
                return handler, {key: value or "" for key, value in match.groupdict().items()}
        if known:
            raise InvalidInput(f"{method} is not a method of {path[:200]}.")
        raise NotFound(f"There is nothing at {path[:200]}.", "The protocol's paths start at /v2.")

    async def _body(self, headers: dict[bytes, bytes], receive: Receive) -> bytes:
        declared = headers.get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > self.max_body:
            raise self._too_large()
        chunks: list[bytes] = []
        size = 0
        while True:
            message = await receive()
            if message["type"] != "http.request":
                raise _Disconnected
            chunks.append(message.get("body", b""))
            size += len(chunks[-1])
            if size > self.max_body:
                raise self._too_large()
            if not message.get("more_body"):
                break
        body = b"".join(chunks)
        encoding = headers.get(b"content-encoding", b"identity").lower().strip()
        return body if encoding in (b"identity", b"") else self._decompressed(body, encoding)

    def _decompressed(self, body: bytes, encoding: bytes) -> bytes:
        if encoding not in (b"gzip", b"deflate"):
            raise Unsupported(
                f"The content encoding '{encoding.decode('latin-1')[:40]}' is unknown.",
                "Use gzip or deflate.",
            )
        unpacker = zlib.decompressobj(16 + zlib.MAX_WBITS if encoding == b"gzip" else zlib.MAX_WBITS)
        try:
            data = unpacker.decompress(body, self.max_body + 1)
        except zlib.error as error:
            raise InvalidInput(f"The body is not {encoding.decode()}: {error}.") from error
        if len(data) > self.max_body:
            raise self._too_large()
        if not unpacker.eof:
            raise InvalidInput(f"The {encoding.decode()} body is truncated.")
        return data

    def _too_large(self) -> TooLarge:
        return TooLarge(f"The body is larger than {self.max_body} bytes.", "Send fewer items in one request.")


class _Disconnected(Exception):
    """The client left before its request was complete."""


async def _send(reply: Reply, send: Send, close: bool) -> None:
    body = b"".join(reply.body)
    headers = [*reply.headers, (b"content-length", b"%d" % len(body))]
    if close:
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": reply.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _answer(value: Any, status: int = 200) -> Reply:
    return json_reply(json.dumps(value, separators=(",", ":")).encode(), status)


# ---------------------------------------------------------------------------- the protocol


async def _live(app: App, request: Request) -> Reply:
    return json_reply(b"")


async def _ready(app: App, request: Request) -> Reply:
    return json_reply(b"", 200 if app.plane.ready() else 503)


async def _model_ready(app: App, request: Request) -> Reply:
    app.plane.find(request.parts["model"], request.parts["version"])
    return json_reply(b"")


async def _server(app: App, request: Request) -> Reply:
    return _answer(describe.server_metadata())


async def _metadata(app: App, request: Request) -> Reply:
    return _answer(describe.model_metadata(app.plane.find(request.parts["model"], request.parts["version"])))


async def _config(app: App, request: Request) -> Reply:
    return _answer(describe.model_config(app.plane.find(request.parts["model"], request.parts["version"])))


async def _stats(app: App, request: Request) -> Reply:
    name = request.parts.get("model", "")
    if name:
        found = [app.plane.find(name, request.parts["version"])]
    else:
        found = [part for part in app.plane.loaded() if part.role == "primary"]
    return _answer({"model_stats": [describe.statistics(part) for part in found]})


async def _index(app: App, request: Request) -> Reply:
    message = request.json()
    ready_only = isinstance(message, dict) and message.get("ready") is True
    return _answer([row for row in app.plane.index() if not ready_only or row["state"] == "READY"])


async def _infer(app: App, request: Request) -> Reply:
    future: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()

    def reply(value: Reply) -> None:
        if not future.done():
            future.set_result(value)

    infer(
        app.plane,
        request.parts["model"],
        request.parts["version"],
        request.headers.get(HEADER_LENGTH),
        request.body,
        reply,
        request.peer,
    )
    return await future


async def _feedback(app: App, request: Request) -> Reply:
    message = request.json()
    posted = message if isinstance(message, list) else [message]
    if len(posted) > MAX_LABELS:
        raise TooLarge(f"More than {MAX_LABELS} labels came at once.", "Post them in several calls.")
    counts = {"matched": 0, "duplicate": 0, "unmatched": 0}
    for item in posted:
        if not isinstance(item, dict) or "label" not in item or not isinstance(item.get("id"), str):
            raise InvalidInput("Each label is an object with the fields 'id' (a text) and 'label'.")
        counts[app.plane.label(request.parts["model"], item["id"], item["label"])] += 1
    return _answer(counts)


async def _metrics(app: App, request: Request) -> Reply:
    text = metrics.render(app.plane, triton=request.query.get("names") == "triton")
    return Reply(200, ((b"content-type", metrics.CONTENT_TYPE),), [text])


async def _regions(app: App, request: Request) -> Reply:
    return _answer(app.plane.regions.status(request.parts["region"]))


async def _register(app: App, request: Request) -> Reply:
    message = request.json()
    if not isinstance(message, dict):
        raise InvalidInput("The body is no object.")
    key, offset, size = message.get("key"), message.get("offset", 0), message.get("byte_size")
    if not isinstance(key, str) or type(offset) is not int or type(size) is not int:
        raise InvalidInput("A region needs 'key' (a text), 'byte_size' and 'offset' (integers).")
    name = request.parts["region"]
    app.plane.regions.register(name, key, offset, size, request.peer.user())
    return json_reply(b"")


async def _unregister(app: App, request: Request) -> Reply:
    app.plane.regions.unregister(request.parts["region"], request.peer.user())
    return json_reply(b"")


# ---------------------------------------------------------------------------- the supervisor's calls


async def _load(app: App, request: Request) -> Reply:
    parameters = request.parameters()
    store, digest = parameters.get("store"), parameters.get("bundle", "")
    if not isinstance(store, str) or not isinstance(digest, str):
        raise InvalidInput("The parameters 'store' and 'bundle' are missing.")
    settings = PlacementSettings()
    try:
        settings.ParseFromString(base64.b64decode(str(parameters.get("settings", "")), validate=True))
    except (DecodeError, binascii.Error, ValueError) as error:
        raise InvalidInput("The parameter 'settings' is not a PlacementSettings in base64.") from error

    def load() -> None:
        app.plane.load(
            request.parts["model"],
            Path(store),
            digest,
            version=str(parameters.get("version", "1")),
            role=str(parameters.get("role", "primary")),
            settings=settings,
        )

    await asyncio.get_running_loop().run_in_executor(None, load)
    return _answer({})


async def _unload(app: App, request: Request) -> Reply:
    app.plane.unload(request.parts["model"], str(request.parameters().get("role", "primary")))
    return _answer({})


async def _telemetry(app: App, request: Request) -> Reply:
    data = app.plane.telemetry().SerializeToString()
    return Reply(200, ((b"content-type", b"application/x-protobuf"),), [data])


async def _samples(app: App, request: Request) -> Reply:
    message = request.json()
    directory = message.get("directory") if isinstance(message, dict) else None
    if not isinstance(directory, str) or not directory.startswith("/"):
        raise InvalidInput("The field 'directory' is not an absolute path.")
    try:
        written = await asyncio.get_running_loop().run_in_executor(
            None, app.plane.write_samples, Path(directory)
        )
    except OSError as error:
        raise ShoalError(f"Samples cannot be written: {error.strerror}.") from error
    return _answer(written)


_SHARED = r"/v2/systemsharedmemory(?:/region/(?P<region>[^/]+))?"
_MODEL = r"/v2/models/(?P<model>[^/]+)(?:/versions/(?P<version>[^/]+))?"


def _compiled(
    rows: list[tuple[str, str, Handler, bool]],
) -> list[tuple[str, re.Pattern[str], Handler, bool]]:
    return [(method, re.compile(path), handler, private) for method, path, handler, private in rows]


# method, path, handler, private. The first match counts.
_ROUTES = _compiled(
    [
        ("POST", _MODEL + "/infer", _infer, False),
        ("GET", "/v2/health/live", _live, False),
        ("GET", "/v2/health/ready", _ready, False),
        ("GET", "/v2/?", _server, False),
        ("GET", "/v2/models/stats", _stats, False),
        ("GET", _MODEL + "/ready", _model_ready, False),
        ("GET", _MODEL + "/config", _config, False),
        ("GET", _MODEL + "/stats", _stats, False),
        ("POST", _MODEL + "/feedback", _feedback, False),
        ("GET", _MODEL, _metadata, False),
        ("GET", _SHARED + "/status", _regions, False),
        ("POST", _SHARED + "/register", _register, False),
        ("POST", _SHARED + "/unregister", _unregister, False),
        ("POST", "/v2/repository/index", _index, False),
        ("POST", "/v2/repository/models/(?P<model>[^/]+)/load", _load, True),
        ("POST", "/v2/repository/models/(?P<model>[^/]+)/unload", _unload, True),
        ("GET", "/metrics", _metrics, False),
        ("POST", "/shoal/telemetry", _telemetry, True),
        ("POST", "/shoal/samples", _samples, True),
    ]
)
