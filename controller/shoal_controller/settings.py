"""What a controller is told: flag > environment > file > default, once, into one frozen value.

Layout of the data directory (`SHOAL_HOME`, default `~/.local/share/shoal`, mode 0700):

    controller.toml        optional settings, same names as the fields below
    identity/              CA, door and signing keys (0600), see identity.py
    shoal.db               the store
    blobs/                 one OCI image layout for everything content-addressed
    jobs/                  the worker's job directories
    wheels/                what devices install from, see wheels.py
    run/{controller.lock,ports.json}
"""

from __future__ import annotations

import dataclasses
import ipaddress
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

import platformdirs
import tomllib

from shoal_protos.errors import Denied, InvalidInput

HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?\Z")
FLEET_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?\Z")  # a DNS label: it is part of a name


@dataclass(frozen=True)
class Settings:
    """Everything that can be set. Times in seconds unless the name says otherwise, sizes in bytes."""

    home: Path
    fleet: str = ""  # "" = the directory's own; `shoal` for a new directory
    host: str = "127.0.0.1"  # loopback; what API, dashboard and (without `lan`) the devices' doors bind to
    # Opens the doors for devices (installer, enrolment, agents) to the network; API and dashboard stay.
    lan: bool = False
    # Hosts, comma-separated, that devices are told before the ones found: a port forward, a DNS name.
    advertise: str = ""
    http_port: int = 8080  # API, dashboard, metrics; 0 = free
    installer_port: int = 8441  # plain HTTP, GET only: installer and wheels, only with `lan`; 0 = free
    enrolment_port: int = 8442  # server TLS; 0 = free
    agents_port: int = 8443  # mutual TLS; 0 = free
    database: str = ""  # SQLAlchemy URL; "" = home/shoal.db
    ui: bool = True
    telemetry_seconds: int = 30  # window length that agents are told
    heartbeat_seconds: int = 30
    missed_heartbeats: int = 3  # so many missed = offline
    certificate_seconds: int = 30 * 86400  # a device certificate's life
    renewal_grace_seconds: int = 30 * 86400  # after expiry, while renewal is still accepted
    desired_seconds: int = 14 * 86400  # `not_after` of a desired state; re-signed at half of it
    drift_window_seconds: int = 900  # how far back a device's figures look
    max_message_bytes: int = 4 << 20  # one gRPC message
    max_blob_bytes: int = 64 << 20  # one blob pushed by a device
    device_quota_bytes: int = 256 << 20  # all blobs a device may hold here
    max_upload_bytes: int = 2 << 30  # one push of a model version
    blob_lease_seconds: int = 86400  # how long an unreferred blob is kept

    @property
    def database_url(self) -> str:
        return self.database or f"sqlite:///{self.home / 'shoal.db'}"

    @property
    def identity_dir(self) -> Path:
        return self.home / "identity"

    @property
    def blobs_dir(self) -> Path:
        return self.home / "blobs"

    @property
    def jobs_dir(self) -> Path:
        return self.home / "jobs"

    @property
    def wheels_dir(self) -> Path:
        """What devices without internet install from: one folder of wheels per platform and Python."""
        return self.home / "wheels"

    @property
    def doors_host(self) -> str:
        """What the devices' doors bind to."""
        return "0.0.0.0" if self.lan else self.host  # noqa: S104  # TLS, or no secret crosses it

    @property
    def extra_hosts(self) -> tuple[str, ...]:
        """`advertise`, taken apart."""
        return tuple(host.strip() for host in self.advertise.split(",") if host.strip())

    @property
    def run_dir(self) -> Path:
        return self.home / "run"

    @property
    def ports_file(self) -> Path:
        return self.run_dir / "ports.json"

    @property
    def offline_after_seconds(self) -> float:
        """A device silent for so long is offline."""
        return self.heartbeat_seconds * self.missed_heartbeats

    @classmethod
    def load(
        cls, flags: Mapping[str, Any] | None = None, environment: Mapping[str, str] | None = None
    ) -> Settings:
        """Merges flags (None = not given), `SHOAL_*` variables, `controller.toml` and defaults.

        Raises:
            InvalidInput: an unknown name, a value of the wrong type or out of range.
        """
        environment = os.environ if environment is None else environment
        given = {name: value for name, value in (flags or {}).items() if value is not None}
        home = Path(given.pop("home", None) or environment.get("SHOAL_HOME") or default_home()).expanduser()
        hints = get_type_hints(cls)
        names = [field.name for field in dataclasses.fields(cls) if field.name != "home"]
        values: dict[str, Any] = {}
        for source, found in (
            (str(home / "controller.toml"), _read_file(home / "controller.toml", names)),
            ("the environment", _read_environment(environment, names)),
            ("the command line", given),
        ):
            for name, value in found.items():
                values[name] = _convert(name, value, hints.get(name), source)
        return _check(cls(home=home.absolute(), **values))


