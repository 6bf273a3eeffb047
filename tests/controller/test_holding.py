"""Quarantine and pins: the device keeps what it has, whatever rollouts, releases and the loop do."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import select

from shoal_controller import holding
from shoal_controller.api.app import create_api
from shoal_controller.desired import MOVED, DeviceInputs, EndpointFacts, RolloutFacts, VariantFacts, merge
from shoal_controller.loop import facts
from shoal_controller.store.tables import Device, Event, RolloutDevice
from shoal_protos.bundle import RuntimeNeed
from shoal_protos.errors import Conflict, InvalidInput, NotFound
from tests.controller.test_desired import CLASS, NEW, OLD, digest, inputs
from tests.controller.world import World, profile
from tests.web.client import Client

THIRD = VariantFacts("k-3", digest("3"), "onnxruntime", "digits", 1)
ROLLOUTS = st.one_of(
    st.none(),
    st.builds(
        RolloutFacts,
        state=st.sampled_from(["running", "paused", "stopping", "promoted", "rolled_back", "aborted"]),
        from_assignment=st.sampled_from(["", "a-1"]),
        to_assignment=st.just("a-2"),
        attempt=st.integers(1, 9),
        device_state=st.sampled_from(["", "waiting", "failed", "left_out", *sorted(MOVED)]),
    ),
)


def facing(rollout: RolloutFacts | None, assignment: str, **kept: Any) -> DeviceInputs:
    endpoint = EndpointFacts("digits", "default", assignment, rollout=rollout)
    return inputs(endpoint, variants={"k-1": OLD, "k-2": NEW, "k-3": THIRD}, **kept)


@given(ROLLOUTS, st.sampled_from(["", "a-1", "a-2"]), st.sampled_from(["k-1", "k-2", "k-3"]))
def test_a_pinned_device_never_gets_another_variant(
    rollout: RolloutFacts | None, assignment: str, pin: str
) -> None:
    state = merge(facing(rollout, assignment, pins={"digits": pin}))
    assert [p.settings.variant for p in state.placements] == [pin]
    assert list(state.keep) == []


@given(ROLLOUTS, st.sampled_from(["", "a-1", "a-2"]), st.sampled_from(["", "k-1", "k-3"]), st.booleans())
def test_a_quarantined_device_never_gets_another_variant(
    rollout: RolloutFacts | None, assignment: str, had: str, pinned: bool
) -> None:
    held = {"digits": had} if had else {}
    state = merge(facing(rollout, assignment, held=held, pins={"digits": "k-2"} if pinned else {}))
    assert [p.settings.variant for p in state.placements] == ([had] if had else [])


def test_a_kept_fallback_is_still_shown_as_one() -> None:
    (placement,) = merge(facing(None, "a-1", held={"digits": "k-3"})).placements
    assert placement.settings.fallback
    (placement,) = merge(facing(None, "a-1", held={"digits": "k-2"})).placements
    assert not placement.settings.fallback and placement.settings.envelope.latency_p95_ms == 5.0


# ---------------------------------------------------------------------------- with everything around it


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    found = World(tmp_path)
    yield found
    found.close()


@pytest.fixture
def api(world: World) -> Client:
    return Client(create_api(world.controller))


def serving(world: World, device: str) -> str:
    """The bundle that a device's newest desired state names."""
    names = {p.endpoint: p.bundle for p in world.desired(device).placements}
    return names.get("digits", "")


def fleet(world: World, count: int = 3) -> tuple[list[str], str, str]:
    """Devices that serve a first variant; (devices, first variant, second variant)."""
    devices = [world.add_device(f"cam-{n}", "onnxruntime") for n in range(count)]
    name = world.class_of(devices[0])
    variants = []
    for number in (1, 2):
        version = world.version(accuracy=0.97)
        made = world.variant(version, f"plain-{number}", {name: (0.97, 1.0)})
        if number == 1:
            world.release(version, {name: [made]})
            world.endpoint(objective="minimise latency_p95")
            for _ in range(40):
                world.look(2)
        variants.append((version, made))
    world.release(variants[1][0], {name: [variants[1][1]]})
    return devices, variants[0][1], variants[1][1]


