"""Servers for tests: in this process (a data plane with its listeners), and as a real subprocess."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from shoal_agent.serving.asgi import App
from shoal_agent.serving.dataplane import DataPlane
from shoal_agent.serving.http import Listener, listen_tcp
from shoal_protos.bundle import Bundle
from tests.agent import bundles
from tests.agent.serving import raw

START = "import sys; from shoal_agent.serving.main import main; sys.exit(main(sys.argv[1:]))"


class ServerProcess:
    """`shoal-agent serve` as a process of its own."""

    def __init__(self, arguments: list[str], ports_file: Path | None = None) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", START, *arguments, "--http-port", "0", "--grpc-port", "0"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self.ports: dict[str, int] = {}
        self.lines: list[str] = []
        end = time.monotonic() + 60
        if ports_file is None:
            assert self.process.stdout is not None
            while not self.ports:
                line = self.process.stdout.readline()
                assert line, self.errors()
                self.lines.append(line)
                if line.startswith("{"):
                    self.ports = json.loads(line)
        while ports_file is not None and not self.ports and time.monotonic() < end:
            if (ports_file.parent / "private.sock").exists():
                self.ports = json.loads(ports_file.read_text())
            assert self.process.poll() is None, self.errors()
            time.sleep(0.02)

    @property
    def http(self) -> str:
        return f"127.0.0.1:{self.ports['http']}"

    @property
    def grpc(self) -> str:
        return f"127.0.0.1:{self.ports['grpc']}"

    def errors(self) -> str:
        return self.process.communicate(timeout=10)[1]

    def stop(self, number: int = signal.SIGTERM) -> int:
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            self.process.communicate(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.communicate()
        return self.process.returncode


@pytest.fixture
def start_server() -> Iterator[Callable[..., ServerProcess]]:
    """Starts servers that end with the test."""
    started: list[ServerProcess] = []

    def start(arguments: list[str], ports_file: Path | None = None) -> ServerProcess:
        started.append(ServerProcess(arguments, ports_file))
        return started[-1]

    yield start
    for server in started:
        server.stop()


@pytest.fixture(scope="module")
def digits_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """One server of the digits-like model for a whole module."""
    bundle = bundles.onnx_bundle(tmp_path_factory.mktemp("bundle"))
    server = ServerProcess([str(bundle.path), "--metrics-port", "0"])
    yield server
    server.stop()


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return bundles.onnx_bundle(tmp_path_factory.mktemp("digits"))


@pytest.fixture(scope="session")
def other_digits(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Another model of the same signature, of other answers."""
    return bundles.onnx_bundle(tmp_path_factory.mktemp("other"), seed=7, version=2)


@pytest.fixture(scope="session")
def vector(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return bundles.vector_bundle(tmp_path_factory.mktemp("vector"), name="vector")


@pytest.fixture(scope="session")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A model too slow to run in the event loop."""
    return bundles.vector_bundle(tmp_path_factory.mktemp("slow"), width=2048, depth=4, name="slow")


@pytest.fixture(autouse=True)
async def _connections() -> AsyncIterator[None]:
    yield
    await raw.close_all()


@pytest.fixture
async def plane() -> AsyncIterator[DataPlane]:
    with ThreadPoolExecutor(2) as executor:
        yield DataPlane(asyncio.get_running_loop(), executor, workers=2, max_queue=8)


@pytest.fixture
async def listener(plane: DataPlane, digits: Bundle) -> AsyncIterator[Listener]:
    """HTTP on a free port, serving `digits`, bodies limited to 1 MiB."""
    await asyncio.get_running_loop().run_in_executor(
        None, lambda: plane.load("digits", digits.path, digits.digest)
    )
    server = await listen_tcp(App(plane, max_body=1 << 20), "127.0.0.1", 0)
    yield server
    await server.close(1.0)
