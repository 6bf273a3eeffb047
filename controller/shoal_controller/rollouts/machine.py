"""The states of a rollout, stepped purely: `(state, observations, now) -> (state, what changed)`.

running   wave by wave: start, admit, judge; go -> next wave or promoted; stop -> stopping
paused    still judged, so that harm stops it; nothing new starts
stopping  every device goes back; those offline go back when they return
promoted, rolled_back, aborted    the end
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from shoal_controller.rollouts import plan, verdict
from shoal_controller.rollouts.gates import Gates
from shoal_controller.rollouts.plan import Budget
from shoal_controller.rollouts.verdict import DeviceObservation, Verdict, WaveState

OPEN = ("running", "paused", "stopping")
# A device in one of these has been given the new assignment.
MOVED = ("updating", "settling", "switched", "no_traffic", "failed", "silent")
BUSY = ("updating", "settling")


@dataclass(frozen=True)
class WaveRecord:
    """One wave as stored. state: waiting, running, passed, stopped, carried."""

    name: str
    devices: tuple[str, ...]
    state: str = "waiting"
    started_ms: int = 0
    decided_ms: int = 0
    verdict: Verdict | None = None


@dataclass(frozen=True)
class DeviceRecord:
    """One device as stored. Times in Unix milliseconds, 0 = not yet."""

    device: str
    wave: int
    state: str = "waiting"
    reason: str = ""
    detail: str = ""
    started_ms: int = 0
    switched_ms: int = 0


@dataclass(frozen=True)
class RolloutState:
    state: str
    wave: int
    waves: tuple[WaveRecord, ...]
    devices: Mapping[str, DeviceRecord]
    sentence: str = ""
    aborted: bool = False  # a person stopped it, not a verdict
    stopped_ms: int = 0

    @property
    def ended(self) -> bool:
        return self.state not in OPEN


@dataclass(frozen=True)
class Newcomer:
    """A device that joined, or came to fit the endpoint's filter, after the rollout was planned."""

    device: str


@dataclass(frozen=True)
class Step:
    """What one step changed. `moved` devices need a new desired state."""

    state: RolloutState
    moved: tuple[str, ...] = ()
    happened: tuple[str, ...] = field(default_factory=tuple)  # events: "wave_started", "wave_passed"...


Observations = Mapping[str, DeviceObservation]


def advance(
    rollout: RolloutState,
    observations: Observations,
    gates: Gates,
    now_ms: int,
    *,
    newcomers: Sequence[str] = (),
    labels: Mapping[str, Mapping[str, str]] | None = None,
) -> Step:
    """Takes every step that is due at `now_ms`, at most one wave's decision.

    Args:
        observations: device -> what is known of it; its stored fields (state, times) are taken
            from `rollout`, whatever the observation says.
        newcomers: devices that the endpoint has by now and the rollout does not know.
    """
    if rollout.state == "stopping":
        return _going_back(rollout, observations, gates, now_ms)
    if rollout.ended:
        return Step(rollout)
    if newcomers:
        rollout = _take_in(rollout, newcomers)
    if not rollout.waves:
        return Step(
            replace(rollout, state="promoted", sentence="No device needed a change."), (), ("promoted",)
        )
    rollout, started, happened = _start(rollout, gates, now_ms, labels or {})
    if rollout.waves[rollout.wave].state != "running":
        return Step(rollout, started, happened)
    step = _judge(rollout, observations, gates, now_ms)
    return Step(step.state, (*started, *step.moved), (*happened, *step.happened))


def stop(rollout: RolloutState, sentence: str, now_ms: int, *, aborted: bool = False) -> Step:
    """Every device of the rollout goes back, the healthy-looking ones too."""
    waves = list(rollout.waves)
    if waves:
        current = waves[rollout.wave]
        waves[rollout.wave] = replace(current, state="stopped", decided_ms=now_ms)
    moved = tuple(d.device for d in rollout.devices.values() if d.state in MOVED)
    state = replace(
        rollout, state="stopping", waves=tuple(waves), sentence=sentence, aborted=aborted, stopped_ms=now_ms
    )
    return Step(state, moved, ("aborted" if aborted else "stopped",))


# ------------------------------------------------------------------ going forward


def _take_in(rollout: RolloutState, newcomers: Sequence[str]) -> RolloutState:
    """A newcomer keeps the old assignment until its wave: the last one."""
    new = tuple(d for d in newcomers if d not in rollout.devices)
    if not new:
        return rollout
    waves = list(rollout.waves) or [WaveRecord("100%", ())]
    last = len(waves) - 1
    waves[last] = replace(waves[last], devices=(*waves[last].devices, *new))
    devices = dict(rollout.devices) | {d: DeviceRecord(d, last) for d in new}
    return replace(rollout, waves=tuple(waves), devices=devices)


