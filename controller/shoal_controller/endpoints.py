"""Endpoints and assignments: which variant each profile class of an endpoint gets.

A class's own variants come first, chosen by the endpoint's objective. A class without any gets the
nearest compatible class's (`desired.variant_for`), judged by what the bundle needs; the device proves
it by its own probe.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from shoal_controller import desired, query, registry, releases
from shoal_controller.blobs import BlobStore
from shoal_controller.classes import ClassFacts, class_facts, fits
from shoal_controller.clock import Clock
from shoal_controller.store.repositories import find, new_id, record
from shoal_controller.store.tables import (
    Assignment,
    Device,
    Endpoint,
    Model,
    Release,
    Rollout,
    Variant,
    Version,
)
from shoal_optimizer import objective as objectives
from shoal_protos.bundle import RuntimeNeed, canonical_json
from shoal_protos.errors import Conflict, InvalidInput, ShoalError
from shoal_protos.v1.profile_pb2 import Profile

MAX_SAMPLES_PER_WINDOW = 64
MAX_SAMPLE_BYTES_PER_DAY = 64 << 20
OPEN_ROLLOUTS = ("running", "paused", "stopping")


@dataclass(frozen=True)
class EndpointSettings:
    """What `Endpoint.settings` holds."""

    sampling_share: float = 0.0  # 0 = no input leaves a device
    settle_s: int = 10
    automatic: bool = True  # policies may act without a person

    @classmethod
    def of(cls, endpoint: Endpoint) -> EndpointSettings:
        raw = endpoint.settings
        return cls(
            float((raw.get("sampling") or {}).get("share", 0.0)),
            int((raw.get("settle") or {}).get("seconds", 10)),
            bool((raw.get("policy") or {}).get("automatic", True)),
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "sampling": {
                "share": self.sampling_share,
                "max_samples_per_window": MAX_SAMPLES_PER_WINDOW,
                "max_bytes_per_day": MAX_SAMPLE_BYTES_PER_DAY,
            },
            "settle": {"seconds": self.settle_s},
            "policy": {"automatic": self.automatic},
        }


# ------------------------------------------------------------------ the name applications call


def create(
    session: Session,
    clock: Clock,
    *,
    name: str,
    model: str,
    actor: str,
    objective: str = "",
    filter: str = "",
    settings: EndpointSettings | None = None,
    project: str = "default",
) -> Endpoint:
    """Makes an endpoint. Its signature is fixed by its first assignment.

    Raises:
        InvalidInput: objective, filter or name cannot be read.
        Conflict: the name is taken.
        NotFound: there is no such model.
    """
    if not registry.NAME.match(name):
        raise InvalidInput(
            f"'{name[:80]}' is not an endpoint's name.", "Use lower-case letters, digits, '.', '_', '-'."
        )
    row_model = registry.model_by_name(session, model, project)
    objectives.parse(objective)
    query.parse_stable(filter)
    if session.scalar(select(Endpoint.id).where(Endpoint.project == project, Endpoint.name == name)):
        raise Conflict(f"There is an endpoint '{name}' already.", "Choose another name or change that one.")
    row = Endpoint(
        id=new_id(session, "e"),
        project=project,
        name=name,
        model=row_model.id,
        objective=objective or objectives.DEFAULT,
        filter=filter,
        signature={},
        settings=(settings or EndpointSettings()).to_json(),
        created_ms=clock(),
    )
    session.add(row)
    session.flush()
    after = {"name": name, "model": row_model.name, "objective": row.objective, "filter": filter}
    record(session, project=project, actor=actor, verb="created", kind="endpoint", object=row.id, after=after)
    return row


def change(
    session: Session,
    endpoint: Endpoint,
    *,
    actor: str,
    objective: str | None = None,
    filter: str | None = None,
    sampling_share: float | None = None,
    settle_s: int | None = None,
    automatic: bool | None = None,
) -> Endpoint:
    """Changes what is given. The assignment stays; the loop judges it by the new objective.

    Raises:
        InvalidInput: objective or filter cannot be read.
        Conflict: the filter may not change while a rollout runs.
    """
    before: dict[str, Any] = {}
    after: dict[str, Any] = {}
    if objective is not None and objective != endpoint.objective:
        objectives.parse(objective)
        before["objective"], after["objective"] = endpoint.objective, objective
        endpoint.objective = objective
    if filter is not None and filter != endpoint.filter:
        query.parse_stable(filter)
        if running := open_rollout(session, endpoint):
            raise Conflict(f"The rollout {running.id} is {running.state}.", "Wait for its end, or abort it.")
        before["filter"], after["filter"] = endpoint.filter, filter
        endpoint.filter = filter
    old = EndpointSettings.of(endpoint)
    new = EndpointSettings(
        old.sampling_share if sampling_share is None else sampling_share,
        old.settle_s if settle_s is None else settle_s,
        old.automatic if automatic is None else automatic,
    )
    if new != old:
        merged = {**endpoint.settings}
        for room, values in new.to_json().items():  # what else a room holds stays
            merged[room] = {**(endpoint.settings.get(room) or {}), **values}
        before["settings"], after["settings"] = endpoint.settings, merged
        endpoint.settings = merged
    if after:
        record(
            session,
            project=endpoint.project,
            actor=actor,
            verb="changed",
            kind="endpoint",
            object=endpoint.id,
            before=before,
            after=after,
        )
    return endpoint


def by_name(session: Session, key: str, project: str = "default") -> Endpoint:
    """The endpoint with this name or id. Raises NotFound."""
    return find(session, Endpoint, key, project=project)


def open_rollout(session: Session, endpoint: Endpoint) -> Rollout | None:
    """The rollout of this endpoint that has not ended, if any."""
    return session.scalar(
        select(Rollout).where(Rollout.endpoint == endpoint.id, Rollout.state.in_(OPEN_ROLLOUTS)).limit(1)
    )


def members(session: Session, endpoint: Endpoint) -> list[Device]:
    """Devices that have this endpoint: joined, not revoked, fitting its filter; by id."""
    return query.devices(session, endpoint.filter, project=endpoint.project)


# ------------------------------------------------------------------ assignments


@dataclass(frozen=True)
class Chosen:
    """The variant of one class. `sentence` says why."""

    variant: str
    feasible: bool
    sentence: str


def choose(
    session: Session, blobs: BlobStore, endpoint: Endpoint, release: Release, facts: Mapping[str, ClassFacts]
) -> dict[str, Chosen]:
    """Class -> the best of the release's front by the objective, among variants that the class's
    devices can run. A class without any is left out: its devices get a fallback, see `wanted`."""
    objective = objectives.parse(endpoint.objective)
    found = {
        name: _best(session, release, name, front, objective, facts.get(name), blobs)
        for name, front in release.fronts.items()
    }
    return {name: chosen for name, chosen in found.items() if chosen is not None}


def _best(
    session: Session,
    release: Release,
    profile_class: str,
    front: Sequence[str],
    objective: objectives.Objective,
    facts: ClassFacts | None,
    blobs: BlobStore,
) -> Chosen | None:
    """The best variant of a front by the objective, among those that fit the devices."""
    known = registry.points(session, release.version, profile_class)
    if facts is not None:
        known = [
            p for p in known if fits(runtime_need(blobs, p.bundle, session.get(Variant, p.variant)), facts)
        ]
    # A front of bundles that these devices cannot run leaves what they can.
    found = [p for p in known if p.variant in front] or known
    if not found:
        return None
    found = [p for p in found if p.proven] or found
    choice = objective.choose(objectives.Point(p.variant, p.metrics) for p in found)
    names = {p.variant: p.name for p in found}
    sentence = choice.sentence.replace(choice.key, f"'{names[choice.key]}'")
    return Chosen(choice.key, choice.feasible, sentence)


def runtime_need(blobs: BlobStore, bundle: str, variant: Variant | None) -> RuntimeNeed:
    """What a bundle needs; judged by its variant's target alone when it cannot be opened."""
    try:
        return blobs.bundle(bundle).config.runtime
    except ShoalError:
        return RuntimeNeed(variant.target if variant else "", "")


