"""Following one object until it ends: redrawn in place on a terminal, a line a change when piped."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from shoal_controller.cli import durations, output
from shoal_protos.errors import ShoalError, Unavailable

T = TypeVar("T")

INTERVAL_S = 1.0
PATIENCE_S = 30.0  # how long a watched controller may be away


class StillGoing(ShoalError):
    """Watching ended before the thing that was watched."""

    code = "timed_out"


@dataclass(frozen=True)
class Watched(Generic[T]):
    """How to follow one kind of object."""

    fetch: Callable[[], T]
    ended: Callable[[T], bool]
    draw: Callable[[T], Any]  # a rich renderable
    line: Callable[[T], str]  # one line of text, without times that change by themselves


def watch(watched: Watched[T], *, form: str, timeout: str = "", interval_s: float = INTERVAL_S) -> T:
    """Follows until the object ended and returns its last state.

    Raises:
        StillGoing: `timeout` passed first (exit code 6).
        Unavailable: the controller was away for longer than `PATIENCE_S`.
    """
    limit = time.monotonic() + durations.parse(timeout) if timeout else float("inf")
    follow = _redraw if form == "table" else _append
    return follow(watched, limit, interval_s, form)


def _states(watched: Watched[T], limit: float, interval_s: float) -> Iterator[T]:
    away_since: float | None = None
    while True:
        try:
            item = watched.fetch()
            away_since = None
        except Unavailable:
            away_since = away_since or time.monotonic()
            if time.monotonic() - away_since > PATIENCE_S:
                raise
        else:
            yield item
            if watched.ended(item):
                return
        if time.monotonic() > limit:
            raise StillGoing("Stopped watching; it is still going.", "The same command follows it again.")
        time.sleep(interval_s)


def _append(watched: Watched[T], limit: float, interval_s: float, form: str) -> T:
    last, shown = None, None
    for item in _states(watched, limit, interval_s):
        last = item
        if form == "silent":
            continue
        current = output.dump(item) if form == "json" else watched.line(item)
        if current != shown:
            shown = current
            if form == "json":
                output.print_json(item, indent=None)
            else:
                sys.stdout.write(f"{current}\n")
                sys.stdout.flush()
    assert last is not None
    return last


def _redraw(watched: Watched[T], limit: float, interval_s: float, form: str) -> T:
    from rich.live import Live

    last = None
    with Live(console=output.stdout(), auto_refresh=False, vertical_overflow="visible") as live:
        for item in _states(watched, limit, interval_s):
            last = item
            live.update(watched.draw(item), refresh=True)
    assert last is not None
    return last
