"""The verdict on one wave: go, stop or collecting, with its sentence and its evidence. Pure.

Nothing here waits for ever. A device that misses is typed, and each type has its deadline:

    silent            not heard of since before it could know   silent_s -> carried over
    planned_offline   its label says so                         at once  -> carried over
    updating          heard of, but not done                    update_s -> failed
    no_traffic        switched, no request since                settle_s (observe_s if it had traffic before)
    too_few           switched, fewer than min_requests         observe_s

A device that took the new assignment and then fell silent is a failure, not missing data: it may
be the new assignment that silenced it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from shoal_controller.rollouts import statistics
from shoal_controller.rollouts.gates import Gates
from shoal_controller.rollouts.statistics import Estimate, Pair, Period

Decision = Literal["go", "stop", "collecting"]

# Interim looks use Haybittle and Peto's strict boundary; the last look the usual one.
INTERIM_CONFIDENCE = 0.999
FINAL_CONFIDENCE = 0.95

DONE_STATES = ("switched", "no_traffic", "too_few")


@dataclass(frozen=True)
class DeviceObservation:
    """What is known of one device of a wave. Times are Unix milliseconds, 0 = never."""

    device: str
    name: str
    profile_class: str
    state: str  # as stored: waiting, updating, settling, switched, failed, silent, no_traffic, rolled_back
    started_ms: int  # when its desired state began to name the new assignment
    switched_ms: int = 0
    last_seen_ms: int = 0
    connected: bool = False
    planned_offline: bool = False
    carried: bool = False  # from an earlier wave: never waited for
    wanted: bool = False  # its report speaks of the wanted bundle and attempt
    step: str = ""  # of that placement, lower case: "fetch", "probe", "commit", "rolled_back"...
    serving: bool = False  # the wanted bundle answers
    reason: str = ""
    detail: str = ""
    before: Period = field(default_factory=Period)
    after: Period = field(default_factory=Period)
    emulated: bool = False  # gives no timing evidence: its periods have no latency
    back: bool = False  # the bundle of before answers again, or nothing if there was none


@dataclass(frozen=True)
class WaveState:
    """A running wave. Times in Unix milliseconds."""

    number: int  # from 0
    name: str
    total: int  # waves of the rollout
    started_ms: int


@dataclass(frozen=True)
class Outcome:
    """What a device's state becomes."""

    device: str
    state: str
    reason: str = ""
    detail: str = ""


@dataclass(frozen=True)
class EffectView:
    """New against old with its 95 % interval beside its gate; `unit` "%" or "points"."""

    name: str
    value: float | None
    low: float | None
    high: float | None
    gate: float
    unit: str
    n: int
    sentence: str


@dataclass(frozen=True)
class Verdict:
    decision: Decision
    sentence: str
    outcomes: tuple[Outcome, ...]
    effects: tuple[EffectView, ...]
    deadline_ms: int  # by then this wave is decided, whatever happens; rises only with a switch


def decide(wave: WaveState, devices: Sequence[DeviceObservation], gates: Gates, now_ms: int) -> Verdict:
    """Decides on a wave from everything known at `now_ms`."""
    outcomes = tuple(classify(device, gates, now_ms) for device in devices)
    state = {outcome.device: outcome for outcome in outcomes}
    own = [device for device in devices if not device.carried]
    counts = _count(state[device.device].state for device in own)
    deadline = _deadline(wave, devices, state, gates)
    effects = effect_views(devices, gates)

    failed = [state[d.device] for d in devices if state[d.device].state == "failed"]
    if len(failed) > int(gates.max_failed_share * len(devices)):
        return Verdict("stop", _failed_sentence(wave, failed, devices), outcomes, effects, deadline)

    pending = counts.get("waiting", 0) + counts.get("updating", 0) + counts.get("settling", 0)
    switched = [d for d in devices if state[d.device].state in DONE_STATES]
    last = max((d.switched_ms for d in switched if not d.carried), default=0)
    over = bool(switched) and not pending and now_ms >= last + gates.observe_s * 1000
    harm = _harm(switched, gates, FINAL_CONFIDENCE if over else INTERIM_CONFIDENCE)
    if harm:
        return Verdict("stop", f"{_wave(wave)} stopped: {harm}", outcomes, effects, deadline)

    if pending:
        return Verdict("collecting", _pending_sentence(wave, counts, own), outcomes, effects, deadline)
    if not switched:
        return _without_devices(wave, devices, outcomes, gates, now_ms, deadline)
    if now_ms < last + gates.settle_s * 1000:
        left = (last + gates.settle_s * 1000 - now_ms) / 1000
        text = f"{_wave(wave)}: {_all(len(switched))} switched, watched for {left:.0f} s more."
        return Verdict("collecting", text, outcomes, effects, deadline)
    return _judge(wave, switched, state, effects, gates, over, outcomes, deadline)


