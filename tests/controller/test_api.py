"""The REST API: what it answers, how it refuses, whom it lets in."""

from __future__ import annotations

import asyncio
import json
import subprocess
from typing import Any

import httpx
import pytest

from shoal_controller.api import status
from shoal_controller.api.stream import QUEUE, Hub
from shoal_controller.app import Controller
from shoal_controller.store.repositories import record
from shoal_controller.store.tables import Device, Window
from shoal_protos import tokens
from shoal_protos.v1 import telemetry_pb2

API = "/api/v1"


@pytest.fixture
def joined(opened: Controller) -> list[str]:
    """Two devices, one with telemetry."""
    from cryptography.hazmat.primitives.asymmetric import ec

    from shoal_controller import enrolment
    from shoal_protos.v1 import enrolment_pb2

    from .conftest import csr_of, profile_of

    ids = []
    with opened.store.write() as session:
        _, secret = enrolment.create_token(session, uses=2, ttl_s=60, now_ms=opened.clock())
        for name in ("alpha", "beta"):
            request = enrolment_pb2.EnrollRequest(
                token_secret=secret,
                csr_der=csr_of(ec.generate_private_key(ec.SECP256R1())),
                profile=profile_of(),
                name=name,
            )
            reply = enrolment.enroll(
                session, opened.keys, request, settings=opened.settings, now_ms=opened.clock()
            )
            ids.append(reply.device)
        _telemetry(opened, session, ids[0])
    return ids


def _telemetry(opened: Controller, session: Any, device: str) -> None:
    window = telemetry_pb2.TelemetryWindow(boot_id="b", monotonic_start_ns=0, monotonic_end_ns=2_000_000_000)
    window.system.temperature_celsius = float("nan")
    latency = telemetry_pb2.Histogram(scale=4, offset=180, counts=[40], count=40, sum=1e5, min=2400, max=2500)
    window.placements.add(
        endpoint="digits",
        bundle="sha256:" + "a" * 64,
        role=1,
        requests=40,
        errors=4,
        labelled=20,
        correct=19,
        latency=latency,
    )
    row = session.get_one(Device, device)
    opened.intake._telemetry(session, row, window, opened.clock() - 2000)
    row.last_seen_ms = opened.clock()
    row.connected = True


async def test_an_empty_fleet_says_what_to_do(client: httpx.AsyncClient) -> None:
    answer = (await client.get(f"{API}/status")).json()
    assert answer["sentence"] == "No device has joined yet."
    assert answer["next_step"] == "shoal token create --join" and not answer["needs_attention"]
    assert (await client.get(f"{API}/fleet/map")).json() == {"classes": [], "states": [], "names": []}
    assert (await client.get(f"{API}/devices")).json()["total"] == 0


async def test_tokens_are_made_listed_and_revoked(client: httpx.AsyncClient, opened: Controller) -> None:
    made = await client.post(f"{API}/tokens", json={"uses": 3, "labels": {"site": "lab"}})
    assert made.status_code == 201
    token = tokens.decode(made.json()["token"])
    assert token.agent_addresses == ("127.0.0.1:8443",) and token.ca_der == opened.keys.ca_der
    (listed,) = (await client.get(f"{API}/tokens")).json()
    assert listed["uses_left"] == 3 and "token" not in listed
    revoked = await client.delete(f"{API}/tokens/{listed['id']}")
    assert revoked.json()["revoked"]


async def test_devices_are_listed_filtered_and_sorted(client: httpx.AsyncClient, joined: list[str]) -> None:
    page = (await client.get(f"{API}/devices", params={"sort": "-p95"})).json()
    assert [item["name"] for item in page["items"]] == ["alpha", "beta"] and page["total"] == 2
    assert page["items"][0]["p95_ms"] == pytest.approx(2.5, rel=0.05)
    found = (await client.get(f"{API}/devices", params={"filter": "p95>1"})).json()
    assert [item["name"] for item in found["items"]] == ["alpha"]
    offset = (await client.get(f"{API}/devices", params={"offset": 1, "limit": 1})).json()
    assert [item["name"] for item in offset["items"]] == ["beta"] and offset["total"] == 2
    wrong = await client.get(f"{API}/devices", params={"filter": "p95>"})
    assert wrong.status_code == 422 and "character 4" in wrong.json()["detail"]
    assert (await client.get(f"{API}/devices", params={"sort": "colour"})).status_code == 422


