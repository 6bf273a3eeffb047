"""A board to join and leave: the real command line in child processes, beside a protocol-true controller."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import stat
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shoal_agent import lock
from shoal_agent.config import Paths
from shoal_protos.tokens import encode
from tests.agent.fake_controller import FakeController

LIMIT_S = 90.0
PORTS = ("--http-port", "0", "--grpc-port", "0", "--metrics-port", "0", "--heartbeat-seconds", "1")


@dataclass
class Board:
    """`home` holds everything of this board: state directory, token, PREFIX, a fake systemd."""

    controller: FakeController
    home: Path
    environ: dict[str, str] = field(default_factory=dict)

    @property
    def state(self) -> Path:
        return self.home / "state"

    @property
    def paths(self) -> Paths:
        return Paths(self.state)

    def token(self, uses: int = 1, **changes: Any) -> str:
        """A token file's path."""
        path = self.home / "token"
        path.write_text(encode(self.controller.token(uses=uses, **changes)))
        return str(path)

    async def agent(self, *arguments: str, fault: str = "") -> tuple[int, str]:
        """`shoal-agent ARGUMENTS`; returns exit code and everything printed.

        Args:
            fault: "module:function" of shoal_agent that loses power when it is called, or, with a + at
                its end, right after it has done its work.
        """
        start = ["-m", "shoal_agent"] if not fault else ["-c", _FAULT, fault]
        process = await asyncio.create_subprocess_exec(
            sys.executable, *start, *arguments, "--state-dir", str(self.state),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "SHOAL_RUNTIMES": "onnxruntime", **self.environ},
        )  # fmt: skip
        output, _ = await asyncio.wait_for(process.communicate(), LIMIT_S)
        assert process.returncode is not None
        return process.returncode, output.decode()

    @property
    def pid(self) -> int:
        return lock.holder(self.paths)

    @property
    def status(self) -> dict[str, Any]:
        return dict(json.loads((self.paths.runtime / "status.json").read_bytes()))

    def with_systemd(self, linger: bool = True) -> Path:
        """A user's systemd; returns the unit's path."""
        tools, systemd = self.home / "bin", self.home / "systemd"
        systemd.mkdir()
        (self.home / "user").mkdir()
        here = Path(__file__).parent
        script(tools / "systemctl", f'exec {sys.executable} {here / "fake_systemctl.py"} "$@"')
        script(tools / "loginctl", f"exit {0 if linger else 1}")
        user = self.home / "user"
        self.environ |= {
            "PATH": f"{tools}:{os.environ['PATH']}", "HOME": str(user), "FAKE_SYSTEMD": str(systemd),
        }  # fmt: skip
        self.environ.setdefault("XDG_CONFIG_HOME", str(user / ".config"))
        return user / ".config/systemd/user/shoal-agent.service"

    def with_prefix(self) -> Path:
        """What the installer leaves behind; returns PREFIX."""
        prefix = self.home / "opt/shoal-agent"
        script(prefix / "agent/0.1.0/bin/python", f'exec {sys.executable} "$@"')
        (prefix / "agent/current").symlink_to("0.1.0")
        (prefix / "download").mkdir()
        (prefix / "install.json").write_text(json.dumps({"version": "0.1.0", "extras": ["onnxruntime"]}))
        return prefix

    def end(self) -> None:
        server = 0
        with contextlib.suppress(OSError, ValueError):
            server = int((self.paths.runtime / "server.pid").read_text())
        for pid in (self.pid, server):
            with contextlib.suppress(OSError):
                if pid and str(self.state).encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
                    os.kill(pid, signal.SIGKILL)


def script(path: Path, body: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


_FAULT = """
import importlib, os, signal, sys
fault = sys.argv.pop(1)
name, _, function = fault.rstrip("+").partition(":")
module = importlib.import_module("shoal_agent." + name)
if "." in function:
    owner, _, function = function.partition(".")
    module = getattr(module, owner)
real = getattr(module, function)
def cut(*arguments, **options):
    if fault.endswith("+"):
        real(*arguments, **options)
    os.kill(os.getpid(), signal.SIGKILL)
setattr(module, function, cut)
from shoal_agent.cli import main
sys.exit(main(sys.argv[1:]))
"""
