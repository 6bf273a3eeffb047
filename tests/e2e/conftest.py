"""A real fleet of real processes for the fault stories: controller, worker, three agents, a tiny model."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from shoal_controller.api import schemas
from shoal_controller.client import Client
from shoal_controller.demo import cast
from shoal_controller.demo.applications import Applications, Feed
from shoal_controller.demo.stage import Stage
from shoal_protos.bundle import TensorSpec

NAME = "blobs"
ENDED = ("promoted", "rolled_back", "aborted")

# The nearest of three centres, as a linear layer: nothing to train, always right.
TASK = """
import numpy as np
import torch
from shoal_optimizer import Task, TensorSpec

SCALE = {scale}
CENTRES = np.eye(3, 8, dtype=np.float32) * 4


def blobs(seed, n=300):
    random = np.random.default_rng(seed)
    labels = random.integers(0, 3, n)
    return (CENTRES[labels] + random.normal(0, 0.5, (n, 8))).astype(np.float32), labels.astype(np.int64)


class Blobs(Task):
    input = TensorSpec("x", "FP32", (-1, 8), low=-8, high=8)
    input_kind = "tensor"
    output_kind = "logits"
    labels = ("a", "b", "c")

    def model(self):
        layer = torch.nn.Linear(8, 3)
        with torch.no_grad():
            layer.weight.copy_(torch.from_numpy(CENTRES * SCALE))
            layer.bias.zero_()
        return torch.nn.Sequential(layer)

    def evaluation(self):
        return blobs(1)

    def training(self):
        return blobs(2)
"""


@dataclass
class Fleet:
    """The stage with its controller and agents, and what the tests do to them."""

    stage: Stage
    client: Client
    token: Path
    agents: dict[str, cast.Agent] = field(default_factory=dict)
    settings: dict[str, dict[str, str]] = field(default_factory=dict)
    applications: Applications | None = None
    pushed: int = 0

    def join(self, name: str, runtimes: str = "onnxruntime") -> cast.Agent:
        self.settings[name] = cast.join(self.stage, name, runtimes, self.token)
        return self.start(name)

    def start(self, name: str) -> cast.Agent:
        self.agents[name] = cast.start_agent(self.stage, self.client, name, self.settings[name])
        return self.agents[name]

    def push(self) -> str:
        """Pushes the next version and returns its plain release."""
        self.pushed += 1
        folder = self.stage.root / f"push-{self.pushed}"
        folder.mkdir()
        task = folder / f"{NAME}.py"
        task.write_text(TASK.replace("{scale}", str(1 + self.pushed / 10)))
        self.stage.shoal(
            "the push is taken", "model", "push", str(task), "--name", NAME, "--wait", timeout_s=120
        )

        def released() -> str | None:
            found = [r for r in self.client.releases(NAME) if r.version == self.pushed]
            return found[0].id if found else None

        return self.stage.wait("plain variants are released", released, 60)

    def roll_out(self, release: str, waves: str) -> str:
        return self.stage.shoal(
            "the rollout starts", "rollout", "create", NAME, "--release", release, "--waves", waves, "--yes"
        ).strip()

    def wait_rollout(self, rollout: str, state: str = "promoted", timeout_s: float = 120) -> schemas.Rollout:
        def ended() -> schemas.Rollout | None:
            found = self.client.rollout(rollout)
            return found if found.state in ENDED else None

        found = self.stage.wait(
            f"{rollout} ends", ended, timeout_s, explain=lambda: str(self.client.rollout(rollout))
        )
        assert found.state == state, found
        return found

    def wait_first_switch(self, rollout: str) -> schemas.Rollout:
        """Waits until the first wave has switched and another is still to come."""

        def switched() -> schemas.Rollout | None:
            found = self.client.rollout(rollout)
            assert found.state not in ENDED, found
            return found if found.waves[0].switched >= 1 else None

        return self.stage.wait("the first wave switches", switched, 90, 0.1)

    def versions(self) -> dict[str, str]:
        """Device name -> what it serves ("blobs v2")."""
        return {device.name: device.version for device in self.client.all_devices()}

    def wait_version(self, number: int, names: list[str] | None = None) -> None:
        wanted = names or list(self.agents)

        def there() -> bool | None:
            found = self.versions()
            return True if all(found[name].endswith(f"v{number}") for name in wanted) else None

        self.stage.wait(f"{wanted} serve v{number}", there, 60, explain=lambda: str(self.versions()))

    def controller_processes(self) -> dict[str, psutil.Process]:
        """The children of `shoal up` by role."""
        up = next(p for p in self.stage.processes if p.name == "controller")
        found = {}
        for child in psutil.Process(up.popen.pid).children():
            line = child.cmdline()
            if "shoal_controller.cli.child" in line:
                found[line[line.index("shoal_controller.cli.child") + 1]] = child
        return found

    def kill_agent(self, name: str) -> None:
        """kill -9 of the supervisor alone, as a crash would; what it had started must cope."""
        process = self.agents[name].process
        os.kill(process.popen.pid, signal.SIGKILL)
        process.popen.wait()
        self.stage.processes.remove(process)

    def ask(self, name: str, inputs: Any) -> Any:
        from shoal_controller.demo import traffic

        return traffic.send(self.agents[name].address, NAME, TENSOR, "logits", inputs, "test").outputs


TENSOR = TensorSpec("x", "FP32", (-1, 8))


def items(n: int = 60) -> tuple[Any, Any]:
    random = np.random.default_rng(5)
    labels = random.integers(0, 3, n)
    centres = np.eye(3, 8, dtype=np.float32) * 4
    return (centres[labels] + random.normal(0, 0.5, (n, 8))).astype(np.float32), labels


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Three agents that serve v1 of a tiny model under steady traffic."""
    with Stage(tmp_path_factory.mktemp("fleet"), keep=False) as stage:
        found = Fleet(stage, cast.start_controller(stage), stage.root / "token")
        try:
            stage.shoal(
                "a token",
                "token",
                "create",
                "--join",
                "--uses",
                "9",
                "--ttl",
                "1h",
                "--out",
                str(found.token),
            )
            for name, runtimes in cast.AGENTS.items():
                found.join(name, runtimes)
            found.push()
            stage.shoal("an endpoint", "endpoint", "create", NAME, "--model", NAME, "--settle", "2s", "--yes")
            found.wait_version(1)  # the first rollout starts by itself
            inputs, labels = items()
            found.applications = Applications(
                [agent.address for agent in found.agents.values()],
                NAME,
                TENSOR,
                "logits",
                Feed(inputs, labels),
            )
            found.wait_rollout("r-0001")
            yield found
        finally:
            if found.applications is not None:
                found.applications.close()
            found.client.close()