def _start(
    rollout: RolloutState, gates: Gates, now_ms: int, labels: Mapping[str, Mapping[str, str]]
) -> tuple[RolloutState, tuple[str, ...], tuple[str, ...]]:
    """Starts the wave if it waits, then as many of its devices as the disruption budget allows."""
    if rollout.state == "paused":
        return rollout, (), ()
    happened: tuple[str, ...] = ()
    wave = rollout.waves[rollout.wave]
    if wave.state == "waiting":
        wave = replace(wave, state="running", started_ms=now_ms)
        rollout = replace(rollout, waves=_with(rollout.waves, rollout.wave, wave))
        happened = ("wave_started",)
    waiting = [d for d in wave.devices if rollout.devices[d].state == "waiting"]
    if not waiting:
        return rollout, (), happened
    busy = [d.device for d in rollout.devices.values() if d.state in BUSY]
    budget = Budget(gates.group_by, gates.max_unavailable)
    started = plan.admit(waiting, busy, labels, budget)
    devices = dict(rollout.devices)
    for device in started:
        devices[device] = replace(devices[device], state="updating", started_ms=now_ms)
    return replace(rollout, devices=devices), started, happened


def _judge(rollout: RolloutState, observations: Observations, gates: Gates, now_ms: int) -> Step:
    number = rollout.wave
    wave = rollout.waves[number]
    seen = []
    for record in rollout.devices.values():
        carried = record.wave < number
        if (record.wave == number or (carried and record.state in MOVED)) and record.device in observations:
            seen.append(_with_record(observations[record.device], record, carried=carried, now_ms=now_ms))
    found = verdict.decide(
        WaveState(number, wave.name, len(rollout.waves), wave.started_ms), seen, gates, now_ms
    )
    devices = dict(rollout.devices)
    moved = []
    for outcome, observation in zip(found.outcomes, seen, strict=True):
        old = devices[outcome.device]
        if (old.state, old.reason, old.detail, old.switched_ms) == (
            outcome.state,
            outcome.reason,
            outcome.detail,
            observation.switched_ms,
        ):
            continue
        new = replace(
            old,
            state=outcome.state,
            reason=outcome.reason,
            detail=outcome.detail,
            switched_ms=observation.switched_ms,
        )
        if old.state == "silent" and new.state == "updating":
            new = replace(new, started_ms=now_ms)
        if old.state != new.state and (old.state == "silent" or new.state in ("silent", "failed")):
            moved.append(outcome.device)
        devices[outcome.device] = new
    wave = replace(wave, verdict=found)
    rollout = replace(
        rollout, devices=devices, waves=_with(rollout.waves, number, wave), sentence=found.sentence
    )
    if found.decision == "stop":
        step = stop(rollout, found.sentence, now_ms)
        return Step(step.state, step.moved, step.happened)
    if found.decision != "go" or rollout.state == "paused":
        return Step(rollout, tuple(moved))
    return _passed(rollout, tuple(moved), now_ms)


def _with_record(
    observation: DeviceObservation, record: DeviceRecord, *, carried: bool, now_ms: int
) -> DeviceObservation:
    switched_ms = record.switched_ms
    if observation.serving and observation.wanted and not switched_ms:
        switched_ms = now_ms
    return replace(
        observation,
        state=record.state,
        started_ms=record.started_ms,
        switched_ms=switched_ms,
        carried=carried,
        reason=observation.reason or record.reason,
        detail=observation.detail or record.detail,
    )


def _passed(rollout: RolloutState, moved: tuple[str, ...], now_ms: int) -> Step:
    number = rollout.wave
    wave = rollout.waves[number]
    nobody = not any(rollout.devices[d].state in verdict.DONE_STATES for d in wave.devices)
    wave = replace(wave, state="carried" if nobody else "passed", decided_ms=now_ms)
    rollout = replace(rollout, waves=_with(rollout.waves, number, wave))
    if number + 1 < len(rollout.waves):
        return Step(replace(rollout, wave=number + 1), moved, ("wave_passed",))
    return Step(replace(rollout, state="promoted"), moved, ("wave_passed", "promoted"))


# ------------------------------------------------------------------ going back


def _going_back(rollout: RolloutState, observations: Observations, gates: Gates, now_ms: int) -> Step:
    """Ends when every reachable device serves what it served before; the others do when they return."""
    devices = dict(rollout.devices)
    left = 0
    for record in rollout.devices.values():
        observation = observations.get(record.device)
        if record.state not in MOVED or observation is None:
            continue
        if observation.back:
            reason = record.reason if record.state == "failed" else ""
            devices[record.device] = replace(record, state="rolled_back", reason=reason)
        elif not observation.connected:
            text = "offline: it goes back when it returns"
            devices[record.device] = replace(record, state="silent", reason=text)
        else:
            left += 1
    rollout = replace(rollout, devices=devices)
    if left and now_ms < rollout.stopped_ms + gates.update_s * 1000:
        return Step(rollout)
    final = "aborted" if rollout.aborted else "rolled_back"
    return Step(replace(rollout, state=final), (), (final,))


def _with(waves: Sequence[WaveRecord], number: int, wave: WaveRecord) -> tuple[WaveRecord, ...]:
    changed = list(waves)
    changed[number] = wave
    return tuple(changed)
