"""`shoal up`: the controller and its worker on this machine."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated

import typer

from shoal_controller.cli import options, output

if TYPE_CHECKING:
    from shoal_controller.settings import Settings

Port = Annotated[int | None, typer.Option(min=0, max=65535, help="0 = any free one.")]


def up(
    home: Annotated[str, typer.Option("--home", help="Data directory [SHOAL_HOME].")] = "",
    fleet: Annotated[str, typer.Option("--fleet", help="Name of a new fleet.")] = "",
    host: Annotated[str, typer.Option("--host", help="Loopback address of API and dashboard.")] = "",
    http_port: Port = None,
    enrolment_port: Port = None,
    agents_port: Port = None,
    lan: Annotated[
        bool | None,
        typer.Option("--lan/--no-lan", help="Open the doors for devices, and only those, to the network."),
    ] = None,
    installer_port: Port = None,
    ui: Annotated[bool | None, typer.Option("--ui/--no-ui", help="Serve the dashboard.")] = None,
    as_json: options.Json = False,
) -> None:
    """Starts the controller and its worker, making what is missing; Ctrl-C stops both.

    Example: shoal up --lan
    """
    from shoal_controller import identity
    from shoal_controller.cli.supervision import StartFailed, Supervisor
    from shoal_controller.settings import Settings, prepare_home

    flags = {
        "home": home or None,
        "fleet": fleet or None,
        "host": host or None,
        "http_port": http_port,
        "enrolment_port": enrolment_port,
        "agents_port": agents_port,
        "installer_port": installer_port,
        "lan": lan,
        "ui": ui,
    }
    settings = Settings.load(flags)
    prepare_home(settings)
    keys = identity.init(settings.home, settings.fleet)
    supervisor = Supervisor(child_environment(settings.home, flags), output.say)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, supervisor.request_stop)
    try:
        ports = supervisor.start()
    except StartFailed as error:
        raise typer.Exit(error.exit_code) from error
    try:
        announce(settings, keys.fleet, ports, as_json)
        supervisor.run()
        output.say("Stopping...")
    finally:
        supervisor.stop()


def child_environment(home: object, flags: Mapping[str, object]) -> dict[str, str]:
    """The flags as the variables that `Settings.load` reads in the children."""
    given = {f"SHOAL_{name.upper()}": str(value) for name, value in flags.items() if value is not None}
    return {**given, "SHOAL_HOME": str(home), "PYTHONUNBUFFERED": os.environ.get("PYTHONUNBUFFERED", "1")}


def announce(settings: Settings, fleet: str, ports: Mapping[str, int], as_json: bool) -> None:
    """Says where everything is and what to do next."""
    from shoal_controller.settings import default_home
    from shoal_protos import __version__

    url, hosts = f"http://{settings.host}:{ports['http']}", told_hosts(settings)
    if as_json:
        output.print_json(
            {"fleet": fleet, "url": url, "home": str(settings.home), "ports": dict(ports), "hosts": hosts},
            indent=None,
        )
        return
    if not output.is_terminal():
        typer.echo(url)
    remote = (
        ""
        if "SHOAL_HOME" not in os.environ and settings.home == default_home()
        else f"SHOAL_HOME={settings.home} "
    )
    output.say(
        f"Shoal {__version__}, fleet '{fleet}'\n"
        f"  dashboard  {url}/ (this machine only)\n"
        f"  devices    {doors(settings, ports, hosts)}\n"
        f"  data       {settings.home}\n\n"
        "Next, in another terminal:\n"
        + "".join(f"  {remote}{line}\n" for line in next_commands(settings))
        + "\nCtrl-C stops the controller and its worker; devices serve on."
    )


def told_hosts(settings: Settings) -> list[str]:
    """What the controller wrote down about how devices reach it, best first."""
    try:
        return list(json.loads(settings.ports_file.read_text())["hosts"])
    except (OSError, ValueError, KeyError, TypeError):
        return [settings.host]


def doors(settings: Settings, ports: Mapping[str, int], hosts: list[str]) -> str:
    if not settings.lan:
        return (
            f"{settings.host} only, ports {ports['enrolment']} (join) and {ports['agents']} (agents); "
            "--lan opens them to the network"
        )
    outside = [host for host in hosts if host not in ("127.0.0.1", "::1")]
    return (
        f"{', '.join(outside or hosts)}\n"
        f"             ports {ports['installer']} (installer), {ports['enrolment']} (join), "
        f"{ports['agents']} (agents), open to the network"
    )


def next_commands(settings: Settings) -> list[str]:
    from shoal_controller import installer, wheels

    first = [installer.FIRST_SET] if settings.lan and not wheels.sets(settings.wheels_dir) else []
    return [
        *first,
        "shoal token create --join --uses 10 --ttl 1h",
        "shoal model push examples/digits.py --serve --wait",
    ]
