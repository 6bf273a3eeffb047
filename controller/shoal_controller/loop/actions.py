"""Does what `policy` decided, and follows it to its end. Every change is an event with its reason."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from shoal_agent.telemetry import sketches
from shoal_controller import endpoints, optimizations, releases
from shoal_controller.blobs import BlobStore
from shoal_controller.clock import Clock
from shoal_controller.loop import facts as facts_
from shoal_controller.loop.facts import EndpointFacts
from shoal_controller.loop.monitor import Changes
from shoal_controller.loop.policy import Action, FindingView
from shoal_controller.rollouts import service
from shoal_controller.rollouts.observe import Presence
from shoal_controller.store.repositories import new_id, record
from shoal_controller.store.tables import (
    Assignment,
    Device,
    Endpoint,
    Finding,
    Optimization,
    Release,
    Rollout,
    Window,
)
from shoal_protos.errors import ShoalError
from shoal_protos.v1 import telemetry_pb2

ACTOR = "loop"
MAX_SAMPLES = 200  # blobs an adaptation gets
MAX_SAMPLE_BYTES = 64 << 20
FIELD_MARGIN_MS = 1000
DEFAULT_FIELD_MS = 600_000  # how far back the field is taken from, when a finding does not say


@dataclass(frozen=True)
class Hands:
    """What actions work with."""

    blobs: BlobStore
    clock: Clock
    presence: Presence
    telemetry_s: float


# ------------------------------------------------------------------ findings


def apply_changes(session: Session, clock: Clock, changes: Changes, project: str = "default") -> None:
    """Opens, refreshes and closes findings."""
    for signal in changes.opened:
        row = Finding(
            id=new_id(session, "f"),
            project=project,
            kind=signal.kind,
            subject=signal.subject,
            endpoint=signal.endpoint,
            profile_class=signal.profile_class,
            state="open",
            severity=signal.severity,
            sentence=signal.sentence,
            evidence=dict(signal.evidence),
            action={},
            opened_ms=clock(),
        )
        session.add(row)
        session.flush()
        _note(session, row, "opened", signal.sentence)
    for key, signal in changes.refreshed:
        found = session.get(Finding, key)
        if found is not None and found.state == "open":
            since = {k: v for k, v in found.evidence.items() if k == "since_ms"}
            found.sentence, found.evidence = signal.sentence, {**signal.evidence, **since}
    for key, sentence in changes.closed:
        found = session.get(Finding, key)
        if found is not None and found.state == "open":
            close(session, found, clock, sentence)


def close(
    session: Session, finding: Finding, clock: Clock, why: str, *, state: str = "resolved", actor: str = ACTOR
) -> None:
    """Ends a finding."""
    before = finding.state
    finding.state, finding.closed_ms = state, clock()
    _note(session, finding, state, why, before=before, actor=actor)


def _note(
    session: Session, finding: Finding, verb: str, reason: str, *, before: str = "", actor: str = ACTOR
) -> None:
    record(
        session,
        project=finding.project,
        actor=actor,
        verb=verb,
        kind="finding",
        object=finding.id,
        before={"state": before} if before else None,
        after={
            "kind": finding.kind,
            "subject": finding.subject,
            "state": finding.state,
            "endpoint": finding.endpoint,
            "action": finding.action,
        },
        reason=reason,
    )


def view(finding: Finding) -> FindingView:
    return FindingView(finding.id, finding.kind, finding.endpoint, finding.profile_class, finding.opened_ms)


# ------------------------------------------------------------------ acting


def execute(session: Session, hands: Hands, finding: Finding, facts: EndpointFacts, action: Action) -> None:
    """Does one action for an open finding, in the caller's transaction."""
    if action.act in ("wait", "ask"):
        say(session, finding, action)
        return
    result: dict[str, Any] = {"policy": action.act, "sentence": action.sentence}
    if action.act == "step":
        rollout = _step(session, hands, finding, facts, action)
        result["rollout"] = rollout.id
    elif action.act == "join":
        result["optimization"] = action.join
    else:
        job = (
            _adapt(session, hands, finding, facts, action)
            if action.act == "adapt"
            else _optimize(session, hands, finding, facts, action)
        )
        result["optimization"] = job.id
    _act(session, finding, result, action.sentence)


def say(session: Session, finding: Finding, action: Action) -> None:
    """Waiting is shown, and recorded only when it becomes a question to a person."""
    if finding.action.get("policy") == action.act and finding.action.get("sentence") == action.sentence:
        return
    asks = action.act == "ask" and finding.action.get("policy") != "ask"
    finding.action = {"policy": action.act, "sentence": action.sentence}
    if asks:
        _note(session, finding, "asked", action.sentence)


def _act(session: Session, finding: Finding, action: dict[str, Any], reason: str) -> None:
    before, finding.state, finding.action = finding.state, "acting", action
    _note(session, finding, "acting", reason, before=before)


