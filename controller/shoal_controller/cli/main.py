"""`shoal`: parses the line, loads the one module that it needs, maps errors to exit codes.

Only this file and `catalogue.py` are read for `shoal --help`; a command's module is imported when it is
called, and what talks to a controller never imports the server.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from shoal_controller.cli import catalogue, exits


class LazyGroup(TyperGroup):
    """The root: names come from the catalogue, code from the named module when it is called."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(catalogue.ENTRIES)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        entry = catalogue.ENTRIES.get(cmd_name)
        if entry is None:
            return None
        if cmd_name not in self.commands:
            module = importlib.import_module(f"shoal_controller.cli.{entry.module}")
            self.commands[cmd_name] = as_command(entry, module)
        return self.commands[cmd_name]

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and args[0] not in catalogue.ENTRIES and not args[0].startswith("-"):
            ctx.fail(f"There is no command '{args[0]}'.{suggestion(args[0])}")
        return super().resolve_command(ctx, args)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        formatter.write(catalogue.overview() + "\n")

    def shell_complete(self, ctx: Any, incomplete: str) -> Any:
        from typer._click.shell_completion import CompletionItem

        return [
            CompletionItem(entry.name, help=entry.help)
            for entry in catalogue.ENTRIES.values()
            if entry.name.startswith(incomplete)
        ]


def as_command(entry: catalogue.Entry, module: Any) -> Any:
    """The click command of a catalogue entry: its module's `app`, or one function of it."""
    if not entry.function:
        command: Any = typer.main.get_group(module.app)
    else:
        single = typer.Typer(add_completion=False)
        settings = getattr(module, "CONTEXT_SETTINGS", None)
        single.command(entry.name, context_settings=settings)(getattr(module, entry.function))
        command = typer.main.get_command(single)
    command.name = entry.name
    return command


def suggestion(name: str) -> str:
    """` Did you mean 'rollout'?`, or what lists the commands."""
    from difflib import get_close_matches

    close = get_close_matches(name, catalogue.ENTRIES)
    return f" Did you mean '{close[0]}'?" if close else " `shoal --help` lists them."


def show_version(value: bool) -> None:
    if value:
        from shoal_protos import __version__

        typer.echo(f"shoal {__version__}")
        raise typer.Exit


app = typer.Typer(cls=LazyGroup, no_args_is_help=True, pretty_exceptions_enable=False)


@app.callback()
def root(
    ctx: typer.Context,
    url: Annotated[str, typer.Option("--url", help="Controller to talk to.", envvar="SHOAL_URL")] = "",
    token_file: Annotated[str, typer.Option("--token-file", help="File with the token; - = stdin.")] = "",
    context: Annotated[str, typer.Option("--context", help="A context of the configuration.")] = "",
    home: Annotated[str, typer.Option("--home", help="Data directory of this machine's controller.")] = "",
    no_color: Annotated[bool, typer.Option("--no-color", help="Plain output.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the trace of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Keeps a fleet of edge devices running the best model each of them can run."""
    if no_color:
        os.environ["NO_COLOR"] = "1"
    if home:
        os.environ["SHOAL_HOME"] = home
    ctx.obj = {"url": url, "token_file": token_file, "context": context, "debug": debug}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line and returns its exit code (see `exits`)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        typer.main.get_command(app).main(args=arguments, prog_name="shoal")
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except KeyboardInterrupt:
        return exits.INTERRUPTED
    except Exception as error:
        if "--debug" in arguments or os.environ.get("SHOAL_DEBUG"):
            import traceback

            traceback.print_exception(error)
        return exits.explain(error)
    return exits.OK


if __name__ == "__main__":
    sys.exit(main())
