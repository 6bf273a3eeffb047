"""Finds the public data sets, copies examples into a folder of their own, serves files with Range."""

from __future__ import annotations

import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from shoal_agent.runtimes.base import machine_isa
from shoal_optimizer.targets import ClassSpec

REPOSITORY = Path(__file__).parents[2]
EXAMPLES = REPOSITORY / "examples"
if str(EXAMPLES) not in sys.path:
    sys.path.insert(0, str(EXAMPLES))  # the examples import what lies beside them


def data_folder(file: str) -> Path | None:
    """The folder with a packed set: SHOAL_DATA, the examples' own, or shared/data beside the repository."""
    named = os.environ.get("SHOAL_DATA")
    places = [*([Path(named)] if named else []), EXAMPLES, REPOSITORY.parent / "shared" / "data"]
    return next((place for place in places if (place / file).is_file()), None)


@pytest.fixture
def with_data(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Points SHOAL_DATA at the folder that has a set; skips the test where none has."""

    def point(file: str) -> None:
        folder = data_folder(file)
        if folder is None:
            pytest.skip(f"{file} is nowhere; `python examples/... --download` fetches it, or set SHOAL_DATA")
        monkeypatch.setenv("SHOAL_DATA", str(folder))

    return point


@pytest.fixture
def without_data(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No set anywhere."""
    monkeypatch.delenv("SHOAL_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def example(tmp_path: Path) -> Callable[[str], Path]:
    """Copies an example's code, without weights and data, to where it may write."""

    def copy(name: str) -> Path:
        for file in (name, "public_data.py"):
            shutil.copy(EXAMPLES / file, tmp_path)
        return tmp_path / name

    return copy


class _Files(BaseHTTPRequestHandler):
    files: dict[str, bytes]
    ranges: list[str]
    break_at: list[int]  # answer only so many bytes of the next request

    def do_GET(self) -> None:
        content = self.files.get(self.path.lstrip("/"))
        if content is None:
            self.send_error(404)
            return
        asked = self.headers.get("Range", "")
        self.ranges.append(asked)
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked else 0
        if start >= len(content):
            self.send_error(416)
            return
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        end = start + self.break_at.pop() if self.break_at else len(content)
        self.wfile.write(content[start:end])

    def log_message(self, *arguments: object) -> None:
        pass


class Server:
    """A publisher's server: `files` by name, `ranges` it was asked for, `break_at` cuts answers off."""

    def __init__(self, address: str, handler: type[_Files]) -> None:
        self.address = address
        self.files, self.ranges, self.break_at = handler.files, handler.ranges, handler.break_at


@pytest.fixture
def server() -> Iterator[Server]:
    handler = type("Handler", (_Files,), {"files": {}, "ranges": [], "break_at": []})
    listening = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=listening.serve_forever, daemon=True)
    thread.start()
    yield Server(f"http://127.0.0.1:{listening.server_address[1]}", handler)
    listening.shutdown()
    listening.server_close()
    thread.join()


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def local_class() -> ClassSpec:
    """What this machine is, with the runtimes that the tests use."""
    import onnxruntime
    import openvino

    runtimes = {"onnxruntime": onnxruntime.__version__, "openvino": openvino.__version__.split("-")[0]}
    return ClassSpec.of("x86_64.test", machine_isa(), runtimes, local=True)