def _step(session: Session, hands: Hands, finding: Finding, facts: EndpointFacts, action: Action) -> Rollout:
    choice = {**facts.assignment.choice, finding.profile_class: action.variant}
    return create_rollout(
        session, hands, facts.endpoint, facts.release.id, action.sentence, finding.id, choice
    )


def _optimize(
    session: Session, hands: Hands, finding: Finding, facts: EndpointFacts, action: Action
) -> Optimization:
    return optimizations.enqueue(
        session,
        hands.clock,
        kind="optimize",
        version=facts.version,
        actor=ACTOR,
        endpoint=facts.endpoint.id,
        objective=facts.endpoint.objective,
        spec={
            "minutes": action.minutes,
            "classes": [finding.profile_class],
            "finding": finding.id,
            "finding_class": finding.profile_class,
        },
        reason=action.sentence,
        project=finding.project,
    )


def _adapt(
    session: Session, hands: Hands, finding: Finding, facts: EndpointFacts, action: Action
) -> Optimization:
    since = field_since(session, facts.endpoint, hands.clock)
    field: dict[str, Any] = {"samples": _samples(session, facts.endpoint, since), "since_ms": since}
    merged = field_inputs(session, facts, since)
    if merged is not None:
        data = merged.SerializeToString(deterministic=True)
        field["inputs"] = hands.blobs.put(session, data, purpose="data")
        field["items"] = int(merged.count)
    return optimizations.enqueue(
        session,
        hands.clock,
        kind="adapt",
        version=facts.version,
        actor=ACTOR,
        endpoint=facts.endpoint.id,
        objective=facts.endpoint.objective,
        spec={
            "classes": sorted({d.profile_class for d in facts.devices}),
            "finding": finding.id,
            "finding_class": finding.profile_class,
            "field": field,
        },
        reason=action.sentence,
        project=finding.project,
    )


def field_since(session: Session, endpoint: Endpoint, clock: Clock) -> int:
    """Since when the field has been as it is now: the earliest of the endpoint's open drift findings.
    A finding that does not say counts only when none does: its guess would mix in the time before."""
    rows = session.scalars(
        select(Finding).where(
            Finding.endpoint == endpoint.id,
            Finding.kind.in_(("input_drift", "accuracy_drop")),
            Finding.state.in_(("open", "acting")),
        )
    )
    found = list(rows)
    known = [int(row.evidence["since_ms"]) for row in found if row.evidence.get("since_ms")]
    known = known or [row.opened_ms - DEFAULT_FIELD_MS for row in found]
    return min(known, default=clock() - DEFAULT_FIELD_MS) - FIELD_MARGIN_MS


def field_inputs(session: Session, facts: EndpointFacts, since_ms: int) -> telemetry_pb2.SketchSet | None:
    """The inputs of all of the endpoint's devices since then, as one sketch set."""
    bundles = {facts.wanted.bundle(device) for device in facts.devices} - {""}
    merged: telemetry_pb2.SketchSet | None = None
    rows = session.scalars(
        select(Window.inputs)
        .join(Device, Device.id == Window.device)
        .where(
            Window.endpoint == facts.endpoint.name,
            Window.bundle.in_(bundles),
            Window.end_ms >= since_ms,
            Device.quarantined.is_(False),
        )
    )
    for data in rows:
        part = telemetry_pb2.SketchSet.FromString(data) if data else None
        if part is None or not part.count:
            continue
        merged = part if merged is None else _merge(merged, part)
    return merged


def _merge(first: telemetry_pb2.SketchSet, second: telemetry_pb2.SketchSet) -> telemetry_pb2.SketchSet:
    try:
        return sketches.merge(first, second)
    except ShoalError:  # an agent with another rule version: what cannot be added is left out
        return first if first.count >= second.count else second


def _samples(session: Session, endpoint: Endpoint, since_ms: int) -> list[str]:
    taken: list[str] = []
    size = 0
    for sample in facts_.samples_since(session, endpoint, since_ms):
        size += sample.size
        if len(taken) == MAX_SAMPLES or size > MAX_SAMPLE_BYTES:
            break
        if sample.blob not in taken:
            taken.append(sample.blob)
    return taken


def create_rollout(
    session: Session,
    hands: Hands,
    endpoint: Endpoint,
    release: str,
    reason: str,
    finding: str,
    choice: dict[str, str] | None = None,
) -> Rollout:
    """The rollout that a policy wants. Raises what rollouts.service.create raises."""
    request = service.Request(endpoint.id, ACTOR, release, choice, reason=reason, finding=finding)
    return service.create(
        session,
        hands.blobs,
        hands.clock,
        request,
        presence=hands.presence,
        telemetry_s=hands.telemetry_s,
        project=endpoint.project,
    )


