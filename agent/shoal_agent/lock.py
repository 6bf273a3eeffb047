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


def holder(paths: Paths) -> int:
    """Process id of the supervisor that runs on this state directory, 0 if none does.

    Looks without taking the lock: a supervisor that starts in this moment must not be refused.
    """
    try:
        pid = int(paths.lock.read_text())
        target = os.stat(paths.lock)
    except (OSError, ValueError):
        return 0
    try:
        descriptors = os.listdir(f"/proc/{pid}/fd")
    except PermissionError:
        return pid  # somebody else's process, under the number that the file names
    except OSError:
        return 0
    for descriptor in descriptors:
        with contextlib.suppress(OSError):
            found = os.stat(f"/proc/{pid}/fd/{descriptor}")
            if (found.st_dev, found.st_ino) == (target.st_dev, target.st_ino):
                return pid
    return 0
