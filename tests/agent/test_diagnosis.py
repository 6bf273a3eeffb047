"""Requests through the desired state, transitions, and the logs that failures bring by themselves."""
# ruff: noqa: F811  # fixtures of another module

from __future__ import annotations

import asyncio
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from shoal_agent import diagnosis, doctor, logs, reporting, requests, transitions
from shoal_agent.config import Config
from shoal_agent.requests import MAX_ANSWER, Requests
from shoal_agent.transitions import Transitions
from shoal_protos.errors import Unavailable
from shoal_protos.v1 import agents_pb2, desired_pb2, profile_pb2
from tests.agent.fake_controller import FakeController
from tests.agent.test_supervisor import Agent, agent, controller, good  # noqa: F401  # fixtures


def ask(*kinds: int, not_after_ms: int = 0) -> desired_pb2.DesiredState:
    items = [
        desired_pb2.Request(id=f"q{number}", kind=kind, not_after_ms=not_after_ms)  # type: ignore[arg-type]
        for number, kind in enumerate(kinds)
    ]
    return desired_pb2.DesiredState(requests=items)


LOGS, DIAGNOSE, PROFILE = (
    desired_pb2.REQUEST_KIND_LOGS, desired_pb2.REQUEST_KIND_DIAGNOSE, desired_pb2.REQUEST_KIND_PROFILE,
)  # fmt: skip


@pytest.fixture
def config(tmp_path: Path) -> Config:
    made = Config(tmp_path / "state", runtimes=("onnxruntime",))
    made.paths.create()
    (made.paths.logs / "supervisor.log").write_text("".join(f'line {n} "x"\n' for n in range(20_000)))
    return made


async def profile_of() -> profile_pb2.Profile:
    return profile_pb2.Profile(architecture="x86_64", cores=3)


async def answers_of(config: Config, state: desired_pb2.DesiredState, **parts: Any) -> dict[str, bytes]:
    desk = Requests(config, measure=parts.get("measure", profile_of), on_answer=lambda: None)
    desk.apply(state, 1000)
    await asyncio.gather(*desk._tasks.values())
    desk.apply(state, 1000)  # the same state again asks for nothing new
    assert not desk._tasks
    return {item.id: item.body for item in desk.answers()}


async def test_answers(config: Config) -> None:
    bodies = await answers_of(config, ask(LOGS, DIAGNOSE, PROFILE, 99))
    assert bodies["q0"].startswith(b"==> supervisor.log") and b"line 19999" in bodies["q0"]
    diagnose = json.loads(bodies["q1"])
    assert {"checks", "facts", "transitions"} == set(diagnose) and diagnose["facts"]["files"]["logs"]
    assert json.loads(bodies["q2"])["cores"] == 3
    assert b"update it" in bodies["q3"]
    assert all(len(body) <= MAX_ANSWER for body in bodies.values())


async def test_late_and_withdrawn_requests_are_not_answered(config: Config) -> None:
    assert await answers_of(config, ask(LOGS, not_after_ms=999)) == {}
    desk = Requests(config, measure=profile_of, on_answer=lambda: None)
    desk.apply(ask(DIAGNOSE, DIAGNOSE), 1000)
    desk.apply(desired_pb2.DesiredState(), 1000)
    await asyncio.sleep(0)
    assert not desk._tasks and not desk.answers()
    await desk.stop()