async def test_one_device_in_full(client: httpx.AsyncClient, joined: list[str]) -> None:
    detail = (await client.get(f"{API}/devices/alpha")).json()
    assert detail["id"] == joined[0] and detail["profile"]["architecture"] == "x86_64"
    assert detail["windows"][0]["requests"] == 40 and detail["system"]["temperature_celsius"] is None
    assert [event["verb"] for event in detail["events"]] == ["joined"]
    assert "avx2" in detail["class_reason"]
    assert (await client.get(f"{API}/devices/{joined[0][:5]}")).json()["name"] == "alpha"
    missing = await client.get(f"{API}/devices/gamma")
    assert missing.status_code == 404 and missing.json()["remedy"]
    assert missing.headers["content-type"] == "application/problem+json"
    assert missing.json()["request_id"] == missing.headers["x-request-id"]


async def test_devices_are_renamed_labelled_and_revoked(
    client: httpx.AsyncClient, opened: Controller, joined: list[str]
) -> None:
    changed = await client.patch(f"{API}/devices/alpha", json={"labels": {"site": "lab"}, "name": "door"})
    assert changed.json()["labels"] == {"site": "lab"} and changed.json()["name"] == "door"
    assert (await client.patch(f"{API}/devices/door", json={"labels": {"site": ""}})).json()["labels"] == {}
    taken = await client.patch(f"{API}/devices/door", json={"name": "beta"})
    assert taken.status_code == 409
    bad = await client.patch(f"{API}/devices/door", json={"labels": {"not a label": "x"}})
    assert bad.status_code == 422
    revoked = await client.delete(f"{API}/devices/beta", params={"reason": "stolen"})
    assert revoked.json()["status"] == "revoked"
    events = (await client.get(f"{API}/events", params={"kind": "device", "object": joined[1]})).json()
    assert events[0]["verb"] == "revoked" and events[0]["reason"] == "stolen"
    assert events[0]["actor"] == "person:local"
    asked = await client.post(f"{API}/devices/beta/requests", json={"kind": "logs"})
    assert asked.status_code == 409
    assert (await client.post(f"{API}/devices/door/requests", json={"kind": "logs"})).status_code == 202
    assert (await client.get(f"{API}/devices/door/requests")).json()[0]["state"] == "open"


async def test_the_fleet_at_a_glance(client: httpx.AsyncClient, joined: list[str]) -> None:
    (summary,) = (await client.get(f"{API}/classes")).json()
    assert summary["devices"] == 2 and summary["by_status"] == {"healthy": 1, "offline": 1}
    fleet_map = (await client.get(f"{API}/fleet/map")).json()
    assert fleet_map["states"] == ["ho"] and fleet_map["names"] == [["alpha", "beta"]]
    latency = (await client.get(f"{API}/fleet/latency", params={"minutes": 5})).json()
    (line,) = latency["series"].values()
    assert len(line) == len(latency["times_ms"]) and [v for v in line if v is not None]
    answer = (await client.get(f"{API}/status")).json()
    assert answer["sentence"].startswith("1 of 2 devices healthy, 1 offline")
    assert answer["needs_attention"]


async def test_events_are_read_forward_and_back(client: httpx.AsyncClient, joined: list[str]) -> None:
    newest = (await client.get(f"{API}/events", params={"limit": 1})).json()
    later = (await client.get(f"{API}/events", params={"after": newest[0]["id"] - 1})).json()
    assert [event["id"] for event in later] == [newest[0]["id"]]


async def test_blobs_are_served_by_range_and_never_as_a_page(
    client: httpx.AsyncClient, opened: Controller
) -> None:
    with opened.store.write() as session:
        digest = opened.blobs.put(session, b"0123456789", purpose="data")
    answer = await client.get(f"{API}/blobs/{digest}", headers={"range": "bytes=2-4"})
    assert answer.status_code == 206 and answer.content == b"234"
    assert answer.headers["content-disposition"] == "attachment"
    assert (await client.get(f"{API}/blobs/sha256:{'0' * 64}")).status_code == 404
    assert (await client.get(f"{API}/blobs/x")).status_code == 422


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example:8080", "", "localhost.evil"])
async def test_strange_names_of_this_machine_are_refused(client: httpx.AsyncClient, host: str) -> None:
    answer = await client.get(f"{API}/status", headers={"host": host})
    assert answer.status_code == 403 and answer.json()["code"] == "denied"


@pytest.mark.parametrize("host", ["localhost:8080", "127.0.0.1:8080", "[::1]:8080", "localhost"])
async def test_loopback_names_are_let_in(client: httpx.AsyncClient, host: str) -> None:
    assert (await client.get(f"{API}/status", headers={"host": host})).status_code == 200


@pytest.mark.parametrize(
    ("headers", "status_code"),
    [
        ({}, 201),
        ({"origin": "http://localhost:8080"}, 201),
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "http://localhost:9999"}, 403),
        ({"origin": "null"}, 403),
        ({"sec-fetch-site": "cross-site"}, 403),
        ({"sec-fetch-site": "same-origin"}, 201),
    ],
)
async def test_changes_from_other_sites_are_refused(
    client: httpx.AsyncClient, headers: dict[str, str], status_code: int
) -> None:
    answer = await client.post(f"{API}/tokens", json={}, headers=headers)
    assert answer.status_code == status_code


