"""Keeping the agent running: a systemd unit, or a process of its own where there is no systemd.

`service.json` in the state directory says what `join` chose, written before it is done, so that a
join or leave that was cut off can be taken up again.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path

from shoal_agent import children, lock
from shoal_agent.config import Config, Paths
from shoal_agent.fs import RealFs, durable_write
from shoal_protos.errors import Conflict, InvalidInput, ShoalError, Unsupported

UNIT = "shoal-agent.service"
SYSTEM_UNITS = Path("/etc/systemd/system")
SYSTEMD_RUNS = Path("/run/systemd/system")
SYSTEM_STATE = Path("/var/lib/shoal-agent")
CHOICES = ("auto", "system", "user", "none")
SYSTEM, USER, DIRECT, NONE = "system", "user", "direct", "none"
CALL_TIMEOUT_S = 200.0  # longer than a unit's TimeoutStartSec
STOP_TIMEOUT_S = 45.0
_USABLE = ("running", "degraded", "starting", "initializing")
_HOMES = ("/home", "/root", "/run/user")


@dataclass(frozen=True)
class Service:
    """How this device's agent is kept running. `direct` = a process of its own, without systemd."""

    kind: str
    unit: str = ""  # path of the unit file
    prefix: str = ""  # where the installer put the agent, "" = it was installed otherwise

    @property
    def systemd(self) -> bool:
        return self.kind in (SYSTEM, USER)

    @property
    def installed_kind(self) -> str:
        """What install.json calls it."""
        return self.kind if self.systemd else NONE


