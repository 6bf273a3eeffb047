"""`shoal optimization`: searches for better variants."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from shoal_controller.api import schemas
from shoal_controller.cli import changes, options, output, progress
from shoal_controller.cli.connect import connect
from shoal_controller.cli.output import Column

app = typer.Typer(no_args_is_help=True, help="Searches for better variants.")

COLUMNS = (
    Column("id", lambda o: o.id, "id"),
    Column("kind", lambda o: o.kind),
    Column("model", lambda o: o.model, "id"),
    Column("version", lambda o: o.version, "number"),
    Column("state", lambda o: o.state, "status"),
    Column("step", lambda o: (o.progress or {}).get("step") or ""),
    Column("release", lambda o: o.release, "id"),
    Column("created", lambda o: o.created_ms, "time"),
    Column("objective", lambda o: o.error or o.objective),
)

Optimization = Annotated[str, typer.Argument(help="Id or a unique prefix.")]


@app.command("list")
def list_optimizations(
    ctx: typer.Context,
    form: options.Format = "",
    columns: options.Columns = "",
    as_json: options.Json = False,
) -> None:
    """Lists optimizations. Example: shoal optimization list --columns id,state"""
    with connect(ctx) as client:
        found = client.optimizations()
    empty = "No optimization. Start one: shoal optimization start digits"
    output.show_many(found, COLUMNS, form=form, as_json=as_json, names=columns, empty=empty)


@app.command("start")
def start_optimization(
    ctx: typer.Context,
    model: Annotated[str, typer.Argument(help="Name of the model.")],
    version: Annotated[
        int | None, typer.Option("--version", help="Version; default: the latest ready.")
    ] = None,
    objective: Annotated[
        str, typer.Option("--objective", help='"accuracy>=0.97, latency_p95<=5ms; minimise size".')
    ] = "",
    endpoint: Annotated[str, typer.Option("--endpoint", help="Take the objective of this endpoint.")] = "",
    classes: Annotated[
        list[str] | None, typer.Option("--class", help="Only for this profile class; repeatable.")
    ] = None,
    minutes: Annotated[float, typer.Option("--minutes", help="Time the search may take.", min=0.1)] = 3.0,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the search.")] = 0,
    watch: options.Watch = False,
    timeout: options.Timeout = "",
    dry_run: options.DryRun = False,
    form: options.Format = "",
    as_json: options.Json = False,
) -> None:
    """Queues a search for each class of the fleet. Example: shoal optimization start digits -w"""
    wanted = schemas.OptimizationCreate(
        model=model,
        version=version,
        objective=objective,
        endpoint=endpoint,
        classes=classes or None,
        minutes=minutes,
        seed=seed,
    )
    with connect(ctx) as client:
        names = classes or [summary.name for summary in client.classes()]
        output.say(
            f"A search of {minutes:g} min for {model} on {len(names)} class(es): {', '.join(names) or '-'}."
        )
        if dry_run:
            return
        started = client.start_optimization(wanted)
        if watch:
            form = output.resolve_form(form, as_json)
            ended = progress.follow_optimization(client, started.id, form=form, timeout=timeout)
            raise typer.Exit(progress.EXIT_CODES[ended.state])
    if as_json:
        output.print_json(started)
    else:
        typer.echo(started.id)


@app.command("get")
def get_optimization(
    ctx: typer.Context,
    optimization: Optimization,
    watch: options.Watch = False,
    timeout: options.Timeout = "",
    form: options.Format = "",
    as_json: options.Json = False,
) -> None:
    """Shows one optimization, with -w until it ends. Example: shoal optimization get o-0002 -w"""
    form = output.resolve_form(form, as_json)
    with connect(ctx) as client:
        if watch:
            ended = progress.follow_optimization(client, optimization, form=form, timeout=timeout)
            raise typer.Exit(progress.EXIT_CODES[ended.state])
        found = client.optimization(optimization)
    if form == "table":
        output.stdout().print(progress.tree(found))
    else:
        output.show_one(found, COLUMNS, form=form)


@app.command("cancel")
def cancel_optimization(
    ctx: typer.Context,
    optimization: Optimization,
    yes: options.Yes = False,
    dry_run: options.DryRun = False,
    as_json: options.Json = False,
) -> None:
    """Stops a search; what it found so far stays. Example: shoal optimization cancel o-0002 --yes"""
    with connect(ctx) as client:
        found = client.optimization(optimization)
        changes.confirm(
            f"{found.id} ({found.kind} of {found.model} v{found.version}, {found.state}) will stop. "
            "No device changes.",
            yes=yes,
            dry_run=dry_run,
        )
        cancelled = client.cancel_optimization(found.id)
    if as_json:
        output.print_json(cancelled)
    else:
        output.say(f"{cancelled.id} is {cancelled.state}.")


@app.command("report")
def report_optimization(
    ctx: typer.Context,
    optimization: Optimization,
    out: Annotated[str, typer.Option("--out", help="Write the HTML page here; - = standard output.")] = "",
) -> None:
    """Fetches the report, one HTML page. Example: shoal optimization report o-0002 --out report.html"""
    with connect(ctx) as client:
        page = client.report(optimization)
    if out == "-" or (not out and not output.is_terminal()):
        typer.echo(page, nl=False)
        return
    path = Path(out or f"{optimization}.html")
    path.write_text(page)
    output.say(f"The report is in {path} ({output.size(len(page.encode()))}).")
