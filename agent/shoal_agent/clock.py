"""Time as a value that tests can hold: everything that waits or dates something takes a `Clock`."""

from __future__ import annotations

import asyncio
import time
from typing import Protocol


class Clock(Protocol):
    """Wall time, monotonic time and sleeping."""

    def wall_ms(self) -> int:
        """Unix time in milliseconds, as the device believes it."""
        ...

    def monotonic_ns(self) -> int:
        """Nanoseconds since boot, counting suspended time where the system can."""
        ...

    async def sleep(self, seconds: float) -> None: ...


class SystemClock:
    """The machine's own clock."""

    def wall_ms(self) -> int:
        return time.time_ns() // 1_000_000

    def monotonic_ns(self) -> int:
        source = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
        return time.clock_gettime_ns(source)

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)
