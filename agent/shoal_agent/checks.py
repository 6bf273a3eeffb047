"""What a check of this machine finds. The form is the contract with controller and pages."""

from __future__ import annotations

from dataclasses import dataclass

OK, WARNING, FAILED, UNMEASURED = "ok", "warning", "failed", "unmeasured"


@dataclass(frozen=True)
class Check:
    """`found` says what is, `remedy` what to do ("" where nothing is wrong)."""

    name: str
    state: str
    found: str
    remedy: str = ""


def size(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def span(seconds: float) -> str:
    """A length of time for people."""
    seconds = abs(seconds)
    for limit, divisor, unit in ((120, 1, "s"), (7200, 60, "min"), (172_800, 3600, "h")):
        if seconds < limit:
            return f"{seconds / divisor:.0f} {unit}"
    days = seconds / 86_400
    return f"{days:.0f} days" if days < 800 else f"{days / 365.25:.0f} years"
