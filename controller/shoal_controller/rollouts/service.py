"""What people and policies ask of rollouts: create, pause, resume, abort, promote."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from shoal_controller import endpoints, holding, releases
from shoal_controller.blobs import BlobStore
from shoal_controller.clock import Clock
from shoal_controller.rollouts import machine, observe, plan, records
from shoal_controller.rollouts.gates import Gates
from shoal_controller.rollouts.plan import Candidate
from shoal_controller.store.repositories import find, new_id, record
from shoal_controller.store.tables import Assignment, Device, Endpoint, Release, Rollout, Variant, Version
from shoal_optimizer import objective as objectives
from shoal_protos.errors import Conflict, InvalidInput

DEFAULT_WAVES = ("1", "25%", "100%")
MIN_OBSERVE_S = 20.0


@dataclass(frozen=True)
class Request:
    """A rollout that somebody wants."""

    endpoint: str
    actor: str
    release: str = ""  # "" = the newest of the endpoint's model
    choice: Mapping[str, str] | None = None  # class -> variant; None = best by the objective
    waves: Sequence[str] = DEFAULT_WAVES
    reason: str = ""
    finding: str = ""
    gates: Mapping[str, Any] | None = None


def create(
    session: Session,
    blobs: BlobStore,
    clock: Clock,
    request: Request,
    *,
    presence: observe.Presence,
    telemetry_s: float = 30.0,
    project: str = "default",
) -> Rollout:
    """Plans a rollout and starts it; the runner takes it from here.

    Raises:
        Conflict: a rollout of this endpoint has not ended, it already serves just this, a class that is
            served would get nothing, or the signature differs.
        InvalidInput, NotFound: the request names something wrong.
    """
    endpoint = endpoints.by_name(session, request.endpoint, project)
    if running := endpoints.open_rollout(session, endpoint):
        raise Conflict(
            f"The rollout {running.id} of '{endpoint.name}' is {running.state}.",
            f"Wait for its end, or abort it: shoal rollout abort {running.id}",
        )
    release = _release(session, endpoint, request.release)
    current = session.get(Assignment, endpoint.assignment)
    target = endpoints.assign(
        session,
        blobs,
        clock,
        endpoint,
        release,
        actor=request.actor,
        choice=request.choice,
        reason=request.reason,
    )
    if current is not None and current.release == release.id and current.choice == target.choice:
        raise Conflict(
            f"'{endpoint.name}' serves just this already.", "Name another release, or choose another variant."
        )
    old, new = (endpoints.Wanted(session, blobs, a) for a in (current, target))
    everybody = endpoints.members(session, endpoint)
    devices = holding.counted(everybody, endpoint.name)
    held = holding.left_out(everybody, endpoint.name)
    _refuse_losses(endpoint, devices, old, new)
    changed = [d for d in devices if new.bundle(d) and new.bundle(d) != old.bundle(d)]
    candidates = [
        Candidate(
            d.id, d.profile_class, presence.is_connected(d.id), {k: str(v) for k, v in d.labels.items()}
        )
        for d in changed
    ]
    gates = default_gates(endpoint, telemetry_s, request.gates)
    waves = plan.plan(candidates, list(request.waves), seed=gates.seed)
    row = Rollout(
        id=new_id(session, "r"),
        project=endpoint.project,
        endpoint=endpoint.id,
        from_assignment=endpoint.assignment,
        to_assignment=target.id,
        state="running",
        wave=0,
        waves=[
            {
                "name": w.name,
                "devices": list(w.devices),
                "state": "waiting",
                "started_ms": 0,
                "decided_ms": 0,
                "verdict": {},
            }
            for w in waves
        ],
        gates=gates.to_json(),
        verdict={"sentence": _planned(waves, len(changed), held), "left_out": held},
        attempt=_attempt(session, endpoint),
        actor=request.actor,
        reason=request.reason,
        finding=request.finding,
        created_ms=clock(),
    )
    session.add(row)
    session.flush()
    for number, wave in enumerate(waves):
        session.add_all(records.new_device(row.id, device, number) for device in wave.devices)
    record(
        session,
        project=endpoint.project,
        actor=request.actor,
        verb="created",
        kind="rollout",
        object=row.id,
        after={
            "endpoint": endpoint.id,
            "from": row.from_assignment,
            "to": row.to_assignment,
            "waves": [len(w.devices) for w in waves],
            "finding": request.finding,
            **({"left_out": held} if held else {}),
        },
        reason=request.reason,
    )
    return row


def _release(session: Session, endpoint: Endpoint, key: str) -> Release:
    if key:
        return find(session, Release, key)
    release = releases.latest_release(session, endpoint.model)
    if release is None:
        raise Conflict(
            f"The model of '{endpoint.name}' has no release yet.",
            "Push a version, or wait for its ingest to end.",
        )
    return release


def _refuse_losses(
    endpoint: Endpoint, devices: Sequence[Device], old: endpoints.Wanted, new: endpoints.Wanted
) -> None:
    lost = sorted({d.profile_class for d in devices if old.bundle(d) and not new.bundle(d)})
    if lost:
        raise Conflict(
            f"The release has nothing for {', '.join(lost)}, which '{endpoint.name}' serves now.",
            "Start an optimization for that class, or exclude it by the endpoint's filter.",
        )


def _attempt(session: Session, endpoint: Endpoint) -> int:
    """Rises with each rollout that did not end well, so that devices try a bundle again that failed there."""
    failed = session.scalar(
        select(func.count())
        .select_from(Rollout)
        .where(Rollout.endpoint == endpoint.id, Rollout.state.in_(("rolled_back", "aborted")))
    )
    return 1 + int(failed or 0)


def _planned(waves: Sequence[plan.PlannedWave], devices: int, held: Mapping[str, list[str]]) -> str:
    sizes = ", ".join(str(len(w.devices)) for w in waves)
    count = "1 device" if devices == 1 else f"{devices} devices"
    text = f"{count} in 1 wave." if len(waves) == 1 else f"{count} in {len(waves)} waves ({sizes})."
    return f"{text if devices else 'No device needs a change.'} {holding.sentence(held)}".strip()


def default_gates(
    endpoint: Endpoint, telemetry_s: float, overrides: Mapping[str, Any] | None = None
) -> Gates:
    """Gates from the endpoint's settings and objective; whatever is given goes before.

    Raises:
        InvalidInput: an unknown gate or a wrong value.
    """
    settle = float(endpoints.EndpointSettings.of(endpoint).settle_s)
    limit = next(
        (c.bound for c in objectives.parse(endpoint.objective).constraints if c.metric == "latency_p95"), 0.0
    )
    own = dict(endpoint.settings.get("gates") or {})
    base = Gates(
        settle_s=settle,
        observe_s=max(3 * telemetry_s, 2 * settle, MIN_OBSERVE_S),
        silent_s=max(3 * telemetry_s, 60.0),
        latency_limit_ms=limit,
    )
    return Gates.from_json({**base.to_json(), **own, **dict(overrides or {})})


# ------------------------------------------------------------------ while it runs


def open_row(session: Session, key: str) -> Rollout:
    """A rollout that has not ended. Raises NotFound or Conflict."""
    row = find(session, Rollout, key)
    if row.state not in machine.OPEN:
        raise Conflict(f"The rollout {row.id} has ended: {row.state}.", "Create a new one.")
    return row


def pause(session: Session, key: str, *, actor: str, reason: str = "") -> Rollout:
    """Nothing new starts until `resume`; harm still stops it."""
    return _switch(session, key, "running", "paused", "paused", actor, reason)


def resume(session: Session, key: str, *, actor: str, reason: str = "") -> Rollout:
    return _switch(session, key, "paused", "running", "resumed", actor, reason)


def _switch(
    session: Session, key: str, before: str, after: str, verb: str, actor: str, reason: str
) -> Rollout:
    row = open_row(session, key)
    if row.state != before:
        raise Conflict(f"The rollout {row.id} is {row.state}, not {before}.")
    row.state = after
    record(
        session,
        project=row.project,
        actor=actor,
        verb=verb,
        kind="rollout",
        object=row.id,
        before={"state": before},
        after={"state": after},
        reason=reason,
    )
    return row


def abort(session: Session, clock: Clock, key: str, *, actor: str, reason: str = "") -> Rollout:
    """Every device goes back; the endpoint stays on the old assignment."""
    row = open_row(session, key)
    if row.state == "stopping":
        raise Conflict(f"The rollout {row.id} is going back already.")
    state, rows = records.load(session, row)
    sentence = f"Aborted by {_who(actor, reason)}. All devices go back."
    step = machine.stop(state, sentence, clock(), aborted=True)
    before = row.state
    records.save(session, row, rows, step.state, clock())
    record(
        session,
        project=row.project,
        actor=actor,
        verb="aborted",
        kind="rollout",
        object=row.id,
        before={"state": before},
        after={"state": row.state},
        reason=reason,
    )
    return row


def _who(actor: str, reason: str) -> str:
    name = actor.partition(":")[2] or actor
    return f"{name} ({reason.rstrip('.')})" if reason else name


def promote(session: Session, clock: Clock, key: str, *, actor: str, reason: str = "") -> Rollout:
    """Skips what is left of the judging: the endpoint has the new assignment from now on.

    Raises:
        Conflict: it is going back, or has ended.
    """
    row = open_row(session, key)
    if row.state == "stopping":
        raise Conflict(f"The rollout {row.id} is going back.", "Create a new one when it has ended.")
    state, rows = records.load(session, row)
    sentence = f"Promoted before its waves had ended, by {_who(actor, reason)}."
    records.save(session, row, rows, replace(state, state="promoted", sentence=sentence), clock())
    adopt(session, row, actor=actor, reason=reason or sentence)
    return row


def adopt(session: Session, row: Rollout, *, actor: str, reason: str) -> None:
    """The endpoint takes over a promoted rollout's assignment."""
    endpoint = session.get(Endpoint, row.endpoint)
    assert endpoint is not None
    before, endpoint.assignment = endpoint.assignment, row.to_assignment
    record(
        session,
        project=row.project,
        actor=actor,
        verb="promoted",
        kind="rollout",
        object=row.id,
        before={"assignment": before},
        after={"assignment": row.to_assignment, "endpoint": endpoint.id},
        reason=reason,
    )


