"""kill -9 of anything, a controller that is away, a device that joins in the middle: real processes."""

from __future__ import annotations

import signal
import time

import numpy as np
import pytest

from shoal_controller.demo import cast
from tests.e2e.conftest import NAME, Fleet, items

pytestmark = [pytest.mark.slow, pytest.mark.timeout(420)]


class TestControllerKilled:
    def test_an_interrupted_rollout_resumes(self, fleet: Fleet) -> None:
        release = fleet.push()
        rollout = fleet.roll_out(release, "1,100%")
        fleet.wait_first_switch(rollout)
        before = fleet.client.events(kind="rollout", object=rollout)
        fleet.controller_processes()["controller"].send_signal(signal.SIGKILL)
        ended = fleet.wait_rollout(rollout)
        fleet.wait_version(fleet.pushed)
        assert sum(wave.switched for wave in ended.waves) == len(fleet.agents)
        after = fleet.client.events(kind="rollout", object=rollout)
        assert {event.id for event in before} <= {event.id for event in after}  # nothing lost
        steps = [(event.verb, event.reason) for event in after]
        assert len(steps) == len(set(steps))  # nothing twice

    def test_a_killed_worker_starts_again_and_the_job_goes_on(self, fleet: Fleet) -> None:
        started = fleet.stage.shoal(
            "a search starts", "optimization", "start", NAME, "--minutes", "0.2"
        ).strip()
        fleet.stage.wait(
            "it runs", lambda: fleet.client.optimization(started).state == "running" or None, 60, 0.05
        )
        fleet.controller_processes()["worker"].send_signal(signal.SIGKILL)
        fleet.stage.wait(
            "it ends", lambda: fleet.client.optimization(started).state == "done" or None, 150, 0.5,
            explain=lambda: str(fleet.client.optimization(started)),
        )  # fmt: skip


class TestAgentKilled:
    def test_an_interrupted_rollout_resumes(self, fleet: Fleet) -> None:
        release = fleet.push()
        rollout = fleet.roll_out(release, "1,100%")
        moving = fleet.client.rollout(rollout)
        first = next(device.name for device in moving.devices if device.wave == 0)
        fleet.stage.wait(
            "the first device is on its way",
            lambda: fleet.client.rollout(rollout).waves[0].state == "running" or None,
            60,
            0.05,
        )
        fleet.kill_agent(first)
        time.sleep(1)
        fleet.start(first)
        fleet.wait_rollout(rollout, timeout_s=180)
        fleet.wait_version(fleet.pushed)
        inputs, labels = items()
        assert (fleet.ask(first, inputs).argmax(axis=1) == labels).mean() > 0.95


class TestJoiningInMidRollout:
    def test_it_gets_the_old_assignment_until_its_wave(self, fleet: Fleet) -> None:
        old = fleet.pushed
        release = fleet.push()
        rollout = fleet.roll_out(release, "1,100%")
        fleet.wait_first_switch(rollout)
        fleet.stage.shoal("it is paused", "rollout", "pause", rollout, "--yes", "--reason", "a device joins")
        fleet.join("attic")
        fleet.wait_version(old, ["attic"])
        assert fleet.client.rollout(rollout).state == "paused"
        fleet.stage.shoal("it goes on", "rollout", "resume", rollout, "--yes")
        fleet.wait_rollout(rollout)
        fleet.wait_version(fleet.pushed)


class TestControllerAway:
    def test_agents_serve_spool_and_catch_up(self, fleet: Fleet) -> None:
        assert fleet.applications is not None
        ports = {name: port for name, port in read_ports(fleet).items() if name != "host"}
        up = next(p for p in fleet.stage.processes if p.name == "controller")
        fleet.applications.pause(True)
        time.sleep(5)
        before = counted(fleet)
        fleet.stage.stop(up)
        inputs, labels = items()
        for name in fleet.agents:  # served, while nobody watches
            assert (fleet.ask(name, inputs).argmax(axis=1) == labels).mean() > 0.95
        time.sleep(8)
        fleet.client.close()
        fleet.client = cast.start_controller(fleet.stage, ports=ports)

        def caught_up() -> bool | None:
            now = counted(fleet)
            return True if all(now[name] - before[name] == len(inputs) for name in fleet.agents) else None

        fleet.stage.wait(
            "the spooled windows arrive", caught_up, 90, explain=lambda: f"{before} {counted(fleet)}"
        )
        assert all(device.status != "offline" for device in fleet.client.all_devices())
        fleet.applications.pause(False)


def read_ports(fleet: Fleet) -> dict[str, int]:
    import json

    found: dict[str, int] = json.loads((fleet.stage.home / "run" / "ports.json").read_text())
    return found


def counted(fleet: Fleet) -> dict[str, int]:
    """Requests that the controller knows of, per device."""
    return {
        name: int(np.sum([window["requests"] for window in fleet.client.device(name).windows], dtype=int))
        for name in fleet.agents
    }
