"""How a loaded model's requests are run: inline, on threads, and in greedy batches.

Greedy batching needs no timer: every socket that is readable in one pass of the event loop puts its
request into the list before the scheduled kick runs them together. With threads, a batch forms while
the ones before it run. Only models whose time per item falls with the batch are batched, which is
measured when they are loaded.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from shoal_agent.runtimes.base import Instance
from shoal_agent.runtimes.tensors import Array
from shoal_agent.serving.errors import ModelFailed
from shoal_agent.serving.workers import Pool
from shoal_protos.errors import InvalidInput, Overloaded, ShoalError

MAX_BATCH = 16
MAX_BATCH_BYTES = 4 << 20  # the runtimes' arenas keep what the largest batch needed
MAX_QUEUE = 256
INLINE_NS = 500_000  # slower models run on threads: a slow inline run blocks every other request
GAIN = 0.8  # batch when an item of a batch of 8 costs less than this share of one alone

Outputs = dict[str, Array]
# (outputs or the error, nanoseconds waited, nanoseconds computed, share of an execution)
Done = Callable[["Outputs | ShoalError", int, int, float], None]


@dataclass(frozen=True)
class Speed:
    """A model's own times, measured at load."""

    single_ns: int
    batch_gain: float  # time of an item in a batch of 8 / alone; NaN = takes no such batch
    item_bytes: int

    @property
    def inline(self) -> bool:
        return self.single_ns <= INLINE_NS

    @property
    def max_batch(self) -> int:
        if not self.batch_gain < GAIN:
            return 1
        return max(1, min(MAX_BATCH, MAX_BATCH_BYTES // max(1, self.item_bytes)))


def measure_speed(instance: Instance, examples: Sequence[Mapping[str, Array]], batches: bool) -> Speed:
    """Warms an instance up and times it at batch 1, 4 and 8, interleaved, for about 50 ms each.

    Args:
        batches: whether the signature leaves the batch size open.

    Raises:
        InvalidInput: the model cannot run its own example.
    """
    single = dict(examples[0])
    size = sum(value.nbytes for value in single.values())
    for _ in range(2):
        start = time.perf_counter_ns()
        instance.run(single)
        first = time.perf_counter_ns() - start
    feeds = {1: single}
    if batches and size * 8 <= MAX_BATCH_BYTES and first < 50_000_000:
        for count in (4, 8):
            feed = {name: np.repeat(value, count, axis=0) for name, value in single.items()}
            try:
                outputs = instance.run(feed)
            except InvalidInput:
                continue
            if all(len(value) == count for value in outputs.values()):
                feeds[count] = feed
    readings: dict[int, list[int]] = {count: [] for count in feeds}
    began = time.perf_counter_ns()
    while len(readings[1]) < 100 and (len(readings[1]) < 3 or time.perf_counter_ns() - began < 100_000_000):
        for count, feed in feeds.items():
            start = time.perf_counter_ns()
            instance.run(feed)
            readings[count].append(time.perf_counter_ns() - start)
    alone = int(statistics.median(readings[1]))
    gain = statistics.median(readings[8]) / 8 / alone if 8 in readings else float("nan")
    return Speed(alone, gain, size)


@dataclass
class _Waiting:
    inputs: Mapping[str, Array]
    items: int
    done: Done
    queued_ns: int


class Lane:
    """Runs one instance's requests. All methods belong to the event loop's thread."""

    def __init__(
        self,
        instance: Instance,
        speed: Speed,
        loop: asyncio.AbstractEventLoop,
        executor: Pool,
        workers: int,
        max_queue: int = MAX_QUEUE,
    ) -> None:
        self._instance, self._loop, self._executor = instance, loop, executor
        self._inline = speed.inline
        self._max_batch = speed.max_batch
        self._max_queue, self._workers = max_queue, workers
        self._waiting: deque[_Waiting] = deque()
        self._kicked = False
        self._running = 0

    @property
    def queued(self) -> int:
        """Requests that wait, running ones not counted."""
        return len(self._waiting)

    def submit(self, inputs: Mapping[str, Array], items: int, done: Done) -> None:
        """Runs the request, now or soon; `done` is called exactly once, in the event loop.

        Raises:
            Overloaded: the queue is full; `done` is not called.
        """
        if self._inline and self._max_batch == 1:
            start = time.perf_counter_ns()
            outcome = run_guarded(self._instance, inputs)
            done(outcome, 0, time.perf_counter_ns() - start, 1.0)
            return
        if len(self._waiting) >= self._max_queue:
            raise Overloaded(f"{self._max_queue} requests are waiting already.", "Try again in a second.")
        self._waiting.append(_Waiting(inputs, items, done, time.perf_counter_ns()))
        if self._inline:
            if not self._kicked:
                self._kicked = True
                self._loop.call_soon(self._kick)
        elif self._running < self._workers:
            self._start()

    def _kick(self) -> None:
        self._kicked = False
        batch = self._next_batch()
        if batch:
            start = time.perf_counter_ns()
            outcomes = _run_batch(self._instance, batch)
            _finish(batch, outcomes, start, time.perf_counter_ns() - start)
        if self._waiting and not self._kicked:
            self._kicked = True
            self._loop.call_soon(self._kick)

    def _start(self) -> None:
        batch = self._next_batch()
        if not batch:
            return
        self._running += 1

        def work() -> None:
            start = time.perf_counter_ns()
            outcomes = _run_batch(self._instance, batch)
            spent = time.perf_counter_ns() - start
            self._loop.call_soon_threadsafe(self._end, batch, outcomes, start, spent)

        try:
            self._executor.submit(work)
        except RuntimeError:  # the server is stopping
            self._running -= 1
            error = ShoalError("The server is stopping.")
            _finish(batch, [error] * len(batch), time.perf_counter_ns(), 0)

    def _end(
        self, batch: list[_Waiting], outcomes: Sequence[Outputs | ShoalError], start: int, spent: int
    ) -> None:
        self._running -= 1
        _finish(batch, outcomes, start, spent)
        if self._waiting and self._running < self._workers:
            self._start()

    def _next_batch(self) -> list[_Waiting]:
        """The longest run of waiting requests of one shape that fits a batch; at least one request."""
        batch: list[_Waiting] = []
        items = 0
        while self._waiting:
            head = self._waiting[0]
            if batch and (
                items + head.items > self._max_batch or not _same_shape(batch[0].inputs, head.inputs)
            ):
                break
            batch.append(self._waiting.popleft())
            items += head.items
        return batch


def run_guarded(instance: Instance, inputs: Mapping[str, Array]) -> Outputs | ShoalError:
    """Outputs, or the error as a value: a request that fits the signature and fails is the model's fault."""
    try:
        return instance.run(inputs)
    except InvalidInput as error:
        return ModelFailed(error.message, error.remedy)
    except ShoalError as error:
        return error
    except Exception as error:
        return ModelFailed(f"The runtime failed: {type(error).__name__}.")


def _same_shape(first: Mapping[str, Array], second: Mapping[str, Array]) -> bool:
    return all(value.shape[1:] == second[name].shape[1:] for name, value in first.items())


def _run_batch(instance: Instance, batch: Sequence[_Waiting]) -> Sequence[Outputs | ShoalError]:
    if len(batch) == 1:
        return [run_guarded(instance, batch[0].inputs)]
    joined = {name: np.concatenate([w.inputs[name] for w in batch]) for name in batch[0].inputs}
    together = run_guarded(instance, joined)
    total = sum(waiting.items for waiting in batch)
    if isinstance(together, ShoalError) or any(len(value) != total for value in together.values()):
        # One request's values must not fail the others'.
        return [run_guarded(instance, waiting.inputs) for waiting in batch]
    outcomes: list[Outputs | ShoalError] = []
    start = 0
    for waiting in batch:
        stop = start + waiting.items
        outcomes.append({name: value[start:stop] for name, value in together.items()})
        start = stop
    return outcomes


def _finish(
    batch: Sequence[_Waiting], outcomes: Sequence[Outputs | ShoalError], start: int, spent: int
) -> None:
    total = sum(waiting.items for waiting in batch)
    for waiting, outcome in zip(batch, outcomes, strict=True):
        share = waiting.items / total
        # `done` guards itself: one member's closed connection must not lose the others' answers.
        waiting.done(outcome, max(0, start - waiting.queued_ns), spent, share)
