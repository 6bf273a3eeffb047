"""How one placement moves to another bundle, as a pure table: (state, event) -> state.

    fetch -> verify -> probe -> switch -> settle -> commit
                 every failure -> the bundle that served before

Each step has one action (see `executor.py`), which is started after the state with that step was
saved; so whatever step is found on disk after a crash can be resumed or rolled back. An event that
no row handles is a bug and raises `UnhandledEvent`.
"""
# ruff: noqa: E501  # the table is read as one picture

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

from shoal_protos.v1 import desired_pb2

MAX_FAILED = 16  # remembered failures of one placement
MAX_RESUMES = 1  # restarts allowed while a new bundle is switched to or watched: one ordinary reboot
MAX_PROBE_RESUMES = 2  # restarts after which a probe is blamed for them


class UnhandledEvent(AssertionError):
    """The table has no row for this event in this step."""


class Step(str, Enum):
    WAITING = "waiting"  # nothing may be installed now
    FETCH = "fetch"
    VERIFY = "verify"
    PROBE = "probe"
    SWITCH = "switch"
    SETTLE = "settle"
    COMMIT = "commit"  # done: the wanted bundle serves
    ROLL_BACK = "roll back"  # the bundle before is being put back
    ROLLED_BACK = "rolled back"  # done: failed, the bundle before serves
    FAILED = "failed"  # done: failed, and nothing served before
    UNLOAD = "unload"
    GONE = "gone"  # done: forget the placement


@dataclass(frozen=True)
class Wanted:
    """A bundle with the settings it is to serve under. `settings` is a serialized PlacementSettings."""

    bundle: str
    attempt: int = 0
    settings: bytes = b""

    @property
    def parsed(self) -> desired_pb2.PlacementSettings:
        return desired_pb2.PlacementSettings.FromString(self.settings)


@dataclass(frozen=True)
class Failure:
    bundle: str
    attempt: int
    reason: str


@dataclass(frozen=True)
class PlacementState:
    """Everything that survives a power cut. `base` is committed: what every failure leads back to."""

    endpoint: str
    role: int
    step: Step
    wanted: Wanted
    base: Wanted | None = None
    failures: tuple[Failure, ...] = ()
    reason: str = ""  # short, for grouping: "probe: golden mismatch"
    detail: str = ""
    resumes: int = 0  # supervisor starts seen in this step
    baseline_p95_us: float = 0.0  # of the base before the switch; 0 = unknown
    probe: bytes = b""  # serialized ProbeReport of the wanted bundle

    def failure(self) -> Failure | None:
        """Why the wanted bundle may not be tried: it failed under this attempt or a later one."""
        for failed in reversed(self.failures):
            if failed.bundle == self.wanted.bundle and failed.attempt >= self.wanted.attempt:
                return failed
        return None


def answering(state: PlacementState) -> Wanted | None:
    """What the server should answer with in this step, should it have to start anew."""
    if state.step is Step.SETTLE:
        return state.wanted
    if state.step in (Step.UNLOAD, Step.GONE):
        return None
    return state.base


# ---------------------------------------------------------------------------- events


@dataclass(frozen=True)
class Want:
    """The desired state names this placement."""

    wanted: Wanted


@dataclass(frozen=True)
class Drop:
    """The desired state no longer names this placement."""


@dataclass(frozen=True)
class Done:
    """The step's action succeeded."""

    probe: bytes = b""
    baseline_p95_us: float = 0.0
    detail: str = ""


@dataclass(frozen=True)
class Failed:
    """The step's action failed for good."""

    reason: str
    detail: str = ""
    probe: bytes = b""


@dataclass(frozen=True)
class Withheld:
    """Trust lets nothing be installed now."""

    detail: str = ""


@dataclass(frozen=True)
class Allowed:
    """Trust may let things be installed again."""


@dataclass(frozen=True)
class ServerDied:
    """The server process ended by itself."""


@dataclass(frozen=True)
class Started:
    """The supervisor started and found this state on disk."""


@dataclass(frozen=True)
class BaseLost:
    """The committed bundle can no longer be loaded (its files are damaged)."""

    detail: str = ""


Event = Want | Drop | Done | Failed | Withheld | Allowed | ServerDied | Started | BaseLost
Handler = Callable[[PlacementState, Any], PlacementState]


# ---------------------------------------------------------------------------- handlers


def _stay(state: PlacementState, event: Event) -> PlacementState:
    return state


def _bug(state: PlacementState, event: Event) -> PlacementState:
    raise UnhandledEvent(f"{state.endpoint}: {type(event).__name__} in step '{state.step.value}'")


def _to(step: Step) -> Handler:
    def move(state: PlacementState, event: Event) -> PlacementState:
        return replace(state, step=step, resumes=0)

    return move


def _want(state: PlacementState, event: Want) -> PlacementState:
    """A quiet placement: only the base is loaded."""
    if event.wanted == state.wanted:
        return state
    return _head_for(_aim(state, event.wanted))


