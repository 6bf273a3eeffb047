"""What `shoal-agent join`, `doctor`, `service` and `leave` print and ask."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from shoal_agent import arrival, diagnosis, joining, leaving
from shoal_agent import config as configs
from shoal_agent import doctor as doctors
from shoal_agent import service as services
from shoal_agent.arrival import Arrived
from shoal_agent.checks import FAILED, Check
from shoal_agent.config import Config
from shoal_protos.errors import InvalidInput, NotFound, Unavailable
from shoal_protos.tokens import JoinToken

OK, CANNOT, UNREACHABLE = 0, 1, 4


def _say(text: str) -> None:
    print(text, flush=True)  # noqa: T201


def _config(options: argparse.Namespace) -> Config:
    """Settings with an absolute state directory: a service is started from elsewhere."""
    config = configs.resolve(vars(options), os.environ)
    return replace(config, state_dir=config.state_dir.absolute())


# ---------------------------------------------------------------------------- join


def join(options: argparse.Namespace) -> int:
    """Joins, starts the service, and ends well only after the first accepted heartbeat."""
    config = _config(options)
    token = joining.given_token(options.token_file, os.environ)
    if token is None and arrival.needs_token(config):
        token = joining.read_token(None, os.environ)
    service = services.NONE if options.run else options.service
    try:
        arrived = arrival.arrive(
            config, token, name=options.name, service=service,
            prefix=str(Path(options.prefix).absolute()) if options.prefix else "",
            wait_s=options.wait, environ=os.environ, say=_say,
        )  # fmt: skip
    except Unavailable:
        _explain(config, token, but=("certificate", "service", "connection"))
        raise
    identity = arrived.joined.identity
    _say(f"Joined the fleet '{identity.fleet}' as {identity.name or identity.device} ({identity.device}).")
    if options.run:
        from shoal_agent import cli

        return cli.run(options)
    return _tell(config, arrived, token)


def _tell(config: Config, arrived: Arrived, token: JoinToken | None) -> int:
    status, identity = arrived.status, arrived.joined.identity
    name = status.get("name") or identity.name or identity.device
    _say(f"class       {status.get('profile_class') or arrived.joined.profile_class or '?'}")
    reason = str(status.get("class_reason") or arrived.joined.class_reason).partition(": ")[2]
    if reason:
        _say(f"            {reason}")
    if arrived.service.kind == services.NONE:
        _say("Start it with: shoal-agent run")
        return OK
    for line in _service_lines(config, arrived):
        _say(line)
    if arrived.problem:
        return _not_heard(config, arrived, token)
    ports = status.get("ports") or {}
    if ports.get("http"):
        bound = f"http {ports['http']}, grpc {ports['grpc']}, metrics {ports['metrics']}"
        _say(f"serves      {bound} on {ports['host']}")
    else:
        _say("serves      not yet; shoal-agent status shows the ports")
    beat = f"first heartbeat accepted after {status['first_heartbeat_s']:.1f} s"
    _say(f"controller  {status.get('controller')}, {beat}")
    _say(f"Next: shoal-agent status here, or where the controller runs: shoal device get {name}")
    return OK


def _service_lines(config: Config, arrived: Arrived) -> list[str]:
    service, folder = arrived.service, config.paths.logs
    lines = {
        services.SYSTEM: [f"service     {service.unit} (starts at boot)"],
        services.USER: [f"service     {service.unit}{'' if arrived.notes else ' (starts at boot)'}"],
        services.DIRECT: [
            "service     none: systemd does not run here, so the agent was started directly",
            "            and nothing starts it again. Put this into what starts things here",
            f"            (cron: @reboot ...): {services.boot_line(config, service)}",
        ],
    }[service.kind]  # fmt: skip
    journal = {
        services.SYSTEM: ", journalctl -u shoal-agent",
        services.USER: ", journalctl --user -u shoal-agent",
    }.get(service.kind, "")  # fmt: skip
    return [*lines, *(f"            {note}" for note in arrived.notes), f"logs        {folder}{journal}"]


def _not_heard(config: Config, arrived: Arrived, token: JoinToken | None) -> int:
    print(f"shoal-agent: {arrived.problem}", file=sys.stderr)  # noqa: T201
    checks = _explain(config, token, offset_ms=arrived.joined.clock_offset_ms)
    print(  # noqa: T201
        "The agent goes on trying. When that is mended, run join again to see it through: shoal-agent join",
        file=sys.stderr,
    )
    unreachable = any(check.state == FAILED and " door " in check.name for check in checks)
    return UNREACHABLE if unreachable else CANNOT


def _explain(
    config: Config, token: JoinToken | None, *, offset_ms: int | None = None, but: Sequence[str] = ()
) -> list[Check]:
    """Doctor's findings that are not well, on standard error; without those named `but`."""
    checks = doctors.examine(doctors.patient(config, os.environ, token=token, offset_ms=offset_ms))
    bad = [check for check in checks if check.remedy and check.name not in but]
    for line in doctors.lines(bad, color=sys.stderr.isatty() and not os.environ.get("NO_COLOR")):
        print(line, file=sys.stderr)  # noqa: T201
    return checks