# ------------------------------------------------------------------ one device


def classify(device: DeviceObservation, gates: Gates, now_ms: int) -> Outcome:
    """The state of one device, with the reason people read."""
    if device.state in ("failed", "rolled_back", "waiting"):
        return Outcome(device.device, device.state, device.reason, device.detail)
    if device.state == "silent" and device.connected and not device.wanted:
        return Outcome(device.device, "updating", "it is back")
    if device.wanted and device.step in ("rolled_back", "failed"):
        return Outcome(device.device, "failed", device.reason or "the update failed", device.detail)
    heard_ms = max(device.last_seen_ms, device.started_ms)
    silent = not device.connected and now_ms - heard_ms >= gates.silent_s * 1000
    if device.wanted and silent:
        text = f"silent for {(now_ms - heard_ms) / 1000:.0f} s since it took the new assignment"
        return Outcome(device.device, "failed", text)
    if device.serving and device.step == "commit":
        return Outcome(device.device, *_traffic(device, gates, now_ms))
    late = now_ms - device.started_ms >= gates.update_s * 1000
    if device.wanted and device.step == "settle" and not late:
        return Outcome(device.device, "settling")
    if device.planned_offline and not device.connected:
        return Outcome(device.device, "silent", "planned offline", "It updates when it returns.")
    if silent:
        return Outcome(device.device, "silent", "not heard of", "It updates when it returns.")
    if device.state == "silent" and not device.connected:
        return Outcome(device.device, "silent", device.reason, device.detail)
    if late:
        if not device.wanted and device.last_seen_ms < device.started_ms:
            return Outcome(device.device, "silent", "not heard of", "It updates when it returns.")
        return Outcome(
            device.device,
            "failed",
            f"not done after {gates.update_s:.0f} s",
            f"Last step: {device.step or 'none'}.",
        )
    return Outcome(device.device, "updating", device.step)


def _traffic(device: DeviceObservation, gates: Gates, now_ms: int) -> tuple[str, str]:
    since = now_ms - (device.switched_ms or now_ms)
    if device.after.requests >= gates.min_requests:
        return "switched", ""
    if device.after.requests == 0 and since >= gates.settle_s * 1000:
        return "no_traffic", "no request since it switched"
    if device.after.requests and since >= gates.observe_s * 1000:
        return "switched", f"only {device.after.requests} requests since it switched"
    return "switched", ""


# ------------------------------------------------------------------ effects


def effect_views(devices: Sequence[DeviceObservation], gates: Gates) -> tuple[EffectView, ...]:
    """Every effect with its 95 % interval, for people; None where it cannot be known yet."""
    pairs = [Pair(d.before, d.after) for d in devices if d.serving]
    latency = statistics.latency_change(pairs, min_requests=gates.min_requests)
    errors = statistics.error_change(pairs)
    accuracy = statistics.accuracy_change(pairs)
    return (
        _view(
            "latency_p95",
            latency,
            gates.latency_p95_increase,
            "%",
            "p95 latency",
            "devices with enough requests",
            emulated=bool(devices) and all(d.emulated for d in devices),
        ),
        _view("error_share", errors, gates.error_share_increase, "points", "share of errors", "requests"),
        _view("accuracy", accuracy, -gates.accuracy_drop, "points", "accuracy", "labels"),
    )


def _view(
    name: str,
    estimate: Estimate | None,
    gate: float,
    unit: str,
    title: str,
    of: str,
    *,
    emulated: bool = False,
) -> EffectView:
    if estimate is None:
        text = (
            f"{title} unmeasured (emulated): all devices are." if emulated else f"No {of} on both sides yet."
        )
        return EffectView(name, None, None, None, gate * 100, unit, 0, text)
    value, low, high = (100 * x for x in (estimate.value, estimate.low, estimate.high))
    text = (
        f"{title[0].upper()}{title[1:]} {value:+.1f} {unit} (95 % interval {low:+.1f} to {high:+.1f}), "
        f"gate {gate * 100:+.1f}, from {estimate.n} {of}."
    )
    return EffectView(name, value, low, high, gate * 100, unit, estimate.n, text)