def _want_back(state: PlacementState, event: Want) -> PlacementState:
    """Another bundle than the base may be loaded: put the base back first, then see."""
    if event.wanted == state.wanted:
        return state
    return replace(_aim(state, event.wanted), step=Step.ROLL_BACK)


def _want_again(state: PlacementState, event: Want) -> PlacementState:
    """The placement came back while it was being unloaded: nothing is loaded that counts."""
    return _head_for(_aim(replace(state, base=None), event.wanted))


def _aim(state: PlacementState, wanted: Wanted) -> PlacementState:
    return replace(state, wanted=wanted, reason="", detail="", resumes=0, baseline_p95_us=0.0, probe=b"")


def _head_for(state: PlacementState) -> PlacementState:
    """The first step towards `wanted`, with only the base loaded."""
    failed = state.failure()
    base = state.base
    if base is not None and base.bundle == state.wanted.bundle and base.settings == state.wanted.settings:
        return replace(state, step=Step.COMMIT, base=state.wanted)
    if failed is not None:
        step = Step.FAILED if base is None else Step.ROLLED_BACK
        return replace(state, step=step, reason=failed.reason)
    if base is not None and base.bundle == state.wanted.bundle:
        return replace(state, step=Step.SWITCH)  # proven already: only load it under its new settings
    return replace(state, step=Step.FETCH)


def _probed(state: PlacementState, event: Done) -> PlacementState:
    return replace(
        state, step=Step.SWITCH, resumes=0, probe=event.probe, baseline_p95_us=event.baseline_p95_us
    )


def _switched(state: PlacementState, event: Done) -> PlacementState:
    proven = state.base is not None and state.base.bundle == state.wanted.bundle
    if state.wanted.parsed.settle.seconds and not proven:
        return replace(state, step=Step.SETTLE, detail=event.detail)  # resumes go on counting
    return _commit(replace(state, detail=event.detail), event)


def _commit(state: PlacementState, event: Done) -> PlacementState:
    return replace(state, step=Step.COMMIT, base=state.wanted, resumes=0, reason="")


def _put_back(state: PlacementState, event: Done) -> PlacementState:
    detail = state.detail
    return replace(_head_for(replace(state, resumes=0)), detail=detail)


def _fail(state: PlacementState, event: Failed) -> PlacementState:
    """Nothing but the base was ever loaded."""
    return _head_for(_blame(state, event.reason, event.detail, event.probe))


def _fail_back(state: PlacementState, event: Failed) -> PlacementState:
    return replace(_blame(state, event.reason, event.detail, event.probe), step=Step.ROLL_BACK)


def _blame(state: PlacementState, reason: str, detail: str = "", probe: bytes = b"") -> PlacementState:
    failure = Failure(state.wanted.bundle, state.wanted.attempt, reason)
    others = tuple(item for item in state.failures if item.bundle != failure.bundle)
    return replace(
        state,
        failures=(*others, failure)[-MAX_FAILED:],
        reason=reason,
        detail=detail,
        resumes=0,
        probe=probe or state.probe,
    )


def _crashed(state: PlacementState, event: ServerDied) -> PlacementState:
    reason = f"{state.step.value}: the server crashed"
    return replace(_blame(state, reason), step=Step.ROLL_BACK)


def _lost_for_good(state: PlacementState, event: Failed) -> PlacementState:
    """Not even the base can be loaded."""
    reason = state.reason or "roll back: the bundle before cannot be loaded"
    lost = replace(state, base=None, detail=event.detail, reason=reason)
    if lost.failure() is None and state.base is not None and state.base.bundle == lost.wanted.bundle:
        return replace(lost, step=Step.FETCH)  # its files are damaged: get them again
    return replace(lost, step=Step.FAILED)


def _withhold(state: PlacementState, event: Withheld) -> PlacementState:
    return replace(state, step=Step.WAITING, detail=event.detail, resumes=0)


def _allow(state: PlacementState, event: Allowed) -> PlacementState:
    return _head_for(replace(state, detail=""))


def _resume_probe(state: PlacementState, event: Started) -> PlacementState:
    if state.resumes >= MAX_PROBE_RESUMES:
        return _head_for(_blame(state, "probe: the device restarted during each probe"))
    return replace(state, resumes=state.resumes + 1)


def _resume_switch(state: PlacementState, event: Started) -> PlacementState:
    """The new server has nothing loaded: load the new bundle again and settle from the start, once."""
    if state.resumes >= MAX_RESUMES:
        blamed = _blame(state, f"{state.step.value}: restarted more than once")
        return replace(blamed, step=Step.ROLL_BACK)
    return replace(state, step=Step.SWITCH, resumes=state.resumes + 1)


def _lose_base(state: PlacementState, event: BaseLost) -> PlacementState:
    return replace(state, base=None, detail=event.detail)


