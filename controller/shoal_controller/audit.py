"""Who did what, as one log line an event: the event log is the audit trail, this prints it."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from shoal_controller.store.tables import Event

log = logging.getLogger("shoal.audit")


def describe(event: Event) -> str:
    """One line: who, what, on what, why."""
    reason = f": {event.reason}" if event.reason else ""
    return f"{event.actor} {event.verb.replace('_', ' ')} {event.kind} {event.object}{reason}"


def log_events(events: Sequence[Event]) -> None:
    """An event feed's listener."""
    for event in events:
        log.info("%s", describe(event))
