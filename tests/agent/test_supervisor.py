"""The whole agent as real processes against a protocol-true controller."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import shlex
import shutil
import signal
import sys
import urllib.request
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shoal_agent import joining
from shoal_agent.config import Config
from shoal_protos.bundle import Bundle
from shoal_protos.v1 import agents_pb2, desired_pb2
from tests.agent import bundles
from tests.agent.fake_controller import Device, FakeController

COMMIT, ROLLED_BACK = agents_pb2.STEP_COMMIT, agents_pb2.STEP_ROLLED_BACK
LIMIT_S = 60.0


class Agent:
    """A joined device whose supervisor can be started, killed and started again."""

    def __init__(self, controller: FakeController, config: Config) -> None:
        self.controller, self.config = controller, config
        self.process: asyncio.subprocess.Process | None = None
        self.device: Device = next(iter(controller.devices.values()))
        self.generation_fields: dict[str, Any] = {}

    async def start(self, **environ: str) -> None:
        arguments = [
            "run", "--state-dir", str(self.config.state_dir), "--runtimes", "onnxruntime",
            "--http-port", "0", "--grpc-port", "0", "--metrics-port", "0",
            "--telemetry-seconds", "1", "--heartbeat-seconds", "1",
        ]  # fmt: skip
        self.process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "shoal_agent", *arguments,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environ},
            stderr=asyncio.subprocess.DEVNULL,
        )  # fmt: skip

    async def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        await self.process.wait()

    async def stop(self) -> None:
        if self.process is not None and self.process.returncode is None:
            self.process.send_signal(signal.SIGTERM)
            await asyncio.wait_for(self.process.wait(), 30)
        with contextlib.suppress(OSError, ValueError):  # a server whose supervisor was killed
            os.kill(int((self.config.paths.runtime / "server.pid").read_text()), signal.SIGKILL)

    async def until(self, condition: Any, what: str = "") -> Any:
        return await self.controller.until(condition, what, LIMIT_S)

    def publish(self, bundle: Bundle | None, *, attempt: int = 1, settle: int = 1, **fields: Any) -> None:
        placements = []
        if bundle is not None:
            self.controller.add_bundle(bundle.path, bundle.digest)
            settings = desired_pb2.PlacementSettings(
                model="digits", model_version=1,
                settle=desired_pb2.Settle(seconds=settle, max_error_share=0.5, min_requests=5),
            )  # fmt: skip
            placements = [
                desired_pb2.Placement(
                    endpoint="digits", bundle=bundle.digest, role=desired_pb2.ROLE_PRIMARY,
                    attempt=attempt, settings=settings,
                )
            ]  # fmt: skip
        self.controller.publish(self.device.id, placements=placements, **fields)

    def shows(self, step: int, bundle: Bundle | None = None) -> bool:
        status = self.device.placement("digits")
        return (
            status is not None
            and status.step == step
            and (bundle is None or status.serving == bundle.digest)
            and self.device.reports[-1].generation == self.device.generation
        )

    async def serve(self, bundle: Bundle) -> None:
        self.publish(bundle)
        await self.until(lambda: self.shows(COMMIT, bundle), "commit")

    @property
    def status(self) -> dict[str, Any]:
        with contextlib.suppress(OSError, ValueError):
            return dict(json.loads((self.config.paths.runtime / "status.json").read_text()))
        return {}

    async def get(self, path: str, port: str = "http", body: Any = None) -> tuple[int, bytes]:
        url = f"http://127.0.0.1:{self.status['ports'][port]}{path}"
        data = None if body is None else json.dumps(body).encode()

        def call() -> tuple[int, bytes]:
            with urllib.request.urlopen(url, data, timeout=10) as answer:
                return answer.status, answer.read()

        return await asyncio.to_thread(call)

    async def infer(self) -> list[float]:
        image = bundles.images(1)
        tensor = {
            "name": "image",
            "datatype": "UINT8",
            "shape": list(image.shape),
            "data": image.ravel().tolist(),
        }
        _, answer = await self.get("/v2/models/digits/infer", body={"inputs": [tensor]})
        return list(json.loads(answer)["outputs"][0]["data"])


@pytest.fixture
async def controller() -> AsyncIterator[FakeController]:
    async with FakeController() as opened:
        yield opened


@pytest.fixture
async def agent(controller: FakeController, tmp_path: Path) -> AsyncIterator[Agent]:
    config = Config(tmp_path / "device", runtimes=("onnxruntime",))
    await joining.join(config, controller.token(), "bench")
    agent = Agent(controller, config)
    yield agent
    await agent.stop()


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return bundles.onnx_bundle(tmp_path_factory.mktemp("good"))


@pytest.fixture(scope="module")
def better(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return bundles.onnx_bundle(tmp_path_factory.mktemp("better"), seed=1)


@pytest.fixture(scope="module")
def wrong(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Its golden outputs are another model's."""
    return bundles.onnx_bundle(tmp_path_factory.mktemp("wrong"), seed=2, golden=bundles.image_golden(9))


