"""What the demo stands on: a scratch directory and the processes that it started, and no others.

Everything is a public command (`shoal`, `shoal-agent`) in a process of its own. `close` ends exactly what
was started here, whatever happened.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from shoal_protos.errors import ShoalError

T = TypeVar("T")

SHOAL = (sys.executable, "-m", "shoal_controller.cli.main")
AGENT = (sys.executable, "-m", "shoal_agent")
STOP_S = 20.0


class BrokenPromise(ShoalError):
    """The story stops here: what was promised did not happen."""

    code = "broken_promise"

    def __init__(self, promise: str, detail: str) -> None:
        super().__init__(f"Broken promise: {promise}. {detail}".strip())
        self.promise = promise


@dataclass(frozen=True)
class Process:
    """A process that this demo started, with the file that its output goes to."""

    name: str
    popen: subprocess.Popen[bytes]
    log: Path
    started_ms: int  # wall clock
    ends: bool = False  # it may end by itself

    def tail(self, lines: int = 15) -> str:
        with contextlib.suppress(OSError):
            return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])
        return ""


class Stage:
    """The scratch directory with the processes. Use it with `with`."""

    def __init__(self, root: Path, keep: bool) -> None:
        self.root = root
        self.keep = keep
        self.processes: list[Process] = []
        (root / "logs").mkdir(parents=True, mode=0o700, exist_ok=True)

    def __enter__(self) -> Stage:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def home(self) -> Path:
        return self.root / "controller"

    def environment(self, more: Mapping[str, str] | None = None) -> dict[str, str]:
        """This process's environment, aimed at the demo's own controller."""
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("SHOAL_")}
        return {**inherited, "SHOAL_HOME": str(self.home), "OMP_NUM_THREADS": "1", **(more or {})}

    def start(
        self,
        name: str,
        command: Sequence[str],
        more: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        ends: bool = False,
    ) -> Process:
        """Starts a process in a session of its own; `ends`: it may end by itself, see `finish`."""
        log = self.root / "logs" / f"{name}.log"
        started_ms = int(time.time() * 1000)
        with log.open("ab") as output:
            popen = subprocess.Popen(
                list(command),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=self.environment(more),
                cwd=cwd or self.root,
                start_new_session=True,
            )
        process = Process(name, popen, log, started_ms, ends)
        self.processes.append(process)
        return process

    def run(
        self,
        promise: str,
        command: Sequence[str],
        timeout_s: float = 60.0,
        more: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ) -> str:
        """Runs a command to its end and returns its stdout.

        Raises:
            BrokenPromise: it failed or took too long; the message holds what it said.
        """
        popen = subprocess.Popen(
            list(command),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=self.environment(more),
            cwd=cwd or self.root,
            start_new_session=True,
        )
        try:
            out, err = popen.communicate(timeout=timeout_s)
        except BaseException as error:
            end(popen, 2.0)
            popen.communicate()
            if isinstance(error, subprocess.TimeoutExpired):
                raise BrokenPromise(promise, f"It took longer than {timeout_s:.0f} s.") from None
            raise
        if popen.returncode != 0:
            said = err.decode(errors="replace").strip() or out.decode(errors="replace").strip()
            raise BrokenPromise(promise, f"Exit code {popen.returncode}: {said[-1500:]}")
        return out.decode()

    def shoal(self, promise: str, *arguments: str, timeout_s: float = 60.0) -> str:
        return self.run(promise, [*SHOAL, *arguments], timeout_s)

    def shoal_json(self, promise: str, *arguments: str, timeout_s: float = 60.0) -> Any:
        return json.loads(self.shoal(promise, *arguments, "--json", timeout_s=timeout_s))

    def check_alive(self) -> None:
        """Raises BrokenPromise when a process of the stage ended by itself."""
        for process in self.processes:
            code = process.popen.poll()
            if code is not None and not process.ends:
                raise BrokenPromise(
                    "every process stays up", f"{process.name} ended with code {code}:\n{process.tail()}"
                )

    def wait(
        self,
        promise: str,
        look: Callable[[], T | None],
        timeout_s: float,
        interval_s: float = 0.25,
        explain: Callable[[], str] | None = None,
    ) -> T:
        """Looks until `look` gives something. A controller that is away for a moment is looked at again.

        Raises:
            BrokenPromise: nothing came in time; `explain` says what was seen last.
        """
        limit = time.monotonic() + timeout_s
        trouble = ""
        while True:
            try:
                found = look()
            except BrokenPromise:
                raise
            except ShoalError as error:
                found, trouble = None, str(error)
            if found is not None:
                return found
            self.check_alive()
            if time.monotonic() > limit:
                with contextlib.suppress(ShoalError):
                    trouble = explain() if explain else trouble
                raise BrokenPromise(promise, f"Not within {timeout_s:.0f} s. {trouble}")
            time.sleep(interval_s)

    def finish(self, process: Process, promise: str, timeout_s: float) -> None:
        """Waits for a process that ends by itself. Raises BrokenPromise unless it ends well in time."""
        code = self.wait(promise, process.popen.poll, timeout_s, 0.1, process.tail)
        self.processes.remove(process)
        if code != 0:
            raise BrokenPromise(promise, f"Exit code {code}:\n{process.tail()}")

    def stop(self, process: Process) -> None:
        """Ends one process and forgets it."""
        end(process.popen, STOP_S)
        self.processes.remove(process)

    def close(self) -> None:
        """Ends every process, last started first, then removes the scratch directory unless it is kept."""
        for process in reversed(self.processes):
            if process.popen.poll() is None:
                process.popen.terminate()
        while self.processes:
            end(self.processes.pop().popen, STOP_S)
        if not self.keep:
            shutil.rmtree(self.root, ignore_errors=True)


def end(popen: subprocess.Popen[bytes], patience_s: float) -> None:
    """SIGTERM, then SIGKILL to the session that the process leads; it was started here."""
    if popen.poll() is None:
        popen.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            popen.wait(patience_s)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(popen.pid, signal.SIGKILL)
    popen.wait()
