"""What the API tells about one device: desired against reported, why, what next, drift, emulation."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from shoal_controller.api import stream
from shoal_controller.api.app import create_api
from shoal_controller.device_detail import class_reason
from shoal_controller.store.repositories import record
from shoal_controller.store.tables import Device, Event
from tests.controller.world import World, images, profile
from tests.web.client import Client


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    found = World(tmp_path)
    yield found
    found.close()


@pytest.fixture
def api(world: World) -> Client:
    return Client(create_api(world.controller))


def detail(api: Client, key: str) -> dict[str, Any]:
    found: dict[str, Any] = api.get(f"/api/v1/devices/{key}").json()
    return found


def released(world: World, device: str, *, drift: bool = False, front: str = "") -> None:
    """A release of one variant for `front` (default the device's class), rolled out to its end."""
    name = front or world.class_of(device)
    version = world.version(accuracy=0.97)
    variant = world.variant(version, "plain-onnxruntime", {name: (0.97, 1.0)}, drift=drift)
    world.release(version, {name: [variant]})
    world.endpoint(objective="minimise latency_p95")
    for _ in range(40):
        world.look(2)


def test_a_device_that_never_reported_names_causes_with_the_door(world: World, api: Client) -> None:
    device = world.add_device("cam", "onnxruntime")
    world.set_online(device, False)
    world.services.addresses["agents"] = "10.0.0.7:8443"
    with world.store.write() as session:
        session.get_one(Device, device).last_seen_ms = 0
    found = detail(api, "cam")
    assert found["status"] == "offline" and len(found["causes"]) == 3
    assert "10.0.0.7:8443" in found["causes"][1] and "doctor" in found["next_step"]


def test_desired_against_reported(world: World, api: Client) -> None:
    device = world.add_device("cam", "onnxruntime")
    world.set_online(device, False)
    name = world.class_of(device)
    version = world.version(accuracy=0.97)
    variant = world.variant(version, "plain-onnxruntime", {name: (0.97, 1.0)})
    world.release(version, {name: [variant]})
    world.endpoint(objective="minimise latency_p95")
    api.patch(f"/api/v1/devices/{device}", json={"pins": {"digits": variant}})
    world.look(2)
    (placement,) = detail(api, "cam")["placements"]
    assert placement["wanted"] == "plain-onnxruntime" and placement["serving"] == ""
    assert not placement["current"] and placement["step"] == ""
    found = detail(api, "cam")
    assert found["generation"] > found["reported_generation"] and found["desired_ms"] > 0
    world.set_online(device, True)
    for _ in range(10):
        world.look(2)
    found = detail(api, "cam")
    (placement,) = found["placements"]
    assert placement["variant"] == "plain-onnxruntime" and placement["current"]
    assert found["connected"] and found["expected_ms"] > found["last_seen_ms"] and found["next_step"] == ""


def test_inputs_are_judged_device_by_device(world: World, api: Client) -> None:
    clean, noisy = (world.add_device(name, "onnxruntime") for name in ("clean", "noisy"))
    released(world, clean, drift=True)
    assert detail(api, "clean")["drift"] == []  # nothing was asked of it yet
    for at in range(4):
        world.look(2)
        world.traffic(clean, ms=1.0, inputs=images(60, 40 + at))
        world.traffic(noisy, ms=1.0, inputs=images(60, 50 + at, contrast=0.3, noise=60))
    (inside,), (outside,) = detail(api, "clean")["drift"], detail(api, "noisy")["drift"]
    assert inside["score"] < 1.2 < 2 < outside["score"]
    assert outside["endpoint"] == "digits" and outside["n"] >= 50 and outside["statistic"]


def test_a_fallback_is_marked_in_lists_too(world: World, api: Client) -> None:
    device = world.add_device("cam", "onnxruntime", "openvino")
    other = world.add_device("plain", "onnxruntime")
    released(world, other, front=world.class_of(other))
    (found,) = api.get("/api/v1/devices", params={"filter": "is:fallback"}).json()["items"]
    assert found["id"] == device and found["placements"][0]["fallback"]
    assert api.get("/api/v1/devices", params={"filter": "is:emulated"}).json()["total"] == 0


def test_an_emulated_device_claims_no_latency(world: World, api: Client) -> None:
    device = world.add_device("qemu", "onnxruntime")
    released(world, device)
    measured = profile("onnxruntime")
    measured.emulated = True
    with world.store.write() as session:
        session.get_one(Device, device).profile = measured.SerializeToString()
    world.look(2)
    world.traffic(device, ms=9.0)
    found = detail(api, "qemu")
    assert found["emulated"] and found["p95_ms"] is None
    assert all(window["p95_ms"] is None for window in found["windows"]) and found["windows"]
    assert "emulated" in found["class_reason"]
    assert api.get("/api/v1/devices", params={"filter": "is:emulated"}).json()["total"] == 1


def test_removed_devices_are_listed_only_when_asked_for(world: World, api: Client) -> None:
    device = world.add_device("cam", "onnxruntime")
    world.add_device("other", "onnxruntime")
    with world.store.write() as session:
        session.get_one(Device, device).revoked = True
        record(session, actor="person:test", verb="revoked", kind="device", object=device)
    names = [d["name"] for d in api.get("/api/v1/devices").json()["items"]]
    assert names == ["other"]
    gone = api.get("/api/v1/devices", params={"filter": "status:revoked"}).json()["items"]
    assert [d["name"] for d in gone] == ["cam"]
    assert "join it with a new token" in detail(api, "cam")["next_step"]
    refused = api.post(f"/api/v1/devices/{device}/requests", json={"kind": "logs"})
    assert refused.status_code == 409


@pytest.mark.parametrize("kind", ["logs", "diagnose", "profile"])
def test_every_kind_of_request_reaches_the_desired_state(world: World, api: Client, kind: str) -> None:
    device = world.add_device("cam", "onnxruntime")
    assert api.post(f"/api/v1/devices/{device}/requests", json={"kind": kind}).status_code == 202
    world.services.publish([device])
    assert len(world.desired(device).requests) == 1
    assert [r["kind"] for r in api.get(f"/api/v1/devices/{device}/requests").json()] == [kind]


def test_the_class_is_explained() -> None:
    reason = class_reason(profile("onnxruntime"), "x86")
    assert reason == "x86: x86_64 with 2 usable cores; instructions avx2; runtimes onnxruntime 1.32.0."


async def test_joins_and_answers_do_not_wait_for_the_next_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second join arrives while the hub rests after the first: it is told before the rest is over."""
    monkeypatch.setattr(stream, "PERIOD_SECONDS", 3600.0)
    heard: list[Any] = []

    def listen(call: Any) -> Any:
        heard.append(call)
        return lambda: None

    services = SimpleNamespace(
        intake=SimpleNamespace(windows_total=0),
        feed=SimpleNamespace(listen=listen),
        clock=lambda: int(time.time() * 1000),
    )
    hub = stream.Hub(cast(Any, services), asyncio.Event())
    client = hub.open(frozenset())
    for number, verb in enumerate(("joined", "joined", "answered")):
        heard[0]([Event(id=number, kind="device", object=f"d-{number}", verb=verb)])
        assert f"d-{number}" in await client.queue.get()
    hub.close(client)
