"""The three logs of a device, and their last bytes for reports of failures."""

from __future__ import annotations

import contextlib
import logging
import sys
from pathlib import Path

MAX_LOG_BYTES = 2 * 1024 * 1024  # of each file; beyond it the older half goes
REPORT_BYTES = 64 * 1024
NAMES = ("supervisor", "server", "probe")


def set_up(directory: Path, *, quiet: bool = False) -> None:
    """Logs to `supervisor.log`, and to standard error unless `quiet`."""
    handlers: list[logging.Handler] = [logging.FileHandler(directory / "supervisor.log")]
    if not quiet:
        handlers.append(logging.StreamHandler(sys.stderr))
    form = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    for handler in handlers:
        handler.setFormatter(form)
    root = logging.getLogger()
    root.setLevel(logging.INFO)
    root.handlers[:] = handlers


def path(directory: Path, name: str) -> Path:
    return directory / f"{name}.log"


def tail(file: Path, limit: int) -> bytes:
    """The last `limit` bytes, from a line's start; b"" if there is no such file."""
    try:
        with file.open("rb") as stream:
            size = stream.seek(0, 2)
            stream.seek(max(0, size - limit))
            data = stream.read(limit)
    except OSError:
        return b""
    return data if size <= limit else data.partition(b"\n")[2]


def report(directory: Path, limit: int = REPORT_BYTES) -> bytes:
    """The last lines of every log, together at most `limit` bytes; what a short one leaves over goes to
    the others."""
    left = limit - 32 * len(NAMES)
    texts: dict[str, bytes] = {}
    shortest_first = sorted(NAMES, key=lambda name: _size(path(directory, name)))
    for done, name in enumerate(shortest_first):
        texts[name] = tail(path(directory, name), max(0, left // (len(NAMES) - done)))
        left -= len(texts[name])
    parts = [f"==> {name}.log\n".encode() + texts[name] for name in NAMES]
    return b"\n".join(parts)[-limit:]


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:
        return 0


def trim(directory: Path) -> None:
    """Bounds every log. Writers append, so cutting a file under them is safe."""
    for name in NAMES:
        file = path(directory, name)
        with contextlib.suppress(OSError):
            if file.stat().st_size > MAX_LOG_BYTES:
                kept = tail(file, MAX_LOG_BYTES // 2)
                with file.open("r+b") as stream:
                    stream.truncate(0)
                with file.open("ab") as stream:
                    stream.write(kept)