def _harm(devices: Sequence[DeviceObservation], gates: Gates, confidence: float) -> str:
    """The sentence of the first harm shown with this confidence, "" if none is."""
    pairs = [Pair(d.before, d.after) for d in devices]
    errors = statistics.error_change(pairs, confidence)
    if errors and errors.low > gates.error_share_increase:
        return (
            f"the share of errors rose by {100 * errors.value:.1f} points (at least {100 * errors.low:.1f}; "
            f"allowed {100 * gates.error_share_increase:.1f}) over {errors.n} requests."
        )
    if errors is None and (text := _errors_alone(devices, gates, confidence)):
        return text
    accuracy = statistics.accuracy_change(pairs, confidence)
    if accuracy and accuracy.n >= gates.min_labels and accuracy.high < -gates.accuracy_drop:
        return (
            f"accuracy fell by {-100 * accuracy.value:.1f} points (at least {-100 * accuracy.high:.1f}; "
            f"allowed {100 * gates.accuracy_drop:.1f}) over {accuracy.n} labels."
        )
    timed = [Pair(d.before, d.after) for d in devices if not d.emulated]
    return _slower(timed, gates, confidence) or _above_limit(devices, gates, confidence)


def _errors_alone(devices: Sequence[DeviceObservation], gates: Gates, confidence: float) -> str:
    """Without a before (a first assignment), errors are judged against none."""
    after = statistics.share(
        sum(d.after.errors for d in devices), sum(d.after.requests for d in devices), confidence
    )
    if after and after.low > gates.error_share_increase:
        allowed = 100 * gates.error_share_increase
        return f"{100 * after.value:.1f} % of {after.n} requests failed (allowed {allowed:.1f} %)."
    return ""


def _slower(pairs: Sequence[Pair], gates: Gates, confidence: float) -> str:
    judged = [
        pair for pair in pairs if _rise_ms(pair) >= gates.latency_floor_ms
    ]  # below the floor nobody notices, whatever the ratio
    change = statistics.latency_change(judged, min_requests=gates.min_requests, confidence=confidence)
    if not change or change.low <= gates.latency_p95_increase or len(judged) * 2 < len(pairs):
        return ""
    return (
        f"p95 latency rose by {100 * change.value:.0f} % (at least {100 * change.low:.0f} %; "
        f"allowed {100 * gates.latency_p95_increase:.0f} %) on {change.n} devices."
    )


def _rise_ms(pair: Pair) -> float:
    if pair.before.latency is None or pair.after.latency is None:
        return 0.0
    before = statistics.quantile(pair.before.latency, 0.95)
    after = statistics.quantile(pair.after.latency, 0.95)
    return after.value - before.value if before and after else 0.0


def _above_limit(devices: Sequence[DeviceObservation], gates: Gates, confidence: float) -> str:
    """The objective's limit, per class: broken now, and not already broken before."""
    if not gates.latency_limit_ms:
        return ""
    for name in sorted({d.profile_class for d in devices}):
        members = [d for d in devices if d.profile_class == name]
        after = _merged(members, "after", gates, confidence)
        before = _merged(members, "before", gates, confidence)
        broken = after is not None and after.low > gates.latency_limit_ms
        if broken and after and not (before and before.high > gates.latency_limit_ms):
            return (
                f"p95 latency of class {name} is {after.value:.1f} ms (at least {after.low:.1f}), "
                f"above the objective's {gates.latency_limit_ms:g} ms, over {after.n} requests."
            )
    return ""


def _merged(
    devices: Sequence[DeviceObservation], side: str, gates: Gates, confidence: float
) -> Estimate | None:
    periods: list[Period] = [getattr(device, side) for device in devices]
    merged = statistics.merge_histograms(p.latency for p in periods if p.latency is not None)
    if merged is None or merged.count < gates.min_requests:
        return None
    return statistics.quantile(merged, 0.95, confidence)


# ------------------------------------------------------------------ decisions and sentences


