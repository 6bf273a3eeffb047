"""The protocol's system shared memory extension: tensors of local applications in POSIX shared memory.

A region is read and written through its file descriptor (`pread`, `pwrite`), never mapped: an
application that cuts its region short then gets an error, where a mapping would kill the server with
SIGBUS. The one copy is needed anyway, since sketches and samples outlive the request.

A region belongs to the user who registered it, and its file must be that user's own: else a server
with more rights would read and write other people's memory on request.
"""

from __future__ import annotations

import os
import re
import stat
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from shoal_agent.runtimes.tensors import Array
from shoal_protos.errors import Conflict, Denied, InvalidInput, NotFound, Overloaded, ShoalError

ROOT = Path("/dev/shm")  # noqa: S108 - where POSIX shared memory lies on Linux
MAX_REGIONS = 64
IDLE_S = 60.0  # at the limit, a region unused for so long makes room
MAX_NAME = 128
MAX_SIZE = 1 << 32  # bytes of one region
_KEY = re.compile(r"/?[A-Za-z0-9._+=@:~-]{1,200}\Z")
_BOOL = np.dtype(np.bool_)


@dataclass(frozen=True)
class Span:
    """Where a tensor lies: bytes `offset` to `offset + size` of a region."""

    region: str
    offset: int
    size: int


@dataclass
class _Region:
    name: str
    key: str
    offset: int  # in the shared memory object
    size: int
    user: int
    descriptor: int
    used: float
    lock: threading.Lock = field(default_factory=threading.Lock)

    def close(self) -> None:
        with self.lock:  # never while somebody reads: the number could be another file's by then
            if self.descriptor >= 0:
                os.close(self.descriptor)
                self.descriptor = -1


