"""Raw HTTP for tests: requests as bytes, answers read whole."""

from __future__ import annotations

import asyncio
import contextlib
import json
from typing import Any

from tests.agent import bundles

Array = bundles.Array


def infer_body(batch: Array, request_id: str = "", name: str = "image", **header: Any) -> tuple[bytes, int]:
    """(body, header length) of a binary request."""
    message: dict[str, Any] = {"id": request_id} if request_id else {}
    message["inputs"] = [
        {
            "name": name,
            "datatype": "UINT8" if batch.dtype == "uint8" else "FP32",
            "shape": list(batch.shape),
            "parameters": {"binary_data_size": batch.nbytes},
        }
    ]
    message["parameters"] = {"binary_data_output": True}
    message.update(header)
    text = json.dumps(message).encode()
    return text + batch.tobytes(), len(text)


def request(
    body: bytes,
    header_length: int | None,
    model: str = "digits",
    extra: str = "",
    chunked: bool = False,
    target: str = "",
) -> bytes:
    head = f"POST {target or f'/v2/models/{model}/infer'} HTTP/1.1\r\nHost: test\r\n{extra}"
    if header_length is not None:
        head += f"Inference-Header-Content-Length: {header_length}\r\n"
    if chunked:
        half = len(body) // 2
        parts = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (body[:half], body[half:]))
        return f"{head}Transfer-Encoding: chunked\r\n\r\n".encode() + parts + b"0\r\n\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


class Connection:
    """One kept connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def read(self) -> tuple[int, dict[str, str], bytes, bytes]:
        """(status, headers, body, the whole answer as it came)."""
        head = await asyncio.wait_for(self.reader.readuntil(b"\r\n\r\n"), 30)
        lines = head.decode().split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in lines[1:] if line)
        body = await self.reader.readexactly(int(headers.get("content-length", 0)))
        return int(lines[0].split()[1]), headers, body, head + body

    async def exchange(self, data: bytes) -> tuple[int, dict[str, str], bytes, bytes]:
        await self.send(data)
        return await self.read()


_open: list[Connection] = []


async def connect(port: int) -> Connection:
    connection = Connection(*await asyncio.open_connection("127.0.0.1", port, limit=1 << 24))
    _open.append(connection)
    return connection


async def close_all() -> None:
    """Ends every connection that a test opened."""
    while _open:
        connection = _open.pop()
        connection.writer.transport.abort()
        with contextlib.suppress(OSError):
            await connection.writer.wait_closed()


def outputs(headers: dict[str, str], body: bytes, name: str = "logits") -> Array:
    """One FP32 output of a binary answer."""
    import numpy as np

    size = int(headers["inference-header-content-length"])
    offset = size
    for tensor in json.loads(body[:size])["outputs"]:
        length = tensor["parameters"]["binary_data_size"]
        if tensor["name"] == name:
            return np.frombuffer(body, np.float32, length // 4, offset).reshape(tensor["shape"])
        offset += length
    raise AssertionError(name)
