"""`shoal-agent`: measure, join, run, look, leave. Starts fast: every command imports only its own.

Exit codes: 0 ok, 1 failed, 2 usage, 3 denied, 4 controller unreachable.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from shoal_protos import __version__
from shoal_protos.errors import Denied, InvalidInput, MissingExtra, ShoalError, Unavailable

OK, FAILED, USAGE, DENIED, UNREACHABLE = 0, 1, 2, 3, 4
TOKEN_VARIABLE = "SHOAL_JOIN_TOKEN"  # noqa: S105  # the variable's name
# Their own parsers, imported only when they are asked for.
_PROCESSES = {
    "serve": ("shoal_agent.serving.main", "serve a bundle, or a device's placements (--managed)"),
    "probe": ("shoal_agent.update.probe", "try one bundle and print what was found"),
    "bench": ("shoal_agent.bench", "execute one trial and print its result"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")  # its notes about lost connections are ours to say
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        if arguments and arguments[0] in _PROCESSES:
            return _process(arguments[0], arguments[1:])
        options = _parser().parse_args(arguments)
        command: Callable[[argparse.Namespace], int] = options.command
        return command(options)
    except ShoalError as error:
        print(f"shoal-agent: {error}", file=sys.stderr)  # noqa: T201
        return exit_code(error)
    except KeyboardInterrupt:
        return FAILED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader has gone
        return OK


def exit_code(error: ShoalError) -> int:
    """The one place where errors become exit codes."""
    if isinstance(error, Denied):
        return DENIED
    if isinstance(error, Unavailable):
        return UNREACHABLE
    return USAGE if isinstance(error, InvalidInput) else FAILED


def _process(name: str, arguments: Sequence[str]) -> int:
    import importlib

    module = _PROCESSES[name][0]
    try:
        return int(importlib.import_module(module).main(arguments))
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "shoal_agent":
            raise
        raise MissingExtra("agent", error.name) from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="shoal-agent", description="The part of Shoal that lives on a device."
    )
    parser.add_argument("--version", action="version", version=f"shoal-agent {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def add(name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(command=run)
        return command

    profile = add("profile", _profile, "measure this machine and show its profile class")
    profile.add_argument("--json", action="store_true", help="print JSON")
    _runtimes(profile)

    join = add("join", _join, f"join a fleet; the token comes from a file, ${TOKEN_VARIABLE} or a prompt")
    join.add_argument("--token-file", metavar="FILE", help="file with the join token, - for standard input")
    join.add_argument("--name", help="what people call this device (default: its host name)")
    join.add_argument("--run", action="store_true", help="go on as `shoal-agent run`")
    _running(join)

    run = add("run", _run, "run the agent in the foreground")
    _running(run)

    status = add("status", _status, "show what this device runs")
    status.add_argument("--json", action="store_true", help="print JSON")
    _state_dir(status)

    leave = add("leave", _leave, "forget the fleet: key, certificate, bundles and everything waiting")
    leave.add_argument("--yes", action="store_true", help="do not ask")
    _state_dir(leave)

    for name, (_, text) in _PROCESSES.items():
        commands.add_parser(name, help=text, add_help=False)
    return parser


def _state_dir(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--state-dir", metavar="DIR", help="where the agent keeps things ($SHOAL_AGENT_DIR)")


def _runtimes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--runtimes", metavar="NAMES", help="use only these runtimes, separated by commas ($SHOAL_RUNTIMES)"
    )


def _running(parser: argparse.ArgumentParser) -> None:
    _state_dir(parser)
    _runtimes(parser)
    parser.add_argument("--host", help="address of the data plane and of metrics (default 127.0.0.1)")
    parser.add_argument("--http-port", type=int, metavar="PORT", help="default 8000, 0 = any free one")
    parser.add_argument("--grpc-port", type=int, metavar="PORT", help="default 8001, 0 = any free one")
    parser.add_argument("--metrics-port", type=int, metavar="PORT", help="default 8002, 0 = any free one")
    parser.add_argument("--telemetry-seconds", type=int, metavar="S", help="length of a window, default 10")
    parser.add_argument("--heartbeat-seconds", type=int, metavar="S", help="default 20")


def _config(options: argparse.Namespace) -> Any:
    from shoal_agent import config

    return config.resolve(vars(options), os.environ)


def _say(text: str) -> None:
    print(text, flush=True)  # noqa: T201


# ---------------------------------------------------------------------------- commands


def _profile(options: argparse.Namespace) -> int:
    from shoal_agent import config, profile

    chosen = config.resolve({"runtimes": options.runtimes}, os.environ).runtimes
    measured = profile.measure(chosen)
    facts = {
        "class": profile.class_of(measured),
        "class_rule_version": profile.CLASS_RULE_VERSION,
        "architecture": measured.architecture,
        "cpu_model": measured.cpu_model,
        "isa_features": list(measured.isa_features),
        "cores": measured.cores,
        "memory_bytes": measured.memory_bytes,
        "accelerators": [
            {"vendor": item.vendor, "kind": item.kind, "name": item.name, "driver": item.driver_version}
            for item in measured.accelerators
        ],
        "runtimes": [
            {"name": item.name, "version": item.version, "providers": list(item.providers)}
            for item in measured.runtimes
        ],
        "os": measured.os,
        "hardware_part": measured.hardware_part,
        "emulated": measured.emulated,
        "ports": _bound_ports(),
        "agent_version": measured.agent_version,
        "features": list(measured.features),
        "python_version": measured.python_version,
    }
    if options.json:
        _say(json.dumps(facts, indent=2))
        return OK
    _say(f"class         {facts['class']}")
    _say(f"cpu           {measured.cpu_model or '?'}, {measured.cores} cores")
    _say(f"isa           {' '.join(measured.isa_features) or 'none that matters'}")
    _say(f"memory        {measured.memory_bytes / 2**30:.1f} GiB")
    accelerators = [f"{item.vendor} {item.kind} {item.name}" for item in measured.accelerators]
    _say(f"accelerators  {', '.join(accelerators) or 'none'}")
    for item in measured.runtimes:
        _say(f"runtime       {item.name} {item.version} ({', '.join(item.providers)})")
    if not measured.runtimes:
        _say("runtime       none: install one with pip install 'shoal[onnxruntime]'")
    _say(f"os            {measured.os}")
    ports = facts["ports"]
    _say(f"ports         {ports or 'none bound: no agent runs here'}")
    return OK


def _bound_ports() -> dict[str, Any]:
    """Ports of the agent that runs on the default state directory, if one does."""
    from shoal_agent import config

    path = config.Paths(config.default_state_dir(os.environ)).runtime / "status.json"
    try:
        return dict(json.loads(path.read_bytes())["ports"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _join(options: argparse.Namespace) -> int:
    import asyncio

    from shoal_agent import joining

    config = _config(options)
    token = joining.read_token(options.token_file, os.environ)
    identity, profile_class = asyncio.run(joining.join(config, token, options.name))
    _say(f"Joined the fleet '{identity.fleet}' as {identity.name or identity.device} ({identity.device}).")
    _say(f"Profile class: {profile_class}")
    if options.run:
        return _run(options)
    _say("Start it with: shoal-agent run")
    return OK


def _run(options: argparse.Namespace) -> int:
    import asyncio

    from shoal_agent import supervisor

    asyncio.run(supervisor.supervise(_config(options)))
    return OK


def _status(options: argparse.Namespace) -> int:
    from shoal_agent import joining

    status = joining.status(_config(options))
    if options.json:
        _say(json.dumps(status, indent=2))
        return OK if status["running"] else FAILED
    _say(f"device      {status['name'] or status['device']} ({status['device']}) of fleet {status['fleet']}")
    _say(f"agent       {'process ' + str(status['pid']) if status['running'] else 'not running'}")
    if not status["running"]:
        _say("            start it with: shoal-agent run")
        return FAILED
    where = f"connected to {status['controller']}" if status["connected"] else "not connected"
    _say(f"controller  {where}")
    if status["last_problem"] and not status["connected"]:
        _say(f"            {status['last_problem']}")
    ports = status["ports"]
    bound = f"http {ports['http']}, grpc {ports['grpc']}, metrics {ports['metrics']}"
    _say(f"ports       {bound} on {ports['host']}")
    for item in status["placements"]:
        _say(
            f"endpoint    {item['endpoint']} ({item['role']}): {item['step']}, "
            f"serving {item['serving'][7:19] or 'nothing'} {item['reason']}".rstrip()
        )
    return OK


def _leave(options: argparse.Namespace) -> int:
    from shoal_agent import joining

    config = _config(options)
    if not options.yes and sys.stdin.isatty():
        answer = input(f"Forget the fleet and remove everything under {config.state_dir}? [y/N] ")
        if answer.strip().lower() not in ("y", "yes"):
            _say("Nothing was changed.")
            return FAILED
    elif not options.yes:
        raise InvalidInput("Leaving removes this device's key.", "Say so with --yes.")
    device = joining.leave(config)
    _say(f"{device} has left. Remove it from the fleet's list with: shoal device remove {device}")
    return OK
