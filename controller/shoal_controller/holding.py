"""Devices that keep what they have: quarantined as a whole, or pinned to a variant at one endpoint.

Both serve on and answer. No rollout moves them, no verdict, drift or accuracy counts them, and
`desired.merge` gives them no other variant until a person releases or unpins them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from sqlalchemy import select
from sqlalchemy.orm import Session

from shoal_controller import endpoints, query
from shoal_controller.blobs import BlobStore
from shoal_controller.classes import facts_of, version_key
from shoal_controller.store.repositories import record
from shoal_controller.store.tables import Desired, Device, Endpoint, Variant, Version
from shoal_protos.bundle import RuntimeNeed
from shoal_protos.errors import Conflict, InvalidInput
from shoal_protos.v1 import agents_pb2, desired_pb2
from shoal_protos.v1.profile_pb2 import Profile


def why_held(device: Device, endpoint: str) -> str:
    """Either "quarantined" or "pinned"; "" for a device that rollouts of the endpoint move."""
    if device.quarantined:
        return "quarantined"
    return "pinned" if endpoint in device.pins else ""


def counted(devices: Iterable[Device], endpoint: str) -> list[Device]:
    """The devices that rollouts move and that verdicts and findings of the endpoint count."""
    return [device for device in devices if not why_held(device, endpoint)]


def left_out(devices: Iterable[Device], endpoint: str) -> dict[str, list[str]]:
    """Why -> names of the devices that rollouts of the endpoint leave alone."""
    found: dict[str, list[str]] = {}
    for device in devices:
        why = why_held(device, endpoint)
        if why:
            found.setdefault(why, []).append(device.name)
    return found


def sentence(held: Mapping[str, list[str]]) -> str:
    """`Left out: 1 pinned (kiln), 12 quarantined.`; "" where nobody is."""
    parts = []
    for why, names in sorted(held.items()):
        shown = f" ({', '.join(sorted(names))})" if len(names) <= 3 else ""
        parts.append(f"{len(names):,} {why}{shown}")
    return f"Left out: {', '.join(parts)}." if parts else ""


# ---------------------------------------------------------------------------- quarantine


def quarantine(session: Session, device: Device, *, actor: str, reason: str = "") -> None:
    """From now on the device keeps what it serves. Doing it twice changes nothing.

    Raises:
        Conflict: the device was removed.
    """
    _refuse_removed(device)
    if device.quarantined:
        return
    device.quarantined = True
    device.held = has_now(session, device)
    _event(session, device, actor, "quarantined", {}, {"quarantined": True, "keeps": device.held}, reason)


def release(session: Session, device: Device, *, actor: str, reason: str = "") -> None:
    """The device follows its endpoints again; it gets their current assignment at once."""
    if not device.quarantined:
        return
    before = {"quarantined": True, "keeps": device.held}
    device.quarantined, device.held = False, {}
    _event(session, device, actor, "released", before, {"quarantined": False}, reason)


def has_now(session: Session, device: Device) -> dict[str, str]:
    """Endpoint -> variant id that the device serves; where it serves nothing, what it was told last."""
    row = session.get(Desired, device.id)
    found: dict[str, str] = {}
    if row is not None:
        payload = desired_pb2.Signed.FromString(row.signed).payload
        for placement in desired_pb2.DesiredState.FromString(payload).placements:
            found[placement.endpoint] = placement.settings.variant
    for status in agents_pb2.Reported.FromString(device.reported or b"").placements:
        if status.serving and status.role in (0, 1):
            known = session.scalar(select(Variant.id).where(Variant.bundle == status.serving).limit(1))
            if known is not None:
                found[status.endpoint] = known
    return found


# ---------------------------------------------------------------------------- pins


def pin(
    session: Session,
    blobs: BlobStore,
    device: Device,
    wanted: Mapping[str, str],
    *,
    actor: str,
    reason: str = "",
) -> None:
    """Makes `wanted` (endpoint name -> variant id or name) the device's pins, all of them.

    Raises:
        Conflict: the device is quarantined, or cannot run a variant.
        InvalidInput: it does not have an endpoint, or a variant is not of the endpoint's model.
        NotFound: there is no such endpoint.
    """
    _refuse_removed(device)
    checked: dict[str, str] = {}
    for name, key in wanted.items():
        endpoint = endpoints.by_name(session, name, device.project)
        same = device.pins.get(endpoint.name) == key
        checked[endpoint.name] = key if same else _pinnable(session, blobs, device, endpoint, key).id
    before = dict(device.pins)
    if checked == before:
        return
    if device.quarantined:
        raise Conflict(
            f"{device.name} is quarantined: it keeps what it has.",
            f"Release it first: shoal device release {device.name}",
        )
    device.pins = checked
    verb = "pinned" if any(before.get(name) != key for name, key in checked.items()) else "unpinned"
    _event(session, device, actor, verb, {"pins": before}, {"pins": checked}, reason)


def _pinnable(session: Session, blobs: BlobStore, device: Device, endpoint: Endpoint, key: str) -> Variant:
    profile = Profile.FromString(device.profile)
    if not query.parse(endpoint.filter).matches(query.stable_facts(device, profile)):
        raise InvalidInput(
            f"{device.name} does not have the endpoint '{endpoint.name}': its filter is '{endpoint.filter}'.",
            f"Change the filter: shoal endpoint update {endpoint.name} --filter ...",
        )
    variant = _variant_of(session, endpoint, key)
    version = session.get(Version, variant.version)
    assert version is not None
    endpoints.check_signature(session, endpoint, version)
    need = endpoints.runtime_need(blobs, variant.bundle, variant)
    problem = why_not(need, profile, device.profile_class)
    if problem:
        raise Conflict(
            f"{device.name} cannot run '{variant.name}': {problem}.",
            f"See what fits: shoal variant list --class '{device.profile_class}'",
        )
    return variant


def _variant_of(session: Session, endpoint: Endpoint, key: str) -> Variant:
    """By id, or by name: then the newest version's of the endpoint's model."""
    row = session.get(Variant, key)
    if row is None:
        row = session.scalar(
            select(Variant)
            .join(Version, Version.id == Variant.version)
            .where(Version.model == endpoint.model, Variant.name == key)
            .order_by(Version.number.desc())
            .limit(1)
        )
    if row is None:
        raise InvalidInput(
            f"There is no variant '{key[:80]}' of the model that '{endpoint.name}' serves.",
            "List them with: shoal variant list",
        )
    return row


def why_not(need: RuntimeNeed, profile: Profile, profile_class: str) -> str:
    """Why a device cannot load a bundle, in words; "" if it can, as far as its profile tells. Pure."""
    facts = facts_of(profile, profile_class)
    version = facts.runtimes.get(need.name)
    if version is None:
        has = ", ".join(sorted(facts.runtimes)) or "no runtime"
        return f"it needs {need.name}, the device has {has}"
    if need.version_min and version_key(version) < version_key(need.version_min):
        return f"it needs {need.name} {need.version_min} or newer, the device has {version}"
    if need.version_max and version_key(version) >= version_key(need.version_max):
        return f"it needs {need.name} before {need.version_max}, the device has {version}"
    missing = sorted(frozenset(need.isa) - facts.isa)
    return f"it needs {', '.join(missing)}, which the processor lacks" if missing else ""


def _refuse_removed(device: Device) -> None:
    if device.revoked:
        raise Conflict(f"The device {device.name} was removed.", "Let the machine join again.")


def _event(
    session: Session,
    device: Device,
    actor: str,
    verb: str,
    before: Mapping[str, object],
    after: Mapping[str, object],
    reason: str,
) -> None:
    record(
        session,
        project=device.project,
        actor=actor,
        verb=verb,
        kind="device",
        object=device.id,
        before=dict(before) or None,
        after=dict(after),
        reason=reason,
    )
