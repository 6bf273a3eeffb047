"""Where the agent keeps things, and its settings: flag > environment > config.json > default."""

from __future__ import annotations

import json
import os
import shlex
import stat
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from shoal_protos.errors import Denied, InvalidInput

ENV_PREFIX = "SHOAL_AGENT_"


@dataclass(frozen=True)
class Paths:
    """The state directory's rooms (docs/architecture.md)."""

    root: Path

    @property
    def identity(self) -> Path:
        return self.root / "identity"

    @property
    def desired(self) -> Path:
        return self.root / "trust" / "desired.bin"

    @property
    def state(self) -> Path:
        return self.root / "state"

    @property
    def store(self) -> Path:
        return self.root / "store"

    @property
    def spool(self) -> Path:
        return self.root / "spool"

    @property
    def samples(self) -> Path:
        return self.root / "spool" / "samples"

    @property
    def runtime(self) -> Path:
        return self.root / "run"

    @property
    def private_socket(self) -> Path:
        return self.runtime / "private.sock"

    @property
    def ports(self) -> Path:
        return self.runtime / "ports.json"

    @property
    def lock(self) -> Path:
        return self.runtime / "agent.lock"

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    @property
    def config(self) -> Path:
        return self.root / "config.json"

    @property
    def transitions(self) -> Path:
        return self.state / "transitions.jsonl"

    @property
    def profile_cache(self) -> Path:
        return self.state / "profile.json"

    def create(self) -> None:
        """Makes every room, closed to others (0700).

        Raises:
            Denied: the directory exists and others can read it, or it belongs to somebody else.
        """
        check_private(self.root)
        rooms = (
            self.identity,
            self.desired.parent,
            self.state,
            self.store,
            self.spool,
            self.samples,
            self.runtime,
            self.logs,
        )
        for room in (self.root, *rooms):
            room.mkdir(mode=0o700, parents=True, exist_ok=True)


def check_private(root: Path) -> None:
    """Refuses a state directory that others could read: it holds the device's key.

    Raises:
        Denied: others have rights on it, or it belongs to another user.
    """
    try:
        status = root.stat()
    except FileNotFoundError:
        return
    if not stat.S_ISDIR(status.st_mode):
        raise InvalidInput(f"{root} is not a directory.", "Choose another one with --state-dir.")
    if status.st_uid != os.geteuid():
        raise Denied(f"{root} belongs to another user.", "Start the agent as that user, or use --state-dir.")
    if status.st_mode & 0o077 and any(root.iterdir()):
        raise Denied(f"Others can read {root}, which holds this device's key.", f"Run: chmod 700 {root}")
    if status.st_mode & 0o077:
        root.chmod(0o700)


def default_state_dir(environ: Mapping[str, str]) -> Path:
    if environ.get("SHOAL_AGENT_DIR"):
        return Path(environ["SHOAL_AGENT_DIR"]).expanduser()
    if os.geteuid() == 0:
        return Path("/var/lib/shoal-agent")
    return Path(environ.get("HOME", "~")).expanduser() / ".local/share/shoal-agent"


@dataclass(frozen=True)
class Config:
    """Settings of one agent. Names are those of flags (`--http-port`), variables
    (`SHOAL_AGENT_HTTP_PORT`) and keys of config.json (`http_port`)."""

    state_dir: Path
    host: str = "127.0.0.1"  # address of the data plane and of metrics
    http_port: int = 8000  # 0 = any free one
    grpc_port: int = 8001
    metrics_port: int = 8002
    runtimes: tuple[str, ...] | None = None  # None = every installed one
    # Put before the command line of every child process: an emulator where the kernel knows none.
    child_prefix: str = ""
    telemetry_seconds: int = 10  # window length
    heartbeat_seconds: int = 20
    spool_mb: int = 64  # telemetry kept while offline
    samples_mb: int = 64  # sampled inputs kept while offline
    trial_share: float = 0.75  # of the time that trials may run, the rest is idle between them

    @property
    def paths(self) -> Paths:
        return Paths(self.state_dir)


_LIMITS: Mapping[str, tuple[float, float]] = {
    "http_port": (0, 65535),
    "grpc_port": (0, 65535),
    "metrics_port": (0, 65535),
    "telemetry_seconds": (1, 3600),
    "heartbeat_seconds": (1, 3600),
    "spool_mb": (1, 1 << 20),
    "samples_mb": (1, 1 << 20),
    "trial_share": (0.01, 1.0),
}


def resolve(flags: Mapping[str, Any], environ: Mapping[str, str]) -> Config:
    """Merges flags (None = not given), environment, config.json and defaults.

    Raises:
        InvalidInput: a value of the wrong type or out of range; the message names where it stands.
    """
    state_dir = flags.get("state_dir")
    config = Config(Path(state_dir).expanduser() if state_dir else default_state_dir(environ))
    known = [spec.name for spec in fields(Config) if spec.name != "state_dir"]
    for where, values in (
        (str(config.paths.config), _from_file(config.paths.config)),
        ("the environment", _from_environment(environ, known)),
        ("the command line", {key: value for key, value in flags.items() if value is not None}),
    ):
        unknown = [key for key in values if key not in known and where == str(config.paths.config)]
        if unknown:
            raise InvalidInput(
                f"{where}: unknown setting '{unknown[0]}'.", f"Settings are: {', '.join(known)}."
            )
        checked = {key: _check(key, value, where) for key, value in values.items() if key in known}
        config = replace(config, **checked)
    return config


def _from_file(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except NotADirectoryError:
        raise InvalidInput(
            f"{path.parent} is no directory.", "Name the agent's own with --state-dir or SHOAL_AGENT_DIR."
        ) from None
    except (OSError, ValueError) as error:
        raise InvalidInput(f"{path} cannot be read: {error}.", "Correct or remove it.") from error
    if not isinstance(value, dict):
        raise InvalidInput(f"{path} must hold one JSON object.", "Correct or remove it.")
    return value


def _from_environment(environ: Mapping[str, str], known: list[str]) -> dict[str, Any]:
    values = {name: environ.get(ENV_PREFIX + name.upper()) for name in known}
    values["runtimes"] = values["runtimes"] or environ.get("SHOAL_RUNTIMES")
    return {name: value for name, value in values.items() if value}


def _check(name: str, value: Any, where: str) -> Any:
    if name == "runtimes":
        items = value.split(",") if isinstance(value, str) else value
        if not isinstance(items, (list, tuple)) or not all(isinstance(item, str) for item in items):
            raise InvalidInput(f"{where}: runtimes must be names separated by commas.")
        return tuple(item.strip() for item in items if item.strip()) or None
    if name == "child_prefix":
        if not isinstance(value, str):
            raise InvalidInput(f"{where}: child_prefix must be a command line.")
        try:
            shlex.split(value)
        except ValueError as error:
            raise InvalidInput(f"{where}: child_prefix must be a command line: {error}.") from error
        return value
    if name == "host":
        if not isinstance(value, str) or not value:
            raise InvalidInput(f"{where}: host must be an address.")
        return value
    try:
        number = float(value) if name == "trial_share" else int(value)
    except (TypeError, ValueError) as error:
        raise InvalidInput(f"{where}: {name} must be a number, not {value!r}.") from error
    low, high = _LIMITS[name]
    if not low <= number <= high:
        raise InvalidInput(f"{where}: {name} must be between {low:g} and {high:g}, not {number:g}.")
    return number


def remember(paths: Paths, **settings: Any) -> None:
    """Writes settings into config.json, keeping what else stands there."""
    value = _from_file(paths.config)
    value.update(settings)
    temporary = paths.config.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")
    temporary.replace(paths.config)