async def test_wrong_bodies_name_the_field(client: httpx.AsyncClient) -> None:
    answer = await client.post(f"{API}/tokens", json={"uses": "many", "colour": 1})
    assert answer.status_code == 422
    assert "uses:" in answer.json()["detail"] and "colour:" in answer.json()["detail"]


async def test_the_description_covers_every_route(client: httpx.AsyncClient) -> None:
    paths = (await client.get(f"{API}/openapi.json")).json()["paths"]
    for path in ("/status", "/devices/{key}", "/fleet/map", "/tokens", "/stream", "/prometheus/devices"):
        assert f"{API}{path}" in paths, path


# ---------------------------------------------------------------------------- Prometheus


async def test_the_metrics_are_accepted_by_promtool(client: httpx.AsyncClient, joined: list[str]) -> None:
    answer = await client.get("/metrics")
    text = answer.text
    assert 'shoal_requests_total{endpoint="digits",profile_class="x86_64' in text
    assert 'shoal_devices{profile_class="x86_64.avx2.2c+onnxruntime",status="healthy"} 1.0' in text
    assert "shoal_request_duration_seconds_bucket" in text
    done = await asyncio.to_thread(
        subprocess.run, ["promtool", "check", "metrics"], input=text, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


async def test_devices_that_can_be_scraped_are_told_to_prometheus(
    client: httpx.AsyncClient, opened: Controller, joined: list[str]
) -> None:
    from .conftest import profile_of

    profile = profile_of()
    profile.ports.metrics, profile.ports.host = 8002, "127.0.0.1"
    with opened.store.write() as session:
        row = session.get_one(Device, joined[0])
        row.profile, row.labels = profile.SerializeToString(), {"site/room": "lab"}
    (target,) = (await client.get(f"{API}/prometheus/devices")).json()
    assert target["targets"] == ["127.0.0.1:8002"]
    assert target["labels"]["device_name"] == "alpha" and target["labels"]["label_site_room"] == "lab"


async def test_health(client: httpx.AsyncClient) -> None:
    assert (await client.get("/healthz")).text == "ok\n"


# ---------------------------------------------------------------------------- the stream


async def test_the_stream_tells_of_changes_and_ends_with_the_controller(controller: Controller) -> None:
    url = f"http://127.0.0.1:{controller.ports['http']}{API}/stream?topics=device"
    seen: list[str] = []

    async def listen() -> None:
        async with httpx.AsyncClient(timeout=30) as http, http.stream("GET", url) as answer:
            assert answer.headers["content-type"].startswith("text/event-stream")
            async for line in answer.aiter_lines():
                seen.append(line)  # noqa: PERF401  # another task reads it meanwhile

    listening = asyncio.create_task(listen())
    async with asyncio.timeout(20):
        while not seen:
            await asyncio.sleep(0.02)
        with controller.store.write() as session:
            record(session, actor="a", verb="joined", kind="device", object="d-1")
            record(session, actor="a", verb="created", kind="model", object="m-1")
        while not any(line.startswith("data:") for line in seen):
            await asyncio.sleep(0.02)
        data = json.loads(next(line for line in seen if line.startswith("data:"))[5:])
        assert data["kinds"] == ["device"] and data["objects"] == {"device": ["d-1"]}
        await controller.stop()
        await listening


async def test_a_slow_client_is_told_to_read_again_and_dropped(opened: Controller) -> None:
    hub = Hub(opened.services, opened.stopping)
    client = hub.open(frozenset())
    for _ in range(QUEUE + 1):
        client.offer("event: change\ndata: {}\n\n")
    messages = [message async for message in hub.messages(client)]
    assert messages[-1].startswith("event: resync") and hub.clients == 0


# ---------------------------------------------------------------------------- the sentence


def counts(**devices: int) -> status.Counts:
    return status.Counts(devices, 0, 0, 0, 0, 0, 0, 1, 1, 1)


def test_the_sentence_leads_with_what_matters() -> None:
    assert status.sentence(counts(healthy=3)) == "All 3 devices are healthy."
    assert status.sentence(counts(healthy=1)) == "The device is healthy."
    assert status.sentence(counts(healthy=1, degraded=2, revoked=4)) == "1 of 3 devices healthy, 2 degraded."
    assert status.next_step(counts(healthy=1)) == ""
    assert "status:degraded" in status.next_step(counts(degraded=1))


async def test_a_window_row_is_never_counted_twice(opened: Controller, joined: list[str]) -> None:
    from sqlalchemy import select

    with opened.store.read() as session:
        rows = session.scalars(select(Window).where(Window.endpoint == "digits")).all()
    assert sum(row.requests for row in rows) == 40
