"""Uploads that survive a dropped line: bytes are appended to a file named by the digest of the whole.

What is here is always a start of the whole, so anybody who sends the same bytes goes on where the last
one stopped, in another process or after a restart. At the end the whole is hashed; what does not match
its name is dropped. Two who send one digest at once cannot harm each other: each piece is written under
a lock and only where the file ends, and whoever lost is told where to go on.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from shoal_agent.fs import RealFs
from shoal_controller.blobs import BlobStore
from shoal_protos.bundle import blob_path, check_digest
from shoal_protos.errors import Conflict, InvalidInput, Overloaded, TamperedData

ROOM = "uploads"  # below the blob store's `partial`: its daily sweep removes what was left there
ABANDONED_SECONDS = 86400.0
MAX_UNFINISHED = 32
RESERVE_BYTES = 256 << 20  # what stays free for the database and the devices' blobs
CHUNK = 1 << 20


@dataclass(frozen=True)
class Progress:
    """How much of an upload is here. `complete` = the blob exists and its digest was right."""

    received: int
    complete: bool


class Uploads:
    """The unfinished uploads of one blob store.

    Args:
        limit: the largest whole in bytes.
        reserve: bytes of the disk that uploads leave alone.
    """

    def __init__(self, blobs: BlobStore, limit: int, *, reserve: int = RESERVE_BYTES) -> None:
        self._blobs = blobs
        self._limit = limit
        self._reserve = reserve

    @property
    def room(self) -> Path:
        return self._blobs.root / "partial" / ROOM

    def path(self, digest: str) -> Path:
        """The file of an unfinished upload. Raises InvalidInput for what is no digest."""
        return self.room / check_digest(digest).removeprefix("sha256:")

    def progress(self, digest: str) -> Progress:
        """How much is here; nothing for a digest that nobody began."""
        path = self.path(digest)
        if self._blobs.exists(digest):
            return Progress(blob_path(self._blobs.root, digest).stat().st_size, True)
        with contextlib.suppress(FileNotFoundError):
            return Progress(path.stat().st_size, False)
        return Progress(0, False)

    def begin(self, digest: str, offset: int, size: int) -> Progress:
        """Checks that a writer may go on at `offset` of a whole of `size` bytes.

        Raises:
            InvalidInput: the sizes make no sense, or the whole is larger than the limit.
            Conflict: the upload stands at another byte.
            Overloaded: no room on the disk, or too many unfinished uploads.
        """
        if size < 0 or not 0 <= offset <= size:
            raise InvalidInput(f"Byte {offset} is not inside an upload of {size} bytes.")
        if size > self._limit:
            raise InvalidInput(
                f"The push has {size} bytes, larger than {self._limit} bytes.",
                "Leave out files that the task does not need, or raise max_upload_bytes.",
            )
        found = self.progress(digest)
        if found.complete:
            return found
        _check_offset(found.received, offset)
        self.room.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not found.received:
            self.sweep()
            if sum(1 for _ in self.room.iterdir()) >= MAX_UNFINISHED:
                raise Overloaded(
                    f"{MAX_UNFINISHED} uploads are unfinished.",
                    "They are removed after a day; try again then.",
                )
        free = shutil.disk_usage(self.room).free
        # Twice: the whole, then what its ingest unpacks and stores.
        if free - self._reserve < (size - found.received) + size:
            raise Overloaded(
                f"The controller's disk has {free >> 20} MiB left, too few for a push of {size >> 20} MiB.",
                "Free space in its data directory, then run the same command: it goes on where it stopped.",
            )
        return found

    def append(self, digest: str, offset: int, data: bytes, size: int) -> int:
        """Writes one piece where the upload stands; returns the bytes received.

        Raises:
            Conflict: another writer was faster.
            InvalidInput: it would grow past `size` bytes.
            Overloaded: the disk is full.
        """
        if offset + len(data) > size:
            raise InvalidInput(f"The upload is longer than the {size} bytes it announced.")
        with self._locked(digest) as stream:
            _check_offset(stream.seek(0, os.SEEK_END), offset)
            try:
                stream.write(data)
                stream.flush()
            except OSError as error:
                stream.truncate(offset)
                raise Overloaded(
                    f"The controller cannot store the upload: {error.strerror}.",
                    "Free space in its data directory, then run the same command.",
                ) from error
        return offset + len(data)

    def sync(self, digest: str) -> None:
        """Makes what was appended survive a power cut."""
        with contextlib.suppress(FileNotFoundError), self.path(digest).open("rb") as stream:
            os.fsync(stream.fileno())

    def finish(self, digest: str, size: int) -> None:
        """Hashes the whole and makes it a blob on disk. Nothing to do when it is one already.

        Raises:
            Conflict: it is not whole.
            TamperedData: the bytes do not match the digest; they are dropped.
        """
        with self._locked(digest) as stream:
            if self._blobs.exists(digest):
                self.path(digest).unlink(missing_ok=True)
                return
            _check_offset(stream.seek(0, os.SEEK_END), size)
            stream.seek(0)
            state = hashlib.sha256()
            while chunk := stream.read(CHUNK):
                state.update(chunk)
            if "sha256:" + state.hexdigest() != digest:
                self.path(digest).unlink(missing_ok=True)
                raise TamperedData(
                    f"The uploaded bytes do not match {digest[:19]}; they were dropped.",
                    "Upload them again from the start.",
                )
            os.fsync(stream.fileno())
            target = blob_path(self._blobs.root, digest)
            self.path(digest).replace(target)
            RealFs().fsync_directory(target.parent)

    def sweep(self, now: float | None = None) -> list[str]:
        """Removes uploads that nobody touched for a day; returns their digests."""
        oldest = (time.time() if now is None else now) - ABANDONED_SECONDS
        removed = []
        for path in self.room.iterdir() if self.room.is_dir() else ():
            with contextlib.suppress(FileNotFoundError):
                if path.stat().st_mtime < oldest:
                    path.unlink()
                    removed.append("sha256:" + path.name)
        return removed

    @contextlib.contextmanager
    def _locked(self, digest: str) -> Iterator[BinaryIO]:
        """The upload's file, this thread's alone. A writer that waited until the file was moved or
        dropped gets a new one."""
        path = self.path(digest)
        while True:
            with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), "rb+") as stream:
                fcntl.flock(stream, fcntl.LOCK_EX)
                if _is_at(stream, path):
                    yield stream
                    return


def _is_at(stream: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(stream.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _check_offset(at: int, offset: int) -> None:
    if at != offset:
        raise Conflict(f"The upload stands at byte {at}, not {offset}.", f"Go on from byte {at}.")
