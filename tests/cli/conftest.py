"""A fleet to look at: a small HTTP server that answers as `api/schemas.py` says."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from pydantic import BaseModel

from shoal_controller.api import schemas
from shoal_controller.cli.main import main

NOW_MS = 1_800_000_000_000


@dataclass
class Call:
    method: str
    path: str
    query: dict[str, str]
    body: bytes


@dataclass
class Api:
    """`answers`: (method, path) -> schema, list, (status, problem) or a function of the call."""

    url: str = ""
    answers: dict[tuple[str, str], Any] = field(default_factory=dict)
    calls: list[Call] = field(default_factory=list)

    def answer(self, method: str, path: str, value: Any) -> None:
        self.answers[(method, path)] = value


def plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, list):
        return [plain(item) for item in value]
    return value


def handler(api: Api) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def reply(self) -> None:
            parts = urlsplit(self.path)
            length = int(self.headers.get("content-length") or 0)
            query = {key: values[0] for key, values in parse_qs(parts.query).items()}
            call = Call(self.command, parts.path.removeprefix("/api/v1"), query, self.rfile.read(length))
            api.calls.append(call)
            missing = (
                404,
                problem(404, "not_found", f"There is nothing at {call.path}.", "Look at the list."),
            )
            value = api.answers.get((call.method, call.path), missing)
            if callable(value):
                value = value(call)
            status, value = value if isinstance(value, tuple) else (200, value)
            body = json.dumps(plain(value)).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST = do_PATCH = do_DELETE = reply

        def log_message(self, format: str, *args: Any) -> None:
            pass

    return Handler


def problem(status: int, code: str, detail: str, remedy: str = "") -> schemas.Problem:
    return schemas.Problem(
        title=code, status=status, code=code, detail=detail, remedy=remedy, request_id="req-7"
    )


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Api]:
    """A running API; `shoal` finds it through SHOAL_URL, and no configuration of this machine leaks in."""
    api = Api()
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(api))
    api.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("SHOAL_URL", api.url)
    for name in ("SHOAL_HOME", "SHOAL_TOKEN", "NO_COLOR", "SHOAL_DEBUG"):
        monkeypatch.delenv(name, raising=False)
    yield api
    server.shutdown()
    server.server_close()
    thread.join()


@dataclass
class Done:
    code: int
    out: str
    err: str


Shoal = Callable[..., Done]


@pytest.fixture
def shoal(capfd: pytest.CaptureFixture[str]) -> Shoal:
    """Runs one command line in this process: `shoal("device", "list").code`."""

    def call(*arguments: str) -> Done:
        capfd.readouterr()
        code = main(arguments)
        out, err = capfd.readouterr()
        return Done(code, out, err)

    return call


def device(name: str = "kitchen", **changes: Any) -> schemas.Device:
    values: dict[str, Any] = {
        "id": f"d-{name}",
        "name": name,
        "project": "default",
        "profile_class": "x86_64.avx2.2c+onnxruntime",
        "status": "healthy",
        "labels": {"site": "lab"},
        "version": "digits v1",
        "p95_ms": 0.41,
        "last_seen_ms": NOW_MS,
        "joined_ms": NOW_MS - 60_000,
        "agent_version": "0.1.0",
    }
    return schemas.Device(**{**values, **changes})


def rollout(state: str = "running", **changes: Any) -> schemas.Rollout:
    effect = schemas.Effect(name="latency_p95", value=-11.8, low=-14.9, high=-8.7, gate=5.0, n=40)
    values: dict[str, Any] = {
        "id": "r-0002",
        "endpoint": "digits",
        "from_label": "v1",
        "to_label": "v2",
        "state": state,
        "sentence": "Wave 1 is collecting.",
        "waves": [
            schemas.Wave(
                name="first", state="passed", devices=1, switched=1, failed=0, effects=[effect], decision="go"
            ),
            schemas.Wave(
                name="rest", state="running", devices=4, switched=2, failed=0, sentence="Collecting."
            ),
        ],
        "gates": {"latency_p95": "+5 %"},
        "actor": "person:ann",
        "reason": "",
        "created_ms": NOW_MS,
        "finished_ms": 0,
    }
    return schemas.Rollout(**{**values, **changes})


def optimization(state: str = "running", **changes: Any) -> schemas.Optimization:
    values: dict[str, Any] = {
        "id": "o-0003",
        "kind": "optimize",
        "model": "digits",
        "version": 1,
        "endpoint": "digits",
        "objective": "minimise size",
        "state": state,
        "progress": {
            "step": "distil",
            "share": 0.4,
            "message": "epoch 4 of 10",
            "steps": ["analyse", "distil"],
        },
        "result": {},
        "created_ms": NOW_MS,
        "started_ms": NOW_MS,
        "finished_ms": 0,
    }
    return schemas.Optimization(**{**values, **changes})


def version(state: str = "ready", **changes: Any) -> schemas.Version:
    values: dict[str, Any] = {
        "id": "v-0001",
        "model": "digits",
        "number": 1,
        "state": state,
        "metric": "accuracy",
        "baseline": schemas.Figure(value=0.992, low=0.97, high=1.0, n=250, source="local"),
        "created_ms": NOW_MS,
        "optimization": "",
    }
    return schemas.Version(**{**values, **changes})
