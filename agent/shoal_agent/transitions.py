"""The last steps that placements took, kept over restarts for diagnosis: one JSON object a line."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

KEPT = 100
LIMIT = 2 * KEPT  # lines at which the older ones go
MAX_REASON = 300  # characters


class Transitions:
    """A bounded file. Losing its end in a power cut is harmless, so nothing waits for the disk."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lines = len(read(path, LIMIT))

    def add(self, time_ms: int, endpoint: str, before: str, after: str, reason: str) -> None:
        """A placement went from one step to another; `before` "" = it was just named."""
        entry = {
            "time_ms": time_ms,
            "endpoint": endpoint,
            "from": before,
            "to": after,
            "reason": reason[:MAX_REASON],
        }
        with contextlib.suppress(OSError):
            with self._path.open("a") as stream:
                stream.write(json.dumps(entry) + "\n")
            self._lines += 1
            if self._lines > LIMIT:
                self._shorten()

    def _shorten(self) -> None:
        kept = read(self._path, KEPT)
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(item) + "\n" for item in kept))
        temporary.replace(self._path)
        self._lines = len(kept)


def read(path: Path, limit: int = KEPT) -> list[dict[str, Any]]:
    """The last entries, oldest first; a torn line is passed over."""
    try:
        lines = path.read_bytes().splitlines()[-limit:]
    except OSError:
        return []
    found = []
    for line in lines:
        with contextlib.suppress(ValueError):
            value = json.loads(line)
            if isinstance(value, dict):
                found.append(value)
    return found
