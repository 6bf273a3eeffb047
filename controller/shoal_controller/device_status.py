"""A device's status with its reason: a pure judgement of what is known about it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from shoal_protos.v1 import agents_pb2

STATUSES = ("healthy", "updating", "degraded", "drifting", "offline", "revoked")
STATUS_LETTERS = {
    "healthy": "h",
    "updating": "u",
    "degraded": "d",
    "drifting": "r",
    "offline": "o",
    "revoked": "x",
}
DRIFT_KINDS = frozenset({"input_drift", "output_drift", "confidence", "accuracy", "accuracy_drop", "drift"})
QUIET_KINDS = frozenset({"new_class", "fallback", "runtime_upgrade"})  # say nothing against a device

_STEP = agents_pb2.Step
BUSY_STEPS = frozenset(
    {
        _STEP.STEP_WAITING,
        _STEP.STEP_FETCH,
        _STEP.STEP_VERIFY,
        _STEP.STEP_PROBE,
        _STEP.STEP_SWITCH,
        _STEP.STEP_SETTLE,
    }
)
FAILED_STEPS = frozenset({_STEP.STEP_ROLLED_BACK, _STEP.STEP_FAILED})


def step_name(step: int) -> str:
    """`STEP_ROLLED_BACK` -> `rolled_back`; "" for the unspecified one."""
    try:
        name = agents_pb2.Step.Name(step)  # type: ignore[arg-type]
    except ValueError:
        return "unknown"
    return "" if step == 0 else name.removeprefix("STEP_").lower()


@dataclass(frozen=True)
class PlacementFacts:
    """One placement: what the device should have now (`wanted`) and what it reported last.

    `wanted` and `serving` are bundles; step 0 = it has not reported on this placement.
    """

    endpoint: str
    wanted: str
    serving: str
    step: int
    reason: str = ""
    detail: str = ""
    fallback: bool = False
    pinned: bool = False
    current: bool = True  # the report is about what the device should have now
    wanted_name: str = ""
    serving_name: str = ""
    serves: str = ""  # "digits v1"


@dataclass(frozen=True)
class FindingFacts:
    kind: str
    sentence: str


@dataclass(frozen=True)
class StatusFacts:
    """What a status is judged by. Times in Unix ms."""

    revoked: bool
    connected: bool
    last_seen_ms: int
    now_ms: int
    offline_after_s: float
    behind: bool  # has not adopted the newest desired state
    clock_wrong: bool
    throttled: bool
    refusal: str
    placements: Sequence[PlacementFacts] = ()
    findings: Sequence[FindingFacts] = ()


def judge(facts: StatusFacts) -> tuple[str, str]:
    """(status, reason) of a device; the worst that applies. Pure."""
    if facts.revoked:
        return "revoked", "it was revoked"
    if not facts.connected and facts.now_ms - facts.last_seen_ms > facts.offline_after_s * 1000:
        if not facts.last_seen_ms:
            return "offline", "it has joined but never connected"
        return "offline", f"nothing heard for {_span(facts.now_ms - facts.last_seen_ms)}"
    worse = _degraded(facts)
    if worse:
        return "degraded", worse
    busy = next((p for p in facts.placements if p.step in BUSY_STEPS), None)
    if busy is not None:
        return "updating", f"{busy.endpoint}: {step_name(busy.step)}"
    if facts.behind:
        return "updating", "it has not adopted the newest desired state yet"
    drift = next((f for f in facts.findings if f.kind in DRIFT_KINDS), None)
    if drift is not None:
        return "drifting", drift.sentence
    return "healthy", ""


def _degraded(facts: StatusFacts) -> str:
    failed = next((p for p in facts.placements if p.step in FAILED_STEPS), None)
    if failed is not None:
        step = step_name(failed.step).replace("_", " ")
        return f"{failed.endpoint}: {step}, {failed.reason or 'no reason given'}"
    if facts.refusal:
        return f"it refused its desired state: {facts.refusal}"
    finding = next((f for f in facts.findings if f.kind not in DRIFT_KINDS | QUIET_KINDS), None)
    if finding is not None:
        return finding.sentence
    if facts.clock_wrong:
        return "its clock is wrong"
    return "it is throttled by heat or power" if facts.throttled else ""


def likely_causes(address: str) -> list[str]:
    """Why a device that joined was never heard, the likeliest first. `address` is the agents' door."""
    return [
        "The agent does not run. On the device: systemctl status shoal-agent",
        f"It cannot reach the controller at {address or 'its port 8443'}: a firewall, another network, or an "
        "address that changed. On the device: shoal-agent doctor",
        "Its clock is far off, so that certificates look invalid. On the device: timedatectl",
    ]


def next_step(name: str, facts: StatusFacts, *, logs: bool = False) -> str:
    """What a person can do about a device that is not well; "" if nothing is wrong. Pure."""
    if facts.revoked:
        return "To let the machine in again, join it with a new token: shoal token create --join"
    if not facts.last_seen_ms:
        return "On the device: shoal-agent doctor"
    if not facts.connected and facts.now_ms - facts.last_seen_ms > facts.offline_after_s * 1000:
        return (
            f"Check its power and network; it serves on meanwhile. shoal device diagnose {name} is answered "
            "when it returns."
        )
    if any(p.step in FAILED_STEPS for p in facts.placements):
        more = "Its logs are below. " if logs else f"Read its logs: shoal device logs {name}. "
        return f"{more}It serves on with what it had; a newer variant or a rollout tries again."
    if facts.refusal or facts.clock_wrong or facts.throttled:
        return f"Ask the device what is wrong: shoal device diagnose {name}"
    return ""


def _span(ms: int) -> str:
    seconds = ms // 1000
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds // size} {unit}"
    return f"{seconds} s"
