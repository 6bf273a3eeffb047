"""`shoal up` with real processes: what it refuses, what it starts again, what it leaves behind."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from shoal_controller.client import Client
from shoal_controller.demo.stage import end

SHOAL = [sys.executable, "-m", "shoal_controller.cli.main"]
FREE = ["--http-port", "0", "--enrolment-port", "0", "--agents-port", "0"]


def environment() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if not key.startswith("SHOAL_")}


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*SHOAL, *arguments], capture_output=True, text=True, timeout=60, env=environment(), check=False
    )


def wait(look: Callable[[], object], seconds: float = 40.0) -> None:
    limit = time.monotonic() + seconds
    while not look():
        assert time.monotonic() < limit, "it did not happen in time"
        time.sleep(0.1)


@pytest.fixture
def up(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], Path, dict[str, int]]]:
    home = tmp_path / "home"
    process = subprocess.Popen(
        [*SHOAL, "up", "--home", str(home), *FREE, "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment(),
        start_new_session=True,
    )
    try:
        assert process.stdout is not None
        yield process, home, json.loads(process.stdout.readline())["ports"]
    finally:
        end(process, 20)  # type: ignore[arg-type]
        assert process.stdout is not None
        process.stdout.close()


def children(process: subprocess.Popen[str]) -> dict[str, psutil.Process]:
    found = {}
    for child in psutil.Process(process.pid).children():
        with contextlib.suppress(psutil.Error):  # one that has just ended
            line = child.cmdline()
            if "shoal_controller.cli.child" in line:
                found[line[line.index("shoal_controller.cli.child") + 1]] = child
    return found


def answers(ports: dict[str, int]) -> bool:
    try:
        with Client(f"http://127.0.0.1:{ports['http']}") as client:
            return bool(client.status().version)
    except Exception:
        return False


Up = tuple[subprocess.Popen[str], Path, dict[str, int]]


def test_it_is_found_without_configuration_and_refuses_a_second(up: Up) -> None:
    _, home, ports = up
    done = subprocess.run(
        [*SHOAL, "device", "list", "--json"],
        capture_output=True,
        text=True,
        timeout=60,
        env={**environment(), "SHOAL_HOME": str(home)},
        check=True,
    )
    assert json.loads(done.stdout)["items"] == []
    second = run("up", "--home", str(home), *FREE)
    assert second.returncode == 1
    assert "Another controller" in second.stderr
    taken = run("up", "--home", str(home.with_name("other")), *FREE[2:], "--http-port", str(ports["http"]))
    assert taken.returncode == 1
    assert str(ports["http"]) in taken.stderr
    assert "--http-port" in taken.stderr


def test_whoever_dies_starts_again_where_it_was(up: Up) -> None:
    process, _, ports = up
    before = children(process)
    for child in before.values():
        child.send_signal(signal.SIGKILL)
    wait(lambda: len(now := children(process)) == 2 and not {c.pid for c in now.values()} & pids(before))
    wait(lambda: answers(ports))


def test_sigterm_stops_both(up: Up) -> None:
    process, home, ports = up
    running = list(children(process).values())
    assert len(running) == 2
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0
    assert not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in running)
    assert not answers(ports)
    assert (home / "logs" / "controller.log").stat().st_size > 0


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child of its parent's end")
def test_children_end_with_a_killed_supervisor(up: Up) -> None:
    process, _, _ = up
    running = list(children(process).values())
    process.kill()
    process.wait()

    def gone(child: psutil.Process) -> bool:
        try:
            return not child.is_running() or child.status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True

    wait(lambda: all(gone(child) for child in running))


def test_a_directory_that_others_can_read_is_refused(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir(mode=0o755)
    home.chmod(0o755)
    done = run("controller", "init", "--home", str(home))
    assert done.returncode == 3
    assert "chmod 700" in done.stderr
    home.chmod(0o700)
    made = json.loads(run("controller", "init", "--home", str(home), "--fleet", "plant-7", "--json").stdout)
    assert made == {"home": str(home), "fleet": "plant-7", "created": True}
    assert json.loads(run("controller", "init", "--home", str(home), "--json").stdout)["created"] is False


def pids(processes: dict[str, psutil.Process]) -> set[int]:
    return {process.pid for process in processes.values()}
