"""One emulated device: the agent's commands run by the board's Python, its settings in the environment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shoal_controller.client import Client
from shoal_controller.demo.stage import Process, Stage
from tests.emulation.root import Board

JOIN_S, HEARD_S = 90.0, 90.0  # an emulator takes its time


@dataclass(frozen=True)
class Emulated:
    """A device on an emulated board. `shoal` is the folder that Shoal's own packages lie in."""

    board: Board
    shoal: Path
    state: Path

    @property
    def environment(self) -> dict[str, str]:
        return {
            **self.board.environment(self.shoal),
            "SHOAL_AGENT_DIR": str(self.state),
            "SHOAL_AGENT_CHILD_PREFIX": " ".join(self.board.prefix),
            "SHOAL_AGENT_HTTP_PORT": "0",
            "SHOAL_AGENT_GRPC_PORT": "0",
            "SHOAL_AGENT_METRICS_PORT": "0",
        }

    def command(self, *arguments: str) -> list[str]:
        return self.board.command("-m", "shoal_agent", *arguments)

    def run(self, stage: Stage, promise: str, *arguments: str) -> str:
        """Runs one command of the agent to its end and returns what it printed."""
        return stage.run(promise, self.command(*arguments), JOIN_S, self.environment)

    def start(self, stage: Stage, client: Client, name: str) -> Process:
        """Starts the supervisor and waits until the controller has heard of it with its ports."""
        process = stage.start(name, self.command("run"), self.environment, ends=True)
        stage.wait(f"{name} is heard", lambda: address(client, name), HEARD_S, explain=process.tail)
        return process


def address(client: Client, name: str) -> str | None:
    """Where applications call a device, None while it does not answer."""
    device = client.device(name)
    ports: Mapping[str, Any] = device.profile.get("ports") or {}
    if device.status == "offline" or not ports.get("http"):
        return None
    return f"{ports.get('host') or '127.0.0.1'}:{ports['http']}"