async def test_from_start_to_serving_telemetry_metrics_and_a_refused_update(
    agent: Agent, good: Bundle, wrong: Bundle
) -> None:
    await agent.start()
    await agent.until(lambda: agent.device.heartbeats, "heartbeat")
    hello = agent.device.hellos[0]
    assert [item.name for item in hello.profile.runtimes] == ["onnxruntime"] and hello.boot_id
    await agent.serve(good)
    expected = bundles.expected(bundles.images(1))
    np.testing.assert_allclose(await agent.infer(), expected.ravel(), atol=1e-3)

    window = await agent.until(
        lambda: next(
            (w for w in agent.device.items("telemetry") if any(p.requests for p in w.placements)), None
        )
    )
    assert window.placements[0].bundle == good.digest and window.boot_id == hello.boot_id
    assert 0 < window.monotonic_start_ns < window.monotonic_end_ns and window.system.agent_rss_bytes

    assert agent.process is not None
    libraries = Path(f"/proc/{agent.process.pid}/maps").read_text()
    assert not [name for name in ("numpy", "onnxruntime", "cryptography", "uvloop") if name in libraries]

    await agent.until(lambda: agent.status.get("ports", {}).get("metrics"))
    _, metrics = await agent.get("/metrics", "metrics")
    assert b"shoal_agent_connected 1.0" in metrics and b"nv_inference_request_success" in metrics
    promtool = shutil.which("promtool")
    if promtool:
        check = await asyncio.create_subprocess_exec(
            promtool, "check", "metrics", stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
        )  # fmt: skip
        output, _ = await check.communicate(metrics)
        assert check.returncode == 0, output.decode()

    agent.publish(wrong)
    await agent.until(lambda: agent.shows(ROLLED_BACK, good), "rolled back")
    status = agent.device.placement("digits")
    assert status is not None and status.reason.startswith("probe: golden")
    assert b"supervisor.log" in status.logs and status.probe.runtime_version
    assert len(await agent.infer()) == 10


async def test_controller_gone_the_agent_serves_spools_and_catches_up(agent: Agent, good: Bundle) -> None:
    await agent.start()
    await agent.until(lambda: agent.device.connected)
    await agent.serve(good)
    seen = len(agent.device.items("telemetry"))
    await agent.controller.stop()
    for _ in range(3):
        assert len(await agent.infer()) == 10
        await asyncio.sleep(1.1)
    assert agent.status["connected"] is False
    await agent.controller.start()
    await agent.until(lambda: agent.device.connected)

    def requests() -> int:
        windows = agent.device.items("telemetry")[seen:]
        return sum(p.requests for window in windows for p in window.placements)

    await agent.until(lambda: requests() >= 3, "spooled windows")
    assert requests() == 3


async def test_server_killed_is_replaced_on_the_same_ports(agent: Agent, good: Bundle) -> None:
    await agent.start()
    await agent.until(lambda: agent.device.connected)
    await agent.serve(good)
    before = agent.status["ports"]
    os.kill(int((agent.config.paths.runtime / "server.pid").read_text()), signal.SIGKILL)
    await agent.until(lambda: agent.device.placement("digits").serving == "", "report of the truth")  # type: ignore[union-attr]
    await agent.until(lambda: agent.shows(COMMIT, good), "restored")
    await agent.until(lambda: agent.status["server_up"])
    assert agent.status["ports"] == before
    assert len(await agent.infer()) == 10