def _judge(
    wave: WaveState,
    switched: Sequence[DeviceObservation],
    state: Mapping[str, Outcome],
    effects: tuple[EffectView, ...],
    gates: Gates,
    over: bool,
    outcomes: tuple[Outcome, ...],
    deadline: int,
) -> Verdict:
    requests = sum(d.after.requests for d in switched)
    carried = sum(1 for d in state.values() if d.state == "silent")
    tail = f" {_all(carried)} not reached, carried over." if carried else ""
    head = f"{_wave(wave)} passed: {_all(len(switched))} switched"
    if requests == 0:
        expected = any(d.before.requests for d in switched)
        if expected and not over:
            text = f"{_wave(wave)}: {_all(len(switched))} switched, waiting for the first requests."
            return Verdict("collecting", text, outcomes, effects, deadline)
        text = f"{head}, no traffic at all: judged by the devices' own probes alone.{tail}"
        return Verdict("go", text, outcomes, effects, deadline)
    timed = [d for d in switched if not d.emulated]
    few = [d for d in timed if d.before.requests and d.after.requests < gates.min_requests]
    if few and not over:
        text = (
            f"{_wave(wave)}: {requests} requests so far; {_all(len(few))} below the "
            f"{gates.min_requests} needed to judge latency."
        )
        return Verdict("collecting", text, outcomes, effects, deadline)
    shown = "; ".join(e.sentence.rstrip(".") for e in effects if e.value is not None)
    judged = f"{shown}." if shown else "nothing to compare with before, no errors above the gate."
    note = f" {_all(len(few))} had too few requests to judge latency." if few else ""
    untimed = len(switched) - len(timed)
    note += f" Latency of {_all(untimed)} is unmeasured (emulated)." if untimed else ""
    return Verdict("go", f"{head}, {requests} requests. {judged}{note}{tail}", outcomes, effects, deadline)


def _without_devices(
    wave: WaveState,
    devices: Sequence[DeviceObservation],
    outcomes: tuple[Outcome, ...],
    gates: Gates,
    now_ms: int,
    deadline: int,
) -> Verdict:
    """Nobody switched and nobody is on the way: failures within the allowance, or nobody reachable."""
    text = (
        f"{_wave(wave)}: none of {_all(len(devices))} could be reached; all are carried over "
        "and update when they return."
    )
    return Verdict("go", text, outcomes, (), deadline)


def _deadline(
    wave: WaveState, devices: Sequence[DeviceObservation], state: Mapping[str, Outcome], gates: Gates
) -> int:
    started = max((d.started_ms for d in devices if not d.carried), default=wave.started_ms)
    slowest = max(gates.update_s, gates.silent_s) * 1000
    switched = max((d.switched_ms for d in devices if state[d.device].state in DONE_STATES), default=0)
    update_end = int(max(started, wave.started_ms) + slowest)
    return max(update_end, int(switched + gates.observe_s * 1000)) if switched else update_end


def _failed_sentence(wave: WaveState, failed: list[Outcome], devices: Sequence[DeviceObservation]) -> str:
    names = {d.device: d.name for d in devices}
    reasons = _count(outcome.reason or "unknown reason" for outcome in failed)
    listed = ", ".join(
        f"{reason} ({count})" if count > 1 else reason
        for reason, count in sorted(reasons.items(), key=lambda r: -r[1])[:3]
    )
    who = ", ".join(sorted(names[outcome.device] for outcome in failed)[:3])
    more = f" and {len(failed) - 3} more" if len(failed) > 3 else ""
    return f"{_wave(wave)} stopped: {len(failed)} of {_all(len(devices))} failed ({who}{more}): {listed}."


def _pending_sentence(wave: WaveState, counts: Mapping[str, int], own: Sequence[DeviceObservation]) -> str:
    done = sum(counts.get(state, 0) for state in DONE_STATES)
    parts = [f"{counts[s]} {text}" for s, text in _PENDING.items() if counts.get(s)]
    return f"{_wave(wave)}: {done} of {_all(len(own))} switched, {', '.join(parts)}."


_PENDING = {
    "updating": "updating",
    "settling": "settling",
    "waiting": "waiting for their turn",
    "silent": "not reached",
    "failed": "failed",
}


def _count(values: object) -> dict[str, int]:
    counts: dict[str, int] = {}
    for value in values:  # type: ignore[attr-defined]
        counts[value] = counts.get(value, 0) + 1
    return counts


def _wave(wave: WaveState) -> str:
    return f"Wave {wave.number + 1} of {wave.total} ({_people(wave.name)})"


def _people(name: str) -> str:
    return {"1": "1 device"}.get(name, name if name.endswith("%") else f"{name} devices")


def _all(count: int) -> str:
    return "1 device" if count == 1 else f"{count} devices"
