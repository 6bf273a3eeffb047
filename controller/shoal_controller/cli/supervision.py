"""Keeping two child processes alive: when to start which again is decided here, purely, and carried out.

`Restarts` is a frozen value; `Supervisor` owns the processes and takes its clock.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from shoal_protos.errors import ShoalError

FIRST_DELAY_S = 0.5
LONGEST_DELAY_S = 60.0
STEADY_S = 60.0  # a child that lived so long counts as healthy again
STOP_S = 15.0  # from SIGTERM to SIGKILL
READY_S = 60.0


@dataclass(frozen=True)
class Restarts:
    """How often a child died in a row, and when it may start again (monotonic seconds)."""

    deaths: int = 0
    started: float = 0.0
    due: float = 0.0

    def begun(self, now: float) -> Restarts:
        return replace(self, started=now)

    def died(self, now: float) -> Restarts:
        """The delay doubles with each death in a row and never exceeds a minute."""
        deaths = 1 if now - self.started >= STEADY_S else self.deaths + 1
        delay = min(LONGEST_DELAY_S, FIRST_DELAY_S * 2 ** (deaths - 1))
        return Restarts(deaths=deaths, started=self.started, due=now + delay)


class Child:
    """One supervised process in a session of its own, so that Ctrl-C reaches only the supervisor."""

    def __init__(self, role: str, environment: Mapping[str, str]) -> None:
        self.role = role
        self.environment = dict(environment)
        self.process: subprocess.Popen[bytes] | None = None
        self.restarts = Restarts()

    def start(self, ready: bool = False) -> dict[str, int]:
        """Starts it; with `ready` waits for its ports.

        Raises:
            StartFailed: it ended, or said nothing for `READY_S`; why stands on stderr already.
        """
        command = [
            sys.executable,
            "-m",
            "shoal_controller.cli.child",
            self.role,
            "--parent",
            str(os.getpid()),
        ]
        read_fd, write_fd = os.pipe() if ready else (-1, -1)
        if ready:
            command += ["--ready-fd", str(write_fd)]
        self.process = subprocess.Popen(
            command,
            env={**os.environ, **self.environment},
            stdin=subprocess.DEVNULL,
            pass_fds=(write_fd,) if ready else (),
            start_new_session=True,
        )
        self.restarts = self.restarts.begun(time.monotonic())
        if not ready:
            return {}
        os.close(write_fd)
        with os.fdopen(read_fd) as pipe:
            if select.select([pipe], [], [], READY_S)[0] and (line := pipe.readline()):
                ports: dict[str, int] = json.loads(line)
                return ports
        raise StartFailed(self.stop())

    def poll(self) -> int | None:
        """The exit code, None while it runs."""
        return self.process.poll() if self.process else None

    def stop(self, patience_s: float = STOP_S) -> int:
        """Asks it to end, insists after `patience_s`; returns its exit code."""
        if self.process is None:
            return 0
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(patience_s)
            except subprocess.TimeoutExpired:
                self._kill()
        code = self.process.wait()
        self._kill()  # what it may have left in its session
        return code

    def _kill(self) -> None:
        assert self.process is not None
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)  # the session is its own: only its children


class StartFailed(ShoalError):
    """A child ended before it was ready; it has said why itself."""

    def __init__(self, exit_code: int) -> None:
        super().__init__("The controller did not start.")
        self.exit_code = exit_code if exit_code > 0 else 1


class Supervisor:
    """Starts the controller, then the worker, and starts again whichever dies, until told to stop."""

    def __init__(self, environment: Mapping[str, str], say: Callable[[str], None]) -> None:
        self.controller = Child("controller", environment)
        self.worker = Child("worker", environment)
        self.say = say
        self.stopping = False

    def start(self) -> dict[str, int]:
        """Starts both; returns the controller's bound ports. Raises StartFailed."""
        ports = self.controller.start(ready=True)
        # A controller that is started again must be found where devices know it.
        for name in ports:
            self.controller.environment[f"SHOAL_{name.upper()}_PORT"] = str(ports[name])
        self.worker.start()
        return ports

    def request_stop(self, *_: object) -> None:
        self.stopping = True

    def run(self, interval_s: float = 0.2) -> None:
        """Supervises until `request_stop`."""
        down: set[str] = set()
        while not self.stopping:
            for child in (self.controller, self.worker):
                self._look_after(child, down)
            time.sleep(interval_s)

    def _look_after(self, child: Child, down: set[str]) -> None:
        code, now = child.poll(), time.monotonic()
        if code is None:
            return
        if child.role not in down:
            down.add(child.role)
            child.restarts = child.restarts.died(now)
            delay = child.restarts.due - now
            self.say(f"The {child.role} ended (code {code}); starting it again in {delay:.1f} s.")
        elif now >= child.restarts.due:
            down.discard(child.role)
            try:
                child.start(ready=child is self.controller)
            except StartFailed:
                return  # the next look counts this death

    def stop(self) -> None:
        """Stops the worker, then the controller."""
        self.worker.stop()
        self.controller.stop()
