"""Spans of time as people type and read them."""

from __future__ import annotations

import re

from shoal_protos.errors import InvalidInput

_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def parse(text: str) -> float:
    """Seconds of `90s`, `10m`, `1h30m`, `2d`, or plain seconds `90`.

    Raises:
        InvalidInput: anything else.
    """
    cleaned = text.strip().lower()
    if re.fullmatch(r"\d+(\.\d+)?", cleaned):
        return float(cleaned)
    parts = re.findall(r"(\d+(?:\.\d+)?)(ms|[smhd])", cleaned)
    if not parts or "".join(number + unit for number, unit in parts) != cleaned:
        raise InvalidInput(f"'{text}' is not a span of time.", "Write it like 30s, 10m, 1h30m or 2d.")
    return sum(float(number) * _UNITS[unit] for number, unit in parts)


def text(seconds: float) -> str:
    """`12s`, `5m`, `3h`, `2d`: the largest unit that is not zero, rounded down."""
    for unit in ("d", "h", "m"):
        if seconds >= _UNITS[unit]:
            return f"{int(seconds // _UNITS[unit])}{unit}"
    return f"{max(0, int(seconds))}s"
