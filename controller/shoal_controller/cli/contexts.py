"""`shoal context`: which controller to talk to."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Annotated, Any

import typer

from shoal_controller.cli import options, output
from shoal_controller.cli.connect import config_path, read_config, resolve
from shoal_controller.cli.output import Column
from shoal_protos.errors import NotFound

app = typer.Typer(no_args_is_help=True, help="Which controller to talk to.")

COLUMNS = (
    Column("name", lambda c: c["name"], "id"),
    Column("url", lambda c: c["url"], "id"),
    Column("current", lambda c: "*" if c["current"] else ""),
    Column("token_file", lambda c: c["token_file"]),
)


def write_config(config: Mapping[str, Any]) -> None:
    """Replaces the configuration file; readable by its owner only."""
    lines = [f"current = {json.dumps(config.get('current', ''))}"]
    for name, context in sorted(config.get("contexts", {}).items()):
        lines += ["", f"[contexts.{json.dumps(name)}]"]
        lines += [f"{key} = {json.dumps(value)}" for key, value in context.items() if value]
    path = config_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f"{path.name}.{os.getpid()}")
    with open(os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write("\n".join(lines) + "\n")
    scratch.replace(path)


@app.command("list")
def list_contexts(
    ctx: typer.Context,
    form: options.Format = "",
    columns: options.Columns = "",
    as_json: options.Json = False,
) -> None:
    """Lists contexts and says which controller is used now. Example: shoal context list"""
    config = read_config(config_path())
    rows: list[Any] = [
        {
            "name": name,
            "url": context["url"],
            "current": name == config.get("current"),
            "token_file": context.get("token_file", ""),
        }
        for name, context in sorted(config.get("contexts", {}).items())
    ]
    output.show_many(rows, COLUMNS, form=form, as_json=as_json, names=columns, empty="No context.")
    target = resolve(ctx.find_root().obj or {})
    output.say(f"Now: {target.url} ({target.source})", "dim")


@app.command("add")
def add_context(
    name: Annotated[str, typer.Argument(help="Name of the context.")],
    url: Annotated[str, typer.Argument(help="Address of the controller.")],
    token_file: Annotated[str, typer.Option("--token-file", help="File that holds the token.")] = "",
) -> None:
    """Adds or replaces a context and uses it. Example: shoal context add lab http://127.0.0.1:8080"""
    config = read_config(config_path())
    config.setdefault("contexts", {})[name] = {"url": url, "token_file": token_file}
    config["current"] = name
    write_config(config)
    output.say(f"Using '{name}': {url}")


def _known(config: Mapping[str, Any], name: str) -> None:
    if name not in config.get("contexts", {}):
        raise NotFound(f"There is no context '{name}'.", "`shoal context list` shows them.")


@app.command("use")
def use_context(name: Annotated[str, typer.Argument(help="Name of the context.")]) -> None:
    """Uses a context from now on. Example: shoal context use lab"""
    config = read_config(config_path())
    _known(config, name)
    write_config({**config, "current": name})
    output.say(f"Using '{name}': {config['contexts'][name]['url']}")


@app.command("remove")
def remove_context(name: Annotated[str, typer.Argument(help="Name of the context.")]) -> None:
    """Forgets a context. Example: shoal context remove lab"""
    config = read_config(config_path())
    _known(config, name)
    del config["contexts"][name]
    if config.get("current") == name:
        config["current"] = ""
    write_config(config)
    output.say(f"'{name}' is forgotten.")