def default_home() -> Path:
    return Path(platformdirs.user_data_dir("shoal", appauthor=False))


def prepare_home(settings: Settings) -> None:
    """Makes the data directory and its rooms, for this user only.

    Raises:
        Denied: others can read the directory, or it cannot be written.
    """
    try:
        settings.home.mkdir(parents=True, mode=0o700, exist_ok=True)
        check_private(settings.home)
        for room in (settings.blobs_dir, settings.jobs_dir, settings.run_dir):
            room.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise Denied(
            f"The data directory {settings.home} cannot be used: {error.strerror}.",
            "Name another one with --home or SHOAL_HOME.",
        ) from error


def check_private(directory: Path) -> None:
    """Raises Denied if anybody but the owner has any right to `directory`."""
    mode = directory.stat().st_mode & 0o777
    if mode & 0o077:
        raise Denied(
            f"The data directory {directory} can be read by others (mode {mode:o}); it holds private keys.",
            f"Run: chmod 700 {directory}",
        )


def _read_file(path: Path, names: list[str]) -> dict[str, Any]:
    try:
        values = tomllib.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError) as error:
        raise InvalidInput(f"{path} cannot be read: {error}.") from error
    for name in values:
        if name not in names:
            raise InvalidInput(f"{path}: there is no setting '{name}'.", f"Settings: {', '.join(names)}.")
    return values


def _read_environment(environment: Mapping[str, str], names: list[str]) -> dict[str, Any]:
    found = ((name, environment.get(f"SHOAL_{name.upper()}")) for name in names)
    return {name: value for name, value in found if value}


def _convert(name: str, value: Any, kind: Any, source: str) -> Any:
    if kind is None:
        raise InvalidInput(f"There is no setting '{name}' (from {source}).")
    try:
        if kind is bool:
            return value if isinstance(value, bool) else _parse_bool(str(value))
        return kind(value)
    except (TypeError, ValueError):
        raise InvalidInput(f"{name} must be {kind.__name__}, not {value!r} (from {source}).") from None


def _parse_bool(text: str) -> bool:
    lowered = text.strip().lower()
    if lowered in ("1", "true", "yes", "on"):
        return True
    if lowered in ("0", "false", "no", "off"):
        return False
    raise ValueError(text)


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _check(settings: Settings) -> Settings:
    if settings.fleet and not FLEET_NAME.match(settings.fleet):
        raise InvalidInput(
            f"'{settings.fleet}' is not a fleet name.",
            "Use lower-case letters, digits and dashes, at most 63.",
        )
    if not _is_loopback(settings.host):
        raise InvalidInput(
            f"API and dashboard cannot be opened to the network at {settings.host}: there is no sign-in yet.",
            "Leave --host out; --lan opens the doors for devices, and only those.",
        )
    for host in settings.extra_hosts:
        if not HOST.match(host):
            raise InvalidInput(f"advertise: '{host[:80]}' is no host.", "Give names or IPv4 addresses.")
    for name in ("http_port", "installer_port", "enrolment_port", "agents_port"):
        if not 0 <= getattr(settings, name) <= 65535:
            raise InvalidInput(f"{name} must be a port, 0 to 65535 (0 = a free one).")
    for field in dataclasses.fields(settings):
        if field.name.endswith(("_seconds", "_bytes")) and getattr(settings, field.name) <= 0:
            raise InvalidInput(f"{field.name} must be above 0.")
    return settings
