"""The applications of the demo's fleet: they call each agent all the time and post some labels."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from shoal_controller.demo import traffic

Array = np.ndarray[Any, Any]

CHUNK = 10  # requests between two looks at what to send; one of them gets a label


@dataclass(frozen=True)
class Feed:
    """What is sent now: `inputs` [n, ...] with their true `labels` [n]; `labelled`: post a tenth of them."""

    inputs: Array
    labels: Array
    labelled: bool = False


@dataclass
class Applications:
    """One thread an agent, `rate` requests a second each, cycling through the present feed."""

    addresses: Sequence[str]
    endpoint: str
    tensor: Any
    output: str
    feed: Feed
    rate: float = 25.0
    sent: int = 0
    labels_posted: int = 0
    errors: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._stop = threading.Event()
        self._quiet = threading.Event()
        self._lock = threading.Lock()
        self._threads = [
            threading.Thread(target=self._work, args=(number, address), daemon=True)
            for number, address in enumerate(self.addresses)
        ]
        for thread in self._threads:
            thread.start()

    def pause(self, quiet: bool) -> None:
        """Holds all applications back, or lets them go on."""
        (self._quiet.set if quiet else self._quiet.clear)()

    def _work(self, number: int, address: str) -> None:
        position = number * 7
        while not self._stop.is_set():
            if self._quiet.is_set():
                self._stop.wait(0.1)
                continue
            feed, began = self.feed, time.monotonic()
            chosen = np.arange(position, position + CHUNK) % len(feed.inputs)
            position += CHUNK
            try:
                self._chunk(f"application-{number}-{position}", address, feed, chosen)
            except Exception as error:  # an agent that is switching or restarting: reported, never fatal
                with self._lock:
                    self.errors.append(f"{address}: {error}")
            self._stop.wait(max(0.0, CHUNK / self.rate - (time.monotonic() - began)))

    def _chunk(self, prefix: str, address: str, feed: Feed, chosen: Array) -> None:
        answers = traffic.send(address, self.endpoint, self.tensor, self.output, feed.inputs[chosen], prefix)
        if feed.labelled:
            traffic.post_labels(address, self.endpoint, answers.ids[:1], feed.labels[chosen[:1]].tolist())
        with self._lock:
            self.sent += len(chosen)
            self.labels_posted += int(feed.labelled)

    def close(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(10)
