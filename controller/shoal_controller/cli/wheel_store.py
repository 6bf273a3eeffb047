"""`shoal controller wheels`: what devices without internet install from, on this machine's disk."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shoal_controller.api import schemas
from shoal_controller.cli import changes, options, output
from shoal_controller.cli.output import Column
from shoal_protos.errors import InvalidInput

if TYPE_CHECKING:
    from shoal_controller.settings import Settings
    from shoal_controller.wheel_closure import Target

app = typer.Typer(no_args_is_help=True, help="Wheels that devices without internet install from.")

PLATFORM, PYTHONS = "aarch64", ("3.11", "3.13")  # Raspberry Pi OS: bookworm, trixie
Home = Annotated[str, typer.Option("--home", help="Data directory [SHOAL_HOME].")]
COLUMNS = (
    Column("name", lambda s: s.name, "id"),
    Column("platform", lambda s: s.platform, "id"),
    Column("python", lambda s: s.python, "id"),
    Column("runtimes", lambda s: ",".join(s.extras)),
    Column("glibc", lambda s: s.glibc, "id"),
    Column("files", lambda s: s.files, "number"),
    Column("size", lambda s: s.size, "bytes"),
    Column("installed", lambda s: s.installed_bytes, "bytes"),
    Column("added", lambda s: s.added_ms, "time"),
)


@app.command("add")
def add(
    platform: Annotated[
        str, typer.Option("--platform", help=f"What `uname -m` says on the devices; default {PLATFORM}.")
    ] = "",
    python: Annotated[
        list[str] | None,
        typer.Option("--python", help=f"Their Python; may be repeated; default {' and '.join(PYTHONS)}."),
    ] = None,
    this_machine: Annotated[bool, typer.Option("--this-machine", help="For machines like this one.")] = False,
    extra: Annotated[
        list[str] | None,
        typer.Option("--extra", help="A runtime: onnxruntime (default), openvino, litert; may be repeated."),
    ] = None,
    folder: Annotated[
        str, typer.Option("--from", help="Take wheels only from this folder.", metavar="DIR")
    ] = "",
    constraint: Annotated[
        list[str] | None, typer.Option("--constraint", help="Such as 'onnxruntime==1.23.2'; may be repeated.")
    ] = None,
    glibc: Annotated[
        str, typer.Option("--glibc", help="The oldest that devices have; default 2.35 (Ubuntu 22.04).")
    ] = "",
    home: Home = "",
    as_json: options.Json = False,
) -> None:
    """Downloads the wheels of an agent. Example: shoal controller wheels add --platform aarch64 --python 3.13

    Run again it goes on where it was interrupted; the present set stays until the new one is whole.
    """
    from shoal_controller import wheels
    from shoal_controller.settings import prepare_home
    from shoal_controller.wheel_pip import Source

    settings = settings_of(home)
    targets = targets_of(platform, python or [], glibc, this_machine)
    prepare_home(settings)
    made = []
    for wanted in targets:
        found = wheels.add(
            settings.wheels_dir,
            wanted,
            extras=extra or wheels.DEFAULT_EXTRAS,
            constraints=constraint or (),
            source=Source(Path(folder).expanduser().absolute() if folder else None),
            say=output.say,
        )
        made.append(schemas.WheelSet(**wheels.facts(found)))
        output.say(
            f"{found.name}: {len(found.files)} wheels, {output.size(found.size)} to send, "
            f"{output.size(found.installed_bytes)} installed, glibc {found.glibc} or newer"
        )
    if as_json:
        output.print_json(made)
    output.say("Next: shoal up --lan, then shoal token create --join")


def targets_of(platform: str, pythons: list[str], glibc: str, this_machine: bool) -> list[Target]:
    """What was asked for, checked, before anything is downloaded."""
    from shoal_controller import wheels

    if this_machine:
        if platform or pythons:
            raise InvalidInput("--this-machine already names platform and Python.", "Leave one of them out.")
        here, python, libc = wheels.this_machine()
        return [wheels.target(here, python, glibc or libc)]
    return [wheels.target(platform or PLATFORM, python, glibc) for python in pythons or PYTHONS]


def settings_of(home: str) -> Settings:
    from shoal_controller.settings import Settings

    return Settings.load({"home": home or os.environ.get("SHOAL_HOME")})


@app.command("list")
def list_sets(
    home: Home = "",
    form: options.Format = "",
    columns: options.Columns = "",
    as_json: options.Json = False,
) -> None:
    """Lists the sets of wheels. Example: shoal controller wheels list"""
    from shoal_controller import wheels

    found = [schemas.WheelSet(**wheels.facts(item)) for item in wheels.sets(settings_of(home).wheels_dir)]
    output.show_many(
        found,
        COLUMNS,
        form=form,
        as_json=as_json,
        names=columns,
        empty="No wheels yet. Add some: shoal controller wheels add --platform aarch64 --python 3.13",
    )


@app.command("remove")
def remove(
    name: Annotated[str, typer.Argument(help="Name of the set, such as aarch64-cp313.")],
    home: Home = "",
    yes: options.Yes = False,
    dry_run: options.DryRun = False,
    as_json: options.Json = False,
) -> None:
    """Removes a set. Example: shoal controller wheels remove aarch64-cp310 --yes

    Join lines that were made with it stop working; devices that joined stay.
    """
    from shoal_controller import wheels

    directory = settings_of(home).wheels_dir
    present = wheels.find_set(directory, name)
    changes.confirm(
        f"The set {name} ({output.size(present.size)}) is removed; join lines made with it stop working. "
        "Devices that joined stay.",
        yes=yes,
        dry_run=dry_run,
    )
    gone = wheels.remove(directory, name)
    if as_json:
        output.print_json([schemas.WheelSet(**wheels.facts(gone))])
    output.say(f"The set {name} is removed.")
