"""Before anything changes: say what will happen, then ask, or refuse where nobody can be asked."""

from __future__ import annotations

import sys

from shoal_controller.cli import output
from shoal_protos.errors import InvalidInput


def confirm(sentence: str, *, yes: bool, dry_run: bool = False) -> None:
    """Says `sentence` and asks on a terminal.

    Raises:
        typer.Exit: a dry run (code 0), or the answer was no (code 1).
        InvalidInput: not a terminal and no `--yes`.
    """
    import typer

    output.say(sentence)
    if dry_run:
        output.say("Nothing was changed (dry run).", "dim")
        raise typer.Exit(0)
    if yes:
        return
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise InvalidInput("This changes the fleet and nobody can be asked here.", "Add --yes to do it.")
    if not typer.confirm("Go on?", default=False, err=True):
        output.say("Nothing was changed.", "dim")
        raise typer.Exit(1)


def devices(count: int) -> str:
    return "1 device" if count == 1 else f"{count:,} devices"
