"""Which controller a command talks to: flag > environment > context > this machine's own.

Contexts live in `~/.config/shoal/config.toml`:

    current = "lab"
    [contexts.lab]
    url = "http://127.0.0.1:8080"
    token_file = "~/.config/shoal/lab.token"
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tomllib

from shoal_protos.errors import Denied, InvalidInput, NotFound

if TYPE_CHECKING:
    from shoal_controller.client import Client

DEFAULT_URL = "http://127.0.0.1:8080"


@dataclass(frozen=True)
class Target:
    """An address, a token ("" = none) and where both come from, for people."""

    url: str
    token: str = ""
    source: str = ""


def config_path(environment: Mapping[str, str] | None = None) -> Path:
    environment = os.environ if environment is None else environment
    base = environment.get("XDG_CONFIG_HOME") or str(Path.home() / ".config")
    return Path(base) / "shoal" / "config.toml"


def read_config(path: Path) -> dict[str, Any]:
    """The configuration; empty when there is no file.

    Raises:
        InvalidInput: the file is not TOML or a context has no url.
    """
    try:
        config = tomllib.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise InvalidInput(f"{path} cannot be read: {error}.", "Mend or remove the file.") from error
    for name, context in config.get("contexts", {}).items():
        if not isinstance(context, dict) or not isinstance(context.get("url"), str):
            raise InvalidInput(f"{path}: the context '{name}' has no url.", 'Add: url = "http://HOST:PORT"')
    return config


def read_token(name: str) -> str:
    """A token from a file, or from standard input for `-`."""
    if name == "-":
        return sys.stdin.readline().strip()
    try:
        return Path(name).expanduser().read_text().strip()
    except OSError as error:
        raise Denied(f"The token file {name} cannot be read: {error.strerror}.") from error


def local_home(environment: Mapping[str, str]) -> Path:
    from shoal_controller.settings import default_home

    return Path(environment.get("SHOAL_HOME") or default_home()).expanduser()


def local_url(home: Path) -> str | None:
    """The address that the controller of a data directory wrote down, None if there is none."""
    try:
        ports = json.loads((home / "run" / "ports.json").read_text())
        return f"http://{ports.get('host') or '127.0.0.1'}:{int(ports['http'])}"
    except (OSError, ValueError, KeyError, TypeError):
        return None


def resolve(flags: Mapping[str, Any], environment: Mapping[str, str] | None = None) -> Target:
    """Decides which controller to talk to.

    Raises:
        NotFound: a context that is not configured was asked for.
    """
    environment = os.environ if environment is None else environment
    config = read_config(config_path(environment))
    contexts: dict[str, dict[str, str]] = config.get("contexts", {})
    named = flags.get("context") or ""
    if named and named not in contexts:
        raise NotFound(f"There is no context '{named}'.", "`shoal context list` shows them.")
    url, source, token_file = "", "", ""
    if flags.get("url"):
        url, source = flags["url"], "--url"
    elif named:
        url, source, token_file = (
            contexts[named]["url"],
            f"context {named}",
            contexts[named].get("token_file", ""),
        )
    elif environment.get("SHOAL_URL"):
        url, source = environment["SHOAL_URL"], "SHOAL_URL"
    elif environment.get("SHOAL_HOME") and (found := local_url(local_home(environment))):
        url, source = found, "SHOAL_HOME"
    elif (current := config.get("current", "")) in contexts:
        url, source, token_file = (
            contexts[current]["url"],
            f"context {current}",
            contexts[current].get("token_file", ""),
        )
    else:
        url, source = local_url(local_home(environment)) or DEFAULT_URL, "this machine"
    token_file = flags.get("token_file") or token_file
    token = read_token(token_file) if flags.get("token_file") else environment.get("SHOAL_TOKEN", "")
    if not token and token_file:
        token = read_token(token_file)
    return Target(url=url, token=token, source=source)


def connect(ctx: Any) -> Client:
    """The client for this command line; `ctx` is Typer's context. Close it, or use it with `with`."""
    from shoal_controller.client import Client

    target = resolve(ctx.find_root().obj or {})
    return Client(target.url, target.token)
