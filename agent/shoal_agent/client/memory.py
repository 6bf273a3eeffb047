"""Large tensors to and from a server on the same machine: system shared memory, or not at all.

The client uses one region for what it sends and one part of it for what it gets. The file's name is
gone as soon as both sides have it open, so nothing is left behind by a program that is killed.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from shoal_agent.client.transport import Transport, random_text
from shoal_agent.runtimes.tensors import Array
from shoal_protos.errors import ShoalError

ROOT = Path("/dev/shm")  # noqa: S108 - where POSIX shared memory lies on Linux
# Bytes of tensors. CPU time of a request through shared memory over one through the socket, both sides,
# against a model that does nothing: 8 kB 1.13, 32 kB 1.09, 64 kB 1.00, 128 kB 0.95, 225 kB 0.88,
# 512 kB 0.74, 1 MB 0.23 (x86-64, Linux 6.18, loopback TCP; median of 12 interleaved rounds).
THRESHOLD = 64 << 10
_ALIGN = 64
_SMALLEST = 1 << 20


class Area:
    """The client's region at one server. Every method is called under the transport's lock."""

    def __init__(self, transport: Transport, root: Path = ROOT) -> None:
        self._transport, self._root = transport, root
        self._map: mmap.mmap | None = None
        self.name = ""
        self.refused = False  # the server offers no shared memory, or not to this program

    def ready(self, size: int) -> bool:
        """Whether `size` bytes lie ready and registered; False once the server has refused."""
        if self._map is not None and len(self._map) >= size:
            return True
        if self.refused or not self._transport.is_local():
            return False
        self.forget()
        try:
            self._create(max(_SMALLEST, 1 << (size - 1).bit_length()))
        except (OSError, ValueError, ShoalError):
            self.forget()
            self.refused = True
        return self._map is not None

    def _create(self, size: int) -> None:
        key = f"shoal-{random_text()}"
        path = self._root / key
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(descriptor, 0, size)  # a full /dev/shm fails here, not as SIGBUS later
            mapped = mmap.mmap(descriptor, size)
            body = f'{{"key":"/{key}","offset":0,"byte_size":{size}}}'.encode()
            try:
                self._transport.call("POST", _target(key, "register"), body, _JSON)
            except BaseException:
                mapped.close()
                raise
            self._map, self.name = mapped, key
        finally:
            os.close(descriptor)
            with contextlib.suppress(OSError):
                path.unlink()

    def view(self, offset: int, dtype: np.dtype[Any], shape: Sequence[int]) -> Array:
        assert self._map is not None
        count = int(np.prod(shape, dtype=np.int64))
        view: Array = np.frombuffer(self._map, dtype, count, offset).reshape(shape)
        return view

    def forget(self) -> None:
        """Gives the memory back; the server's registration is gone, or goes with its own time."""
        if self._map is not None:
            with contextlib.suppress(BufferError):  # a view is still alive: freed with it
                self._map.close()
            self._map, self.name = None, ""

    def close(self) -> None:
        if self._map is not None:
            with contextlib.suppress(ShoalError):
                self._transport.call("POST", _target(self.name, "unregister"), b"{}", _JSON)
        self.forget()


_JSON = {"Content-Type": "application/json"}


def _target(name: str, verb: str) -> str:
    return f"/v2/systemsharedmemory/region/{quote(name, safe='')}/{verb}"


def aligned(offset: int) -> int:
    return -(-offset // _ALIGN) * _ALIGN
