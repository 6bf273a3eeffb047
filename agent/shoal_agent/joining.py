"""Joining a fleet, and what is known of a device that has joined."""

from __future__ import annotations

import json
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from shoal_agent import config as configs
from shoal_agent import lock, profile
from shoal_agent.config import Config
from shoal_agent.fs import RealFs
from shoal_agent.identity import Identity, IdentityStore
from shoal_protos.errors import InvalidInput
from shoal_protos.tokens import MAX_TEXT, JoinToken, decode


@dataclass(frozen=True)
class Joined:
    """A device that was let in. `class_reason` is one sentence, "" from an older controller;
    `clock_offset_ms` how far this machine's clock is ahead of the controller's."""

    identity: Identity
    profile_class: str
    class_reason: str = ""
    clock_offset_ms: int | None = None


def read_token(token_file: str | None, environ: Mapping[str, str]) -> JoinToken:
    """The token from a file ("-" = standard input), the environment or a prompt; never an argument,
    which every user of the machine could read in the list of processes.

    Raises:
        InvalidInput: none given, or it is mistyped.
    """
    token = given_token(token_file, environ)
    if token is not None:
        return token
    if sys.stdin.isatty():
        import getpass

        return decode(getpass.getpass("Join token: "))
    raise InvalidInput(
        "No join token was given.",
        "Get one with `shoal token create --join` and pass it with --token-file FILE or SHOAL_JOIN_TOKEN.",
    )


def given_token(token_file: str | None, environ: Mapping[str, str]) -> JoinToken | None:
    """As `read_token`, but None rather than a prompt."""
    if token_file == "-":  # noqa: S105  # a file name
        return decode(sys.stdin.read(MAX_TEXT + 1))
    if token_file:
        try:
            with Path(token_file).open(errors="replace") as stream:
                return decode(stream.read(MAX_TEXT + 1))
        except OSError as error:
            raise InvalidInput(f"The token file {token_file} cannot be read: {error.strerror}.") from error
    return decode(environ["SHOAL_JOIN_TOKEN"]) if environ.get("SHOAL_JOIN_TOKEN") else None


async def join(config: Config, token: JoinToken, name: str | None) -> Joined:
    """Joins the token's fleet.

    Joining again with the key that is there gives the same device, costs one use only, and takes the
    token's addresses over.

    Raises:
        Denied: the token is wrong, used up, expired or revoked; or the state directory is open to others.
        Unavailable: no address of the token answered.
        Conflict: this device belongs to another fleet, or its agent is running.
    """
    from shoal_agent.clock import SystemClock
    from shoal_agent.link import enrolment

    config.paths.create()
    with lock.locked(config.paths):
        store = IdentityStore(config.paths.identity, RealFs())
        store.check_fleet(token.fleet)
        measured = profile.measure_cached(
            config.paths.profile_cache, config.runtimes, prefix=config.child_prefix
        )
        identity, reply = await enrolment.join(store, token, measured, name or socket.gethostname())
        remember(config)
    offset = SystemClock().wall_ms() - reply.server_time_ms if reply.server_time_ms else None
    return Joined(identity, reply.profile_class or profile.class_of(measured), reply.class_reason, offset)


def remember(config: Config) -> None:
    """Writes the settings given by flags and environment down: a service must find what was promised
    at joining."""
    known = configs.resolve({"state_dir": str(config.state_dir)}, {})
    given = {
        spec.name: getattr(config, spec.name)
        for spec in fields(Config)
        if getattr(config, spec.name) != getattr(known, spec.name)
    }
    if given:
        configs.remember(config.paths, **given)


def status(config: Config) -> dict[str, Any]:
    """What the running agent last wrote, or what is known without one.

    Raises:
        NotFound: this device has not joined.
    """
    identity = IdentityStore(config.paths.identity, RealFs()).load()
    value: dict[str, Any] = {"fleet": identity.fleet, "device": identity.device, "name": identity.name}
    pid = lock.holder(config.paths)
    if not pid:
        return {**value, "running": False, "pid": 0, "placements": [], "connected": False}
    value["running"] = True
    written = written_status(config)
    if written:
        return {**value, **written}
    starting = {"pid": pid, "connected": False, "controller": "", "last_problem": "it is starting"}
    ports = {"http": 0, "grpc": 0, "metrics": 0, "host": config.host}
    return {**value, **starting, "ports": ports, "placements": []}


def written_status(config: Config) -> dict[str, Any]:
    """`run/status.json` of the running or the last supervisor, {} if there is none."""
    try:
        value = json.loads((config.paths.runtime / "status.json").read_bytes())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def agent_addresses(config: Config, identity: Identity) -> list[str]:
    """Where the controller's agents' door may be: the desired state's addresses, then those of the
    join. Only hints: whoever answers there must prove that it is the fleet's."""
    from shoal_agent.reporting import grpc_addresses
    from shoal_protos.v1 import desired_pb2

    try:
        signed = desired_pb2.Signed.FromString(config.paths.desired.read_bytes())
        state = desired_pb2.DesiredState.FromString(signed.payload)
    except Exception:  # none adopted yet, or damaged: protobuf's DecodeError has no public base
        state = desired_pb2.DesiredState()
    return grpc_addresses(state.agent_settings.controllers, identity.agent_addresses)
