"""A dashboard over a fleet of schema objects, in process or behind a real port, and one Chromium."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI

from shoal_controller.web.routes import mount
from tests.web import fleets
from tests.web.client import Client

CHROMIUM = Path("/usr/bin/chromium")
ARGUMENTS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip


def application(fleet: fleets.Fleet) -> FastAPI:
    app = fleets.api(fleet)
    mount(app)
    return app


class Served:
    """The dashboard behind a loopback port; it can go away and come back on the same port."""

    def __init__(self, fleet: fleets.Fleet, port: int = 0) -> None:
        self.fleet = fleet
        self.port = port
        self.start()

    @property
    def url(self) -> str:
        return f"http://localhost:{self.port}"

    def start(self) -> None:
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", self.port))
        self.port = listener.getsockname()[1]
        config = uvicorn.Config(
            application(self.fleet), log_level="error", timeout_graceful_shutdown=1, lifespan="off"
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [listener]})
        self._thread.start()
        while not self._server.started:
            time.sleep(0.02)

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join()


@pytest.fixture(scope="session", params=["empty", "small", "huge"])
def any_fleet(request: pytest.FixtureRequest) -> tuple[str, fleets.Fleet, Client]:
    fleet: fleets.Fleet = getattr(fleets, request.param)()
    return request.param, fleet, Client(application(fleet))


@pytest.fixture
def small() -> tuple[fleets.Fleet, Client]:
    fleet = fleets.small()
    return fleet, Client(application(fleet))


# Module, not session: Playwright's loop runs in this thread until it is stopped, and tests with
# loops of their own may follow in the same process.
@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if not CHROMIUM.exists():
        pytest.skip("Chromium is not installed: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=str(CHROMIUM), args=ARGUMENTS)
        yield found
        found.close()


@pytest.fixture(scope="session")
def small_server() -> Iterator[Served]:
    fleets.shift()
    served = Served(fleets.small())
    yield served
    served.stop()


@pytest.fixture(scope="session")
def empty_server() -> Iterator[Served]:
    served = Served(fleets.empty())
    yield served
    served.stop()


@pytest.fixture(scope="session")
def huge_server() -> Iterator[Served]:
    fleets.shift()
    served = Served(fleets.huge())
    yield served
    served.stop()
