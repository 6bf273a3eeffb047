"""A pushed source: a tar of the task file, first, and the files that it names. Unpacked safely."""

from __future__ import annotations

import shutil
import tarfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from shoal_protos.errors import InvalidInput

MAX_FILES = 1000
MAX_BYTES = 8 << 30  # unpacked
TASK_SUFFIXES = (".py", ".onnx")


@dataclass(frozen=True)
class Source:
    """What a push holds. `task` is the file that a job imports."""

    task: str
    files: tuple[str, ...]
    size: int  # bytes, unpacked


def inspect(path: Path, *, max_files: int = MAX_FILES, max_bytes: int = MAX_BYTES) -> Source:
    """Reads the tar's table of contents and refuses everything that is not a plain file below its root.

    Raises:
        InvalidInput: not a tar, an unsafe member, too many files or bytes, or no task in it.
    """
    files: dict[str, int] = {}
    try:
        with tarfile.open(path, "r:*") as archive:
            for member in archive:
                if member.isdir():
                    _safe(member.name)
                    continue
                if not member.isfile():
                    raise InvalidInput(
                        f"The push holds '{member.name[:80]}', which is no plain file.",
                        "Leave links and devices out.",
                    )
                name = _safe(member.name)
                if name in files:
                    raise InvalidInput(f"The push holds '{name}' twice.")
                files[name] = member.size
                if len(files) > max_files or sum(files.values()) > max_bytes:
                    raise InvalidInput(
                        f"The push is too large: at most {max_files} files and {max_bytes} bytes.",
                        "Name only what the task needs in its `files`.",
                    )
    except (tarfile.TarError, EOFError, OSError) as error:
        raise InvalidInput(
            f"The push is not a readable tar: {error}.", "Send it with: shoal model push"
        ) from error
    return Source(_task(list(files)), tuple(files), sum(files.values()))


def _safe(name: str) -> str:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name or not path.parts:
        raise InvalidInput(
            f"The push holds the unsafe path {name[:80]!r}.", "Paths are relative, without '..'."
        )
    return str(path)


def _task(files: list[str]) -> str:
    """The first task file at the top; a Python file goes before an ONNX file."""
    for suffix in TASK_SUFFIXES:
        for name in files:
            if name.endswith(suffix) and "/" not in name:
                return name
    raise InvalidInput(
        "The push holds no task: neither a .py nor an .onnx file at its top.",
        "Send it with: shoal model push NAME TASK.py",
    )


def unpack(path: Path, target: Path) -> Source:
    """Unpacks a push into `target`, which is emptied first. Modes, owners and times are dropped.

    Raises:
        InvalidInput: see `inspect`.
    """
    source = inspect(path)
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True, mode=0o700)
    with tarfile.open(path, "r:*") as archive:
        for member in archive:
            if not member.isfile():
                continue
            destination = target / _safe(member.name)
            destination.parent.mkdir(parents=True, exist_ok=True)
            content = archive.extractfile(member)
            assert content is not None
            with content, destination.open("wb") as stream:
                shutil.copyfileobj(content, stream, 1 << 20)
    return source