async def test_kill_9_at_any_moment_of_an_update(agent: Agent, good: Bundle, better: Bundle) -> None:
    await agent.start()
    await agent.until(lambda: agent.device.connected)
    await agent.serve(good)
    chance = random.Random(5)

    def serving() -> bool:
        placements = agent.status.get("placements") or [{"serving": ""}]
        return placements[0]["serving"] in (good.digest, better.digest)

    target = [better, good]
    for attempt in range(6):
        agent.publish(target[attempt % 2], settle=1, attempt=attempt + 2)
        await asyncio.sleep(chance.uniform(0, 1.5))
        await agent.kill()
        await agent.start()
        await agent.until(lambda: agent.device.connected and agent.status.get("server_up"))
        await agent.until(
            lambda: (
                (s := agent.device.placement("digits")) is not None
                and s.serving in (good.digest, better.digest)
            )
        )
        assert len(await agent.infer()) == 10
    agent.publish(better, attempt=20)
    await agent.until(lambda: agent.shows(COMMIT, better), "the last wish")


async def test_trials_requests_and_settings(
    agent: Agent, good: Bundle, better: Bundle, tmp_path: Path
) -> None:
    await agent.start()
    await agent.until(lambda: agent.device.connected)
    await agent.serve(good)
    np.savez(tmp_path / "data.npz", image=bundles.images(20))
    dataset = agent.controller.add_blob((tmp_path / "data.npz").read_bytes())
    agent.controller.add_bundle(better.path, better.digest)
    late = agent.controller.server_time_ms() + 600_000
    kinds = desired_pb2.TrialKind.Name(desired_pb2.TRIAL_KIND_TIMING), "TRIAL_KIND_OUTPUTS"
    trials = [
        desired_pb2.Trial(
            id="t1", bundle=better.digest, kind=kinds[0], incumbent=good.digest, not_after_ms=late
        ),
        desired_pb2.Trial(id="t2", bundle=better.digest, kind=kinds[1], dataset=dataset, not_after_ms=late),
        desired_pb2.Trial(id="old", bundle=better.digest, kind=kinds[0], not_after_ms=1),
    ]
    requests = [
        desired_pb2.Request(id="r1", kind=desired_pb2.REQUEST_KIND_LOGS, not_after_ms=late),
        desired_pb2.Request(id="r2", kind=desired_pb2.REQUEST_KIND_DIAGNOSE, not_after_ms=late),
    ]
    settings = desired_pb2.AgentSettings(heartbeat_seconds=3, telemetry_seconds=2)
    agent.publish(good, trials=trials, requests=requests, agent_settings=settings)
    await agent.until(lambda: len(agent.device.items("trial")) == 2, "two results")
    timing, outputs = sorted(agent.device.items("trial"), key=lambda item: item.trial)
    assert timing.ok and timing.timing.candidate.p50_ms > 0 and timing.timing.incumbent.p50_ms > 0, timing
    assert outputs.ok and outputs.outputs_blob in agent.controller.blobs, outputs
    await agent.until(lambda: len(agent.device.reports[-1].requests) == 2, "two answers")
    answers = {item.id: item.body.decode() for item in agent.device.reports[-1].requests}
    assert "==> supervisor.log" in answers["r1"]
    assert json.loads(answers["r2"])["facts"]["profile"]["cores"] >= 1
    await agent.kill()
    await agent.start()
    await agent.until(lambda: len(agent.device.hellos) == 2)
    await asyncio.sleep(1.5)
    assert len(agent.device.items("trial")) == 2  # done once, also over a restart