def assign(
    session: Session,
    blobs: BlobStore,
    clock: Clock,
    endpoint: Endpoint,
    release: Release,
    *,
    actor: str,
    choice: Mapping[str, str] | None = None,
    reason: str = "",
) -> Assignment:
    """Makes an assignment: the release and a variant per class. It takes effect by a rollout.

    Args:
        choice: class -> variant (id, name or bundle) that a person or a policy wants; the other
            classes get the best by the objective.

    Raises:
        Conflict: the release is of another model, or its signature differs from the endpoint's.
        InvalidInput: `choice` names a class or variant that the release does not have.
    """
    version = session.get(Version, release.version)
    assert version is not None
    check_signature(session, endpoint, version)
    facts = class_facts(members(session, endpoint))
    chosen = {name: c.variant for name, c in choose(session, blobs, endpoint, release, facts).items()}
    for name, key in (choice or {}).items():
        if name not in facts and name not in release.fronts:
            known = ", ".join(sorted({*facts, *release.fronts}))
            raise InvalidInput(f"There is no class '{name[:80]}' here.", f"Classes: {known}.")
        chosen[name] = releases.own_variant(session, version, key).id
    if not chosen:
        raise Conflict(
            f"No variant of this release fits any device of '{endpoint.name}'.",
            "Start an optimization for the fleet's classes.",
        )
    row = Assignment(
        id=new_id(session, "a"), endpoint=endpoint.id, release=release.id, choice=chosen, created_ms=clock()
    )
    session.add(row)
    session.flush()
    if not endpoint.signature:
        endpoint.signature = version.signature
    record(
        session,
        project=endpoint.project,
        actor=actor,
        verb="created",
        kind="assignment",
        object=row.id,
        after={"endpoint": endpoint.id, "release": release.id, "choice": chosen},
        reason=reason,
    )
    return row


