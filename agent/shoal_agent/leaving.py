"""What `shoal-agent leave` does: revoke, stop, forget, and with `purge` remove the agent itself.

The controller hears of it first: where it cannot be reached nothing is removed. What is to be done is
written to `leaving.json` before the first file goes, so that a leave which was cut off goes on from there.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from shoal_agent import joining, lock
from shoal_agent import service as services
from shoal_agent.config import Config, Paths
from shoal_agent.fs import RealFs, durable_write
from shoal_agent.identity import Identity, IdentityStore
from shoal_agent.service import Service
from shoal_protos.errors import (
    Conflict,
    Denied,
    InvalidInput,
    NotFound,
    ShoalError,
    TamperedData,
    Unavailable,
)

_PREFIX_PARTS = ("agent", "current", "download", "bin")  # of the installer, beside install.json
_STATE_FILES = ("config.json", "config.tmp", "service.json", "service.json.tmp")


@dataclass(frozen=True)
class Left:
    """What was done. `device` is "" where nothing had joined; `rest` lists what was left lying."""

    device: str
    told: bool  # the controller knows
    removed: tuple[str, ...] = ()
    rest: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Plan:
    device: str
    purge: bool
    told: bool
    service: Service


def leave(
    config: Config, *, purge: bool = False, offline: bool = False, prefix: str = "", reason: str = ""
) -> Left:
    """Leaves the fleet. Run again after an interruption it finishes.

    Args:
        purge: also remove unit, installation and state directory.
        offline: forget locally, whatever the controller knows.
        prefix: where the installer put the agent; "" = as remembered.

    Raises:
        NotFound: this device has not joined, and there is nothing to remove.
        Unavailable: the controller cannot be reached; nothing was changed.
        Denied: the controller refuses; nothing was changed.
        Conflict: an agent runs that is no service of this device.
        InvalidInput: a prefix that no installer of ours made.
    """
    paths = config.paths
    plan = _taken_up(paths, purge)
    if plan is None:
        service = _service(paths, prefix)
        identity = _identity(paths)
        if identity is None and not _anything(config, service, purge):
            raise NotFound("This device has not joined a fleet, so there is nothing to leave.")
        _check_stoppable(paths, service)
        if purge and service.prefix:
            check_prefix(Path(service.prefix))
        told = False
        if identity is not None and not offline:
            _tell(config, identity, reason)
            told = True
        plan = _Plan(identity.device if identity else "", purge, told, service)
        _write(paths, plan)
    services.stop(config, plan.service)
    if plan.purge:
        services.uninstall(plan.service)
    else:
        services.disable(plan.service)
    forget(config)
    if not plan.purge:
        with contextlib.suppress(FileNotFoundError):
            _marker(paths).unlink()
        return Left(plan.device, plan.told)
    return _purge(config, plan)


def forget(config: Config) -> None:
    """Removes key, certificate, bundles and what was spooled.

    Raises:
        Conflict: the agent is running.
    """
    paths = config.paths
    if not paths.root.is_dir():
        return
    paths.runtime.mkdir(mode=0o700, exist_ok=True)
    with lock.locked(paths):
        if paths.identity.is_dir():
            IdentityStore(paths.identity, RealFs()).forget()
        for room in (paths.desired.parent, paths.state, paths.store, paths.spool):
            _remove(room)


# ---------------------------------------------------------------------------- before anything is done


def _identity(paths: Paths) -> Identity | None:
    try:
        return IdentityStore(paths.identity, RealFs()).load()
    except (NotFound, TamperedData):  # damaged: nothing that the controller would believe
        return None


def _service(paths: Paths, prefix: str) -> Service:
    """What runs here: as remembered, else as the installer's own file says."""
    known = services.stored(paths)
    if known is not None and (not prefix or known.prefix == prefix):
        return known
    where = prefix or _own_prefix()
    value: dict[str, object] = {}
    with contextlib.suppress(OSError, ValueError):
        value = dict(json.loads((Path(where) / "install.json").read_bytes())) if where else {}
    if known is not None:
        return Service(known.kind, known.unit, where)
    kind, unit = str(value.get("service", services.NONE)), str(value.get("unit", ""))
    return Service(kind if unit else services.DIRECT if where else services.NONE, unit, where)


def _own_prefix() -> str:
    """PREFIX where this very program lies in PREFIX/agent/VERSION, else ""."""
    own = Path(sys.prefix)
    found = own.parent.parent
    return str(found) if own.parent.name == "agent" and (found / "install.json").exists() else ""


def _anything(config: Config, service: Service, purge: bool) -> bool:
    if services.stored(config.paths) is not None or config.paths.identity.is_dir():
        return purge or (config.paths.identity / "key.pem").exists()
    return purge and bool(service.prefix)


def _check_stoppable(paths: Paths, service: Service) -> None:
    pid = lock.holder(paths)
    if pid and service.kind == services.NONE:
        raise Conflict(
            f"Another agent (process {pid}) runs on {paths.root}, started by hand.",
            "Stop it first, then run this again.",
        )