# ---------------------------------------------------------------------------- doctor


def doctor(options: argparse.Namespace) -> int:
    """Prints the checks; 1 if something failed."""
    config = _config(options)
    token = joining.given_token(options.token_file, os.environ)
    who = doctors.patient(config, os.environ, token=token)
    if options.json:
        value = diagnosis.diagnose(who)
        _say(json.dumps(value, indent=2))
        return CANNOT if any(check["state"] == FAILED for check in value["checks"]) else OK
    checks = doctors.examine(who)
    for line in doctors.lines(checks, color=_colors()):
        _say(line)
    bad = sum(check.state == FAILED for check in checks)
    if bad:
        _say(f"{bad} of {len(checks)} checks failed.")
    return CANNOT if bad else OK


def _colors() -> bool:
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


# ---------------------------------------------------------------------------- service


def service(options: argparse.Namespace) -> int:
    """Starts, stops or shows what keeps the agent running."""
    config = _config(options)
    chosen = services.stored(config.paths)
    if chosen is None or chosen.kind == services.NONE:
        raise NotFound("This device's agent has no service.", "Make one with: shoal-agent join")
    if options.action in ("stop", "restart"):
        services.stop(config, chosen)
    if options.action in ("start", "restart"):
        services.start(config, chosen)
        _say("Started. See: shoal-agent status")
        return OK
    if options.action == "stop":
        _say("Stopped. Start it again with: shoal-agent service start")
        return OK
    pid, words = services.state(config, chosen)
    what = chosen.unit or "a process of its own, without systemd"
    _say(f"service     {what}{f' ({words})' if words else ''}")
    _say(f"agent       {f'process {pid}' if pid else 'not running'}")
    return OK if pid else CANNOT


# ---------------------------------------------------------------------------- leave


def leave(options: argparse.Namespace) -> int:
    """Revokes this device and forgets the fleet; with --purge nothing of the agent stays."""
    config = _config(options)
    if not _agreed(config, options):
        _say("Nothing was changed.")
        return CANNOT
    prefix = str(Path(options.prefix).absolute()) if options.prefix else ""
    left = leaving.leave(
        config, purge=options.purge, offline=options.offline, prefix=prefix, reason=options.reason
    )
    if left.device:
        _say(f"{left.device} has left the fleet{'' if left.told else ' as far as this machine goes'}.")
    if left.device and not left.told:
        _say(f"The fleet does not know: let the operator run  shoal device remove {left.device}")
    if not left.device:
        _say("No readable identity was here, so no fleet was told. If one lists this device, let its")
        _say("operator run  shoal device remove NAME")
    for place in left.removed:
        _say(f"removed     {place}")
    _lines(left.rest, "left        {} (it holds files that are not the agent's)")
    if not options.purge:
        _say("The agent itself is still installed; shoal-agent leave --purge removes it, join uses it again.")
    return OK


def _lines(places: Sequence[str], form: str) -> None:
    for place in places:
        _say(form.format(place))


def _agreed(config: Config, options: argparse.Namespace) -> bool:
    if options.yes:
        return True
    what = "key, certificate, bundles and telemetry"
    if options.purge:
        what += ", unit, installation and state directory"
    if not sys.stdin.isatty():
        raise InvalidInput(f"Leaving removes {what} of {config.state_dir}.", "Say so with --yes.")
    answer = input(f"Leave the fleet and remove {what} ({config.state_dir})? [y/N] ")
    return answer.strip().lower() in ("y", "yes")
