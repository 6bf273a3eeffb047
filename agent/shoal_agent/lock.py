"""One agent a state directory."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator

from shoal_agent.config import Paths
from shoal_protos.errors import Conflict


@contextlib.contextmanager
def locked(paths: Paths) -> Iterator[None]:
    """One supervisor a state directory.

    Raises:
        Conflict: another one holds it.
    """
    with paths.lock.open("a+") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            stream.seek(0)
            raise Conflict(
                f"Another agent (process {stream.read().strip() or 'unknown'}) runs on {paths.root}.",
                "Stop it first, or use another --state-dir.",
            ) from error
        stream.truncate(0)
        stream.write(str(os.getpid()))
        stream.flush()
        yield
