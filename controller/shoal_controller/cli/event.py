"""`shoal event`: every change of state, in order."""

from __future__ import annotations

from typing import Annotated

import typer

from shoal_controller.cli import options, output
from shoal_controller.cli.connect import connect
from shoal_controller.cli.output import Column

app = typer.Typer(no_args_is_help=True, help="Every change of state, in order.")

COLUMNS = (
    Column("id", lambda e: e.id, "number"),
    Column("time", lambda e: e.time_ms, "time"),
    Column("actor", lambda e: e.actor, "id"),
    Column("verb", lambda e: e.verb),
    Column("kind", lambda e: e.kind),
    Column("object", lambda e: e.object, "id"),
    Column("reason", lambda e: e.reason),
)


@app.command("list")
def list_events(
    ctx: typer.Context,
    kind: Annotated[str, typer.Option("--kind", help="Only of this kind: device, rollout, ...")] = "",
    object: Annotated[str, typer.Option("--object", help="Only of this object's id.")] = "",
    after: Annotated[int | None, typer.Option("--after", help="Only ids above this one.")] = None,
    limit: Annotated[int, typer.Option("--limit", min=1, help="At most so many.")] = 200,
    form: options.Format = "",
    columns: options.Columns = "",
    as_json: options.Json = False,
) -> None:
    """Lists events. Example: shoal event list --kind rollout --json"""
    with connect(ctx) as client:
        found = client.events(kind, object, after, limit)
    output.show_many(found, COLUMNS, form=form, as_json=as_json, names=columns, empty="No event.")