def _refetch(state: PlacementState, event: BaseLost) -> PlacementState:
    return replace(state, base=None, detail=event.detail, step=Step.FETCH)


def _fail_without_base(state: PlacementState, event: BaseLost) -> PlacementState:
    return replace(state, base=None, detail=event.detail, step=Step.FAILED)


# ---------------------------------------------------------------------------- the table

_COLUMNS = (Want, Drop, Done, Failed, Withheld, Allowed, ServerDied, Started, BaseLost)
_drop = _to(Step.UNLOAD)
_verify, _probe, _gone = _to(Step.VERIFY), _to(Step.PROBE), _to(Step.GONE)

# fmt: off
_ROWS: Mapping[Step, tuple[Handler, ...]] = {
    #                  Want         Drop   Done       Failed          Withheld   Allowed  ServerDied Started         BaseLost
    Step.WAITING:     (_want,       _drop, _bug,      _bug,           _bug,      _allow,  _stay,     _stay,          _lose_base),
    Step.FETCH:       (_want,       _drop, _verify,   _fail,          _withhold, _stay,   _stay,     _stay,          _lose_base),
    Step.VERIFY:      (_want,       _drop, _probe,    _fail,          _withhold, _stay,   _stay,     _stay,          _lose_base),
    Step.PROBE:       (_want,       _drop, _probed,   _fail,          _withhold, _stay,   _stay,     _resume_probe,  _lose_base),
    Step.SWITCH:      (_want_back,  _drop, _switched, _fail_back,     _withhold, _stay,   _crashed,  _resume_switch, _lose_base),
    Step.SETTLE:      (_want_back,  _drop, _commit,   _fail_back,     _bug,      _stay,   _crashed,  _resume_switch, _lose_base),
    Step.COMMIT:      (_want,       _drop, _bug,      _bug,           _bug,      _stay,   _stay,     _stay,          _refetch),
    Step.ROLL_BACK:   (_want_back,  _drop, _put_back, _lost_for_good, _bug,      _stay,   _stay,     _stay,          _lose_base),
    Step.ROLLED_BACK: (_want,       _drop, _bug,      _bug,           _bug,      _stay,   _stay,     _stay,          _fail_without_base),
    Step.FAILED:      (_want,       _drop, _bug,      _bug,           _bug,      _stay,   _stay,     _stay,          _lose_base),
    Step.UNLOAD:      (_want_again, _stay, _gone,     _gone,          _bug,      _stay,   _stay,     _stay,          _stay),
    Step.GONE:        (_want_again, _stay, _bug,      _bug,           _bug,      _stay,   _stay,     _stay,          _stay),
}
# fmt: on

TABLE: Mapping[tuple[Step, type], Handler] = {
    (step, column): handler
    for step, row in _ROWS.items()
    for column, handler in zip(_COLUMNS, row, strict=True)
}


def begin(endpoint: str, role: int, wanted: Wanted) -> PlacementState:
    """A placement seen for the first time."""
    return PlacementState(endpoint, role, Step.FETCH, wanted)


def step(state: PlacementState, event: Event) -> PlacementState:
    """The state after `event`; the same object if nothing changes.

    Raises:
        UnhandledEvent: a bug: this event cannot happen in this step.
    """
    return TABLE[state.step, type(event)](state, event)


# ---------------------------------------------------------------------------- on disk


def to_json(state: PlacementState) -> dict[str, Any]:
    return {
        "endpoint": state.endpoint,
        "role": state.role,
        "step": state.step.value,
        "wanted": _wanted_json(state.wanted),
        "base": _wanted_json(state.base) if state.base is not None else None,
        "failures": [vars(item) for item in state.failures],
        "reason": state.reason,
        "detail": state.detail,
        "resumes": state.resumes,
        "baseline_p95_us": state.baseline_p95_us,
        "probe": base64.b64encode(state.probe).decode(),
    }


def from_json(value: Mapping[str, Any]) -> PlacementState:
    """Raises KeyError, TypeError or ValueError if `value` is not a saved state."""
    return PlacementState(
        endpoint=value["endpoint"],
        role=value["role"],
        step=Step(value["step"]),
        wanted=_wanted(value["wanted"]),
        base=_wanted(value["base"]) if value["base"] is not None else None,
        failures=tuple(Failure(**item) for item in value["failures"]),
        reason=value["reason"],
        detail=value["detail"],
        resumes=value["resumes"],
        baseline_p95_us=value["baseline_p95_us"],
        probe=base64.b64decode(value["probe"]),
    )


def _wanted_json(wanted: Wanted) -> dict[str, Any]:
    settings = base64.b64encode(wanted.settings).decode()
    return {"bundle": wanted.bundle, "attempt": wanted.attempt, "settings": settings}


def _wanted(value: Mapping[str, Any]) -> Wanted:
    return Wanted(value["bundle"], value["attempt"], base64.b64decode(value["settings"]))
