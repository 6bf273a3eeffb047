"""`shoal-agent doctor`: what is wrong with this machine, and what to do about it.

Works before joining, with the supervisor running or not, as any user, within a few seconds. Every check
is a function that never raises; what cannot be looked at is `unmeasured` and says why.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shoal_agent import doors, joining, lock, platforms
from shoal_agent import service as services
from shoal_agent.checks import FAILED, OK, UNMEASURED, WARNING, Check, size, span
from shoal_agent.config import Config, check_private
from shoal_agent.doors import Door
from shoal_agent.features import BUILD_TIME_MS
from shoal_agent.fs import RealFs
from shoal_agent.identity import Identity, IdentityStore
from shoal_protos.errors import NotFound, ShoalError
from shoal_protos.tokens import JoinToken

MIN_FREE_BYTES, LOW_FREE_BYTES = 50_000_000, 500_000_000
MIN_INODES = 1000
LOW_MEMORY_BYTES = 100_000_000
CLOCK_TOLERANCE_S = 300
OLD_STATUS_S = 7 * 86_400


@dataclass(frozen=True)
class Patient:
    """What is examined: the settings, who this device is, and what its supervisor last wrote."""

    config: Config
    environ: Mapping[str, str]
    identity: Identity | None = None
    identity_problem: ShoalError | None = None
    token: JoinToken | None = None
    status: Mapping[str, Any] = field(default_factory=dict)
    pid: int = 0  # of the running supervisor
    offset_ms: int | None = None  # how far this clock is ahead of the controller's

    @property
    def joined(self) -> bool:
        return self.identity is not None


def patient(
    config: Config,
    environ: Mapping[str, str],
    *,
    token: JoinToken | None = None,
    offset_ms: int | None = None,
) -> Patient:
    """Gathers what is known here without asking anybody."""
    identity, problem = None, None
    try:
        identity = IdentityStore(config.paths.identity, RealFs()).load()
    except NotFound:
        pass
    except ShoalError as error:
        problem = error
    except OSError as error:
        problem = ShoalError(f"{config.paths.identity} cannot be read: {error.strerror}.")
    status = joining.written_status(config)
    if offset_ms is None and isinstance(status.get("clock_offset_ms"), int):
        offset_ms = status["clock_offset_ms"]
    pid = lock.holder(config.paths)
    return Patient(config, environ, identity, problem, token, status, pid, offset_ms)


def examine(who: Patient) -> list[Check]:
    """All checks, in the order in which they are read: the machine, the network, the agent."""
    slow: dict[str, list[Check]] = {}
    work = [
        threading.Thread(target=lambda n=name, c=check: slow.__setitem__(n, _safe(n, c, who)), daemon=True)
        for name, check in _SLOW.items()
    ]
    for thread in work:
        thread.start()
    quick = {name: _safe(name, check, who) for name, check in _QUICK.items()}
    end = time.monotonic() + doors.LIMIT_S + 0.8
    for thread in work:
        thread.join(max(0.0, end - time.monotonic()))
    late = {name: [Check(name, UNMEASURED, "no answer in time")] for name in _SLOW if name not in slow}
    found = {**quick, **slow, **late}
    return [check for name in _ORDER for check in found[name]]


_Found = list[Check]


def _safe(name: str, check: Callable[[Patient], _Found], who: Patient) -> _Found:
    try:
        return check(who)
    except Exception as error:  # one check's bug must not hide what the others found
        return [Check(name, UNMEASURED, f"the check failed: {type(error).__name__}: {error}")]


# ---------------------------------------------------------------------------- the machine


def state_directory(who: Patient) -> _Found:
    root, name = who.config.state_dir, "state directory"
    try:
        check_private(root)
        there = root.exists()
    except PermissionError:
        return [Check(name, FAILED, f"{root} may not be read by this user", "Use sudo, or --state-dir.")]
    except ShoalError as error:
        return [Check(name, FAILED, error.message, error.remedy)]
    place = _existing(root)
    if os.statvfs(place).f_flag & os.ST_RDONLY:
        return [
            Check(name, FAILED, f"{place} is on a file system that is mounted read-only",
                  "A worn or damaged card is mounted so. See dmesg; check or replace the card.")
        ]  # fmt: skip
    if not os.access(place, os.W_OK):
        remedy = "Use sudo, or choose another one with --state-dir."
        return [Check(name, FAILED, f"{place} may not be written by this user", remedy)]
    return [Check(name, OK, f"{root}" if there else f"{root}, not made yet")]


def disk(who: Patient) -> _Found:
    place = _existing(who.config.state_dir)
    facts = os.statvfs(place)
    free, inodes = facts.f_bavail * facts.f_frsize, facts.f_favail
    text = f"{size(free)} free of {size(facts.f_blocks * facts.f_frsize)} at {place}"
    remedy = "Free some: old logs (journalctl --vacuum-size=100M), packages (apt-get clean)."
    if facts.f_files and inodes < MIN_INODES:
        return [Check("disk", FAILED, f"only {inodes} files can still be made at {place}", remedy)]
    if free < MIN_FREE_BYTES:
        return [Check("disk", FAILED, text, remedy)]
    return [
        Check("disk", WARNING if free < LOW_FREE_BYTES else OK, text, remedy if free < LOW_FREE_BYTES else "")
    ]


def _existing(path: Path) -> Path:
    path = path.absolute()
    return next((place for place in (path, *path.parents) if place.exists()), Path("/"))


def memory(who: Patient) -> _Found:
    import psutil

    facts, swap = psutil.virtual_memory(), psutil.swap_memory()
    text = f"{size(facts.available)} available of {size(facts.total)}, swap {size(swap.free)} free"
    if facts.available < LOW_MEMORY_BYTES:
        return [Check("memory", WARNING, text, "End what is not needed, or add swap: a model may not fit.")]
    return [Check("memory", OK, text)]


def clock(who: Patient) -> _Found:
    now = time.time()
    shown = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(now))
    remedy = (
        "Set it: timedatectl set-ntp true (needs the network), or date -s. Without a battery it starts wrong."
    )
    if now * 1000 < BUILD_TIME_MS:
        found = f"it shows {shown}, which is before this software was built"
        return [Check("clock", FAILED, found, remedy)]
    if who.offset_ms is None:
        return [Check("clock", OK, f"it shows {shown}; the controller's was not heard yet")]
    ahead = who.offset_ms / 1000
    age = now - float(who.status.get("written_ms") or now * 1000) / 1000
    when = "" if who.pid or abs(age) < 60 else f", heard {span(age)} ago"
    if abs(ahead) > CLOCK_TOLERANCE_S:
        word = "ahead of" if ahead > 0 else "behind"
        found = f"it shows {shown}, {span(ahead)} {word} the controller's{when}"
        return [
            Check("clock", WARNING, found, f"The agent goes by the controller's time meanwhile. {remedy}")
        ]
    return [
        Check("clock", OK, f"it shows {shown}, within {span(max(1, abs(ahead)))} of the controller's{when}")
    ]


def temperature(who: Patient) -> _Found:
    return platforms.temperature()


def python_and_libc(who: Patient) -> _Found:
    return [platforms.interpreter()]


def runtimes(who: Patient) -> _Found:
    return platforms.runtimes(who.config)


# ---------------------------------------------------------------------------- the network


def network(who: Patient) -> _Found:
    """Every door of every address that is known."""
    wanted = _doors(who)
    addresses = [door.address for door in wanted]
    found = [doors.check_proxies(addresses, who.environ)]
    if not wanted:
        remedy = "Give the token: shoal-agent doctor --token-file FILE"
        found.append(Check("controller", UNMEASURED, "no address is known before joining", remedy))
    return found + doors.check(wanted)


def _doors(who: Patient) -> list[Door]:
    identity, token, paths = who.identity, who.token, who.config.paths
    if token is not None:
        import ssl

        ca = ssl.DER_cert_to_PEM_cert(token.ca_der)
        found = [Door("enrolment", address, token.fleet, ca) for address in token.enrolment_addresses]
        # Without a certificate the agents' door can only be seen to be there.
        known = [door.address for door in found]
        if identity is None:
            return found
        more = _doors_of(identity, who, paths.identity)
        return found + [door for door in more if door.address not in known]
    return _doors_of(identity, who, paths.identity) if identity is not None else []


def _doors_of(identity: Identity, who: Patient, files: Path) -> list[Door]:
    ca = identity.ca_pem.decode(errors="replace")
    certificate, key = files / "cert.pem", files / "key.pem"
    agents = [
        Door("agents", address, identity.fleet, ca, certificate, key)
        for address in joining.agent_addresses(who.config, identity)
    ]
    return agents + [
        Door("enrolment", address, identity.fleet, ca) for address in identity.enrolment_addresses
    ]


# ---------------------------------------------------------------------------- the agent


def certificate(who: Patient) -> _Found:
    name = "certificate"
    if who.identity_problem is not None:
        return [Check(name, FAILED, who.identity_problem.message, who.identity_problem.remedy)]
    if who.identity is None:
        remedy = "Get a token with `shoal token create --join`, then: shoal-agent join"
        return [Check(name, UNMEASURED, "this device has not joined a fleet", remedy)]
    now = time.time() * 1000 - (who.offset_ms or 0)
    left, due = (who.identity.expires_ms - now) / 1000, (who.identity.renew_at_ms - now) / 1000
    if left <= 0:
        found = f"it expired {span(left)} ago and has not been renewed"
        return [
            Check(name, FAILED, found, "Start the agent: it renews by itself for a while. Else join again.")
        ]
    if due < -3600:
        found = f"it is valid for {span(left)} more, but should have been renewed {span(due)} ago"
        return [Check(name, WARNING, found, "The enrolment door must be reachable; see above and the log.")]
    renewal = "is being renewed" if due <= 0 else f"renews itself in {span(due)}"
    return [Check(name, OK, f"of {who.identity.device}, valid for {span(left)}, {renewal}")]


def service(who: Patient) -> _Found:
    chosen = services.stored(who.config.paths)
    pid, words = services.state(who.config, chosen)
    how = {
        services.SYSTEM: "system unit", services.USER: "user unit", services.DIRECT: "no systemd",
    }.get(chosen.kind if chosen else "", "no service")  # fmt: skip
    text = f"{how} ({words})" if words else how
    if not who.joined:
        return [Check("service", UNMEASURED, "nothing to run before joining")]
    if not pid:
        start = (
            "shoal-agent run"
            if chosen is None or chosen.kind == services.NONE
            else "shoal-agent service start"
        )
        return [Check("service", FAILED, f"the agent does not run; {text}", f"Start it with: {start}")]
    if "disabled" in words:
        return [
            Check("service", WARNING, f"process {pid}, {text}", "It will not start at boot; run join again.")
        ]
    return [Check("service", OK, f"process {pid}, {text}")]


def connection(who: Patient) -> _Found:
    status = who.status
    if not who.joined or not who.pid or not status:
        return [Check("connection", UNMEASURED, "the agent does not run")]
    if status.get("connected"):
        return [Check("connection", OK, f"connected to {status.get('controller')}")]
    problem = str(status.get("last_problem") or "it is trying")
    return [
        Check("connection", FAILED, f"not connected: {problem}", "What the network checks found says more.")
    ]


def ports(who: Patient) -> _Found:
    """Whether the data plane's ports are free, or ours."""
    config, found = who.config, []
    bound = (who.status.get("ports") or {}) if who.pid else {}
    for name in ("http", "grpc", "metrics"):
        port = getattr(config, f"{name}_port")
        if who.pid and bound.get(name):
            continue
        if port and not _free(config.host, port):
            found.append(
                Check(f"port {port} ({name})", FAILED, f"taken by {_owner(port)}",
                      f"End that, or choose another: shoal-agent join --{name}-port N (0 = any free one)")
            )  # fmt: skip
    if found:
        return found
    if any(bound.get(name) for name in ("http", "grpc", "metrics")):
        text = ", ".join(f"{name} {bound.get(name) or 'not yet'}" for name in ("http", "grpc", "metrics"))
        return [Check("ports", OK, f"{text} on {bound.get('host')}")]
    wanted = [str(getattr(config, f"{name}_port") or "any") for name in ("http", "grpc", "metrics")]
    return [Check("ports", OK, f"{', '.join(wanted)} are free on {config.host}")]


