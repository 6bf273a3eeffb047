"""Implementations of the agent's small interfaces for tests: a clock to turn, links and servers in memory."""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import AsyncIterator
from pathlib import Path

from shoal_agent.fs import RealFs
from shoal_agent.link.base import Part
from shoal_agent.update.machine import Wanted
from shoal_protos.bundle import BundleConfig, RuntimeNeed, Signature, TensorSpec, write_bundle
from shoal_protos.errors import NotFound, ShoalError, Unavailable
from shoal_protos.v1 import agents_pb2


class FakeClock:
    """Time that passes only when the test says so, or by itself while everybody sleeps (`auto`)."""

    def __init__(self, wall_ms: int = 1_790_000_000_000, *, auto: bool = True) -> None:
        self.wall = wall_ms
        self.monotonic = 1_000_000_000
        self._auto = auto
        self._sleepers: list[tuple[int, int, asyncio.Future[None]]] = []
        self._count = 0

    def wall_ms(self) -> int:
        return self.wall

    def monotonic_ns(self) -> int:
        return self.monotonic

    def advance(self, seconds: float) -> None:
        self.monotonic += int(seconds * 1e9)
        self.wall += int(seconds * 1000)
        while self._sleepers and self._sleepers[0][0] <= self.monotonic:
            future = heapq.heappop(self._sleepers)[2]
            if not future.done():
                future.set_result(None)

    async def sleep(self, seconds: float) -> None:
        if self._auto:
            self.advance(seconds)
            await asyncio.sleep(0)
            return
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._count += 1
        heapq.heappush(self._sleepers, (self.monotonic + int(seconds * 1e9), self._count, future))
        await future


class MemorySource:
    """A `Source` over a directory's or a dict's blobs."""

    def __init__(self, blobs: dict[str, bytes] | None = None, chunk: int = 1000) -> None:
        self.blobs = dict(blobs or {})
        self.chunk = chunk
        self.fetches: list[tuple[str, int]] = []
        self.offline = False
        self.cut_after: int | None = None  # chunks until one transfer breaks off

    def add(self, layout: Path) -> None:
        for path in (layout / "blobs" / "sha256").iterdir():
            self.blobs[f"sha256:{path.name}"] = path.read_bytes()

    async def fetch(self, digest: str, offset: int = 0, length: int = 0) -> AsyncIterator[Part]:
        if self.offline:
            raise Unavailable("offline")
        if digest not in self.blobs:
            raise NotFound(f"no blob {digest}")
        self.fetches.append((digest, offset))
        data = self.blobs[digest]
        end = offset + length if length else len(data)
        for start in range(offset, end, self.chunk):
            if self.cut_after is not None:
                self.cut_after -= 1
                if self.cut_after < 0:
                    self.cut_after = None
                    raise Unavailable("cut off")
            yield Part(start, data[start : min(start + self.chunk, end)], len(data))
            await asyncio.sleep(0)


class FakeServer:
    """An `executor.Server` that remembers what is loaded."""

    def __init__(self) -> None:
        self.loaded: dict[tuple[str, int], str] = {}
        self.up = True
        self.refuses: dict[str, ShoalError] = {}  # bundle -> error of load
        self.loads: list[str] = []

    async def load(self, endpoint: str, role: int, wanted: Wanted) -> None:
        await asyncio.sleep(0)
        if not self.up:
            raise Unavailable("the server is down")
        self.loads.append(wanted.bundle)
        if wanted.bundle in self.refuses:
            raise self.refuses[wanted.bundle]
        self.loaded[endpoint, role] = wanted.bundle

    async def unload(self, endpoint: str, role: int) -> None:
        await asyncio.sleep(0)
        if not self.up:
            raise Unavailable("the server is down")
        self.loaded.pop((endpoint, role), None)


class FakeProber:
    def __init__(self) -> None:
        self.refuses: dict[str, str] = {}
        self.probed: list[str] = []

    async def probe(self, wanted: Wanted) -> tuple[agents_pb2.ProbeReport, str]:
        await asyncio.sleep(0)
        self.probed.append(wanted.bundle)
        reason = self.refuses.get(wanted.bundle, "")
        return agents_pb2.ProbeReport(ok=not reason, latency_p95_ms=1.0), reason


class FullFs(RealFs):
    """A disk that is full when told so."""

    def __init__(self) -> None:
        self.free: int | None = None
        self.broken: OSError | None = None

    def free_bytes(self, path: Path) -> int:
        return super().free_bytes(path) if self.free is None else self.free

    def append(self, path: Path, data: bytes) -> None:
        if self.broken is not None:
            raise self.broken
        super().append(path, data)

    def write(self, path: Path, data: bytes) -> None:
        if self.broken is not None:
            raise self.broken
        super().write(path, data)


def make_bundle(
    layout: Path, content: bytes = b"model", name: str = "b", runtime: str = "onnxruntime"
) -> str:
    """A small bundle (not one that a runtime would load); returns its digest."""
    signature = Signature(
        inputs=(TensorSpec("x", "FP32", (-1, 4)),), outputs=(TensorSpec("y", "FP32", (-1, 2)),)
    )
    config = BundleConfig(signature, RuntimeNeed(runtime, "model.bin"), name=name)
    return write_bundle(layout, config, {"model.bin": content})
