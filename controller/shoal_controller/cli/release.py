"""`shoal release`: one version's variants, class by class, ready to roll out."""

from __future__ import annotations

from typing import Annotated

import typer

from shoal_controller.api import schemas
from shoal_controller.cli import options, output
from shoal_controller.cli.connect import connect
from shoal_controller.cli.output import Column
from shoal_protos.errors import InvalidInput

app = typer.Typer(no_args_is_help=True, help="Variants per class, ready to roll out.")

COLUMNS = (
    Column("id", lambda r: r.id, "id"),
    Column("model", lambda r: r.model, "id"),
    Column("version", lambda r: r.version, "number"),
    Column("number", lambda r: r.number, "number"),
    Column("classes", lambda r: len(r.fronts), "number"),
    Column("created", lambda r: r.created_ms, "time"),
    Column("note", lambda r: r.note),
)


@app.command("list")
def list_releases(
    ctx: typer.Context,
    model: Annotated[str, typer.Option("--model", help="Only of this model.")] = "",
    form: options.Format = "",
    columns: options.Columns = "",
    as_json: options.Json = False,
) -> None:
    """Lists releases. Example: shoal release list --model digits"""
    with connect(ctx) as client:
        found = client.releases(model)
    output.show_many(found, COLUMNS, form=form, as_json=as_json, names=columns, empty="No release yet.")


@app.command("get")
def get_release(
    ctx: typer.Context,
    release: Annotated[str, typer.Argument(help="Id or a unique prefix.")],
    form: options.Format = "",
    as_json: options.Json = False,
) -> None:
    """Shows the front of each class, best choice first. Example: shoal release get l-0002"""
    with connect(ctx) as client:
        found = client.release(release)
    output.show_one(found, COLUMNS, form=form, as_json=as_json)
    if output.resolve_form(form, as_json) == "table":
        for name, front in sorted(found.fronts.items()):
            output.stdout().print(f"  {name}  {' > '.join(front)}", markup=False)


def parse_fronts(pairs: list[str]) -> dict[str, list[str]] | None:
    """`CLASS=k-0001,k-0002` per class; None when nothing was given."""
    fronts: dict[str, list[str]] = {}
    for pair in pairs:
        name, equals, variants = pair.partition("=")
        if not (name and equals and variants):
            raise InvalidInput(
                f"'{pair}' is not a front.", "Write CLASS=VARIANT,VARIANT with the best first."
            )
        fronts[name] = [variant.strip() for variant in variants.split(",")]
    return fronts or None


@app.command("create")
def create_release(
    ctx: typer.Context,
    model: Annotated[str, typer.Argument(help="Name of the model.")],
    version: Annotated[int | None, typer.Option("--version", help="Version; default: the latest.")] = None,
    front: Annotated[
        list[str] | None, typer.Option("--front", help="CLASS=VARIANT,VARIANT; default: the best known.")
    ] = None,
    note: Annotated[str, typer.Option("--note", help="Shown in lists.")] = "",
    dry_run: options.DryRun = False,
    as_json: options.Json = False,
) -> None:
    """Makes a release of a version's variants. Example: shoal release create digits --version 1"""
    fronts = parse_fronts(front or [])
    with connect(ctx) as client:
        number = version if version is not None else client.model(model).latest
        what = "the best known front of each class" if fronts is None else f"{len(fronts)} class(es)"
        output.say(f"A new release of {model} v{number} with {what}. No device changes before a rollout.")
        if dry_run:
            return
        wanted = schemas.ReleaseCreate(model=model, version=number, fronts=fronts, note=note)
        created = client.create_release(wanted)
    if as_json:
        output.print_json(created)
    else:
        typer.echo(created.id)
