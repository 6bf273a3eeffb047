"""What `shoal-agent join`, `status` and `leave` do."""

from __future__ import annotations

import json
import shutil
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shoal_agent import config as configs
from shoal_agent import profile
from shoal_agent.config import Config
from shoal_agent.fs import RealFs
from shoal_agent.identity import Identity, IdentityStore
from shoal_agent.lock import locked
from shoal_protos.errors import Conflict, InvalidInput
from shoal_protos.tokens import MAX_TEXT, JoinToken, decode


def read_token(token_file: str | None, environ: Mapping[str, str]) -> JoinToken:
    """The token from a file ("-" = standard input), the environment or a prompt; never an argument,
    which every user of the machine could read in the list of processes.

    Raises:
        InvalidInput: none given, or it is mistyped.
    """
    if token_file == "-":  # noqa: S105  # a file name
        return decode(sys.stdin.read(MAX_TEXT + 1))
    if token_file:
        try:
            with Path(token_file).open(errors="replace") as stream:
                return decode(stream.read(MAX_TEXT + 1))
        except OSError as error:
            raise InvalidInput(f"The token file {token_file} cannot be read: {error.strerror}.") from error
    if environ.get("SHOAL_JOIN_TOKEN"):
        return decode(environ["SHOAL_JOIN_TOKEN"])
    if sys.stdin.isatty():
        import getpass

        return decode(getpass.getpass("Join token: "))
    raise InvalidInput(
        "No join token was given.",
        "Get one with `shoal token create --join` and pass it with --token-file FILE or SHOAL_JOIN_TOKEN.",
    )


async def join(config: Config, token: JoinToken, name: str | None) -> tuple[Identity, str]:
    """Joins the token's fleet and returns the identity and the profile class.

    Joining again with the key that is there gives the same device and costs one use only.

    Raises:
        Denied: the token is wrong, used up, expired or revoked; or the state directory is open to others.
        Unavailable: no address of the token answered.
        Conflict: this device belongs to another fleet, or its agent is running.
    """
    from shoal_agent.link import enrolment

    config.paths.create()
    with locked(config.paths):
        store = IdentityStore(config.paths.identity, RealFs())
        store.check_fleet(token.fleet)
        measured = profile.measure_cached(
            config.paths.profile_cache, config.runtimes, prefix=config.child_prefix
        )
        identity, profile_class = await enrolment.join(store, token, measured, name or socket.gethostname())
        if config.runtimes:  # `run` must find what was promised at joining
            configs.remember(config.paths, runtimes=list(config.runtimes))
    return identity, profile_class or profile.class_of(measured)


def status(config: Config) -> dict[str, Any]:
    """What the running agent last wrote, or what is known without one.

    Raises:
        NotFound: this device has not joined.
    """
    identity = IdentityStore(config.paths.identity, RealFs()).load()
    value: dict[str, Any] = {"fleet": identity.fleet, "device": identity.device, "name": identity.name}
    try:
        with locked(config.paths):
            return {**value, "running": False, "pid": 0, "placements": [], "connected": False}
    except Conflict:
        value["running"] = True
    try:
        return {**value, **json.loads((config.paths.runtime / "status.json").read_bytes())}
    except (OSError, ValueError):
        starting = {"pid": 0, "connected": False, "controller": "", "last_problem": "it is starting"}
        ports = {"http": 0, "grpc": 0, "metrics": 0, "host": config.host}
        return {**value, **starting, "ports": ports, "placements": []}


def leave(config: Config) -> str:
    """Removes key, certificate, bundles and what was spooled; returns the device id.

    Raises:
        NotFound: this device has not joined.
        Conflict: its agent is running.
    """
    store = IdentityStore(config.paths.identity, RealFs())
    device = store.load().device
    with locked(config.paths):
        store.forget()
        for room in (config.paths.desired.parent, config.paths.state, config.paths.store, config.paths.spool):
            shutil.rmtree(room, ignore_errors=True)
    return device
