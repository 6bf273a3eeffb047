"""Threads that run models: as many as needed up to a limit, and the lean way to hand them work.

`concurrent.futures` makes a future, a work item and two condition variables a call; nobody here waits
for a future, and on the way of every request that is a tenth of a millisecond with cold caches.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections import deque
from collections.abc import Callable
from typing import Protocol

log = logging.getLogger("shoal.serving")

Work = Callable[[], object]


class Pool(Protocol):
    """Runs work on some other thread, in the order it came; `Workers`, or any executor."""

    def submit(self, work: Work, /) -> object:
        """Returns at once. Raises RuntimeError after the end."""


class Workers:
    """At most `limit` threads, started when there is work and none is idle. Work guards itself: what
    it raises is logged and lost."""

    def __init__(self, limit: int, name: str = "shoal-model") -> None:
        self._limit, self._name = max(1, limit), name
        self._queue: queue.SimpleQueue[Work | None] = queue.SimpleQueue()
        self._idle: deque[None] = deque()  # one entry a thread that waits and has no work coming
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._ended = False

    def submit(self, work: Work, /) -> None:
        if self._ended:
            raise RuntimeError("The workers have ended.")
        try:
            self._idle.pop()
        except IndexError:
            if len(self._threads) < self._limit:
                self._grow()
        self._queue.put(work)

    def _grow(self) -> None:
        with self._lock:
            if self._ended or len(self._threads) >= self._limit:
                return
            name = f"{self._name}_{len(self._threads)}"
            thread = threading.Thread(target=self._run, name=name, daemon=True)
            self._threads.append(thread)
        thread.start()

    def _run(self) -> None:
        while True:
            work = self._queue.get()
            if work is None:
                return
            try:
                work()
            except Exception:
                log.exception("A model's thread met a defect.")
            del work  # its arrays go now, not with the next request
            self._idle.append(None)

    def shutdown(self, wait: bool = False) -> None:
        """No more work is taken; what was is still done."""
        with self._lock:
            self._ended = True
            threads = list(self._threads)
        for _ in threads:
            self._queue.put(None)
        if wait:
            for thread in threads:
                thread.join()
