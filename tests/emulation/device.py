"""One emulated device: the real installer and the agent's commands, run by the board's Python."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn

from shoal_controller import installer
from shoal_controller.api import schemas
from shoal_controller.client import Client
from shoal_controller.demo.stage import Stage
from shoal_controller.gateway import installer as door
from tests.emulation.root import Board

INSTALL_S = 240.0  # an emulator takes its time
LEAVE_S = 60.0


@dataclass(frozen=True)
class Emulated:
    """A device on an emulated board; nothing of Shoal is on it before the installer ran."""

    board: Board
    folder: Path  # everything of the device's lies here

    @property
    def prefix(self) -> Path:
        return self.folder / "opt"

    @property
    def state(self) -> Path:
        return self.folder / "state"

    @property
    def environment(self) -> dict[str, str]:
        """What a person on the board would have set; no path to any package of this machine."""
        kept = self.board.environment()
        del kept["PYTHONPATH"]
        return {
            **kept,
            "HOME": str(self.folder),
            "SHOAL_PREFIX": str(self.prefix),
            "SHOAL_COMMAND_PREFIX": shlex.join(self.board.prefix),
            "SHOAL_AGENT_DIR": str(self.state),
            "SHOAL_AGENT_HTTP_PORT": "0",
            "SHOAL_AGENT_GRPC_PORT": "0",
            "SHOAL_AGENT_METRICS_PORT": "0",
        }

    def install(self, stage: Stage, file: Path, url: str, token: str) -> str:
        """The last part of the join line: the installer, which ends after the first accepted heartbeat."""
        return stage.run(
            "the board is installed and joined",
            self.board.command(str(file), url),
            INSTALL_S,
            {**self.environment, "SHOAL_JOIN_TOKEN": token},
        )

    def agent(self, stage: Stage, promise: str, *arguments: str) -> str:
        """A command of the installed agent, run to its end; returns what it printed."""
        python = str(self.prefix / "agent/current/bin/python")
        command = [*self.board.prefix, python, "-m", "shoal_agent", *arguments]
        return stage.run(promise, command, LEAVE_S, self.environment)

    def end(self) -> None:
        """Ends what a failed test left running: the supervisor and its server, by the pids they noted."""
        for name in ("agent.lock", "server.pid"):
            with contextlib.suppress(OSError, ValueError):
                pid = int((self.state / "run" / name).read_text().split()[0])
                if str(self.folder).encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
                    os.kill(pid, signal.SIGKILL)


@contextlib.contextmanager
def installer_door(wheels: Path) -> Iterator[tuple[str, str]]:
    """Door 8441 over a wheel store, on loopback and a free port; gives (URL, SHA-256 of the installer)."""
    sha256 = installer.publish(wheels)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        config = uvicorn.Config(door.create(wheels), log_level="warning", lifespan="off")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            while not server.started and thread.is_alive():
                time.sleep(0.02)
            yield f"http://127.0.0.1:{listener.getsockname()[1]}", sha256
        finally:
            server.should_exit = True
            thread.join()


def address(client: Client, device: schemas.Device) -> str | None:
    """Where applications call a device, None while it does not answer."""
    found = client.device(device.id)
    ports: Mapping[str, Any] = found.profile.get("ports") or {}
    if found.status == "offline" or not ports.get("http"):
        return None
    return f"{ports.get('host') or '127.0.0.1'}:{ports['http']}"