# ------------------------------------------------------------------ following an action to its end


def follow(session: Session, hands: Hands, finding: Finding) -> None:
    """One look at a finding that is acted on."""
    if finding.action.get("rollout"):
        _follow_rollout(session, hands, finding)
    elif finding.action.get("optimization"):
        _follow_optimization(session, hands, finding)
    else:
        _ask(session, finding, "Nothing acts on this any more. Decide what to do.")


def _follow_optimization(session: Session, hands: Hands, finding: Finding) -> None:
    job = session.get(Optimization, finding.action["optimization"])
    if job is None or job.state in ("failed", "cancelled"):
        why = job.error.splitlines()[0] if job is not None and job.error else "it was cancelled"
        name = finding.action["optimization"]
        _ask(session, finding, f"The optimization {name} ended without a result: {why} Decide what to do.")
    elif job.state == "done" and not job.result.get("release"):
        why = job.result.get("sentence") or f"The optimization {job.id} brought nothing better."
        _ask(session, finding, f"{why} The present release stays. Decide what to do.")
    elif job.state == "done":
        _roll_out(session, hands, finding, job)


def _roll_out(session: Session, hands: Hands, finding: Finding, job: Optimization) -> None:
    """One optimization may serve several findings: the first brings the rollout, the others share it."""
    endpoint = session.get(Endpoint, finding.endpoint)
    assert endpoint is not None
    shared = session.scalar(
        select(Rollout)
        .join(Finding, Finding.id == Rollout.finding)
        .where(Rollout.endpoint == endpoint.id, Rollout.created_ms >= job.finished_ms)
        .where(Finding.action["optimization"].as_string() == job.id)
        .limit(1)
    )
    if shared is None and (running := endpoints.open_rollout(session, endpoint)) is not None:
        sentence = f"Waiting for the rollout {running.id} to end."
        if finding.action.get("sentence") != sentence:
            finding.action = {**finding.action, "sentence": sentence}
        return
    sentence = str(job.result.get("sentence") or f"Roll out what {job.id} found.")
    if shared is None:
        try:
            with session.begin_nested():
                choice = _kept_choice(session, endpoint, finding, job)
                shared = create_rollout(
                    session, hands, endpoint, job.result["release"], sentence, finding.id, choice
                )
        except ShoalError as error:
            _ask(session, finding, f"It cannot be rolled out: {error}")
            return
    finding.action = {**finding.action, "rollout": shared.id, "sentence": sentence}
    _note(session, finding, "rolling_out", sentence)


def _kept_choice(
    session: Session, endpoint: Endpoint, finding: Finding, job: Optimization
) -> dict[str, str] | None:
    """A new class changes nothing for the classes that are served already."""
    if finding.kind != "new_class":
        return None
    release = session.get(Release, job.result["release"])
    assignment = session.get(Assignment, endpoint.assignment)
    if release is None or assignment is None:
        return None
    known = {v for front in release.fronts.values() for v in front}
    return {
        name: key for name, key in assignment.choice.items() if key in known and name != finding.profile_class
    }


def _follow_rollout(session: Session, hands: Hands, finding: Finding) -> None:
    rollout = session.get(Rollout, finding.action["rollout"])
    if rollout is None or rollout.state in ("rolled_back", "aborted"):
        why = str(rollout.verdict.get("sentence", "")) if rollout is not None else ""
        _ask(session, finding, f"The rollout {finding.action['rollout']} went back: {why} Decide what to do.")
    elif rollout.state == "promoted":
        close(
            session,
            finding,
            hands.clock,
            f"The rollout {rollout.id} was promoted: {rollout.verdict.get('sentence', '')}",
        )


def _ask(session: Session, finding: Finding, sentence: str) -> None:
    """Back to open, with a question that the policy does not answer by itself again."""
    before = finding.state
    finding.state = "open"
    finding.action = {**finding.action, "policy": "ask", "sentence": sentence, "final": True}
    _note(session, finding, "asked", sentence, before=before)


# ------------------------------------------------------------------ an endpoint's first release


def first_rollout(session: Session, hands: Hands, endpoint: Endpoint) -> Rollout | None:
    """An automatic endpoint without an assignment gets its model's newest release at once; a release
    that was tried already is not tried again."""
    if endpoint.assignment or not endpoints.EndpointSettings.of(endpoint).automatic:
        return None
    release = releases.latest_release(session, endpoint.model)
    if release is None or endpoints.open_rollout(session, endpoint) is not None:
        return None
    tried = session.scalars(
        select(Assignment.release)
        .join(Rollout, Rollout.to_assignment == Assignment.id)
        .where(Rollout.endpoint == endpoint.id)
    ).all()
    if release.id in tried:
        return None
    return create_rollout(session, hands, endpoint, release.id, "The endpoint's first release.", "")
