"""What a job saves and what it says: atomic state, and its lines on stdout.

State is saved before it is relied on: after `kill -9` the job starts again on the same directory,
finds what was finished and repeats none of it.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

from shoal_optimizer import jobspec
from shoal_protos.errors import InvalidInput

STATE_FILE = "state.json"


class State:
    """Nested plain values in one JSON file, replaced atomically.

    Sections: `networks`, `candidates`, `timings` (by key), `told` (list), `emitted` (bundle -> digest
    of the line), `facts` (anything small). `used_s` adds up over all starts of the job.
    """

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.monotonic) -> None:
        """
        Raises:
            InvalidInput: the file is no state: the directory belongs to something else.
        """
        self._path = path
        self._clock = clock
        self._started = clock()
        raw: dict[str, Any] = {}
        if path.exists():
            try:
                raw = json.loads(path.read_bytes())
            except ValueError as error:
                raise InvalidInput(
                    f"{path} cannot be read: {error}.", "Remove the job's directory and start it again."
                ) from error
        self._before_s = float(raw.get("used_s", 0.0))
        self.networks: dict[str, Any] = raw.get("networks", {})
        self.candidates: dict[str, Any] = raw.get("candidates", {})
        self.timings: dict[str, Any] = raw.get("timings", {})
        self.told: list[Any] = raw.get("told", [])
        self.emitted: dict[str, str] = raw.get("emitted", {})
        self.facts: dict[str, Any] = raw.get("facts", {})

    @property
    def used_s(self) -> float:
        """Seconds used so far, earlier starts included as of their last save."""
        return self._before_s + self._clock() - self._started

    def save(self) -> None:
        """Writes everything; either the old or the new file is there at any moment."""
        sections = ("networks", "candidates", "timings", "told", "emitted", "facts")
        write_atomic(
            self._path,
            json.dumps({"used_s": self.used_s, **{name: getattr(self, name) for name in sections}}).encode(),
        )


def write_atomic(path: Path, data: bytes) -> None:
    """Writes `path` so that a crash leaves the old content or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.partial")
    with temporary.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)


class Voice:
    """Writes a job's lines. Progress is thinned: a step says each per cent once."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream
        self._last: tuple[str, int | None, str] = ("", None, "")

    def say(self, event: str, **fields: Any) -> None:
        self._stream.write(jobspec.event_line(event, **fields))
        self._stream.flush()

    def progress(self, step: str, share: float | None = None, message: str = "") -> None:
        now = (step, None if share is None else int(share * 100), message)
        if now != self._last:
            self._last = now
            self.say("progress", step=step, share=share, message=message)

    def variant(self, state: State, fields: Mapping[str, Any]) -> None:
        """Says a `variant` unless the very same was said before. At least once, also after a crash."""
        line = jobspec.event_line("variant", **fields)
        if state.emitted.get(fields["bundle"]) != line:
            self._stream.write(line)
            self._stream.flush()
            state.emitted[fields["bundle"]] = line
            state.save()