def _free(host: str, port: int) -> bool:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            return error.errno != errno.EADDRINUSE
    return True


def _owner(port: int) -> str:
    """Which process listens there, as far as this user may know."""
    import psutil

    try:
        for item in psutil.net_connections("tcp"):
            if item.laddr and item.laddr.port == port and item.status == psutil.CONN_LISTEN and item.pid:
                return f"{psutil.Process(item.pid).name()} (process {item.pid})"
    except (psutil.Error, OSError):
        pass
    return "another program"


def bundles(who: Patient) -> _Found:
    """What the desired state names, against what lies on disk whole."""
    from shoal_protos.bundle import open_bundle
    from shoal_protos.v1 import desired_pb2

    paths = who.config.paths
    try:
        signed = desired_pb2.Signed.FromString(paths.desired.read_bytes())
        state = desired_pb2.DesiredState.FromString(signed.payload)
    except OSError:
        return [Check("bundles", UNMEASURED, "no desired state yet")]
    except Exception:  # protobuf's DecodeError has no public base
        found = f"{paths.desired} is damaged"
        return [
            Check("bundles", WARNING, found, "The controller sends it anew while the agent is connected.")
        ]

    def whole(digest: str) -> bool:
        try:
            open_bundle(paths.store, digest, verify=False)
        except (ShoalError, OSError):
            return False
        return True

    missing = [f"{p.bundle[7:19]} for {p.endpoint}" for p in state.placements if not whole(p.bundle)]
    if missing:
        found = f"of {len(state.placements)} wanted, not whole on disk: {', '.join(missing)}"
        return [Check("bundles", WARNING, found, "They are fetched while the controller is connected.")]
    return [
        Check("bundles", OK, f"{len(state.placements)} wanted, all on disk (generation {state.generation})")
    ]


