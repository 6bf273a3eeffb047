"""What `shoal model push --wait` ends with: the baseline, each class's plain variant, the next command."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from shoal_controller.cli import output
from shoal_controller.cli.output import Column

if TYPE_CHECKING:
    from shoal_controller.api import schemas
    from shoal_controller.client import Client


SERVED_WITHIN_S = 60.0  # the promise: a proved plain variant within a minute of a push
FINAL = ("commit", "rolled_back", "failed")  # steps after which a placement rests
DEVICES = 500  # looked at while waiting


@dataclass(frozen=True)
class PlainState:
    """How far one class is with the plain variant of a version."""

    profile_class: str
    devices: int  # of the fleet
    state: str = "converting"


COLUMNS = (
    Column("class", lambda s: s.profile_class, "id"),
    Column("devices", lambda s: s.devices, "number"),
    Column("plain_variant", lambda s: s.state, "status"),
)


def plain_states(
    classes: Sequence[schemas.ClassSummary], variants: Sequence[schemas.Variant]
) -> list[PlainState]:
    """One line a class, of the fleet and of what was converted, in their order."""
    devices = {found.name: found.devices for found in classes}
    plain = [variant for variant in variants if variant.plain]
    names = [*devices, *(f.profile_class for v in plain for f in v.classes)]
    return [_state(name, devices.get(name, 0), plain) for name in dict.fromkeys(names)]


def _state(name: str, devices: int, plain: Sequence[schemas.Variant]) -> PlainState:
    found = [f for v in plain for f in v.classes if f.profile_class == name]
    if not found:
        return PlainState(name, devices)
    figures = max(found, key=lambda f: (f.serving, f.on_front))
    return PlainState(name, devices, _word(figures))


def _word(figures: schemas.VariantFigures) -> str:
    if figures.serving:
        return f"serves on {figures.serving}"
    latency = figures.latency_p95_ms
    proven = latency is not None and latency.source == "probe"
    return "passed its probe" if proven else "not probed yet"


def next_command(
    model: str,
    version: int,
    fleet: int,
    endpoints: Sequence[schemas.Endpoint],
    rolling: Collection[str] = (),
) -> str:
    """The sentence that ends a push: what to type now. `rolling` names the endpoints whose rollout is one
    to this very version."""
    own = [endpoint for endpoint in endpoints if endpoint.model == model]
    if own:
        going = next((e for e in own if e.rollout), None)
        if going is not None:
            if going.name in rolling:
                return f"It is being rolled out: shoal rollout get {going.rollout} -w"
            return (
                f"Another version is being rolled out: shoal rollout get {going.rollout} -w\n"
                f"Then roll this one out: shoal rollout create {going.name} -w"
            )
        if own[0].version == version:
            # With one endpoint a device knows which is meant.
            which = "" if len(endpoints) == 1 else f"--model {own[0].name} "
            return (
                f"Ask it, on the device: shoal-agent infer {which}FILE\n"
                f"Search for something smaller and faster: shoal optimization start {own[0].name} -w"
            )
        return f"Roll it out: shoal rollout create {own[0].name} -w"
    create = f'shoal endpoint create {model} --model {model} --objective "accuracy>=0.9; minimise size"'
    if not fleet:
        return f"Join a device: shoal token create --join\nThen name what applications call: {create}"
    return f"Name what applications call: {create}"


def serve(client: Client, model: str) -> None:
    """Makes the endpoint `model` for the model, unless one calls it already.

    Raises:
        Conflict: another model has the endpoint of that name.
    """
    from shoal_controller.api import schemas

    own = [endpoint.name for endpoint in client.endpoints() if endpoint.model == model]
    if own:
        output.say(f"Applications call it '{own[0]}' already.")
        return
    client.create_endpoint(schemas.EndpointCreate(name=model, model=model))
    output.say(f"Applications call it '{model}'; each device serves it as soon as it has a proved variant.")


def served(devices: Sequence[schemas.Device], endpoint: str) -> bool:
    """Whether each device that is there has come to an end with the endpoint, well or not."""
    there = [device for device in devices if device.status not in ("offline", "revoked")]
    return all(
        any(
            p.endpoint == endpoint and p.step.lower().removeprefix("step_") in FINAL
            for p in device.placements
        )
        for device in there
    )


def wait_until_served(client: Client, version: schemas.Version) -> None:
    """For a model's first version under an endpoint: until the devices that are there serve it, or the
    time is over. A later version waits for its rollout."""
    own = [e for e in client.endpoints() if e.model == version.model and e.version in (None, version.number)]
    if not own:
        return
    deadline = time.monotonic() + SERVED_WITHIN_S
    with output.stderr().status("each device proves its plain variant"):
        while time.monotonic() < deadline:
            if all(served(client.devices(e.filter, limit=DEVICES).items, e.name) for e in own):
                return
            time.sleep(0.5)
    output.say(f"Not every device was ready within {SERVED_WITHIN_S:.0f} s; see: shoal device list")


def report(client: Client, version: schemas.Version) -> None:
    """Waits until the fleet serves it, then prints classes on stdout and the next command on stderr."""
    wait_until_served(client, version)
    classes = client.classes()
    states = plain_states(classes, client.variants(version.model, version.number))
    output.show_many(states, COLUMNS)
    endpoints = client.endpoints()
    label = f"v{version.number}"
    rolling = {
        e.name for e in endpoints if e.rollout and client.rollout(e.rollout).to_label.startswith(label)
    }
    fleet = sum(c.devices for c in classes)
    output.say(next_command(version.model, version.number, fleet, endpoints, rolling))