def check_prefix(prefix: Path) -> None:
    """Refuses a directory that no installer of ours made.

    Raises:
        InvalidInput: too high up, a home directory, or without install.json.
    """
    home = Path(os.path.expanduser("~"))
    text = os.path.normpath(prefix)
    odd = not prefix.is_absolute() or ".." in prefix.parts or len(Path(text).parts) < 3
    if odd or home == Path(text) or Path(text) in home.parents:
        raise InvalidInput(f"{prefix} is no place of an agent's own, so it is not removed.")
    if not (prefix / "install.json").is_file() and prefix.exists():
        raise InvalidInput(
            f"{prefix} has no install.json: the installer did not make it, so it is not removed.",
            "Leave without --purge, and remove it yourself if you mean to.",
        )


def _tell(config: Config, identity: Identity, reason: str) -> None:
    from shoal_agent.link import leaving as link

    addresses = joining.agent_addresses(config, identity)
    try:
        asyncio.run(link.leave(identity, addresses, reason))
    except Unavailable as error:
        if time.time() * 1000 > identity.expires_ms and _renewed(config):
            asyncio.run(link.leave(_identity(config.paths) or identity, addresses, reason))
            return
        raise Unavailable(
            f"{error.message} Nothing was removed.",
            f"Try again when the controller can be reached, or forget the fleet only here with "
            f"`shoal-agent leave --offline` and let the operator run: shoal device remove {identity.device}",
        ) from error
    except Denied as error:
        raise Denied(
            f"{error.message} Nothing was removed.",
            f"To forget the fleet only here: shoal-agent leave --offline (then, on the controller: "
            f"shoal device remove {identity.device}).",
        ) from error


def _renewed(config: Config) -> bool:
    """An expired certificate opens no door; within its grace the old key gets a new one."""
    from shoal_agent.link import enrolment

    try:
        asyncio.run(enrolment.renew_stored(IdentityStore(config.paths.identity, RealFs())))
    except ShoalError:
        return False
    return True


# ---------------------------------------------------------------------------- what survives a power cut


def _marker(paths: Paths) -> Path:
    return paths.root / "leaving.json"


def _write(paths: Paths, plan: _Plan) -> None:
    paths.root.mkdir(mode=0o700, parents=True, exist_ok=True)
    value = {
        "device": plan.device,
        "purge": plan.purge,
        "told": plan.told,
        "service": vars(plan.service),
    }
    durable_write(RealFs(), _marker(paths), json.dumps(value).encode())


def _taken_up(paths: Paths, purge: bool) -> _Plan | None:
    """The plan of a leave that was cut off. Joining again withdraws it."""
    try:
        value = json.loads(_marker(paths).read_bytes())
        known = Service(**value["service"])
        return _Plan(str(value["device"]), purge or bool(value["purge"]), bool(value["told"]), known)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def withdraw(paths: Paths) -> None:
    """A device that joins again no longer leaves."""
    with contextlib.suppress(FileNotFoundError):
        _marker(paths).unlink()


# ---------------------------------------------------------------------------- purging


def _purge(config: Config, plan: _Plan) -> Left:
    """State directory first: the program that could finish the work goes last."""
    paths, prefix = config.paths, plan.service.prefix
    removed: list[str] = []
    rest: list[str] = []
    if plan.service.unit:
        removed.append(plan.service.unit)
    for room in (paths.identity, paths.runtime, paths.logs):
        _remove(room)
    for name in (*_STATE_FILES, "leaving.json.tmp", "leaving.json"):
        with contextlib.suppress(FileNotFoundError):
            (paths.root / name).unlink()
    (removed if _remove_empty(paths.root) else rest).append(str(paths.root))
    if prefix and Path(prefix).exists():
        check_prefix(Path(prefix))
        removed += _unlink_command(Path(prefix))
        for name in _PREFIX_PARTS:
            _remove(Path(prefix) / name)
        for name in ("install.json.new", "install.json.tmp", "install.json"):
            _remove(Path(prefix) / name)
        (removed if _remove_empty(Path(prefix)) else rest).append(prefix)
    return Left(plan.device, plan.told, tuple(removed), tuple(rest))


def _unlink_command(prefix: Path) -> list[str]:
    """Removes the link that people type, where it still leads into this installation."""
    try:
        link = Path(json.loads((prefix / "install.json").read_bytes())["command"])
        if link.readlink() == prefix / "agent/current/bin/shoal-agent":
            link.unlink()
            return [str(link)]
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return []


def _remove(path: Path) -> None:
    """A file, a link (never what it leads to) or a directory; a missing one is fine."""
    if path.is_symlink() or path.is_file():
        path.unlink(missing_ok=True)
    elif path.is_dir():
        shutil.rmtree(path, ignore_errors=True)


def _remove_empty(path: Path) -> bool:
    """True if the directory is gone; one that holds something of somebody else's stays."""
    try:
        path.rmdir()
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True
