"""From a finding to the cheapest sufficient action. Pure.

The ladder: step along the front (nothing is computed) -> make plain variants for a new class ->
adapt the original to the field -> search again -> ask a human. Each with a cooldown and a budget,
so that a loop never chases its own tail.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

Act = Literal["step", "adapt", "optimize", "join", "wait", "ask"]


@dataclass(frozen=True)
class PolicySettings:
    cooldown_s: float = 120.0  # between two actions of one kind on one endpoint
    day_budget: int = 6  # optimizations started by the loop per endpoint and day
    repeats: int = 3  # so many adaptations within a day: ask
    label_wait_s: float = 20.0  # labels found within this time help an adaptation
    label_goal: int = 40  # enough of them to stop waiting
    search_minutes: float = 3.0
    error_gap: float = 1e-9


@dataclass(frozen=True)
class FrontPoint:
    """A variant on a class's front with its measured figures; None = unmeasured."""

    variant: str
    name: str
    accuracy: float | None
    latency_p95_ms: float | None
    size_bytes: int


@dataclass(frozen=True)
class Past:
    """An earlier action of the loop on the same endpoint."""

    action: Act
    time_ms: int
    profile_class: str = ""


@dataclass(frozen=True)
class Situation:
    """What surrounds a finding at this moment."""

    automatic: bool = True
    rollout_running: str = ""
    optimization_active: str = ""  # the loop's own, of this endpoint
    optimization_kind: str = ""
    version_ready: bool = True
    front: tuple[FrontPoint, ...] = ()  # of the finding's class
    chosen: str = ""  # variant id serving that class
    accuracy_floor: float | None = None  # from the objective
    labelled: int = 0  # labelled samples of the drifted windows
    past: tuple[Past, ...] = field(default_factory=tuple)
    fallback: str = ""


@dataclass(frozen=True)
class Action:
    """What to do, and the sentence that says it."""

    act: Act
    sentence: str
    variant: str = ""  # step: the next one along the front
    minutes: float = 0.0
    join: str = ""  # join: the optimization that already serves this finding


@dataclass(frozen=True)
class FindingView:
    id: str
    kind: str
    endpoint: str
    profile_class: str
    opened_ms: int


def decide(finding: FindingView, situation: Situation, settings: PolicySettings, now_ms: int) -> Action:
    """What the loop does about an open finding now."""
    rule = _RULES.get(finding.kind)
    if rule is None:
        return Action("ask", _ASK.get(finding.kind, "Look at the evidence and decide."))
    if not situation.automatic:
        return Action("ask", "The endpoint is not automatic: decide and start the next step yourself.")
    if situation.rollout_running:
        return Action("wait", f"Waiting for the rollout {situation.rollout_running} to end.")
    return rule(finding, situation, settings, now_ms)


# ------------------------------------------------------------------ rules


def _latency(finding: FindingView, situation: Situation, settings: PolicySettings, now_ms: int) -> Action:
    if waiting := _cooling("step", finding.profile_class, situation.past, settings, now_ms):
        return waiting
    following = next_faster(situation.front, situation.chosen, situation.accuracy_floor)
    if following is not None:
        return Action(
            "step",
            f"Step along the front to '{following.name}' ({following.latency_p95_ms:.2f} ms measured): "
            "no new optimization is needed.",
            variant=following.variant,
        )
    return _search(
        "No faster variant on the front keeps the objective's accuracy.", finding, situation, settings, now_ms
    )


def _drift(finding: FindingView, situation: Situation, settings: PolicySettings, now_ms: int) -> Action:
    if situation.optimization_active:
        if situation.optimization_kind == "adapt":
            text = f"The adaptation {situation.optimization_active} already serves this endpoint."
            return Action("join", text, join=situation.optimization_active)
        return Action("wait", f"Waiting for the optimization {situation.optimization_active}.")
    if not situation.version_ready:
        return Action("wait", "Waiting for the model's version to become ready.")
    if waiting := _cooling("adapt", "", situation.past, settings, now_ms):
        return waiting
    recent = [p for p in situation.past if p.action == "adapt" and now_ms - p.time_ms < 86_400_000]
    if len(recent) >= settings.repeats:
        return Action(
            "ask",
            f"The model was adapted {len(recent)} times within a day and the inputs moved again. Decide: "
            "label field inputs and push a newly trained version, or accept the present accuracy and "
            "dismiss this.",
        )
    if over := _over_budget(situation.past, settings, now_ms):
        return over
    waited = (now_ms - finding.opened_ms) / 1000
    if situation.labelled < settings.label_goal and waited < settings.label_wait_s:
        return Action(
            "wait",
            f"{situation.labelled} labelled inputs so far; waiting {settings.label_wait_s - waited:.0f} s "
            f"more for up to {settings.label_goal}, since labels make an adaptation better.",
        )
    labels = f" and {situation.labelled} labelled inputs" if situation.labelled else ""
    return Action(
        "adapt",
        f"Adapt the original to the field's measured statistics{labels}, then distil and quantize it: "
        "distilling from the unadapted original regains nothing.",
    )