def stored(paths: Paths) -> Service | None:
    """What `join` chose, None before it did."""
    try:
        value = json.loads(_file(paths).read_bytes())
        return Service(str(value["kind"]), str(value["unit"]), str(value["prefix"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def store(paths: Paths, service: Service) -> None:
    """Remembers the choice, also in the installer's install.json."""
    durable_write(RealFs(), _file(paths), json.dumps(asdict(service), indent=1).encode())
    if not service.prefix:
        return
    path = Path(service.prefix) / "install.json"
    value: dict[str, object] = {}
    with contextlib.suppress(OSError, ValueError):
        value = dict(json.loads(path.read_bytes()))
    value.update(service=service.installed_kind, unit=service.unit)
    with contextlib.suppress(OSError):  # only `leave` without a state directory reads it
        durable_write(RealFs(), path, json.dumps(value, indent=1).encode())


def _file(paths: Paths) -> Path:
    return paths.root / "service.json"


# ---------------------------------------------------------------------------- choosing


def choose(wanted: str, environ: Mapping[str, str]) -> str:
    """`auto` -> what this machine offers.

    Raises:
        InvalidInput: an unknown word, or a unit that this user may not or cannot have.
    """
    if wanted not in CHOICES:
        raise InvalidInput(f"--service {wanted} is unknown.", f"Use one of: {', '.join(CHOICES)}.")
    root, systemd = os.geteuid() == 0, SYSTEMD_RUNS.is_dir() and bool(shutil.which("systemctl"))
    if wanted == SYSTEM and not root:
        raise InvalidInput("A system unit needs root.", "Use sudo, or --service user.")
    if wanted == SYSTEM and not systemd:
        raise InvalidInput(
            "systemd does not run here.", "Leave --service out: the agent is started directly."
        )
    if wanted == USER and not _user_manager(environ):
        raise InvalidInput(
            "This user's systemd cannot be reached.",
            "Log in as the user itself (not through su), or leave --service out.",
        )
    if wanted != "auto":
        return wanted
    if root:
        return SYSTEM if systemd else DIRECT
    return USER if _user_manager(environ) else DIRECT


def _user_manager(environ: Mapping[str, str]) -> bool:
    if not shutil.which("systemctl", path=environ.get("PATH")):
        return False
    return _systemctl(USER, "is-system-running", check=False).strip() in _USABLE


def unit_path(kind: str, environ: Mapping[str, str]) -> str:
    """Where the unit of this kind belongs, "" for none."""
    if kind == SYSTEM:
        return str(SYSTEM_UNITS / UNIT)
    if kind == USER:
        base = Path(environ.get("XDG_CONFIG_HOME") or Path(environ.get("HOME", "~")).expanduser() / ".config")
        return str(base / "systemd/user" / UNIT)
    return ""


# ---------------------------------------------------------------------------- what is started


def command(config: Config, prefix: str, *more: str) -> list[str]:
    """The command line that runs this device's agent, with absolute paths."""
    words = children.interpreter(config.child_prefix)
    if prefix:  # by the link, so that a newer version takes over at the next start
        words[-1] = str(Path(prefix) / "agent/current/bin/python")
    program = shutil.which(words[0]) or words[0]
    state = str(config.state_dir.resolve())
    return [program, *words[1:], "-m", "shoal_agent", "run", "--state-dir", state, *more]


def render(kind: str, words: Sequence[str], state_dir: Path, prefix: str = "") -> str:
    """The unit file. Pure but for reading its template."""
    name = UNIT if kind == SYSTEM else "shoal-agent-user.service"
    text = resources.files("shoal_agent").joinpath("units").joinpath(name).read_text()
    places = [str(state_dir), *([prefix] if prefix else [])]
    own = state_dir == SYSTEM_STATE
    values = {
        "COMMAND": " ".join(_quoted(word) for word in words),
        "STATE": str(state_dir).replace("%", "%%"),
        "STATE_LINE": (
            "StateDirectory=shoal-agent\nStateDirectoryMode=0700"
            if own
            else f"ReadWritePaths={_quoted(str(state_dir))}"
        ),
        "PROTECT_HOME": "read-only" if _below(places, _HOMES) else "yes",
        "PRIVATE_TMP": "no" if _below(places, ("/tmp", "/var/tmp")) else "yes",  # noqa: S108
    }
    return re.sub(r"@([A-Z_]+)@", lambda match: values[match.group(1)], text)


def _below(places: Sequence[str], roots: Sequence[str]) -> bool:
    return any(place == root or place.startswith(root + "/") for place in places for root in roots)


def _quoted(word: str) -> str:
    """One word of a unit file: systemd expands %, $ and backslashes."""
    escaped = word.replace("\\", "\\\\").replace("%", "%%").replace("$", "$$").replace('"', '\\"')
    return escaped if re.fullmatch(r"[\w@%+=:,./-]+", escaped) else f'"{escaped}"'


# ---------------------------------------------------------------------------- doing


def install(config: Config, service: Service) -> list[str]:
    """Writes the unit and enables it; returns what people should know. Nothing for other kinds.

    Raises:
        Unsupported: systemd refused; the message is its own.
    """
    if not service.systemd:
        return []
    text = render(service.kind, command(config, service.prefix), config.state_dir.resolve(), service.prefix)
    path = Path(service.unit)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    temporary.chmod(0o644)
    temporary.replace(path)
    _systemctl(service.kind, "daemon-reload")
    _systemctl(service.kind, "enable", UNIT)
    return _linger() if service.kind == USER else []


def _linger() -> list[str]:
    """A user's units live from boot on only if the user lingers."""
    user = _user_name()
    try:
        result = subprocess.run(
            ["loginctl", "enable-linger", user], capture_output=True, timeout=20, check=False
        )
        failed = result.returncode != 0
    except (OSError, subprocess.TimeoutExpired):
        failed = True
    if not failed:
        return []
    return [
        f"The agent stops when {user} logs out: lingering could not be switched on. "
        f"Let root run: loginctl enable-linger {user}"
    ]


def _user_name() -> str:
    import pwd

    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return str(os.geteuid())


def start(config: Config, service: Service) -> int:
    """Starts the agent (anew, if a unit runs already); returns the process id of a direct one, else 0.

    Raises:
        Unsupported: systemd refused.
        Conflict: a direct one runs already.
    """
    if service.systemd:
        _systemctl(service.kind, "restart", UNIT)
        return 0
    pid = lock.holder(config.paths)
    if pid:
        raise Conflict(f"The agent runs already (process {pid}).", "Stop it with: shoal-agent service stop")
    return _start_direct(config, service)


def _start_direct(config: Config, service: Service) -> int:
    """In a session of its own, so that it survives the shell."""
    words = command(config, service.prefix, "--background")
    output = config.paths.logs / "start.log"
    environ = {key: value for key, value in os.environ.items() if key != "SHOAL_JOIN_TOKEN"}
    actions = [
        (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
        (os.POSIX_SPAWN_OPEN, 1, str(output), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600),
        (os.POSIX_SPAWN_DUP2, 1, 2),
    ]
    return os.posix_spawn(words[0], words, environ, file_actions=actions, setsid=True)


def stop(config: Config, service: Service) -> None:
    """Stops the agent and waits until it has ended; nothing to do is fine.

    Raises:
        Unsupported: systemd refused.
        Conflict: the process does not end.
    """
    if service.systemd and Path(service.unit).exists():
        _systemctl(service.kind, "stop", UNIT)
    pid = lock.holder(config.paths)
    if pid and service.kind != NONE:
        _end(config.paths, pid)


def _end(paths: Paths, pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)
    end = time.monotonic() + STOP_TIMEOUT_S
    while time.monotonic() < end:
        if lock.holder(paths) != pid:
            return
        time.sleep(0.05)
    raise Conflict(
        f"The agent (process {pid}) does not end.", f"End it with: kill -9 {pid}, then run this again."
    )


def uninstall(service: Service) -> None:
    """Disables a stopped unit and removes its file. Idempotent."""
    if not service.systemd:
        return
    path = Path(service.unit)
    with contextlib.suppress(ShoalError):  # a unit that systemd does not know is disabled already
        _systemctl(service.kind, "disable", UNIT)
    if path.name == UNIT:
        path.unlink(missing_ok=True)
    with contextlib.suppress(ShoalError):
        _systemctl(service.kind, "daemon-reload")


def disable(service: Service) -> None:
    """Keeps the unit's file, but it is not started at boot any more."""
    if service.systemd and Path(service.unit).exists():
        _systemctl(service.kind, "disable", UNIT)


def state(config: Config, service: Service | None) -> tuple[int, str]:
    """(process id of the running agent or 0, what the service manager says or "")."""
    pid = lock.holder(config.paths)
    if service is None or not service.systemd:
        return pid, ""
    words = [
        _systemctl(service.kind, what, UNIT, check=False, timeout_s=3.0).strip() or "unknown"
        for what in ("is-active", "is-enabled")
    ]
    return pid, ", ".join(words)


def _systemctl(kind: str, *arguments: str, check: bool = True, timeout_s: float = CALL_TIMEOUT_S) -> str:
    """systemctl's output.

    Raises:
        Unsupported: it failed and `check`.
    """
    words = ["systemctl", *(["--user"] if kind == USER else []), *arguments]
    environ = dict(os.environ)
    if kind == USER:
        environ.setdefault("XDG_RUNTIME_DIR", f"/run/user/{os.geteuid()}")
    try:
        result = subprocess.run(
            words, capture_output=True, text=True, timeout=timeout_s, check=False, env=environ
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        if check:
            raise Unsupported(f"`{' '.join(words)}` failed: {error}.") from error
        return ""
    if check and result.returncode != 0:
        journal = "journalctl --user" if kind == USER else "journalctl"
        raise Unsupported(
            f"`{' '.join(words)}` failed: {(result.stderr or result.stdout).strip()[-400:]}",
            f"Look at: {journal} -u shoal-agent -n 50",
        )
    return result.stdout


def boot_line(config: Config, service: Service) -> str:
    """What a machine without systemd should run at its start."""
    program = str(Path(service.prefix) / "agent/current/bin/python") if service.prefix else sys.executable
    words = [*children.interpreter(config.child_prefix)[:-1], program]
    return " ".join(
        [*words, "-m", "shoal_agent", "service", "start", "--state-dir", str(config.state_dir.resolve())]
    )
