"""The sender's side of a resumable upload: pieces, retries and what to tell the person who waits."""

from __future__ import annotations

import hashlib
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from shoal_protos.errors import Conflict, NotFound, Overloaded, ShoalError, TamperedData, Unavailable

if TYPE_CHECKING:
    from shoal_controller.api import schemas

SMALLEST_PIECE, LARGEST_PIECE = 1 << 18, 8 << 20  # of one request
PIECE_SECONDS = 1.0  # pieces grow and shrink to take about this long
MAX_FAILURES = 8  # in a row, with nothing gained between them: about a minute
FIRST_DELAY_S = 0.5
LONGEST_DELAY_S = 20.0


@dataclass(frozen=True)
class Sent:
    """How far a push is. `note` says what is going on when it isn't simply sending."""

    received: int
    total: int
    resumed: int = 0  # bytes that were there before
    note: str = ""


class Uploading(Protocol):
    """What a sender needs of a client."""

    def upload(self, digest: str) -> schemas.Upload: ...

    def append(self, digest: str, offset: int, size: int, data: bytes) -> schemas.Upload: ...


class Sender:
    """Sends one file at a time through `client`; `clock`, `sleep` and `rng` are
    the machine's unless a test brings its own."""

    def __init__(
        self,
        client: Uploading,
        progress: Callable[[Sent], None],
        *,
        piece: int = 1 << 20,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
        rng: random.Random | None = None,
    ) -> None:
        self._client = client
        self._progress = progress
        self._piece = piece
        self._clock = clock
        self._sleep = sleep
        self._rng = rng or random.Random()  # noqa: S311  # jitter

    def send(self, path: Path) -> str:
        """Makes the controller have the file's bytes; returns their digest, "" when the controller is
        too old to take uploads.

        Raises:
            Unavailable: nothing got through for a while.
            TamperedData: the bytes were damaged on the way twice.
            ShoalError: the controller refuses them.
        """
        with path.open("rb") as stream:
            digest = "sha256:" + hashlib.file_digest(stream, "sha256").hexdigest()
        size = path.stat().st_size
        try:
            state = self._client.upload(digest)
        except NotFound:
            return ""
        resumed, failures, damaged = state.received, 0, 0
        self._progress(Sent(state.received, size, resumed))
        with path.open("rb") as stream:
            while not state.complete:
                before, began = state.received, self._clock()
                stream.seek(before)
                try:
                    state = self._client.append(digest, before, size, stream.read(self._piece))
                except TamperedData:
                    damaged += 1
                    if damaged > 1:
                        raise
                    state = state.model_copy(update={"received": 0})
                    resumed = 0
                    self._progress(Sent(0, size, 0, "the bytes were damaged on the way; sending them again"))
                    continue
                except (Unavailable, Overloaded, Conflict) as error:
                    failures += 1
                    if failures > MAX_FAILURES or _hopeless(error):
                        raise _given_up(error, before, size) from error
                    self._wait(failures, Sent(before, size, resumed, _reason(error)))
                    state = self._ask(digest, state)
                else:
                    self._adapt(self._clock() - began)
                if state.received > before:
                    failures = 0
                self._progress(Sent(state.received, size, resumed))
        return digest

    def _adapt(self, seconds: float) -> None:
        if seconds < PIECE_SECONDS / 2:
            self._piece = max(self._piece, min(LARGEST_PIECE, 2 * self._piece))
        elif seconds > 2 * PIECE_SECONDS:
            self._piece = min(self._piece, max(SMALLEST_PIECE, self._piece // 2))

    def _wait(self, failures: int, sent: Sent) -> None:
        """Full jitter: those who were cut off together do not come back together."""
        longest = min(LONGEST_DELAY_S, FIRST_DELAY_S * 2 ** (failures - 1))
        self._progress(sent)
        self._sleep(self._rng.uniform(0, longest))

    def _ask(self, digest: str, known: schemas.Upload) -> schemas.Upload:
        try:
            return self._client.upload(digest)
        except (Unavailable, Overloaded):
            return known  # the next piece asks again


def _reason(error: ShoalError) -> str:
    if isinstance(error, Conflict):
        return "somebody else sends the same bytes"
    return "the controller is busy" if isinstance(error, Overloaded) else "the line dropped; trying again"


def _hopeless(error: ShoalError) -> bool:
    """A full disk does not empty itself within the minute."""
    return isinstance(error, Overloaded) and "disk" in error.message


def _given_up(error: ShoalError, received: int, size: int) -> ShoalError:
    share = 100 * received // size if size else 0
    kept = f"{share} % arrived and are kept for a day: the same command goes on from there."
    return type(error)(error.message, f"{error.remedy} {kept}".strip())
