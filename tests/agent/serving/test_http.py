from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from shoal_agent.serving.asgi import App
from shoal_agent.serving.dataplane import DataPlane
from shoal_agent.serving.http import InferProtocol, Listener, listen_tcp, listen_unix
from shoal_protos.bundle import Bundle
from shoal_protos.errors import Conflict, InvalidInput
from tests.agent import bundles
from tests.agent.serving.fakes import Gated
from tests.agent.serving.raw import Connection, connect, infer_body, outputs, request


class TestFastPathAndAsgi:
    """Both ways to the same handler must give the same bytes."""

    @pytest.mark.parametrize(
        "case",
        [
            "binary",
            "with id",
            "batch",
            "json",
            "unknown model",
            "wrong version",
            "bad shape",
            "bad json",
            "close",
        ],
    )
    async def test_answers_are_equal_byte_for_byte(self, listener: Listener, case: str) -> None:
        batch = bundles.images(3 if case == "batch" else 1)
        body, size = infer_body(batch, "r-1" if case == "with id" else "")
        header_length: int | None = size
        options: dict[str, Any] = {}
        if case == "json":
            tensor = {"name": "image", "datatype": "UINT8", "shape": [1, 8, 8, 1], "data": batch.tolist()}
            body, header_length = json.dumps({"inputs": [tensor]}).encode(), None
        elif case == "unknown model":
            options["model"] = "nobody"
        elif case == "wrong version":
            options["target"] = "/v2/models/digits/versions/9/infer"
        elif case == "bad shape":
            body, header_length = infer_body(batch[:, :7])
        elif case == "bad json":
            body, header_length = b"{" * 40, None
        elif case == "close":
            options["extra"] = "Connection: close\r\n"
        fast, asgi = await connect(listener.port), await connect(listener.port)
        (status, *_, one), (*_, two) = (
            await fast.exchange(request(body, header_length, **options)),
            await asgi.exchange(request(body, header_length, chunked=True, **options)),
        )
        assert one == two
        assert status == {"unknown model": 404, "wrong version": 404, "bad shape": 400, "bad json": 400}.get(
            case, 200
        )

    async def test_plain_requests_take_the_fast_path(
        self, listener: Listener, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        taken: list[str] = []
        real = InferProtocol._write

        def counted(self: InferProtocol, *rest: Any) -> None:
            taken.append("fast")
            real(self, *rest)

        monkeypatch.setattr(InferProtocol, "_write", counted)
        connection = await connect(listener.port)
        body, size = infer_body(bundles.images(1))
        await connection.exchange(request(body, size))
        assert len(taken) == 1
        for options in ({"chunked": True}, {"extra": "Content-Encoding: identity\r\n"}):
            status, *_ = await connection.exchange(request(body, size, **options))  # type: ignore[arg-type]
            assert status == 200
        assert len(taken) == 1
        await connection.exchange(request(body, size))  # and back again on the same connection
        assert len(taken) == 2

    async def test_expect_continue(self, listener: Listener) -> None:
        connection = await connect(listener.port)
        batch = bundles.images(2)
        body, size = infer_body(batch)
        head, _, rest = request(body, size, extra="Expect: 100-continue\r\n").partition(b"\r\n\r\n")
        await connection.send(head + b"\r\n\r\n")
        assert await connection.reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        status, headers, answer, _ = await connection.exchange(rest)
        assert status == 200
        np.testing.assert_allclose(outputs(headers, answer), bundles.expected(batch), atol=1e-4)

    @pytest.mark.parametrize("encoding", ["gzip", "deflate"])
    async def test_compressed_bodies(self, listener: Listener, encoding: str) -> None:
        connection = await connect(listener.port)
        batch = bundles.images(2)
        body, size = infer_body(batch)
        packed = gzip.compress(body) if encoding == "gzip" else zlib.compress(body)
        extra = f"Content-Encoding: {encoding}\r\n"
        status, headers, answer, _ = await connection.exchange(request(packed, size, extra=extra))
        assert status == 200
        np.testing.assert_allclose(outputs(headers, answer), bundles.expected(batch), atol=1e-4)
        for broken in (packed[:-9], b"not compressed"):
            status, *_ = await connection.exchange(request(broken, size, extra=extra))
            assert status == 400
        bomb = gzip.compress(b"\0" * (8 << 20)) if encoding == "gzip" else zlib.compress(b"\0" * (8 << 20))
        status, *_ = await connection.exchange(request(bomb, size, extra=extra))
        assert status == 413

    async def test_an_unknown_encoding_is_refused(self, listener: Listener) -> None:
        connection = await connect(listener.port)
        status, _, answer, _ = await connection.exchange(
            request(b"x", None, extra="Content-Encoding: br\r\n")
        )
        assert status == 501
        assert "gzip or deflate" in json.loads(answer)["error"]

    @pytest.mark.parametrize("model", ["digits", "vector", "slow"])
    async def test_pipelined_requests_are_answered_in_order(
        self, plane: DataPlane, listener: Listener, vector: Bundle, slow: Bundle, model: str
    ) -> None:
        loop = asyncio.get_running_loop()
        for bundle in (vector, slow):
            name = bundle.config.lineage.model
            await loop.run_in_executor(None, plane.load, name, bundle.path, bundle.digest)
        random = np.random.default_rng(0)
        batch = bundles.images(1) if model == "digits" else random.normal(size=(1, 64)).astype(np.float32)
        tensor = "image" if model == "digits" else "x"
        messages = []
        for number in range(12):
            body, size = infer_body(batch, f"p-{number}", tensor)
            messages.append(request(body, size, model, chunked=number % 5 == 3))
            if number % 4 == 2:
                messages.append(b"GET /v2/health/live HTTP/1.1\r\nHost: t\r\n\r\n")
        connection = await connect(listener.port)
        await connection.send(b"".join(messages))
        seen = []
        for _ in messages:
            status, headers, answer, _ = await connection.read()
            assert status == 200
            if answer:
                size = int(headers["inference-header-content-length"])
                seen.append(json.loads(answer[:size])["id"])
        assert seen == [f"p-{number}" for number in range(12)]


class TestRefusals:
    @pytest.mark.parametrize(
        ("change", "status", "words"),
        [
            ({"name": "picture"}, 400, ["no input 'picture'", "image"]),
            ({"shape": [1, 9, 8, 1]}, 400, ["[1, 9, 8, 1]", "[-1, 8, 8, 1]"]),
            ({"shape": [0, 8, 8, 1]}, 400, ["shape"]),
            ({"shape": [-1, 8, 8, 1]}, 400, ["shape"]),
            ({"shape": "8x8"}, 400, ["not a list of integers"]),
            ({"shape": [1 << 62, 8, 8, 1]}, 400, []),
            ({"datatype": "FP32"}, 400, ["FP32", "UINT8"]),
            ({"datatype": 7}, 400, ["not a text"]),
            ({"parameters": {"binary_data_size": 63}}, 400, ["63 bytes", "64 bytes"]),
            ({"parameters": {"binary_data_size": "64"}}, 400, ["'64'"]),
            ({"parameters": {}}, 400, ["neither 'data' nor"]),
            ({"parameters": [1]}, 400, ["not an object"]),
            ({"parameters": {"shared_memory_region": "r"}}, 400, ["shared_memory_byte_size"]),
        ],
    )
    async def test_a_tensor_that_does_not_fit_is_named(
        self, listener: Listener, change: dict[str, Any], status: int, words: list[str]
    ) -> None:
        tensor = {
            "name": "image",
            "datatype": "UINT8",
            "shape": [1, 8, 8, 1],
            "parameters": {"binary_data_size": 64},
            **change,
        }
        text = json.dumps({"inputs": [tensor]}).encode()
        connection = await connect(listener.port)
        found, _, answer, _ = await connection.exchange(request(text + b"\1" * 64, len(text)))
        assert found == status
        for word in words:
            assert word in json.loads(answer)["error"]
        assert (await connection.exchange(_good()))[0] == 200  # the connection lives on

    @pytest.mark.parametrize(
        ("message", "words"),
        [
            ("[]", "not a JSON object"),
            ("{}", "no list 'inputs'"),
            ('{"inputs": [3]}', "no list 'inputs'"),
            ('{"inputs": []}', "Input 'image' is missing"),
            ('{"id": 3, "inputs": []}', "not a text"),
            ('{"id": "a", "id": "b", "inputs": []}', "two ids"),
            ('{"inputs": [T, T]}', "given twice"),
            ('{"inputs": [T], "outputs": [{"name": "mood"}]}', "no output 'mood'"),
            (
                '{"inputs": [T], "outputs": [{"name": "logits", "parameters": {"classification": -1}}]}',
                "classes",
            ),
            ('{"inputs": [T], "outputs": 4}', "not a list of objects"),
            ("not json", "not JSON"),
            ("[" * 5000, "not JSON"),
        ],
    )
    async def test_a_header_that_does_not_fit_is_refused(
        self, listener: Listener, message: str, words: str
    ) -> None:
        tensor = json.dumps({"name": "image", "datatype": "UINT8", "shape": [1, 8, 8, 1], "data": [1] * 64})
        connection = await connect(listener.port)
        status, _, answer, _ = await connection.exchange(request(message.replace("T", tensor).encode(), None))
        assert (status, words in json.loads(answer)["error"]) == (400, True), answer

    @pytest.mark.parametrize(
        ("data", "words"),
        [
            ([1] * 63, "63 values"),
            ([1] * 63 + ["a"], "numbers"),
            ([1] * 63 + [300], "outside of UINT8"),
            ([1] * 63 + [-1], "outside of UINT8"),
            ([1] * 63 + [1.5], "not integers"),
            ([[1] * 32, [1] * 31], "Input 'image'|data of input"),
            ([1] * 63 + [None], "numbers"),
        ],
    )
    async def test_json_values_that_do_not_fit_are_refused(
        self, listener: Listener, data: list[Any], words: str
    ) -> None:
        tensor = {"name": "image", "datatype": "UINT8", "shape": [1, 8, 8, 1], "data": data}
        connection = await connect(listener.port)
        status, _, answer, _ = await connection.exchange(
            request(json.dumps({"inputs": [tensor]}).encode(), None)
        )
        assert status == 400
        assert any(word in json.loads(answer)["error"] for word in words.split("|"))

    async def test_header_lengths_that_lie_are_refused(self, listener: Listener) -> None:
        body, size = infer_body(bundles.images(1))
        connection = await connect(listener.port)
        for length in (len(body) + 1, size - 1, size + 1):
            assert (await connection.exchange(request(body, length)))[0] == 400
        status, *_ = await connection.exchange(
            request(body, None, extra="Inference-Header-Content-Length: -4\r\n")
        )
        assert status == 400

    async def test_a_body_beyond_the_limit_is_refused_and_not_read(self, listener: Listener) -> None:
        connection = await connect(listener.port)
        head = b"POST /v2/models/digits/infer HTTP/1.1\r\nHost: t\r\nContent-Length: 999999999\r\n\r\n"
        status, headers, answer, _ = await connection.exchange(head)
        assert status == 413
        assert headers["connection"] == "close"
        assert "1048576" in json.loads(answer)["error"]
        assert await connection.reader.read() == b""

    async def test_an_endless_chunked_body_is_cut(self, listener: Listener) -> None:
        connection = await connect(listener.port)
        await connection.send(
            b"POST /v2/models/digits/infer HTTP/1.1\r\nHost: t\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        chunk = b"10000\r\n" + b"x" * 65536 + b"\r\n"
        with contextlib.suppress(ConnectionError):
            for _ in range(40):
                await connection.send(chunk)
            assert (await connection.read())[0] == 413
        with contextlib.suppress(ConnectionError):
            assert await connection.reader.read() == b""  # ended by the server

    async def test_bytes_that_are_no_http_end_the_connection(self, listener: Listener) -> None:
        connection = await connect(listener.port)
        await connection.send(b"\x16\x03\x01 no http\r\n\r\n")
        assert (await connection.reader.read()).startswith(b"HTTP/1.1 400")
        other = await connect(listener.port)
        assert (await other.exchange(_good()))[0] == 200

    @pytest.mark.parametrize(
        ("method", "target", "status"),
        [
            ("POST", "/v2/repository/models/digits/load", 403),
            ("POST", "/v2/repository/models/digits/unload", 403),
            ("POST", "/shoal/telemetry", 403),
            ("POST", "/shoal/samples", 403),
            ("GET", "/etc/passwd", 404),
            ("GET", "/v2/models/none", 404),
            ("DELETE", "/v2/models/digits", 400),
            ("GET", "/v2/cudasharedmemory/status", 404),
        ],
    )
    async def test_what_is_not_open_to_the_public(
        self, listener: Listener, method: str, target: str, status: int
    ) -> None:
        connection = await connect(listener.port)
        message = f"{method} {target} HTTP/1.1\r\nHost: t\r\nContent-Length: 0\r\n\r\n"
        found, _, answer, _ = await connection.exchange(message.encode())
        assert found == status
        assert json.loads(answer)["error"]


class TestConnections:
    async def test_a_client_that_leaves_takes_nobody_with_it(
        self, plane: DataPlane, listener: Listener, vector: Bundle
    ) -> None:
        await asyncio.get_running_loop().run_in_executor(
            None, plane.load, "vector", vector.path, vector.digest
        )
        batch = np.ones((1, 64), np.float32)
        body, size = infer_body(batch, name="x")
        connections = [await connect(listener.port) for _ in range(8)]
        for number, connection in enumerate(connections):
            connection.writer.write(request(body, size, "vector"))
            if number % 2:
                connection.writer.transport.abort()
        for connection in connections[::2]:
            assert (await connection.read())[0] == 200

    async def test_a_closing_listener_answers_what_runs(
        self, plane: DataPlane, slow: Bundle, digits: Bundle
    ) -> None:
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(None, plane.load, "slow", slow.path, slow.digest)
        gate = Gated(plane.find("slow").instance)
        plane.find("slow").lane._instance = gate
        server = await listen_tcp(App(plane), "127.0.0.1", 0)
        busy, idle = await connect(server.port), await connect(server.port)
        body, size = infer_body(np.ones((1, 64), np.float32), name="x")
        await busy.send(request(body, size, "slow"))
        await loop.run_in_executor(None, gate.entered.wait)
        closing = asyncio.ensure_future(server.close(10))
        assert await idle.reader.read() == b""
        gate.gate.set()
        status, headers, *_ = await busy.read()
        assert status == 200
        assert headers["connection"] == "close"
        await closing

    async def test_a_full_queue_refuses_with_retry_after(
        self, plane: DataPlane, listener: Listener, slow: Bundle
    ) -> None:
        await asyncio.get_running_loop().run_in_executor(None, plane.load, "slow", slow.path, slow.digest)
        gate = Gated(plane.find("slow").instance)
        plane.find("slow").lane._instance = gate
        body, size = infer_body(np.ones((1, 64), np.float32), name="x")
        connections: list[Connection] = [await connect(listener.port) for _ in range(24)]
        for connection in connections:
            connection.writer.write(request(body, size, "slow"))
        refusals = [asyncio.ensure_future(connection.read()) for connection in connections]
        await asyncio.wait(refusals, return_when=asyncio.FIRST_COMPLETED)
        gate.gate.set()
        answers = [await refusal for refusal in refusals]
        refused = [answer for answer in answers if answer[0] == 503]
        assert refused  # the fixture's queue holds 8
        assert all(headers["retry-after"] == "1" for _, headers, *_ in refused)
        assert sum(status == 200 for status, *_ in answers) + len(refused) == 24
        window = next(p for p in plane.telemetry().placements if p.endpoint == "slow")
        assert window.errors_by_reason["overloaded"] == len(refused)

    async def test_a_port_in_use_is_a_clear_error(self, plane: DataPlane, listener: Listener) -> None:
        with pytest.raises(Conflict, match=f"Port {listener.port} on 127.0.0.1 is in use"):
            await listen_tcp(App(plane), "127.0.0.1", listener.port)

    async def test_a_dead_unix_socket_is_replaced_and_a_long_path_refused(
        self, plane: DataPlane, tmp_path: Path
    ) -> None:
        path = tmp_path / "a.sock"
        first = await listen_unix(App(plane), path, 0o600)
        assert path.stat().st_mode & 0o777 == 0o600
        await first.close(0)
        path.touch()
        second = await listen_unix(App(plane), path, 0o660)
        reader, writer = await asyncio.open_unix_connection(str(path))
        writer.write(b"GET /v2/health/live HTTP/1.1\r\nHost: t\r\n\r\n")
        assert (await reader.readline()) == b"HTTP/1.1 200 OK\r\n"
        writer.close()
        await second.close(0)
        with pytest.raises(InvalidInput, match="shorter --state"):
            await listen_unix(App(plane), tmp_path / ("x" * 120), 0o600)


def _good() -> bytes:
    return request(*infer_body(bundles.images(1)))


def test_uvicorn_still_has_what_the_fast_path_uses() -> None:
    for name in ("on_headers_complete", "on_body", "on_message_complete", "on_response_complete", "shutdown"):
        assert callable(getattr(HttpToolsProtocol, name))