def label_of(session: Session, assignment: str) -> str:
    """ "v1" for people; "nothing" without an assignment."""
    row = session.get(Assignment, assignment) if assignment else None
    release = session.get(Release, row.release) if row is not None else None
    version = session.get(Version, release.version) if release is not None else None
    return f"v{version.number}" if version is not None else "nothing"


def labels_of(session: Session, rollout: Rollout) -> tuple[str, str]:
    """What a rollout goes from and to; within one version, the variants that differ."""
    old, new = (label_of(session, a) for a in (rollout.from_assignment, rollout.to_assignment))
    if old != new:
        return old, new
    before, after = (session.get(Assignment, a) for a in (rollout.from_assignment, rollout.to_assignment))
    if before is None or after is None:
        return old, new
    changed = [name for name, key in sorted(after.choice.items()) if before.choice.get(name) != key]
    return (
        f"{old} {_names(session, [before.choice.get(name, '') for name in changed])}".strip(),
        f"{new} {_names(session, [after.choice[name] for name in changed])}".strip(),
    )


def _names(session: Session, variants: Sequence[str]) -> str:
    rows = [session.get(Variant, key) for key in dict.fromkeys(variants) if key]
    names = list(dict.fromkeys(row.name for row in rows if row is not None))
    return ", ".join(names[:2]) + ("…" if len(names) > 2 else "")


class DryRun(Exception):
    """Carries a planned rollout out of a transaction that is to be rolled back."""

    def __init__(self, result: Any) -> None:
        super().__init__("dry run")
        self.result = result


def check_waves(steps: Sequence[str]) -> None:
    """Raises InvalidInput unless `plan` can use the steps."""
    if not steps:
        raise InvalidInput("A rollout needs at least one wave.", "Try: 1, 25%, 100%.")
    for step in steps:
        plan.target(step, 100)