def _new_class(finding: FindingView, situation: Situation, settings: PolicySettings, now_ms: int) -> Action:
    if situation.optimization_active:
        return Action("wait", f"Waiting for the optimization {situation.optimization_active}.")
    if not situation.version_ready:
        return Action("wait", "Waiting for the model's version to become ready.")
    tried = [p for p in situation.past if p.action == "optimize" and p.profile_class == finding.profile_class]
    if tried and now_ms - tried[-1].time_ms < 86_400_000:
        fallback = f" Until then '{situation.fallback}' serves." if situation.fallback else ""
        return Action(
            "ask",
            f"Converting for {finding.profile_class} was tried today and gave no variant. Decide: install "
            "a runtime that the model can be converted for, or exclude these devices by the endpoint's "
            f"filter.{fallback}",
        )
    if over := _over_budget(situation.past, settings, now_ms):
        return over
    return Action(
        "optimize", f"Convert the present version for {finding.profile_class}; no search.", minutes=0.0
    )


def _search(
    why: str, finding: FindingView, situation: Situation, settings: PolicySettings, now_ms: int
) -> Action:
    if situation.optimization_active:
        return Action("wait", f"Waiting for the optimization {situation.optimization_active}.")
    searched = [p for p in situation.past if p.action == "optimize" and now_ms - p.time_ms < 86_400_000]
    if searched:
        return Action(
            "ask",
            f"{why} A search within the last day found none either. Decide: relax the objective or use "
            "faster devices.",
        )
    if over := _over_budget(situation.past, settings, now_ms):
        return over
    return Action("optimize", f"{why} Search again under the objective.", minutes=settings.search_minutes)


# ------------------------------------------------------------------ helpers


def next_faster(front: Sequence[FrontPoint], chosen: str, accuracy_floor: float | None) -> FrontPoint | None:
    """The most accurate variant that is measured faster than the chosen one and keeps the floor."""
    current = next((p for p in front if p.variant == chosen), None)
    if current is None or current.latency_p95_ms is None:
        return None
    limit = current.latency_p95_ms
    faster = [
        p
        for p in front
        if p.latency_p95_ms is not None
        and p.latency_p95_ms < limit
        and (accuracy_floor is None or (p.accuracy is not None and p.accuracy >= accuracy_floor))
    ]
    return max(faster, key=lambda p: (p.accuracy or 0.0, -(p.latency_p95_ms or 0.0)), default=None)


def _cooling(
    act: Act, profile_class: str, past: Sequence[Past], settings: PolicySettings, now_ms: int
) -> Action | None:
    times = [
        p.time_ms for p in past if p.action == act and (not profile_class or p.profile_class == profile_class)
    ]
    left = (max(times) + settings.cooldown_s * 1000 - now_ms) / 1000 if times else 0
    if left <= 0:
        return None
    return Action("wait", f"The last such action was a moment ago; waiting {left:.0f} s for its effect.")


def _over_budget(past: Sequence[Past], settings: PolicySettings, now_ms: int) -> Action | None:
    used = sum(1 for p in past if p.action in ("adapt", "optimize") and now_ms - p.time_ms < 86_400_000)
    if used < settings.day_budget:
        return None
    return Action(
        "ask",
        f"The loop has started {used} optimizations for this endpoint within a day, which is its budget. "
        "Decide: start one yourself, or dismiss this.",
    )


_RULES = {"latency": _latency, "input_drift": _drift, "accuracy_drop": _drift, "new_class": _new_class}

_ASK = {
    "error_rate": "Requests fail. Look at the device's logs; if a rollout brought it, start one back to the "
    "release before.",
    "device_failed": "Look at the device's logs; the next rollout tries again, or remove the device from the "
    "endpoint.",
    "clock_wrong": "Set the device's clock; until then it relies on the controller's time.",
}
