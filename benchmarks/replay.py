"""Replays the README's first hour: its commands as written, a laptop and a board in bare directories.

The laptop is a clone of the repository in an empty home; the board is another empty home without the
repository, with the system's Python alone. Both are this machine, so what the README says for
another platform is asked for this one (`SUBSTITUTES`, printed), and ports are free ones.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

HEADING = "## Your first hour"
# What a README line says -> what stands in for it on this machine.
SUBSTITUTES = ((re.compile(r"--platform aarch64 --python [0-9.]+"), "--this-machine"),)
JOIN_LINE = "the line that it printed"  # where the README means the output of `shoal token create --join`
MARK = "__shoal_done__"


@dataclass(frozen=True)
class Step:
    """One command of the README. `where` is "laptop", "server" (a terminal of its own) or "board"."""

    where: str
    text: str


def steps(readme: str) -> list[Step]:
    """The commands under the README's heading, in order. A block's first line is a comment that says where.

    Raises:
        ValueError: no such heading, or a block that doesn't say where.
    """
    section = readme.partition(f"\n{HEADING}\n")[2].partition("\n## ")[0]
    if not section:
        raise ValueError(f"The README has no section '{HEADING}'.")
    found = []
    for block in re.findall(r"```sh\n(.*?)```", section, re.DOTALL):
        lines = block.strip().splitlines()
        head = lines[0].lower()
        if not head.startswith("#"):
            raise ValueError(f"A block doesn't say where it is typed: {lines[0]}")
        where = "board" if "board" in head else "server" if "own" in head else "laptop"
        found += [Step(where, _command(line)) for line in lines[1:] if _command(line)]
    return found


def _command(line: str) -> str:
    """The line without its remark, which two spaces and a hash begin."""
    return re.split(r"\s{2,}#", line)[0].strip() if not line.startswith("#") else ""


def localized(text: str) -> str:
    for pattern, text_here in SUBSTITUTES:
        text = pattern.sub(text_here, text)
    return text


class Terminal:
    """A shell that keeps its state between commands, as a person's terminal does."""

    def __init__(self, directory: Path, environment: dict[str, str], echo: Callable[[str], None]) -> None:
        self._echo = echo
        self._shell = subprocess.Popen(
            ["bash", "--norc", "--noprofile"],
            cwd=directory,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def type(self, command: str) -> tuple[str, float]:
        """(what it printed, seconds). Raises RuntimeError with the output when it fails."""
        assert self._shell.stdin and self._shell.stdout
        started = time.monotonic()
        self._shell.stdin.write(f"{command} </dev/null\necho {MARK} $?\n")
        self._shell.stdin.flush()
        lines = []
        for line in self._shell.stdout:
            if line.startswith(MARK):
                code = int(line.split()[1])
                break
            lines.append(line)
            self._echo(line)
        else:
            code = -1
        output = "".join(lines)
        if code:
            raise RuntimeError(f"`{command[:120]}` ended with {code}:\n{output[-4000:]}")
        return output, time.monotonic() - started

    def close(self) -> None:
        if self._shell.stdin:
            self._shell.stdin.close()
        self._shell.wait(timeout=30)
        if self._shell.stdout:
            self._shell.stdout.close()


def free_ports(count: int) -> list[int]:
    doors = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [door.getsockname()[1] for door in doors]
    for door in doors:
        door.close()
    return ports


@dataclass
class Rooms:
    """Two bare homes and what their processes are told."""

    laptop: Path
    board: Path
    laptop_environment: dict[str, str]
    board_environment: dict[str, str]
    clone: Path
    ports: dict[str, int]

    @property
    def pip_report(self) -> Path:
        """Where pip writes what it installed and from where."""
        return self.laptop / "pip-report.json"

    @property
    def prefix(self) -> Path:
        return self.board / "prefix"


def make_rooms(root: Path, repository: Path) -> Rooms:
    """Clones the repository and makes both homes. The board sees neither clone nor virtual environment."""
    laptop, board = root / "laptop", root / "board"
    laptop.mkdir(parents=True)
    board.mkdir()
    clone = laptop / "shoal"
    subprocess.run(["git", "clone", "-q", str(repository), str(clone)], check=True, timeout=120)
    names = ("http", "installer", "enrolment", "agents", "agent_http", "agent_grpc", "agent_metrics")
    ports = dict(zip(names, free_ports(len(names)), strict=True))
    system_path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    python = str(Path(sys.executable).resolve().parent)  # a python3 with venv, as a laptop has
    shared = {key: value for key, value in os.environ.items() if key.startswith(("PIP_", "SSL_", "LANG"))}
    laptop_environment = {
        **shared,
        "PATH": f"{python}:{system_path}",
        "HOME": str(laptop),
        "PIP_NO_CACHE_DIR": "1",  # everything is downloaded, as on a fresh machine
        "PIP_REPORT": str(laptop / "pip-report.json"),
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "SHOAL_HOME": str(laptop / "data"),
        **{f"SHOAL_{name.upper()}_PORT": str(ports[name]) for name in names[:4]},
        "SHOAL_URL": f"http://127.0.0.1:{ports['http']}",
    }
    board_environment = {
        "PATH": f"{board / 'prefix/bin'}:{python}:{system_path}",
        "HOME": str(board),
        "SHOAL_PREFIX": str(board / "prefix"),
        "SHOAL_AGENT_DIR": str(board / "state"),
        **{f"SHOAL_{name.upper()}_PORT": str(ports[name]) for name in names[4:]},
    }
    return Rooms(laptop, board, laptop_environment, board_environment, clone, ports)


@contextmanager
def server(rooms: Rooms, command: str, activate: str, log: IO[str]) -> Iterator[subprocess.Popen[str]]:
    """The terminal of its own where `shoal up` stays; ended by its process id."""
    process = subprocess.Popen(
        ["bash", "-c", f"{activate}exec {command}"],
        cwd=rooms.clone,
        env=rooms.laptop_environment,
        stdout=log,
        stderr=log,
        stdin=subprocess.DEVNULL,
        text=True,
    )
    try:
        ports = rooms.laptop / "data/run/ports.json"
        deadline = time.monotonic() + 60
        while not ports.exists() or "http" not in json.loads(ports.read_text() or "{}"):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"`{command}` did not come up; see {log.name}")
            time.sleep(0.05)
        yield process
    finally:
        process.terminate()
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def disk_mb(path: Path) -> float:
    """Megabytes (10^6) that a tree occupies, links not followed."""
    output = subprocess.run(
        ["du", "-s", "--block-size=1", str(path)], check=True, capture_output=True, text=True
    )
    return int(output.stdout.split()[0]) / 1e6


def remove(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