def roll(world: World, seconds: int = 60) -> str:
    from shoal_controller.rollouts import service

    with world.store.write() as session:
        request = service.Request("digits", "person:test", waves=["1", "100%"])
        row = service.create(session, world.blobs, world.clock, request, presence=world.services.connections)
        found = row.id
    for _ in range(seconds // 2):
        world.look(2)
    return found


def test_a_rollout_leaves_held_devices_out_and_says_so(world: World, api: Client) -> None:
    (first, second, third), old, _ = fleet(world)
    before = serving(world, first)
    api.patch(f"/api/v1/devices/{first}", json={"quarantined": True, "reason": "too hot"})
    api.patch(f"/api/v1/devices/{second}", json={"pins": {"digits": old}})
    rollout = roll(world)
    shown = api.get(f"/api/v1/rollouts/{rollout}").json()
    assert shown["left_out"] == {"quarantined": ["cam-0"], "pinned": ["cam-1"]}
    assert [d["device"] for d in shown["devices"]] == [third] and shown["state"] == "promoted"
    assert serving(world, first) == serving(world, second) == before != serving(world, third)
    released = api.patch(f"/api/v1/devices/{first}", json={"quarantined": False})
    assert released.status_code == 200
    api.patch(f"/api/v1/devices/{second}", json={"pins": {}})
    world.look(4)
    assert serving(world, first) == serving(world, second) == serving(world, third)
    with world.store.read() as session:
        verbs = session.scalars(
            select(Event.verb)
            .where(Event.kind == "device", Event.actor.startswith("person"))
            .order_by(Event.id)
        ).all()
        reasons = session.scalars(select(Event.reason).where(Event.verb == "quarantined")).all()
    assert list(verbs) == ["quarantined", "pinned", "released", "unpinned"] and list(reasons) == ["too hot"]


def test_a_device_quarantined_in_mid_rollout_stays_where_it_is(world: World, api: Client) -> None:
    devices, _, _ = fleet(world)
    before = {device: serving(world, device) for device in devices}
    from shoal_controller.rollouts import service

    with world.store.write() as session:
        request = service.Request("digits", "person:test", waves=["1", "100%"])
        rollout = service.create(
            session, world.blobs, world.clock, request, presence=world.services.connections
        ).id
    with world.store.read() as session:
        last = session.scalars(
            select(RolloutDevice.device).where(RolloutDevice.rollout == rollout, RolloutDevice.wave == 1)
        ).all()[0]
    api.patch(f"/api/v1/devices/{last}", json={"quarantined": True})
    for _ in range(30):
        world.look(2)
    assert serving(world, last) == before[last]
    shown = api.get(f"/api/v1/rollouts/{rollout}").json()
    states = {d["device"]: (d["state"], d["reason"]) for d in shown["devices"]}
    assert states[last] == ("left_out", "quarantined") and shown["state"] == "promoted"
    assert all(serving(world, d) != before[d] for d in devices if d != last)


def test_findings_count_no_quarantined_device(world: World, api: Client) -> None:
    devices, _, _ = fleet(world, 2)
    api.patch(f"/api/v1/devices/{devices[0]}", json={"quarantined": True})
    with world.store.read() as session:
        from shoal_controller import endpoints

        found = facts.load_endpoint(session, world.blobs, endpoints.by_name(session, "digits"))
        assert found is not None and [d.id for d in found.devices] == [devices[1]]


def test_what_cannot_be_pinned_is_refused_with_the_reason(world: World, api: Client) -> None:
    (first, *_), _, _ = fleet(world, 1)
    version = world.version(accuracy=0.97)
    foreign = world.variant(version, "other-runtime", {}, runtime="openvino")
    answer = api.patch(f"/api/v1/devices/{first}", json={"pins": {"digits": foreign}})
    assert answer.status_code == 409
    assert "needs openvino, the device has onnxruntime" in answer.json()["detail"]
    answer = api.patch(f"/api/v1/devices/{first}", json={"pins": {"digits": "k-nothing"}})
    assert answer.status_code == 422 or answer.status_code == 400
    assert "shoal variant list" in answer.json()["remedy"]
    assert api.patch(f"/api/v1/devices/{first}", json={"pins": {"nowhere": foreign}}).status_code == 404
    api.patch(f"/api/v1/devices/{first}", json={"quarantined": True})
    answer = api.patch(f"/api/v1/devices/{first}", json={"pins": {"digits": "plain-2"}})
    assert answer.status_code == 409 and "shoal device release" in answer.json()["remedy"]
    with world.store.read() as session:
        assert session.get_one(Device, first).pins == {}


def test_pinning_takes_effect_by_name_and_shows(world: World, api: Client) -> None:
    (first, *_), _, new = fleet(world, 1)
    api.patch(f"/api/v1/devices/{first}", json={"pins": {"digits": "plain-2"}})
    world.look(6)
    shown = api.get(f"/api/v1/devices/{first}").json()
    assert shown["pins"] == {"digits": new} and shown["placements"][0]["pinned"]
    assert shown["placements"][0]["wanted"] == "plain-2"
    assert api.get("/api/v1/devices", params={"filter": "is:pinned"}).json()["total"] == 1
    assert api.get("/api/v1/devices", params={"filter": "is:quarantined"}).json()["total"] == 0


@pytest.mark.parametrize(
    ("need", "why"),
    [
        (RuntimeNeed("onnxruntime", "m"), ""),
        (RuntimeNeed("litert", "m"), "needs litert, the device has onnxruntime"),
        (RuntimeNeed("onnxruntime", "m", version_min="9.1"), "needs onnxruntime 9.1 or newer"),
        (RuntimeNeed("onnxruntime", "m", version_max="1.2"), "needs onnxruntime before 1.2"),
        (RuntimeNeed("onnxruntime", "m", isa=("amx_int8",)), "needs amx_int8, which the processor lacks"),
    ],
)
def test_why_a_device_cannot_run_a_variant(need: RuntimeNeed, why: str) -> None:
    found = holding.why_not(need, profile("onnxruntime"), CLASS)
    assert why in found and bool(found) == bool(why)


def test_the_sentence_about_who_is_left_out() -> None:
    assert holding.sentence({}) == ""
    assert holding.sentence({"pinned": ["kiln"]}) == "Left out: 1 pinned (kiln)."
    many = {"quarantined": [f"cam-{n}" for n in range(12)]}
    assert holding.sentence(many) == "Left out: 12 quarantined."


def test_errors_are_shoal_errors() -> None:
    assert {Conflict.code, InvalidInput.code, NotFound.code} == {"conflict", "invalid", "not_found"}
