"""A local file as a blob to push."""

from __future__ import annotations

from pathlib import Path

from shoal_protos.bundle import digest_of_file


class FileContent:
    """Implements `link.base.Content`. `digest` is computed if not given."""

    def __init__(self, path: Path, digest: str = "") -> None:
        self._path = path
        self.digest = digest or digest_of_file(path)
        self.size = path.stat().st_size

    def read(self, offset: int, length: int) -> bytes:
        with self._path.open("rb") as stream:
            stream.seek(offset)
            return stream.read(length)
