"""The link to the controller: one interface, several carriers, one conformance test.

A carrier keeps a connection alive for ever, says hello on each, delivers what comes down to `Events`,
sends the latest report and heartbeat, and drains the outbox in order. Losing the connection loses
nothing: reports are latest-wins and the outbox is rewound to what was not acknowledged.
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from shoal_protos.errors import ShoalError
from shoal_protos.v1 import agents_pb2, desired_pb2


class Events(Protocol):
    """What the owner of a link is told, and asked. Handlers must not raise."""

    def hello(self) -> agents_pb2.Hello:
        """The first message of every connection."""
        ...

    def heartbeat(self) -> agents_pb2.Heartbeat: ...

    async def on_welcome(self, welcome: agents_pb2.Welcome) -> None: ...

    async def on_desired(self, signed: desired_pb2.Signed) -> None: ...

    async def on_heartbeat(self, reply: agents_pb2.HeartbeatReply) -> None: ...

    def on_lost(self, reason: ShoalError) -> None:
        """The connection ended or could not be made; another attempt follows by itself."""
        ...


class Outbox(Protocol):
    """Spooled messages in order, kept until the controller acknowledges them."""

    def rewind(self) -> None:
        """A new connection: start again from the first unacknowledged message."""
        ...

    async def next(self) -> agents_pb2.Spooled:
        """The next message to send; waits while there is none or too much is unacknowledged."""
        ...

    def acknowledge(self, ack: agents_pb2.Ack) -> None: ...


@dataclass(frozen=True)
class Part:
    """A piece of a blob: `data` at `offset` of `total` bytes."""

    offset: int
    data: bytes
    total: int


class Source(Protocol):
    """Where blobs come from."""

    def fetch(self, digest: str, offset: int = 0, length: int = 0) -> AsyncIterator[Part]:
        """Streams a blob from `offset` on; `length` 0 = to its end.

        Raises:
            Unavailable: not connected, or the connection was lost on the way.
            NotFound: the controller has no such blob.
            Denied: this device may not have it.
        """
        ...


class Content(Protocol):
    """A local blob to push."""

    @property
    def digest(self) -> str: ...

    @property
    def size(self) -> int: ...

    def read(self, offset: int, length: int) -> bytes: ...


class Link(Source, Protocol):
    """One carrier."""

    async def run(self, events: Events) -> None:
        """Connects and stays connected until cancelled."""
        ...

    def report(self, reported: agents_pb2.Reported) -> None:
        """Sends a report now, or the latest one when a connection is made."""
        ...

    async def push(self, content: Content, purpose: str) -> None:
        """Sends a blob, resuming where an earlier attempt stopped.

        Raises:
            Unavailable: not connected, or lost on the way; call again later.
            Overloaded: this device's quota is full.
        """
        ...

    def set_addresses(self, addresses: Sequence[str]) -> None:
        """`host:port`s to try in order from the next connection on."""
        ...

    def set_heartbeat(self, seconds: float) -> None: ...

    async def close(self) -> None: ...


class Backoff:
    """Full jitter (random between 0 and a doubling bound): a fleet that lost its controller must
    not come back all at once."""

    def __init__(self, first: float = 0.5, limit: float = 60.0, source: random.Random | None = None) -> None:
        self._first, self._limit = first, limit
        self._random = source or random.Random()  # noqa: S311  # jitter, not a secret
        self._failures = 0

    def reset(self) -> None:
        self._failures = 0

    def next(self) -> float:
        """Seconds to wait before the next attempt."""
        bound = min(self._limit, self._first * 2**self._failures)
        self._failures = min(self._failures + 1, 32)
        return self._random.uniform(0, bound)
