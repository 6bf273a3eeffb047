"""Running a job in a child process and following its lines."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from shoal_optimizer import jobspec
from shoal_optimizer.jobstate import write_atomic
from shoal_protos.errors import ShoalError

GRACE_SECONDS = 5.0


def run_job(
    folder: Path, spec: Mapping[str, Any], follow: Callable[[Mapping[str, Any]], None]
) -> list[dict[str, Any]]:
    """Runs one job to its end and returns its events, progress left out. A finished one isn't run again.

    Raises:
        ShoalError: the job said `error`, or died.
    """
    finished = folder / "events.json"
    if finished.is_file():
        kept: list[dict[str, Any]] = json.loads(finished.read_bytes())
        return kept
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "job.json", json.dumps(spec, indent=1).encode())
    events = []
    for event in _events(folder):
        follow(event)
        if event["event"] == "error":
            raise ShoalError(event["message"], event["remedy"])
        if event["event"] != "progress":
            events.append(event)
    write_atomic(finished, json.dumps(events).encode())
    return events


def _events(folder: Path) -> Iterator[dict[str, Any]]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.setdefault("XDG_CACHE_HOME", str(Path.home() / ".cache"))
    with (folder / "log.txt").open("ab") as log:
        child = subprocess.Popen(
            [sys.executable, "-m", "shoal_optimizer.jobs", str(folder)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            env=environment,
            start_new_session=True,  # Ctrl-C is ours to pass on
        )
        try:
            assert child.stdout is not None
            for line in child.stdout:
                yield jobspec.parse_event(line.decode())
            code = child.wait()
        finally:
            _end(child)
    if code not in (0, 1):
        raise ShoalError(
            f"The {folder.name} job ended with code {code}.",
            f"Look into {folder / 'log.txt'}, then try again.",
        )


def _end(child: subprocess.Popen[bytes]) -> None:
    if child.poll() is None:
        child.terminate()
        try:
            child.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
    if child.stdout is not None:
        child.stdout.close()


def one(events: Sequence[dict[str, Any]], name: str) -> dict[str, Any]:
    for event in events:
        if event["event"] == name:
            return event
    raise ShoalError(f"The job ended without saying '{name}'.", "Remove the --out folder and start again.")
