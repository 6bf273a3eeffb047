"""`shoal model`: pushed models and their versions."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shoal_controller.cli import options, output, packing, progress, pushed
from shoal_controller.cli.connect import connect
from shoal_controller.cli.output import Column
from shoal_protos.errors import ShoalError

if TYPE_CHECKING:
    from shoal_controller.api import schemas
    from shoal_controller.client import Client

app = typer.Typer(no_args_is_help=True, help="Pushed models and their versions.")

COLUMNS = (
    Column("name", lambda m: m.name, "id"),
    Column("state", lambda m: m.state, "status"),
    Column("versions", lambda m: m.versions, "number"),
    Column("latest", lambda m: m.latest, "number"),
    Column("accuracy", lambda m: m.accuracy.value if m.accuracy else None, "points"),
    Column("variants", lambda m: m.variants, "number"),
    Column("endpoints", lambda m: ",".join(m.endpoints)),
    Column("findings_open", lambda m: m.findings_open, "number"),
    Column("created", lambda m: m.created_ms, "time"),
    Column("id", lambda m: m.id, "id"),
)

VERSION_COLUMNS = (
    Column("version", lambda v: v.number, "number"),
    Column("state", lambda v: v.state, "status"),
    Column("baseline", lambda v: v.baseline.value if v.baseline else None, "points"),
    Column("metric", lambda v: v.metric),
    Column("from", lambda v: v.parent),
    Column("created", lambda v: v.created_ms, "time"),
    Column("note", lambda v: v.error or v.note),
)


@app.command("list")
def list_models(
    ctx: typer.Context,
    form: options.Format = "",
    columns: options.Columns = "",
    as_json: options.Json = False,
) -> None:
    """Lists models. Example: shoal model list -o name"""
    with connect(ctx) as client:
        found = client.models()
    empty = "No model. Push one: shoal model push examples/digits.py --serve --wait"
    output.show_many(found, COLUMNS, form=form, as_json=as_json, names=columns, empty=empty)


@app.command("get")
def get_model(
    ctx: typer.Context,
    name: Annotated[str, typer.Argument(help="Name, id or a unique prefix.")],
    form: options.Format = "",
    as_json: options.Json = False,
) -> None:
    """Shows one model and its versions. Example: shoal model get digits"""
    with connect(ctx) as client:
        found = client.model(name)
    if output.resolve_form(form, as_json) == "table":
        output.show_one(found, COLUMNS, form="table")
        output.stdout().print()
        output.stdout().print(output.table(found.version_list, VERSION_COLUMNS))
    elif output.resolve_form(form, as_json) == "tsv":
        output.print_tsv(found.version_list, VERSION_COLUMNS)
    else:
        output.show_one(found, COLUMNS, form=form, as_json=as_json)


@app.command("push")
def push_model(
    ctx: typer.Context,
    task: Annotated[Path, typer.Argument(help="The task file; what its `files` names travels with it.")],
    name: Annotated[str, typer.Option("--name", help="Name of the model; default: the file's.")] = "",
    extra: Annotated[
        list[str] | None, typer.Option("--with", help="One more file of the task's folder; repeatable.")
    ] = None,
    note: Annotated[str, typer.Option("--note", help="What is new in this version.")] = "",
    serve: Annotated[
        bool,
        typer.Option("--serve", help="Also make an endpoint of that name, unless the model has one."),
    ] = False,
    wait: Annotated[
        bool,
        typer.Option("--wait", help="Wait until it was imported, and with an endpoint until it is served."),
    ] = False,
    timeout: options.Timeout = "",
    dry_run: options.DryRun = False,
    as_json: options.Json = False,
) -> None:
    """Uploads a task as the next version of a model.

    An interrupted upload goes on where it stopped when the same command is given again.

    Example: shoal model push examples/digits.py --serve --wait
    """
    name = name or task.stem
    with tempfile.TemporaryDirectory(prefix="shoal-push-") as scratch:
        source = Path(scratch) / f"{task.stem}.tar"
        files = packing.pack(task, source, extra or [])
        total = source.stat().st_size
        output.say(f"Pushing {', '.join(files)} ({output.size(total)}) as the next version of '{name}'.")
        if dry_run:
            return
        with connect(ctx) as client:
            version = _send(client, name, source, note)
            if serve:
                pushed.serve(client, version.model or name)
            if wait:
                output.say(f"{name} v{version.number} is here; importing it, then its baseline.")
                version = wait_for_version(
                    client, version.model or name, version.number, version.optimization, timeout
                )
            _tell(client, name, version, wait, as_json)


def _send(client: Client, name: str, source: Path, note: str) -> schemas.Version:
    try:
        with progress.upload() as show:
            return client.push(name, source, note, show)
    except KeyboardInterrupt:
        output.say("Stopped. What arrived is kept for a day: the same command goes on from there.")
        raise


def _tell(client: Client, name: str, version: schemas.Version, waited: bool, as_json: bool) -> None:
    if as_json:
        output.print_json(version)
        return
    value = version.baseline.value if version.baseline else None
    figure = f", {version.metric or 'baseline'} {value:.4f}" if value is not None else ""
    output.say(f"{name} v{version.number} is {version.state}{figure}.")
    if waited:
        pushed.report(client, version)
    else:
        output.say(f"Follow it: shoal optimization get {version.optimization} -w")


def wait_for_version(client: Client, model: str, number: int, job: str, timeout: str) -> schemas.Version:
    """Follows the ingest job, then returns the version.

    Raises:
        ShoalError: the version failed; the message is the task's own error and what to do.
    """
    if job:
        progress.follow_optimization(client, job, form="progress", timeout=timeout)
    version = client.version(model, number)
    if version.state == "failed":
        raise ShoalError(
            f"{model} v{number} failed: {version.error}", "Mend the task file and push it again."
        )
    return version
