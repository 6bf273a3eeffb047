"""`shoal-agent join` from the token to the first accepted heartbeat.

Every step may be cut off: running join again goes on from there, with or without the token once the
device has been let in.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shoal_agent import joining, leaving, lock, logs
from shoal_agent import service as services
from shoal_agent.config import Config
from shoal_agent.fs import RealFs
from shoal_agent.identity import IdentityStore
from shoal_agent.joining import Joined
from shoal_agent.processor import patience
from shoal_agent.service import Service
from shoal_protos.errors import Conflict, InvalidInput, NotFound, ShoalError
from shoal_protos.tokens import JoinToken

POLL_S = 0.1
PORTS_WAIT_S = 10.0  # after the first heartbeat, for the server to say where it answers
START_GRACE_S = 3.0  # a process that has not even taken its lock after this long has failed


@dataclass(frozen=True)
class Arrived:
    """A joined device and what became of its agent. `status` is run/status.json, {} if it was not
    started; `problem` says what is missing, "" when the first heartbeat was accepted."""

    joined: Joined
    service: Service
    status: Mapping[str, Any]
    notes: tuple[str, ...] = ()
    problem: str = ""


def arrive(
    config: Config,
    token: JoinToken | None,
    *,
    name: str | None,
    service: str,
    prefix: str,
    wait_s: float,
    environ: Mapping[str, str],
    say: Callable[[str], None] = lambda text: None,
) -> Arrived:
    """Joins, installs and starts the service, and waits for the first accepted heartbeat.

    Args:
        token: None = go on with the identity that is there.
        service: one of `service.CHOICES`.
        prefix: where the installer put the agent, "" = it was installed otherwise.

    Raises:
        NotFound: no token, and this device has not joined.
        Conflict: an agent runs that is no service of this device.
        ShoalError: joining or systemd refused; running join again goes on.
    """
    if prefix and not (Path(prefix) / "agent/current/bin/python").exists():
        raise InvalidInput(f"There is no agent under {prefix}.", "Leave --prefix out, or run the installer.")
    kind = services.choose(service, environ)
    before = services.stored(config.paths)
    stopped = _stop_earlier(config, before)
    try:
        joined = _let_in(config, token, name)
    except BaseException:
        if stopped and before is not None:
            services.start(config, before)  # what served goes on
        raise
    leaving.withdraw(config.paths)
    chosen = Service(kind, services.unit_path(kind, environ), prefix or (before.prefix if before else ""))
    if before is not None and before.systemd and before.unit != chosen.unit:
        services.uninstall(before)
    services.store(config.paths, chosen)
    if kind == services.NONE:
        return Arrived(joined, chosen, {})
    say(f"Let in by the fleet '{joined.identity.fleet}'." if token is not None else "Joined already.")
    say("Starting the agent...")
    notes = services.install(config, chosen)
    with contextlib.suppress(FileNotFoundError):
        (config.paths.runtime / "status.json").unlink()
    pid = services.start(config, chosen)
    status, problem = _wait(config, pid, wait_s)
    return Arrived(joined, chosen, status, tuple(notes), problem)


def _stop_earlier(config: Config, before: Service | None) -> bool:
    """An agent that joins again must not run meanwhile: it may be renewing its certificate."""
    pid = lock.holder(config.paths)
    if not pid:
        return False
    if before is None or before.kind == services.NONE:
        raise Conflict(
            f"Another agent (process {pid}) runs on {config.state_dir}, started by hand.",
            "Stop it first, then run this again.",
        )
    services.stop(config, before)
    return True


def _let_in(config: Config, token: JoinToken | None, name: str | None) -> Joined:
    if token is not None:
        return asyncio.run(joining.join(config, token, name))
    identity = IdentityStore(config.paths.identity, RealFs()).load()
    config.paths.create()
    joining.remember(config)
    return Joined(identity, "")


def _wait(config: Config, pid: int, wait_s: float) -> tuple[dict[str, Any], str]:
    """The status with the first heartbeat, and "" or why there is none."""
    start = time.monotonic()
    status: dict[str, Any] = {}
    while (waited := time.monotonic() - start) < wait_s:
        status = joining.written_status(config)
        if status.get("first_heartbeat_s") is not None:
            return _with_ports(config, status, pid)
        if pid and _ended(pid):
            return status, f"The agent ended at once. {_last_words(config)}".strip()
        if waited > patience(START_GRACE_S) and pid and not lock.holder(config.paths):
            return status, f"The agent does not run. {_last_words(config)}".strip()
        time.sleep(POLL_S)
    problem = str(status.get("last_problem") or "")
    return status, f"No heartbeat was accepted within {wait_s:.0f} s. {problem}".strip()


def _with_ports(config: Config, status: dict[str, Any], pid: int) -> tuple[dict[str, Any], str]:
    """Waits for the server to say where it answers; a metrics port in use ends the agent only now."""
    end = time.monotonic() + PORTS_WAIT_S
    while not _bound(status) and time.monotonic() < end:
        if pid and _ended(pid):
            return status, f"The agent ended again. {_last_words(config)}".strip()
        time.sleep(POLL_S)
        status = joining.written_status(config) or status
    return status, ""


def _bound(status: Mapping[str, Any]) -> bool:
    ports = status.get("ports") or {}
    return bool(ports.get("http") and ports.get("metrics"))


def _ended(pid: int) -> bool:
    with contextlib.suppress(ChildProcessError):
        return os.waitpid(pid, os.WNOHANG)[0] == pid
    return False


def _last_words(config: Config) -> str:
    """What a directly started agent said before it could log."""
    text = logs.tail(config.paths.logs / "start.log", 4096).decode(errors="replace").strip()
    return text.splitlines()[-1][:300] if text else ""


def needs_token(config: Config) -> bool:
    """Whether this device still has to be let in."""
    try:
        IdentityStore(config.paths.identity, RealFs()).load()
    except (NotFound, ShoalError):
        return True
    return False
