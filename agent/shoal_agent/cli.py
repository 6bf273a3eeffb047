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
    except OSError as error:  # a full disk, a file system mounted read-only
        where = f"{error.filename}: " if error.filename else ""
        text = f"shoal-agent: {where}{error.strerror or error}. Look with: shoal-agent doctor"
        print(text, file=sys.stderr)  # noqa: T201
        return FAILED


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

    join = add(
        "join",
        _command("join"),
        f"join a fleet and start the agent; the token comes from a file, ${TOKEN_VARIABLE} or a prompt",
    )
    _token_file(join)
    join.add_argument("--name", help="what people call this device (default: its host name)")
    join.add_argument(
        "--service",
        default="auto",
        choices=("auto", "system", "user", "none"),
        help="what keeps the agent running: a systemd unit of the system or of this user; none = only join "
        "(default auto: the unit that this machine offers, else a process of its own)",
    )
    join.add_argument(
        "--wait", type=float, default=60.0, metavar="S", help="for the first heartbeat, default 60"
    )
    join.add_argument("--prefix", metavar="DIR", help="where the installer put the agent")
    join.add_argument("--run", action="store_true", help="no service: go on as `shoal-agent run`")
    _running(join)

    foreground = add("run", run, "run the agent in the foreground")
    foreground.add_argument("--background", action="store_true", help=argparse.SUPPRESS)
    _running(foreground)

    status = add("status", _status, "show what this device runs")
    status.add_argument("--json", action="store_true", help="print JSON")
    _state_dir(status)

    infer = add("infer", _infer, "ask this device's model about pictures, sounds or .npy arrays")
    infer.add_argument("files", nargs="+", metavar="FILE", help="files, or folders of them")
    infer.add_argument("--model", default="", help="the endpoint; may be left out where there is one")
    infer.add_argument("--top", type=int, default=1, metavar="N", help="so many classes each, default 1")
    infer.add_argument("--address", metavar="HOST:PORT", help="another server (default: this device's agent)")
    infer.add_argument("--json", action="store_true", help="print one JSON object a file")
    _state_dir(infer)

    doctor = add("doctor", _command("doctor"), "say what is wrong here and what to do about it")
    doctor.add_argument("--json", action="store_true", help="print JSON: checks, facts, last transitions")
    _token_file(doctor)
    _state_dir(doctor)

    service = add("service", _command("service"), "start, stop or look at what keeps the agent running")
    service.add_argument("action", choices=("status", "start", "stop", "restart"))
    _state_dir(service)

    leave = add(
        "leave", _command("leave"), "leave the fleet: it shuts this device out, then all is forgotten here"
    )
    leave.add_argument(
        "--purge", action="store_true", help="also remove unit, installation and state directory"
    )
    leave.add_argument("--offline", action="store_true", help="forget the fleet only here, without asking it")
    leave.add_argument("--yes", action="store_true", help="do not ask")
    leave.add_argument("--reason", default="", help="for the fleet's audit log")
    leave.add_argument("--prefix", metavar="DIR", help="where the installer put the agent")
    _state_dir(leave)

    for name, (_, text) in _PROCESSES.items():
        commands.add_parser(name, help=text, add_help=False)
    return parser


def _command(name: str) -> Callable[[argparse.Namespace], int]:
    """A command of `shoal_agent.commands`, imported when it is asked for."""

    def call(options: argparse.Namespace) -> int:
        from shoal_agent import commands

        command: Callable[[argparse.Namespace], int] = getattr(commands, name)
        return command(options)

    return call


def _token_file(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--token-file", metavar="FILE", help="file with the join token, - for standard input")


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


def _infer(options: argparse.Namespace) -> int:
    from shoal_agent import asking

    return asking.infer(options)


def _profile(options: argparse.Namespace) -> int:
    from shoal_agent import config, profile, reporting

    chosen = config.resolve({"runtimes": options.runtimes}, os.environ).runtimes
    measured = profile.measure(chosen)
    facts = {**reporting.profile_json(measured), "ports": _bound_ports()}
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
    from shoal_agent import config, joining

    return joining.written_status(config.Config(config.default_state_dir(os.environ))).get("ports") or {}


def run(options: argparse.Namespace) -> int:
    import asyncio

    from shoal_agent import supervisor

    config = _config(options)
    if getattr(options, "background", False):
        os.chdir("/")  # the directory that it was started from must not be held
    asyncio.run(supervisor.supervise(config, quiet=getattr(options, "background", False)))
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
        _say("            start it with: shoal-agent service start")
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
