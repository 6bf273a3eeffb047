"""`shoal story`: the loop so far, one paragraph a step."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from shoal_controller.cli import options, output
from shoal_controller.cli.connect import connect
from shoal_controller.cli.output import Column

COLUMNS = (
    Column("time", lambda s: s.time_ms, "time"),
    Column("kind", lambda s: s.kind),
    Column("actor", lambda s: s.actor, "id"),
    Column("title", lambda s: s.title),
    Column("text", lambda s: s.text),
)


def story(
    ctx: typer.Context,
    endpoint: Annotated[str, typer.Argument(help="Only of this endpoint.")] = "",
    form: options.Format = "",
    as_json: options.Json = False,
) -> None:
    """Tells the loop so far. Example: shoal story digits"""
    with connect(ctx) as client:
        found = client.story(endpoint)
    if output.resolve_form(form, as_json) != "table":
        output.show_many(found, COLUMNS, form=form, as_json=as_json)
        return
    console = output.stdout()
    if not found:
        output.say("Nothing to tell yet: a finding, an optimization or a rollout begins a story.")
    for item in found:
        moment = time.strftime("%H:%M:%S", time.localtime(item.time_ms / 1000))
        console.print(f"[dim]{moment}[/dim]  [bold]{item.title}[/bold]  [dim]{item.actor}[/dim]")
        console.print(f"          {item.text}", markup=False)
