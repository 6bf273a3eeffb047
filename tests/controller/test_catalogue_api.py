"""The routers of models, endpoints, optimizations, rollouts, findings and the story, over HTTP."""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from fastapi import FastAPI

from shoal_controller import optimizations
from shoal_controller.api import problems, schemas
from shoal_controller.store.tables import Optimization, Version
from tests.controller.world import World, images, source_tar

ROUTERS = ("models", "variants", "releases", "endpoints", "optimizations", "rollouts", "findings", "story")


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path)
    yield made
    made.close()


class Api:
    """Calls an application in process."""

    def __init__(self, services: Any, routers: tuple[str, ...] = ROUTERS) -> None:
        self.app = FastAPI()
        self.app.state.services = services
        problems.install(self.app)
        for name in routers:
            router = importlib.import_module(f"shoal_controller.api.{name}").router
            self.app.include_router(router, prefix="/api/v1")

    def request(self, method: str, path: str, **kwargs: Any) -> httpx.Response:
        async def call() -> httpx.Response:
            transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost/api/v1") as client:
                return await client.request(method, path, **kwargs)

        return asyncio.run(call())


@pytest.fixture
def api(world: World) -> Api:
    return Api(world.services)


def get(api: Api, path: str, status: int = 200) -> Any:
    answer = api.request("GET", path)
    assert answer.status_code == status, answer.text
    return answer.json()


def post(api: Api, path: str, body: Any = None, status: int = 201) -> Any:
    answer = api.request("POST", path, json=body)
    assert answer.status_code == status, answer.text
    return answer.json()


def push(api: Api, data: bytes, name: str = "digits") -> Any:
    return api.request(
        "POST", f"/models/{name}/versions", files={"source": ("s.tar", data)}, data={"note": "hello"}
    )


def released(world: World) -> tuple[str, list[str], str]:
    devices = [world.add_device(f"cam{i}") for i in range(3)]
    name = world.class_of(devices[0])
    version = world.version()
    slow = world.variant(version, "plain", {name: (0.99, 4.0)}, drift=True)
    quick = world.variant(version, "pruned", {name: (0.97, 1.0)}, drift=True)
    world.release(version, {name: [slow, quick]})
    return version, devices, name


def test_push_and_look(world: World, api: Api) -> None:
    answer = push(api, source_tar())
    assert answer.status_code == 201, answer.text
    version = schemas.Version.model_validate(answer.json())
    assert (version.model, version.number, version.state, version.note) == ("digits", 1, "ingesting", "hello")
    job = schemas.Optimization.model_validate(get(api, f"/optimizations/{version.optimization}"))
    assert (job.kind, job.state, job.model) == ("ingest", "queued", "digits")
    detail = schemas.ModelDetail.model_validate(get(api, "/models/digits"))
    assert detail.state == "ingesting" and detail.version_list[0].id == version.id
    assert get(api, "/models/digits/versions/1")["id"] == version.id
    assert get(api, "/models/nope", 404)["remedy"]
    assert push(api, b"no tar").status_code == 422
    assert push(api, source_tar(), "No Name").status_code == 422
    problem = post(api, "/optimizations", {"model": "digits"}, 409)
    assert "no ready version" in problem["detail"]


def test_uploads_have_a_limit(tmp_path: Path) -> None:
    small = World(tmp_path, max_upload_bytes=1000)
    answer = push(Api(small.services, ("models",)), b"x" * 2000)
    assert answer.status_code == 422 and "larger than 1000 bytes" in answer.text
    small.close()


def test_variants_releases_and_endpoints(world: World, api: Api) -> None:
    _, devices, name = released(world)
    post(
        api,
        "/endpoints",
        {"name": "digits", "model": "digits", "objective": "maximise accuracy", "settle_s": 2},
    )
    for _ in range(20):
        world.look()
    for device in devices:
        world.traffic(device, labelled=20, correct=19)
    endpoint = schemas.Endpoint.model_validate(get(api, "/endpoints/digits"))
    assert endpoint.choice == {name: "plain"} and endpoint.version == 1 and endpoint.devices == 3
    assert endpoint.p95_ms and endpoint.accuracy and endpoint.accuracy.n == 60 and endpoint.requests_per_s > 0
    variants = [
        schemas.Variant.model_validate(v) for v in get(api, f"/variants?model=digits&class={quote(name)}")
    ]
    plain = next(v for v in variants if v.name == "plain")
    (figures,) = plain.classes
    assert figures.chosen and figures.on_front and figures.serving == 3
    assert figures.accuracy and figures.accuracy.value == 0.99 and figures.accuracy.low == pytest.approx(0.98)
    assert figures.latency_p95_ms and figures.latency_p95_ms.value == 4.0
    assert get(api, f"/variants/{plain.id}")["bundle"] == plain.bundle
    assert get(api, "/variants?model=digits&class=none") == []
    (release,) = [schemas.Release.model_validate(r) for r in get(api, "/releases?model=digits")]
    assert release.fronts == {name: [v.id for v in variants]}
    made = post(api, "/releases", {"model": "digits", "version": 1, "note": "again"})
    assert made["number"] == 2 and get(api, f"/releases/{made['id']}")["note"] == "again"
    changed = api.request("PATCH", "/endpoints/digits", json={"automatic": False, "settle_s": 5}).json()
    assert changed["settings"] == {"sampling_share": 0.0, "settle_s": 5, "automatic": False}
    assert api.request("PATCH", "/endpoints/digits", json={"objective": "speed>9"}).status_code == 422
    post(api, "/endpoints", {"name": "digits", "model": "digits"}, 409)
    post(api, "/endpoints", {"name": "other", "model": "nothing"}, 404)