async def test_failed_requests_bring_their_logs(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken() -> profile_pb2.Profile:
        raise Unavailable("The runtime hangs.")

    monkeypatch.setattr(requests, "DIAGNOSIS_S", 0.001)
    bodies = await answers_of(config, ask(DIAGNOSE, PROFILE), measure=broken)
    diagnose = json.loads(bodies["q0"])
    assert diagnose["checks"][0]["state"] == "failed" and "longer than" in diagnose["checks"][0]["found"]
    assert "line 19999" in diagnose["logs"] and len(bodies["q0"]) <= MAX_ANSWER
    assert b"The runtime hangs." in bodies["q1"] and b"line 19999" in bodies["q1"]
    assert 60_000 < len(bodies["q1"]) <= MAX_ANSWER


def test_a_diagnosis_fits_its_limit(config: Config) -> None:
    ring = Transitions(config.paths.transitions)
    for number in range(100):
        ring.add(number, "signs", "probe", "rolled back", "x" * 250)
    value = diagnosis.diagnose(doctor.patient(config, {}))
    assert len(value["transitions"]) == 100
    for limit in (16_000, 8_000):
        short = json.loads(diagnosis.as_json(value, limit))
        assert short["checks"] == value["checks"] and len(json.dumps(short)) <= limit
        if short["transitions"]:
            assert short["transitions"][-1]["time_ms"] == 99  # the newest stay


def test_transitions_are_a_ring_that_survives(tmp_path: Path) -> None:
    path = tmp_path / "transitions.jsonl"
    ring = Transitions(path)
    for number in range(150):
        ring.add(number, "signs", "fetch", "verify", "")
    ring = Transitions(path)  # restarted
    for number in range(150, 1000):
        ring.add(number, "signs", "fetch", "verify", "")
    found = transitions.read(path)
    assert [item["time_ms"] for item in found] == list(range(900, 1000))
    assert len(path.read_bytes().splitlines()) <= transitions.LIMIT
    with path.open("ab") as stream:
        stream.write(b'{"torn')
    assert transitions.read(path, 2)[-1]["time_ms"] == 999
    Transitions(tmp_path / "missing/x.jsonl").add(1, "a", "b", "c", "d")  # a full disk harms nothing else


def test_a_crash_loop_is_reported_with_its_logs() -> None:
    picture = reporting.Picture(
        fleet="f", device="d", name="", profile_class="", connected=True, address="", last_problem="",
        epoch=1, generation=1, placements=(agents_pb2.PlacementStatus(endpoint="signs"),), refusals=(),
        answers=(), ports=profile_pb2.Ports(), bundles=(), clock_wrong=False, server_up=False,
        crash_loop="the server ended 3 times in 300 s", first_heartbeat_s=None, crash_logs=b"==> server.log",
    )  # fmt: skip
    (status,) = reporting.reported(picture).placements
    assert status.reason == "server: crash loop" and status.logs == b"==> server.log"
    assert "3 times" in status.detail


async def test_the_whole_agent_answers_and_its_crash_loops_bring_logs(
    agent: Agent,
    good: Any,
    controller: FakeController,
) -> None:
    await agent.start()
    await agent.until(lambda: agent.device.connected)
    await agent.serve(good)
    late = controller.server_time_ms() + 600_000
    agent.publish(good, requests=list(ask(DIAGNOSE, PROFILE, not_after_ms=late).requests))
    await agent.until(lambda: len(agent.device.reports[-1].requests) == 2, "two answers")
    bodies = {item.id: item.body for item in agent.device.reports[-1].requests}
    steps = [(item["from"], item["to"]) for item in json.loads(bodies["q0"])["transitions"]]
    assert steps[:3] == [("", "fetch"), ("fetch", "verify"), ("verify", "probe")]
    assert steps[-1][1] == "commit"
    checks = {item["name"]: item["state"] for item in json.loads(bodies["q0"])["checks"]}
    assert checks["bundles"] == checks["connection"] == checks["clock"] == "ok"
    assert json.loads(bodies["q1"])["class"] == agent.status["profile_class"]
    await agent.until(lambda: len(agent.device.hellos) == 2, "a hello with the new profile")

    # No import of the diagnosis stayed in the supervisor.
    assert agent.process is not None
    maps = Path(f"/proc/{agent.process.pid}/maps").read_text()
    assert "cryptography" not in maps and "numpy" not in maps

    pid_file = agent.config.paths.runtime / "server.pid"
    for _ in range(3):
        await agent.until(lambda: agent.status.get("server_up"), "the server")
        os.kill(int(pid_file.read_text()), signal.SIGKILL)
        await agent.until(lambda: not agent.status.get("server_up"), "its death")
    status = await agent.until(
        lambda: (
            (s := agent.device.placement("digits")) is not None and s.reason == "server: crash loop" and s
        ),
        "a crash loop",
    )
    assert b"==> server.log" in status.logs and b"SIGKILL" in status.logs
    assert len(status.logs) <= logs.REPORT_BYTES
