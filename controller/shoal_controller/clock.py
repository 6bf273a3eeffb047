"""The one way to ask for the time: a `Clock`, given to whatever needs it, so that tests own time."""

from __future__ import annotations

import time
from collections.abc import Callable

Clock = Callable[[], int]
"""Returns Unix milliseconds on the controller's clock."""


def now_ms() -> int:
    """Unix milliseconds from the system's clock."""
    return time.time_ns() // 1_000_000
