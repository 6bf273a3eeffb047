"""The few file operations that must survive a power cut, behind one interface.

`durable_write` is the only way in which the agent replaces a file that it cannot lose:
temporary file in the same directory, fsync, rename, fsync of the directory. Each primitive is
a method, so that a test can record them, cut them off at any point and replay what a disk would hold.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path
from typing import Protocol


class Fs(Protocol):
    """Primitive operations; paths are absolute."""

    def read(self, path: Path) -> bytes: ...

    def write(self, path: Path, data: bytes) -> None:
        """Creates or truncates `path` (mode 0600) and writes all of `data`, not yet durable."""
        ...

    def append(self, path: Path, data: bytes) -> None:
        """Creates `path` if needed (mode 0600) and appends, not yet durable."""
        ...

    def fsync(self, path: Path) -> None: ...

    def fsync_directory(self, path: Path) -> None: ...

    def replace(self, source: Path, target: Path) -> None: ...

    def unlink(self, path: Path) -> None:
        """Removes `path`; a missing file is no error."""
        ...

    def mkdir(self, path: Path) -> None:
        """Creates a directory (mode 0700) and its parents; an existing one is no error."""
        ...

    def free_bytes(self, path: Path) -> int: ...


class RealFs:
    """The operating system's files."""

    def read(self, path: Path) -> bytes:
        return path.read_bytes()

    def write(self, path: Path, data: bytes) -> None:
        self._write(path, data, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)

    def append(self, path: Path, data: bytes) -> None:
        self._write(path, data, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    @staticmethod
    def _write(path: Path, data: bytes, flags: int) -> None:
        descriptor = os.open(path, flags | os.O_CLOEXEC, 0o600)
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(descriptor, view) :]
        finally:
            os.close(descriptor)

    def fsync(self, path: Path) -> None:
        self._fsync(path, os.O_RDONLY)

    def fsync_directory(self, path: Path) -> None:
        self._fsync(path, os.O_RDONLY | os.O_DIRECTORY)

    @staticmethod
    def _fsync(path: Path, flags: int) -> None:
        descriptor = os.open(path, flags | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def replace(self, source: Path, target: Path) -> None:
        os.replace(source, target)

    def unlink(self, path: Path) -> None:
        with contextlib.suppress(FileNotFoundError):
            path.unlink()

    def mkdir(self, path: Path) -> None:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)

    def free_bytes(self, path: Path) -> int:
        return shutil.disk_usage(path).free


def durable_write(fs: Fs, path: Path, data: bytes) -> None:
    """Replaces `path` by `data` so that after a power cut it holds the old or the new bytes, whole."""
    temporary = path.with_name(path.name + ".tmp")
    fs.write(temporary, data)
    fs.fsync(temporary)
    fs.replace(temporary, path)
    fs.fsync_directory(path.parent)
