"""A device's answer to `diagnose`, read for people: the form of docs/architecture.md, "Requests"."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from shoal_agent.checks import FAILED, OK, UNMEASURED, WARNING
from shoal_agent.checks import Check as Check

STATES = (OK, WARNING, FAILED, UNMEASURED)
MAX_ROWS = 200
MAX_TEXT = 2000
NOTHING = ("", "[]", "{}")  # facts that say nothing


@dataclass(frozen=True)
class Transition:
    """One step of a placement on the device. `time_ms` is the device's own clock, Unix ms."""

    time_ms: int
    endpoint: str
    before: str
    after: str
    reason: str


@dataclass(frozen=True)
class Diagnosis:
    checks: tuple[Check, ...]
    facts: tuple[tuple[str, str], ...]
    transitions: tuple[Transition, ...]  # newest first

    @property
    def wrong(self) -> tuple[Check, ...]:
        """What needs somebody, the worst first."""
        order = {"failed": 0, "warning": 1}
        return tuple(sorted((c for c in self.checks if c.state in order), key=lambda c: order[c.state]))

    @property
    def sentence(self) -> str:
        """`2 of 9 checks need you: disk, clock.`"""
        if not self.wrong:
            unknown = sum(check.state == "unmeasured" for check in self.checks)
            fine = len(self.checks) - unknown
            verb = "check is" if fine == 1 else "checks are"
            return f"{fine} {verb} fine{f', {unknown} unmeasured' if unknown else ''}."
        names = ", ".join(check.name for check in self.wrong)
        verb = "needs" if len(self.wrong) == 1 else "need"
        return f"{len(self.wrong)} of {len(self.checks)} checks {verb} you: {names}."


def read(text: str) -> Diagnosis | None:
    """None for anything that is not such an answer: an older agent's is plain text, to be shown as it is."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict) or not isinstance(value.get("checks"), list):
        return None
    facts = value.get("facts")
    transitions = [_transition(item) for item in _rows(value.get("transitions"))]
    return Diagnosis(
        tuple(_check(item) for item in _rows(value["checks"])),
        tuple(pair for pair in _flat(facts) if pair[1] not in NOTHING)[:MAX_ROWS]
        if isinstance(facts, dict)
        else (),
        tuple(sorted(transitions, key=lambda t: t.time_ms, reverse=True)),
    )


def _rows(value: Any) -> list[Mapping[str, Any]]:
    if not isinstance(value, list):
        return []
    found: list[Mapping[str, Any]] = [item for item in value if isinstance(item, dict)]
    return found[:MAX_ROWS]


def _check(item: Mapping[str, Any]) -> Check:
    state = _text(item.get("state"))
    known = state if state in STATES else "unmeasured"
    return Check(_text(item.get("name")) or "?", known, _text(item.get("found")), _text(item.get("remedy")))


def _transition(item: Mapping[str, Any]) -> Transition:
    at = item.get("time_ms")
    time_ms = int(at) if isinstance(at, (int, float)) and 0 <= at < 1 << 53 else 0
    names = ("endpoint", "from", "to", "reason")
    return Transition(time_ms, *(_text(item.get(name)) for name in names))


def _flat(value: Mapping[str, Any], prefix: str = "", depth: int = 0) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    for key, item in value.items():
        name = f"{prefix}{key}"[:120]
        if isinstance(item, dict) and depth < 4:
            found += _flat(item, f"{name}.", depth + 1)
        elif isinstance(item, (list, dict)):
            found.append((name, _text(json.dumps(item, ensure_ascii=False))))
        else:
            found.append((name, _text(item)))
    return found


def _text(value: Any) -> str:
    if value is None:
        return ""
    return ("yes" if value else "no") if isinstance(value, bool) else str(value)[:MAX_TEXT]