def check_signature(session: Session, endpoint: Endpoint, version: Version) -> None:
    """Raises Conflict unless a version may serve under an endpoint."""
    if version.model != endpoint.model:
        model = session.get(Model, endpoint.model)
        raise Conflict(
            f"The endpoint '{endpoint.name}' serves the model '{model.name if model else endpoint.model}'.",
            "Name a release of that model, or make another endpoint.",
        )
    if endpoint.signature and canonical_json(endpoint.signature) != canonical_json(version.signature):
        raise Conflict(
            f"Version {version.number} has another signature than the endpoint '{endpoint.name}', so "
            "applications would break.",
            "Make a new endpoint for it, or declare the same inputs and outputs.",
        )


class Wanted:
    """What an assignment gives each device: the same decision as the desired state's."""

    def __init__(self, session: Session, blobs: BlobStore, assignment: Assignment | None) -> None:
        self._assignment = (
            desired.AssignmentFacts(assignment.id, dict(assignment.choice))
            if assignment is not None
            else None
        )
        self._variants: dict[str, desired.VariantFacts] = {}
        for key in set(assignment.choice.values()) if assignment is not None else ():
            row = session.get(Variant, key)
            if row is not None:
                need = runtime_need(blobs, row.bundle, row)
                self._variants[key] = desired.VariantFacts(
                    row.id,
                    row.bundle,
                    need.name,
                    isa=frozenset(need.isa),
                    version_min=need.version_min,
                    version_max=need.version_max,
                )

    def of(self, device: Device) -> tuple[desired.VariantFacts, bool] | None:
        """(variant, is it a fallback); None = nothing fits."""
        if self._assignment is None:
            return None
        profile = Profile.FromString(device.profile)
        inputs = desired.DeviceInputs(
            fleet="",
            device=device.id,
            profile_class=device.profile_class,
            isa=frozenset(profile.isa_features),
            runtimes={runtime.name: runtime.version for runtime in profile.runtimes},
            variants=self._variants,
        )
        return desired.variant_for(inputs, self._assignment)

    def bundle(self, device: Device) -> str:
        """The bundle's digest, "" = none."""
        found = self.of(device)
        return found[0].bundle if found is not None else ""


def variant_for(assignment: Assignment | None, profile_class: str) -> str:
    """The variant id that an assignment names for a class, "" = none."""
    return str(assignment.choice.get(profile_class, "")) if assignment is not None else ""
