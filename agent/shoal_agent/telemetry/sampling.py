"""Which inputs may leave the device, under an endpoint's sampling policy (off by default).

Each answered item is offered; a uniform reservoir keeps a fair picture, and the least certain items
are kept beside it. An item waits for its label and leaves labelled, or leaves without when its time
is over. Everything is bounded: items, bytes in memory, items a window and bytes a day.
"""

from __future__ import annotations

import random as random_module
from collections.abc import Mapping
from dataclasses import dataclass, field

from shoal_agent.telemetry.statistics import Array

DEFAULT_WAIT_S = 3600.0
MAX_MEMORY_BYTES = 32 << 20
_DAY_S = 86400.0
_WAITING_WINDOWS = 4  # capacity, in windows' worth of samples


@dataclass(frozen=True)
class Policy:
    """`share` 0 = nothing is sampled. Limits of 0 mean the defaults 64 a window and 16 MiB a day."""

    share: float = 0.0
    max_samples_per_window: int = 0
    max_bytes_per_day: int = 0
    wait_s: float = DEFAULT_WAIT_S

    @property
    def per_window(self) -> int:
        return self.max_samples_per_window or 64

    @property
    def per_day(self) -> int:
        return self.max_bytes_per_day or 16 << 20


@dataclass
class Sample:
    """One recorded item, batch dimension dropped."""

    time_s: float  # monotonic
    request_id: str
    item: int
    inputs: Mapping[str, Array]
    predicted: int
    confidence: float
    margin: float
    label: int = -1
    ticket: float = field(default=0.0)  # uniform: the largest make up the fair half

    @property
    def nbytes(self) -> int:
        return sum(value.nbytes for value in self.inputs.values()) + 64


class Sampler:
    """Keeps the samples of one bundle under one endpoint. Not thread-safe; `now` is monotonic seconds."""

    def __init__(self, policy: Policy, random: random_module.Random | None = None) -> None:
        self.policy = policy
        self._random = random or random_module.Random()  # noqa: S311 - a lottery, not a secret
        self._waiting: list[Sample] = []
        self._bytes = 0
        self._day_start = -_DAY_S
        self._day_bytes = 0

    def wants(self) -> bool:
        """Draws the lottery for one request; the caller copies its inputs only if it won."""
        share = self.policy.share
        return share > 0 and (share >= 1 or self._random.random() < share)

    def offer(self, sample: Sample) -> None:
        sample.ticket = self._random.random()
        self._waiting.append(sample)
        self._bytes += sample.nbytes
        capacity = self.policy.per_window * _WAITING_WINDOWS
        if len(self._waiting) >= 2 * capacity or self._bytes > MAX_MEMORY_BYTES:
            self._prune(capacity)

    def label(self, request_id: str, labels: list[int]) -> int:
        """Gives the items of a request their labels; returns how many samples got one."""
        found = 0
        for sample in self._waiting:
            if sample.request_id == request_id and sample.item < len(labels) and sample.label < 0:
                sample.label = labels[sample.item]
                found += 1
        return found

    def take(self, now: float) -> list[Sample]:
        """What leaves now: labelled items, then those that waited long enough, the least certain first.

        Limits are the window's and the day's; items whose time is over and that do not fit are dropped.
        """
        if now - self._day_start >= _DAY_S:
            self._day_start, self._day_bytes = now, 0
        due = [
            sample
            for sample in self._waiting
            if sample.label >= 0 or now - sample.time_s >= self.policy.wait_s
        ]
        due_ids = {id(sample) for sample in due}
        self._keep([sample for sample in self._waiting if id(sample) not in due_ids])
        fair = {id(sample) for sample in self._fair_half(due, self.policy.per_window)}
        due.sort(key=lambda s: (s.label < 0, id(s) not in fair and s.margin > 0.5, s.margin))
        taken: list[Sample] = []
        for sample in due:
            if len(taken) >= self.policy.per_window:
                break
            if self._day_bytes + sample.nbytes <= self.policy.per_day:
                self._day_bytes += sample.nbytes
                taken.append(sample)
        return taken

    def __len__(self) -> int:
        return len(self._waiting)

    @staticmethod
    def _fair_half(samples: list[Sample], count: int) -> list[Sample]:
        return sorted(samples, key=lambda s: -s.ticket)[: max(1, count // 2)]

    def _prune(self, capacity: int) -> None:
        """Drops what is least worth keeping: unlabelled, not in the fair half, and certain."""
        fair = {id(sample) for sample in self._fair_half(self._waiting, capacity)}
        ranked = sorted(
            self._waiting,
            key=lambda s: (s.label < 0, id(s) not in fair, s.margin if id(s) not in fair else 0),
        )
        kept: list[Sample] = []
        size = 0
        for sample in ranked[:capacity]:
            size += sample.nbytes
            if size > MAX_MEMORY_BYTES // 2 and kept:
                break
            kept.append(sample)
        kept.sort(key=lambda s: s.time_s)
        self._keep(kept)

    def _keep(self, samples: list[Sample]) -> None:
        self._waiting = samples
        self._bytes = sum(sample.nbytes for sample in samples)
