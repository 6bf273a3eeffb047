"""`shoal controller`: this machine's controller."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from shoal_controller.cli import options, output, wheel_store

app = typer.Typer(no_args_is_help=True, help="This machine's controller.")
app.add_typer(wheel_store.app, name="wheels")


@app.callback()
def group() -> None:
    """This machine's controller."""


@app.command("init")
def init(
    home: Annotated[str, typer.Option("--home", help="Data directory [SHOAL_HOME].")] = "",
    fleet: Annotated[str, typer.Option("--fleet", help="Name of the fleet: letters, digits, dashes.")] = "",
    as_json: options.Json = False,
) -> None:
    """Makes the data directory with a CA and a signing key. Example: shoal controller init --fleet plant-7

    The directory is refused if anybody else can read it. Running it twice keeps what is there.
    """
    from shoal_controller import identity
    from shoal_controller.settings import Settings, prepare_home

    settings = Settings.load({"home": home or os.environ.get("SHOAL_HOME"), "fleet": fleet or None})
    existed = any(settings.identity_dir.glob("*")) if settings.identity_dir.is_dir() else False
    prepare_home(settings)
    keys = identity.init(settings.home, settings.fleet)
    if as_json:
        output.print_json({"home": str(settings.home), "fleet": keys.fleet, "created": not existed})
        return
    verb = "is already there" if existed else "is made"
    output.say(f"The controller of fleet '{keys.fleet}' {verb}: {settings.home}")
    output.say(f"Keep a copy of {Path(settings.identity_dir)}: devices trust what is in it. Next: shoal up")