def test_rollouts_over_http(world: World, api: Api) -> None:
    _, devices, name = released(world)
    post(api, "/endpoints", {"name": "digits", "model": "digits", "automatic": False, "settle_s": 2})
    planned = post(api, "/rollouts", {"endpoint": "digits", "dry_run": True})
    assert planned["state"] == "planned" and [w["devices"] for w in planned["waves"]] == [1, 2]
    assert get(api, "/rollouts") == [] and get(api, "/endpoints/digits")["rollout"] == ""
    made = schemas.Rollout.model_validate(post(api, "/rollouts", {"endpoint": "digits", "reason": "first"}))
    assert (made.state, made.from_label, made.to_label, made.actor) == (
        "running",
        "nothing",
        "v1",
        "person:local",
    )
    assert get(api, "/endpoints/digits")["rollout"] == made.id
    post(api, "/rollouts", {"endpoint": "digits"}, 409)
    post(api, "/rollouts", {"endpoint": "digits", "waves": ["many"]}, 422)
    assert post(api, f"/rollouts/{made.id}/pause", {"reason": "wait"}, 200)["state"] == "paused"
    assert post(api, f"/rollouts/{made.id}/resume", None, 200)["state"] == "running"
    for _ in range(20):
        world.look()
    done = schemas.Rollout.model_validate(get(api, f"/rollouts/{made.id}"))
    assert done.state == "promoted" and all(w.decision == "go" and w.sentence for w in done.waves)
    assert {d.state for d in done.devices} <= {"switched", "no_traffic"} and len(done.devices) == 3
    assert done.waves[1].switched == 2
    back = post(api, "/rollouts", {"endpoint": "digits", "choice": {name: "plain"}})
    aborted = post(api, f"/rollouts/{back['id']}/abort", {"reason": "no"}, 200)
    assert aborted["state"] == "stopping" and "no" in aborted["sentence"]
    for _ in range(5):
        world.look()
    assert get(api, f"/rollouts/{back['id']}")["state"] == "aborted"
    assert post(api, f"/rollouts/{back['id']}/promote", None, 409)["remedy"]
    assert devices


def test_optimizations_over_http(world: World, api: Api) -> None:
    version, _, name = released(world)
    made = post(api, "/optimizations", {"model": "digits", "minutes": 1, "classes": [name], "seed": 3})
    row = world.row(Optimization, made["id"])
    assert row.spec == {"minutes": 1.0, "seed": 3, "classes": [name]}
    assert "nope" in post(api, "/optimizations", {"model": "digits", "classes": ["nope"]}, 422)["detail"]
    post(api, "/optimizations", {"model": "digits", "minutes": 0}, 422)
    assert get(api, f"/optimizations/{made['id']}/report", 404)["remedy"]
    with world.store.write() as session:
        job = session.get(Optimization, made["id"])
        assert job is not None
        job.result = {"report": {"html": world.blobs.put(session, b"<p>hi</p>", purpose="report")}}
    answer = api.request("GET", f"/optimizations/{made['id']}/report")
    assert answer.text == "<p>hi</p>" and "default-src 'none'" in answer.headers["content-security-policy"]
    assert post(api, f"/optimizations/{made['id']}/cancel", None, 200)["state"] == "cancelled"
    post(api, f"/optimizations/{made['id']}/cancel", {"reason": "again"}, 409)
    assert {o["kind"] for o in get(api, "/optimizations")} == {"ingest", "optimize"}
    assert world.row(Version, version).state == "ready"


def test_findings_and_story(world: World, api: Api) -> None:
    _, devices, name = released(world)
    post(api, "/endpoints", {"name": "digits", "model": "digits", "settle_s": 2})
    for _ in range(20):
        world.look()
    for seed in range(10):
        for i, device in enumerate(devices):
            world.traffic(device, inputs=images(30, 10 * seed + i + 500, contrast=0.5, noise=30))
        world.look()
    (row,) = get(api, "/findings?state=open,acting")
    finding = schemas.Finding.model_validate(row)
    assert finding.kind == "input_drift" and finding.endpoint == "digits" and finding.profile_class == name
    story = [schemas.StoryItem.model_validate(item) for item in get(api, "/story?endpoint=digits")]
    assert [item.kind for item in story if item.kind in ("finding", "rollout")] == ["rollout", "finding"]
    assert story[-1].link.startswith(("/optimizations/", "/findings/"))
    assert get(api, "/story?endpoint=nothing", 404)
    done = post(api, f"/findings/{finding.id}/dismiss", {"reason": "known"}, 200)
    assert done["state"] == "dismissed"
    post(api, f"/findings/{finding.id}/dismiss", None, 409)
    assert get(api, "/findings?state=open,acting") == []
    with world.store.write() as session:
        for job in session.query(Optimization).filter(Optimization.state == "queued"):
            optimizations.cancel(session, job, world.clock, actor="t")