class Regions:
    """All registered regions of a server. Safe to call from any thread."""

    def __init__(self, root: Path = ROOT, clock: Callable[[], float] = time.monotonic) -> None:
        self._root, self._clock = root, clock
        self._regions: dict[str, _Region] = {}
        self._lock = threading.Lock()

    # ------------------------------------------------------------------------ registry

    def register(self, name: str, key: str, offset: int, size: int, user: int) -> None:
        """Opens a shared memory object under a name.

        Raises:
            InvalidInput: a bad name, key, offset or size, or a size beyond the object's end.
            NotFound: there is no such object. Conflict: the name is taken.
            Denied: the object is another user's. Overloaded: too many regions.
        """
        if not name or len(name) > MAX_NAME or not name.isprintable():
            raise InvalidInput("A region needs a printable name of at most 128 characters.")
        if offset < 0 or not 0 < size <= MAX_SIZE:
            raise InvalidInput(f"The region '{name}' has offset {offset} and size {size}.")
        descriptor = self._open(key, user)
        try:
            with self._lock:
                if os.fstat(descriptor).st_size < offset + size:
                    raise InvalidInput(
                        f"The shared memory '{key}' is smaller than {offset + size} bytes.",
                        "Register no more than it holds.",
                    )
                if name in self._regions:
                    raise Conflict(f"A region '{name}' is registered already.", "Unregister it first.")
                self._make_room()
                self._regions[name] = _Region(name, key, offset, size, user, descriptor, self._clock())
        except BaseException:
            os.close(descriptor)
            raise

    def _open(self, key: str, user: int) -> int:
        if not isinstance(key, str) or not _KEY.match(key) or key.strip("/") in (".", ".."):
            raise InvalidInput(
                f"'{str(key)[:80]}' is no key of shared memory.", "A key is '/' and letters, digits, '._-'."
            )
        flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        try:
            descriptor = os.open(self._root / key.lstrip("/"), flags)
        except FileNotFoundError as error:
            raise NotFound(f"There is no shared memory '{key}' on this device.") from error
        except OSError as error:
            raise Denied(
                f"The shared memory '{key}' cannot be opened: {error.strerror}.", "Send the tensors."
            ) from error
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or (user not in (0, status.st_uid)):
            os.close(descriptor)
            raise Denied(f"The shared memory '{key}' is another user's.", "Make it as the user who asks.")
        return descriptor

    def _make_room(self) -> None:
        if len(self._regions) < MAX_REGIONS:
            return
        oldest = min(self._regions.values(), key=lambda region: region.used)
        if self._clock() - oldest.used < IDLE_S:
            raise Overloaded(f"{MAX_REGIONS} regions are in use already.", "Unregister one.")
        del self._regions[oldest.name]
        oldest.close()

    def unregister(self, name: str, user: int) -> None:
        """Forgets one region, or every one of this user's ("" = all). Unknown names are no error."""
        with self._lock:
            found = [self._regions[name]] if name in self._regions else []
            if not name:
                found = [region for region in self._regions.values() if user in (0, region.user)]
            elif found and user not in (0, found[0].user):
                raise Denied(f"The region '{name}' is another user's.")
            for region in found:
                del self._regions[region.name]
        for region in found:
            region.close()

    def status(self, name: str = "") -> list[dict[str, Any]]:
        """Name, key, offset and byte size of one region, or of all. Raises NotFound."""
        with self._lock:
            found = [self._find(name)] if name else list(self._regions.values())
        return [
            {"name": region.name, "key": region.key, "offset": region.offset, "byte_size": region.size}
            for region in found
        ]

    def close(self) -> None:
        self.unregister("", 0)

    def __len__(self) -> int:
        return len(self._regions)

    def _find(self, name: str) -> _Region:
        region = self._regions.get(name)
        if region is None:
            raise NotFound(
                f"There is no shared memory region '{name[:MAX_NAME]}'.", "Register it, or send the tensor."
            )
        return region

    # ------------------------------------------------------------------------ tensors

    def read(self, span: Span, dtype: np.dtype[Any], shape: tuple[int, ...], user: int) -> Array:
        """A copy of a tensor. Raises NotFound, Denied or InvalidInput."""
        region = self._checked(span, user)
        array: Array = np.empty(shape, np.uint8 if dtype == _BOOL else dtype)
        if array.nbytes != span.size:
            raise InvalidInput(f"The tensor has {array.nbytes} bytes, the region's part {span.size}.")
        view = array.reshape(-1).data.cast("B")
        done = 0
        with region.lock:
            while done < span.size:
                count = self._io(region, os.preadv, [view[done:]], region.offset + span.offset + done)
                if not count:
                    raise InvalidInput(
                        f"The shared memory of region '{region.name}' has shrunk.", "Register it again."
                    )
                done += count
        return array != 0 if dtype == _BOOL else array

    def write(self, span: Span, array: Array, user: int) -> None:
        """Copies a tensor out. Raises NotFound, Denied or InvalidInput."""
        region = self._checked(span, user)
        if array.nbytes > span.size:
            raise InvalidInput(
                f"The output has {array.nbytes} bytes, its part of region '{region.name}' {span.size}.",
                "Give it more room.",
            )
        view = np.ascontiguousarray(array).reshape(-1).data.cast("B")
        start = region.offset + span.offset
        done = 0
        with region.lock:
            if self._size(region) < start + array.nbytes:  # writing would make it larger again
                raise InvalidInput(
                    f"The shared memory of region '{region.name}' has shrunk.", "Register it again."
                )
            while done < array.nbytes:
                done += self._io(region, os.pwritev, [view[done:]], start + done)

    def _checked(self, span: Span, user: int) -> _Region:
        region = self._find(span.region)
        if user not in (0, region.user):
            raise Denied(f"The region '{region.name}' is another user's.")
        if span.offset < 0 or span.size < 0 or span.offset + span.size > region.size:
            raise InvalidInput(
                f"Bytes {span.offset} to {span.offset + span.size} are outside of region '{region.name}' "
                f"({region.size} bytes)."
            )
        region.used = self._clock()
        return region

    @staticmethod
    def _size(region: _Region) -> int:
        return os.fstat(region.descriptor).st_size if region.descriptor >= 0 else 0

    @staticmethod
    def _io(region: _Region, call: Callable[[int, list[memoryview], int], int], *rest: Any) -> int:
        if region.descriptor < 0:
            raise NotFound(f"The region '{region.name}' was unregistered meanwhile.")
        try:
            return call(region.descriptor, *rest)
        except OSError as error:
            raise ShoalError(f"Region '{region.name}' cannot be used: {error.strerror}.") from error


# ---------------------------------------------------------------------------- in requests


def span_of(parameters: Mapping[str, Any]) -> Span | None:
    """The part of a region that a tensor's parameters name, if they do. Raises InvalidInput."""
    region = parameters.get("shared_memory_region")
    if region is None:
        return None
    size, offset = parameters.get("shared_memory_byte_size"), parameters.get("shared_memory_offset", 0)
    if not isinstance(region, str) or type(size) is not int or type(offset) is not int:
        raise InvalidInput(
            "A tensor in shared memory needs 'shared_memory_region', 'shared_memory_byte_size' and, "
            "if it is not 0, 'shared_memory_offset'."
        )
    if size < 0 or offset < 0:
        raise InvalidInput("'shared_memory_byte_size' and 'shared_memory_offset' cannot be negative.")
    return Span(region, offset, size)


def described(span: Span) -> dict[str, Any]:
    """A span as the protocol's parameters."""
    found: dict[str, Any] = {
        "shared_memory_region": span.region,
        "shared_memory_byte_size": span.size,
    }
    if span.offset:
        found["shared_memory_offset"] = span.offset
    return found
