"""The processes beside the supervisor: the server that answers, and throwaway probe and bench.

A model that crashes its runtime ends a process here, never the supervisor.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import logging
import math
import os
import resource
import signal
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shoal_agent import children, logs
from shoal_agent.clock import Clock
from shoal_agent.config import Config
from shoal_agent.link.base import Backoff
from shoal_agent.private import PrivateClient
from shoal_agent.processor import patience
from shoal_agent.update.machine import Wanted
from shoal_protos.v1 import agents_pb2, profile_pb2

log = logging.getLogger(__name__)

START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 10.0
PROBE_TIMEOUT_S = 600.0
CRASH_WINDOW_S = 300.0  # deaths within it ...
CRASH_LOOP = 3  # ... that make a crash loop
CALM_S = 60.0  # after living this long a server's next death is its first again
MAX_OUTPUT = 8 * 1024 * 1024  # bytes of a child's standard output


def python(*arguments: str, prefix: str | None = None) -> list[str]:
    """The command line of one of our own processes. `prefix`: the setting `child_prefix`."""
    return [*children.interpreter(prefix), "-m", "shoal_agent", *arguments]


def environment(config: Config) -> dict[str, str]:
    """What children inherit; the join token, if one is in the environment, is not theirs."""
    names = {key: value for key, value in os.environ.items() if key != "SHOAL_JOIN_TOKEN"}
    if config.child_prefix:
        names[children.VARIABLE] = config.child_prefix
    if config.runtimes:
        names["SHOAL_RUNTIMES"] = ",".join(config.runtimes)
    return names


# ---------------------------------------------------------------------------- the server


class ServerProcess:
    """Starts the server, restarts it with backoff, says when it is up and when it died.

    Args:
        on_up: a fresh server answers on the private socket.
        on_died: a server that had been up ended by itself.
    """

    def __init__(
        self, config: Config, *, clock: Clock, on_up: Callable[[], None], on_died: Callable[[], None]
    ) -> None:
        self._config, self._clock = config, clock
        self._on_up, self._on_died = on_up, on_died
        self.client = PrivateClient(config.paths.private_socket, config.paths.store)
        self._process: asyncio.subprocess.Process | None = None
        self._deaths: deque[int] = deque(maxlen=64)  # monotonic ns
        self._keep_ports = True
        self.up = False
        self.restarts = 0

    @property
    def pid(self) -> int | None:
        running = self._process is not None and self._process.returncode is None
        return self._process.pid if running and self._process is not None else None

    @property
    def crash_loop(self) -> str:
        """A sentence about repeated deaths, "" while there is nothing to say."""
        since = self._clock.monotonic_ns() - int(CRASH_WINDOW_S * 1e9)
        recent = sum(1 for death in self._deaths if death >= since)
        return f"the server ended {recent} times in {CRASH_WINDOW_S:.0f} s" if recent >= CRASH_LOOP else ""

    async def run(self) -> None:
        """Keeps a server running until cancelled, then stops it."""
        await self._end_orphan()
        backoff = Backoff(first=0.5, limit=60.0)
        try:
            while True:
                started = self._clock.monotonic_ns()
                await self._live_once()
                if self._clock.monotonic_ns() - started > CALM_S * 1e9:
                    backoff.reset()
                self.restarts += 1
                await self._clock.sleep(0.1 + backoff.next())
        finally:
            await self._stop()

    async def _live_once(self) -> None:
        self._process = await self._spawn()
        pid_file = self._config.paths.runtime / "server.pid"
        pid_file.write_text(str(self._process.pid))
        waiter = asyncio.ensure_future(self._process.wait())
        try:
            if await self._wait_until_up(waiter):
                self.up = self._keep_ports = True
                log.info("server process %d is up", self._process.pid)
                self._on_up()
            else:
                self._keep_ports = False  # perhaps the ports of last time are taken by now
                if not waiter.done():
                    log.error("the server process did not answer within %.0f s", patience(START_TIMEOUT_S))
                    await self._stop()
            await waiter
        finally:
            was_up, self.up = self.up, False
            waiter.cancel()
        self._deaths.append(self._clock.monotonic_ns())
        log.error("server process ended: %s", describe(self._process.returncode))
        if was_up:
            self._on_died()

    async def _wait_until_up(self, waiter: asyncio.Future[int]) -> bool:
        for _ in range(int(patience(START_TIMEOUT_S) / 0.05)):
            if waiter.done():
                return False
            if self._config.paths.private_socket.exists() and await self.client.live():
                return True
            await self._clock.sleep(0.05)
        return False

    async def _spawn(self) -> asyncio.subprocess.Process:
        config = self._config
        for stale in (config.paths.private_socket, config.paths.runtime / "app.sock"):
            stale.unlink(missing_ok=True)
        http, grpc = self._ports()
        command = python(
            "serve", "--managed", "--state", str(config.state_dir), "--host", config.host,
            "--http-port", str(http), "--grpc-port", str(grpc), prefix=config.child_prefix,
        )  # fmt: skip
        with logs.path(config.paths.logs, "server").open("ab") as output:
            return await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=environment(config),
            )

    def _ports(self) -> tuple[int, int]:
        """Free ports stay the same over restarts of the server: applications know them."""
        http, grpc = self._config.http_port, self._config.grpc_port
        if self._keep_ports:
            before = self.ports()
            http, grpc = http or before.http, grpc or before.grpc
        return http, grpc

    def ports(self) -> profile_pb2.Ports:
        """What the server bound, zeros while unknown."""
        try:
            value = json.loads(self._config.paths.ports.read_bytes())
            return profile_pb2.Ports(
                http=value.get("http", 0), grpc=value.get("grpc", 0), host=value.get("host", "")
            )
        except (OSError, ValueError, TypeError, AttributeError):
            return profile_pb2.Ports()

    async def _end_orphan(self) -> None:
        """A server that outlived a killed supervisor: it served on, now a managed one takes over."""
        try:
            pid = int((self._config.paths.runtime / "server.pid").read_text())
            command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except (OSError, ValueError):
            return
        if b"serve" not in command or str(self._config.state_dir).encode() not in command:
            return
        log.info("ending the server process %d of an earlier supervisor", pid)
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
            for _ in range(int(STOP_TIMEOUT_S / 0.05)):
                if not _alive(pid):
                    return
                await self._clock.sleep(0.05)

    async def _stop(self) -> None:
        process = self._process
        if process is None or process.returncode is not None:
            return
        self.up = False
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        try:
            await asyncio.wait_for(process.wait(), STOP_TIMEOUT_S)
        except asyncio.TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (OSError, IndexError):
        return False


def describe(code: int | None) -> str:
    """A return code for people."""
    if code is not None and code < 0:
        try:
            return f"crashed ({signal.Signals(-code).name})"
        except ValueError:
            return f"crashed (signal {-code})"
    return f"exit code {code}"


# ---------------------------------------------------------------------------- throwaway processes


@dataclass(frozen=True)
class Outcome:
    code: int | None  # None = it had to be ended after the time limit
    output: bytes

    def last_json(self) -> dict[str, Any] | None:
        """The last line of the output as a JSON object, None if it is none."""
        try:
            value = json.loads(self.output.splitlines()[-1])
        except (ValueError, IndexError):
            return None
        return value if isinstance(value, dict) else None


async def throwaway(
    command: Sequence[str], log_file: Path, config: Config, *, timeout_s: float, nice: int = 0, cpu_s: int = 0
) -> Outcome:
    """Runs a process to its end; its standard error goes to `log_file`.

    Args:
        nice: added niceness.
        cpu_s: limit of CPU seconds, 0 = none.
    """
    with log_file.open("ab") as errors:
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=errors,
            env=environment(config),
            limit=MAX_OUTPUT,
        )
    try:
        # From outside, at once: a function run between fork and exec is unsafe beside threads.
        with contextlib.suppress(ProcessLookupError):
            if nice:
                os.setpriority(os.PRIO_PROCESS, process.pid, nice)
            if cpu_s:
                resource.prlimit(process.pid, resource.RLIMIT_CPU, (cpu_s, cpu_s + 5))
        output, _ = await asyncio.wait_for(process.communicate(), timeout_s)
        return Outcome(process.returncode, output)
    except asyncio.TimeoutError:
        return Outcome(None, b"")
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()


class ProcessProber:
    """`executor.Prober` by `shoal-agent probe`."""

    def __init__(self, config: Config) -> None:
        self._config = config

    async def probe(self, wanted: Wanted) -> tuple[agents_pb2.ProbeReport, str]:
        paths = self._config.paths
        settings = base64.b64encode(wanted.settings).decode()
        command = python(
            "probe", "--store", str(paths.store), "--bundle", wanted.bundle, "--settings", settings,
            prefix=self._config.child_prefix,
        )  # fmt: skip
        limit = patience(PROBE_TIMEOUT_S)
        outcome = await throwaway(command, logs.path(paths.logs, "probe"), self._config, timeout_s=limit)
        value = outcome.last_json()
        if outcome.code is None:
            return agents_pb2.ProbeReport(), f"no result within {limit:.0f} s"
        if outcome.code not in (0, 1) or value is None:
            return agents_pb2.ProbeReport(), describe(outcome.code)
        report = read_report(value)
        reason = str(value.get("reason") or "")
        if outcome.code == 1 or not report.ok:
            return report, reason or "refused"
        return report, ""


def read_report(value: dict[str, Any]) -> agents_pb2.ProbeReport:
    """A probe's JSON line as a message; null is NaN, unknown fields are ignored."""
    report = agents_pb2.ProbeReport()
    for name in report.DESCRIPTOR.fields_by_name:
        if name in value:
            with contextlib.suppress(TypeError, ValueError):
                setattr(report, name, math.nan if value[name] is None else value[name])
    return report