def failures(who: Patient) -> _Found:
    """What went wrong with placements, and crash loops."""
    found = []
    if who.pid and who.status.get("crash_loop"):
        remedy = f"See {who.config.paths.logs / 'server.log'}"
        found.append(Check("server", FAILED, str(who.status["crash_loop"]), remedy))
    try:
        saved = json.loads((who.config.paths.state / "placements.json").read_bytes())["placements"]
    except (OSError, ValueError, KeyError, TypeError):
        saved = []
    for item in saved:
        if item.get("reason"):
            text = f"{item['wanted']['bundle'][7:19]}: {item['reason']}"
            detail = str(item.get("detail") or "")
            text += f" ({detail[:200]})" if detail and detail not in text else ""
            remedy = "The logs of the failure: shoal device logs, or the probe's log here."
            found.append(Check(f"endpoint {item['endpoint']}", WARNING, text, remedy))
    remedy = "Update the agent, if it asks for that."
    refused = who.status.get("refusals") or ()
    found += [Check("desired state", WARNING, f"refused: {reason}", remedy) for reason in refused]
    return found or [Check("failures", OK, "none")]


_QUICK: Mapping[str, Callable[[Patient], _Found]] = {
    "state directory": state_directory,
    "disk": disk,
    "memory": memory,
    "clock": clock,
    "python": python_and_libc,
    "certificate": certificate,
    "connection": connection,
    "ports": ports,
    "bundles": bundles,
    "failures": failures,
}
_SLOW: Mapping[str, Callable[[Patient], _Found]] = {
    "temperature": temperature,
    "runtimes": runtimes,
    "network": network,
    "service": service,
}
_ORDER = (
    "state directory", "disk", "memory", "clock", "temperature", "python", "runtimes", "network",
    "certificate", "service", "connection", "ports", "bundles", "failures",
)  # fmt: skip


# ---------------------------------------------------------------------------- for people

_MARKS = {OK: ("ok", "32"), WARNING: ("warning", "33"), FAILED: ("failed", "31"), UNMEASURED: ("-", "2")}


def lines(checks: Sequence[Check], *, color: bool) -> list[str]:
    """One line a check, and its remedy below."""
    width = max((len(check.name) for check in checks), default=0)
    found = []
    for check in checks:
        word, code = _MARKS[check.state]
        mark = f"\033[{code}m{word:<8}\033[0m" if color else f"{word:<8}"
        found.append(f"{mark}{check.name:<{width}}  {check.found}")
        if check.remedy:
            found.append(f"{'':<{8 + width}}  -> {check.remedy}")
    return found
