"""Reads a job's lines from the file that is its stdout."""

from __future__ import annotations

import time
from pathlib import Path

from shoal_controller.job_events import Importer
from shoal_optimizer import jobspec
from shoal_protos.errors import InvalidInput

PROGRESS_SECONDS = 1.0  # the row follows a chatty job no faster
MAX_LINE_BYTES = 8 << 20


class Reader:
    """Reads a child's output from a file, so that nothing is lost when the worker dies."""

    def __init__(self, path: Path, importer: Importer, offset: int) -> None:
        self._path = path
        self._importer = importer
        self._offset = offset
        self._progressed = 0.0

    def drain(self, *, last: bool = False) -> bool:
        """Applies the whole lines that are there; True if there were any. Progress is thinned out:
        of several in a row only the newest counts, at most one a second.

        Raises:
            ShoalError: a line is not one of a job's.
        """
        lines = self._lines()
        if not lines:
            return False
        applied = False
        pending: tuple[dict[str, object], int] | None = None
        for line, end in lines:
            event = jobspec.parse_event(line.decode(errors="replace"))
            if (
                event["event"] == "progress"
                and pending is not None
                and pending[0].get("step") == event.get("step")
            ):
                pending = (event, end)
                continue
            if pending is not None:
                self._apply(*pending)
                applied = True
            pending = (event, end)
        assert pending is not None
        if (
            pending[0]["event"] != "progress"
            or last
            or time.monotonic() - self._progressed >= PROGRESS_SECONDS
        ):
            self._apply(*pending)
            applied = True
        return applied

    def _apply(self, event: dict[str, object], end: int) -> None:
        self._importer.apply([event], end)
        self._offset = end
        if event["event"] == "progress":
            self._progressed = time.monotonic()

    def _lines(self) -> list[tuple[bytes, int]]:
        if not self._path.exists():
            return []
        with self._path.open("rb") as stream:
            stream.seek(self._offset)
            data = stream.read(MAX_LINE_BYTES)
        if b"\n" not in data:
            if len(data) == MAX_LINE_BYTES:
                raise InvalidInput(f"The job wrote a line above {MAX_LINE_BYTES} bytes.")
            return []
        lines, at = [], self._offset
        for line in data[: data.rindex(b"\n")].split(b"\n"):
            at += len(line) + 1
            if line.strip():
                lines.append((line, at))
        return lines
