"""The dashboard over the product's own API and a store that lived: every page, every link, every action."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shoal_controller.api.app import create_api
from shoal_controller.app import Controller
from shoal_controller.settings import Settings
from shoal_controller.store.repositories import record
from shoal_controller.store.tables import Device, Finding, Optimization
from tests.controller.world import World, profile
from tests.web import real
from tests.web.client import Client
from tests.web.html import Page
from tests.web.test_browser import LIVE, opened


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    made = real.lived(tmp_path_factory.mktemp("world"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def client(world: World) -> Client:
    return Client(real.application(world))


def test_every_page_and_every_link(client: Client) -> None:
    seen: set[str] = set()
    waiting = ["/"]
    while waiting:
        path = waiting.pop()
        if path in seen:
            continue
        seen.add(path)
        answer = client.get(path)
        assert answer.status_code == 200, path
        page = Page(answer.text)
        assert page.unbalanced == [] and len(page.all("h1")) == 1, path
        waiting += [link for link in page.links if link.startswith("/") and not link.startswith("/api/")]
    for kind in ("/devices/", "/models/", "/rollouts/", "/findings/", "/optimizations/", "/endpoints/"):
        assert any(path.startswith(kind) for path in seen), kind


def test_pages_say_what_the_loop_did(client: Client) -> None:
    found = Page(client.get("/rollouts/r-0002").text)
    assert "accuracy fell by" in found.text("p")
    drawings = [e for e in found.all("svg") if e.attributes.get("class", "").startswith("forest")]
    assert len(drawings) == 6
    assert any("beyond" in e.attributes["class"] for e in drawings)
    assert "Input drift" in Page(client.get("/findings").text).text("li")
    assert "Inputs drifted" in Page(client.get("/story").text).text("h2")
    model = Page(client.get("/models/digits?version=1").text)
    assert "at most 5 ms" in model.text("svg") and "serving on 1" in model.text("td")


def test_devices_sort_and_filter_with_the_real_language(client: Client) -> None:
    for link in Page(client.get("/").text).links:
        if "sort=" in link:
            assert client.get(link).status_code == 200, link
    assert "loom" in Page(client.get("/?filter=runtime:openvino -runtime:onnxruntime").text).text("tbody")
    wrong = Page(client.get("/?filter=colour:red").text)
    assert "There is no field 'colour'" in wrong.text("p")


def test_refusals_are_pages(client: Client) -> None:
    answer = client.post("/rollouts/r-0002/pause", data={"reason": "late"})
    assert answer.status_code == 409 and len(Page(answer.text).all("h1")) == 1
    assert client.get("/devices/nobody").status_code == 404


def test_actions_reach_the_store(world: World, client: Client) -> None:
    assert client.post("/findings/f-0001/dismiss", data={"reason": "we know"}).status_code == 200
    finding: Finding = world.row(Finding, "f-0001")
    assert finding.state == "dismissed"
    assert client.post("/optimizations/o-0003/cancel").status_code == 200
    job: Optimization = world.row(Optimization, "o-0003")
    assert job.state == "cancelled"
    assert "we know" in client.get("/audit").text


class Running:
    """A controller with its doors open, in a thread of its own."""

    def __init__(self, home: Path) -> None:
        self.url = ""
        self._home = home
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))
        self._thread.start()
        assert self._ready.wait(30)

    async def _run(self) -> None:
        self._loop, self._end = asyncio.get_running_loop(), asyncio.Event()
        doors = {"http_port": 0, "enrolment_port": 0, "agents_port": 0}
        self.controller = Controller(Settings(home=self._home, fleet="lab", **doors))  # type: ignore[arg-type]
        await self.controller.start()
        self.url = f"http://127.0.0.1:{self.controller.ports['http']}"
        self._ready.set()
        await self._end.wait()
        await self.controller.stop()

    def join(self, name: str) -> None:
        """A device joins, as enrolment writes it."""
        with self.controller.store.write() as session:
            session.add(Device(id=f"d-{name}", name=name, profile_class="x86_64.avx2.2c+onnxruntime",
                               profile=profile("onnxruntime").SerializeToString(), public_key_hash=name,
                               certificate_serial=name, certificate_not_after_ms=0, joined_ms=self.controller.clock(), reported=None))  # fmt: skip  # noqa: E501
            record(session, actor=f"device:{name}", verb="joined", kind="device", object=f"d-{name}")

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join()


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Running]:
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    made = Running(home)
    yield made
    made.stop()


def test_a_device_joins_before_your_eyes(browser: Any, running: Running) -> None:
    with opened(browser, running) as page:  # type: ignore[arg-type]
        answer = page.goto("/")
        assert answer.headers["content-security-policy"].startswith("default-src 'self'")
        page.wait_for_selector(LIVE)
        page.wait_for_selector("text=No devices yet")
        running.join("kiln")
        page.wait_for_selector("table >> text=kiln")
        page.wait_for_selector("shoal-map >> text=kiln")
        page.goto("/join")
        page.wait_for_selector(LIVE)
        running.join("loom")
        page.wait_for_selector(".arrivals >> text=loom")
        page.fill("[name=uses]", "2")
        page.click("text=Make the join line")
        page.wait_for_selector("text=for 2 devices, until")
        assert len(page.inner_text("#join-line .code code >> nth=-1")) > 100
        page.wait_for_selector("text=2 of 2 uses left")


def test_no_ui_leaves_the_api(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    controller = Controller(Settings(home=home, fleet="lab", ui=False))
    controller.open()
    try:
        client = Client(create_api(controller))
        assert client.get("/").status_code == 404
        assert client.get("/api/v1/status").status_code == 200
    finally:
        controller.close()
