"""A shadow answers copies of requests after the primary did; nobody sees its answers but telemetry."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from shoal_agent.runtimes.tensors import Array
from shoal_agent.serving.batching import run_guarded
from shoal_agent.serving.feedback import Feedback
from shoal_agent.serving.workers import Pool
from shoal_protos.errors import ShoalError

if TYPE_CHECKING:
    from shoal_agent.serving.loading import Loaded

MAX_WAITING = 64
MAX_WAITING_BYTES = 16 << 20


class Shadow:
    """Mirrors a share of the requests to one loaded shadow, one at a time, on a spare thread.

    When it cannot keep up, copies are dropped and counted: the primary never waits for it.
    """

    def __init__(
        self, loaded: Loaded, executor: Pool, feedback: Feedback, monotonic: Callable[[], float]
    ) -> None:
        self.loaded = loaded
        self.dropped = 0
        self._executor, self._feedback, self._monotonic = executor, feedback, monotonic
        share = loaded.settings.shadow_share
        self._share = share if 0 < share < 1 else 1.0
        self._waiting: list[tuple[dict[str, Array], int, str, Array | None]] = []
        self._bytes = 0
        self._running = False
        self._lock = threading.Lock()

    def mirror(self, inputs: dict[str, Array], items: int, request_id: str, predicted: Array | None) -> None:
        """Queues one answered request. `predicted` is the primary's arg-max of each item."""
        if self._share < 1 and random.random() >= self._share:  # noqa: S311 - a lottery, not a secret
            return
        size = sum(value.nbytes for value in inputs.values())
        with self._lock:
            if len(self._waiting) >= MAX_WAITING or self._bytes + size > MAX_WAITING_BYTES:
                self.dropped += 1
                return
            self._waiting.append((inputs, items, request_id, predicted))
            self._bytes += size
            if self._running:
                return
            self._running = True
        try:
            self._executor.submit(self._work)
        except RuntimeError:  # the server is stopping
            self._running = False

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._waiting:
                    self._running = False
                    return
                inputs, items, request_id, predicted = self._waiting.pop(0)
                self._bytes -= sum(value.nbytes for value in inputs.values())
            self._run(inputs, items, request_id, predicted)

    def _run(self, inputs: dict[str, Array], items: int, request_id: str, predicted: Array | None) -> None:
        observer = self.loaded.observer
        start = time.perf_counter_ns()
        outcome = run_guarded(self.loaded.instance, inputs)
        spent = time.perf_counter_ns() - start
        if isinstance(outcome, ShoalError):
            observer.failure(outcome, spent)
            return
        if observer.success(items, spent, 0, spent, 1.0, inputs, outcome):
            observer.sketch()
        if predicted is None or not self.loaded.predicts_classes:
            return
        scores = outcome[self.loaded.bundle.config.signature.outputs[0].name]
        own = scores.reshape(len(scores), -1).argmax(axis=1)
        observer.compared(items, int((own == predicted).sum()))
        if request_id:
            self._feedback.remember(self.loaded.endpoint, request_id, observer, own, self._monotonic())
