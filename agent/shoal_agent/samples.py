"""Sampled inputs on their way to the controller: kept on disk while offline, bounded, oldest dropped.

Each sample file `X.npz` gets a note `X.json` beside it, which is what survives a restart; a file
without a note was being written when something died, and goes.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from shoal_agent.clock import Clock
from shoal_agent.files import FileContent
from shoal_agent.link.base import Content
from shoal_agent.telemetry.spool import Spool
from shoal_protos.errors import Overloaded, ShoalError, Unavailable
from shoal_protos.v1 import telemetry_pb2

log = logging.getLogger(__name__)

RETRY_S = 2.0
QUOTA_RETRY_S = 60.0


class SampleSender:
    """Pushes sample files and spools a notice for each.

    Args:
        take: asks the server for new sample files in a directory (the private socket's call).
        push: sends a blob.
    """

    def __init__(
        self,
        directory: Path,
        *,
        take: Callable[[Path], Awaitable[list[dict[str, Any]]]],
        push: Callable[[Content, str], Awaitable[None]],
        spool: Spool,
        clock: Clock,
        max_bytes: int,
    ) -> None:
        self._directory, self._take, self._push = directory, take, push
        self._spool, self._clock, self._max_bytes = spool, clock, max_bytes
        self._news = asyncio.Event()
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        for path in directory.glob("*.npz"):
            if not path.with_suffix(".json").exists():
                path.unlink()

    async def collect(self) -> None:
        """Asks the server for what it sampled since the last call."""
        try:
            items = await self._take(self._directory)
        except Unavailable:
            return  # no server now
        for item in items:
            self._note(item)
        self._bound()
        self._news.set()

    def _note(self, item: dict[str, Any]) -> None:
        try:
            path = Path(item["path"])
            if path.parent != self._directory:
                raise ValueError(f"{path} lies elsewhere")
            temporary = path.with_suffix(".tmp")
            temporary.write_text(json.dumps(item))
            temporary.replace(path.with_suffix(".json"))
        except (KeyError, TypeError, ValueError, OSError) as error:
            log.warning("a sample was lost: %s", error)

    def _bound(self) -> None:
        files = sorted(self._directory.glob("*.npz"), key=lambda path: path.stat().st_mtime)
        total = sum(path.stat().st_size for path in files)
        while files and total > self._max_bytes:
            oldest = files.pop(0)
            total -= oldest.stat().st_size
            log.warning("samples: dropped %s: too many wait", oldest.name)
            self._remove(oldest)

    async def run(self) -> None:
        """Sends until cancelled."""
        while True:
            notes = sorted(self._directory.glob("*.json"), key=lambda path: path.stat().st_mtime)
            if not notes:
                self._news.clear()
                await self._news.wait()
                continue
            await self._clock.sleep(await self._send(notes[0]))

    async def _send(self, note: Path) -> float:
        """Sends one; returns the seconds to wait before the next."""
        path = note.with_suffix(".npz")
        try:
            item = json.loads(note.read_bytes())
            content = await asyncio.to_thread(FileContent, path)
            await self._push(content, "samples")
        except Unavailable:
            return RETRY_S
        except Overloaded as error:
            log.warning("samples: %s", error)
            return QUOTA_RETRY_S
        except (OSError, ValueError, ShoalError) as error:
            log.warning("samples: %s was given up: %s", path.name, error)
            self._remove(path)
            return 0.0
        notice = telemetry_pb2.SampleNotice(
            endpoint=str(item.get("endpoint", "")),
            bundle=str(item.get("bundle", "")),
            blob=content.digest,
            size=content.size,
            count=int(item.get("count", 0)),
            labelled=int(item.get("labelled", 0)),
        )
        self._spool.add(notice, sync=True)
        self._remove(path)
        return 0.0

    @staticmethod
    def _remove(path: Path) -> None:
        path.unlink(missing_ok=True)
        path.with_suffix(".json").unlink(missing_ok=True)
