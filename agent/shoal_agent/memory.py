"""Keeps a long-lived small process small, where the C library is glibc; elsewhere nothing happens.

glibc gives each thread an arena of its own and keeps freed memory in it. The supervisor's few
threads hardly allocate at once, so one arena costs no speed and saves megabytes (see mallopt(3)).
"""

from __future__ import annotations

import contextlib
import ctypes

_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_M_ARENA_MAX = -8


def restrict() -> None:
    """One arena, and large blocks go back to the system when freed. Call before starting threads."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_ARENA_MAX, 1)
        libc.mallopt(_M_MMAP_THRESHOLD, 64 << 10)  # also fixes it: it would grow by itself
        libc.mallopt(_M_TRIM_THRESHOLD, 64 << 10)


def release() -> None:
    """Gives freed pages back to the system."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