async def test_every_child_is_started_through_the_prefix(agent: Agent, good: Bundle, tmp_path: Path) -> None:
    used = tmp_path / "used.log"
    wrapper = tmp_path / "an emulator.sh"  # the blank is meant
    wrapper.write_text(f'#!/bin/sh\necho "$*" >> {shlex.quote(str(used))}\nexec "$@"\n')
    wrapper.chmod(0o755)
    prefix = shlex.quote(str(wrapper))
    await agent.start(SHOAL_AGENT_CHILD_PREFIX=prefix)
    await agent.serve(good)
    lines = used.read_text().splitlines()
    assert all(line.startswith(sys.executable) for line in lines)
    for name in ("shoal_agent.vault verify", "shoal_agent serve", "shoal_agent probe"):
        assert any(name in line for line in lines), (name, lines)
    # Signals still reach the process itself, and an orphan is still known as one.
    before = server_pid(agent)
    os.kill(before, signal.SIGKILL)
    await agent.until(lambda: server_pid(agent) not in (0, before), "another server")
    orphan = server_pid(agent)
    await agent.kill()
    assert alive(orphan)
    await agent.start(SHOAL_AGENT_CHILD_PREFIX=prefix)
    await agent.until(lambda: server_pid(agent) not in (0, orphan), "a server of its own")
    assert not alive(orphan)


def server_pid(agent: Agent) -> int:
    with contextlib.suppress(OSError, ValueError):
        return int((agent.config.paths.runtime / "server.pid").read_text())
    return 0


def alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return bool(Path(f"/proc/{pid}/cmdline").read_bytes())  # empty = ended, not yet waited for
    return False


async def test_a_lower_generation_is_refused_and_reported(agent: Agent, good: Bundle) -> None:
    await agent.start()
    await agent.until(lambda: agent.device.connected)
    await agent.serve(good)
    old = agent.controller.sign(agent.controller.state(agent.device.id, generation=0))
    agent.controller.send(agent.device.id, agents_pb2.Down(desired=old))
    await agent.until(lambda: agent.device.reports[-1].refusals)
    assert agent.device.reports[-1].refusals[0].reason == "lower generation"
    assert agent.shows(COMMIT, good)


async def test_vanished_placement_is_unloaded(agent: Agent, good: Bundle) -> None:
    await agent.start()
    await agent.until(lambda: agent.device.connected)
    await agent.serve(good)
    agent.publish(None)
    await agent.until(lambda: not agent.device.reports[-1].placements)
    await agent.until(lambda: not agent.device.reports[-1].bundles_on_disk)
    with pytest.raises(urllib.error.HTTPError):
        await agent.infer()


async def test_certificates_renew_by_themselves(tmp_path: Path) -> None:
    async with FakeController(certificate_life=timedelta(seconds=6)) as controller:
        config = Config(tmp_path / "device", runtimes=("onnxruntime",))
        await joining.join(config, controller.token(), "bench")
        agent = Agent(controller, config)
        await agent.start()
        try:
            await agent.until(lambda: len(agent.device.serials) >= 3, "two renewals")
            numbers = [item.number for item in agent.device.heartbeats]
            await agent.until(lambda: len(agent.device.heartbeats) > len(numbers) + 1)
            numbers = [item.number for item in agent.device.heartbeats]
            assert numbers == list(range(1, len(numbers) + 1)), "no heartbeat was lost"
        finally:
            await agent.stop()


async def test_second_supervisor_is_told_who_runs(agent: Agent) -> None:
    await agent.start()
    await agent.until(lambda: agent.device.connected)
    second = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "shoal_agent", "run", "--state-dir", str(agent.config.state_dir),
        stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    _, errors = await second.communicate()
    assert second.returncode == 1
    assert agent.process is not None and f"process {agent.process.pid}".encode() in errors


async def test_metrics_port_in_use_is_a_clear_error(agent: Agent) -> None:
    taken = await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", 0)
    port = taken.sockets[0].getsockname()[1]
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "shoal_agent", "run", "--state-dir", str(agent.config.state_dir),
        "--http-port", "0", "--grpc-port", "0", "--metrics-port", str(port),
        stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    _, errors = await process.communicate()
    taken.close()
    assert process.returncode == 2 and f"port {port}".encode() in errors and b"--metrics-port" in errors
