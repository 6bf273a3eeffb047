"""`shoal rollout`: moves an endpoint from one assignment to the next, in waves that stop by themselves."""

from __future__ import annotations

from typing import Annotated

import typer

from shoal_controller.api import schemas
from shoal_controller.cli import changes, exits, options, output, rollout_tree
from shoal_controller.cli.connect import connect
from shoal_controller.cli.output import Column
from shoal_controller.cli.watching import Watched, watch
from shoal_controller.client import Client
from shoal_protos.errors import InvalidInput

app = typer.Typer(no_args_is_help=True, help="Moves in waves that stop by themselves.")

ENDED = ("promoted", "rolled_back", "aborted")
EXIT_CODES = {"promoted": exits.OK, "rolled_back": exits.STOPPED, "aborted": exits.STOPPED}

COLUMNS = (
    Column("id", lambda r: r.id, "id"),
    Column("endpoint", lambda r: r.endpoint, "id"),
    Column("change", lambda r: f"{r.from_label or 'nothing'} -> {r.to_label}"),
    Column("state", lambda r: r.state, "status"),
    Column("waves", lambda r: rollout_tree.dots(r.waves)),
    Column("devices", lambda r: f"{sum(w.switched for w in r.waves)}/{sum(w.devices for w in r.waves)}"),
    Column("created", lambda r: r.created_ms, "time"),
    Column("by", lambda r: r.actor),
    Column("sentence", lambda r: r.sentence),
)

Rollout = Annotated[str, typer.Argument(help="Id or a unique prefix.")]


@app.command("list")
def list_rollouts(
    ctx: typer.Context,
    form: options.Format = "",
    columns: options.Columns = "",
    as_json: options.Json = False,
) -> None:
    """Lists rollouts. Example: shoal rollout list"""
    with connect(ctx) as client:
        found = client.rollouts()
    empty = "No rollout. Start one: shoal rollout create ENDPOINT"
    output.show_many(found, COLUMNS, form=form, as_json=as_json, names=columns, empty=empty)


@app.command("get")
def get_rollout(
    ctx: typer.Context,
    rollout: Rollout,
    watch: options.Watch = False,
    timeout: options.Timeout = "",
    form: options.Format = "",
    as_json: options.Json = False,
) -> None:
    """Shows one rollout as a tree, with -w until it ends (code 5 when it rolled back).

    Example: shoal rollout get r-0002 -w --timeout 30m
    """
    form = output.resolve_form(form, as_json)
    with connect(ctx) as client:
        if watch:
            raise typer.Exit(EXIT_CODES[follow(client, rollout, form, timeout).state])
        found = client.rollout(rollout)
    if form == "table":
        output.stdout().print(rollout_tree.tree(found))
    elif form == "tsv":
        output.print_tsv(found.waves, rollout_tree.WAVE_COLUMNS)
    else:
        output.show_one(found, COLUMNS, form=form)


def follow(client: Client, rollout: str, form: str, timeout: str) -> schemas.Rollout:
    """Watches a rollout to its end."""
    watched = Watched(
        fetch=lambda: client.rollout(rollout),
        ended=lambda item: item.state in ENDED,
        draw=rollout_tree.tree,
        line=rollout_tree.line,
    )
    return watch(watched, form=form, timeout=timeout)


def parse_choice(pairs: list[str]) -> dict[str, str] | None:
    """`CLASS=VARIANT` per class; None when nothing was given."""
    choice = {}
    for pair in pairs:
        name, equals, variant = pair.partition("=")
        if not (name and equals and variant):
            raise InvalidInput(f"'{pair}' is not a choice.", "Write CLASS=VARIANT.")
        choice[name] = variant
    return choice or None


@app.command("create")
def create_rollout(
    ctx: typer.Context,
    endpoint: Annotated[str, typer.Argument(help="Name of the endpoint.")],
    release: Annotated[str, typer.Option("--release", help="Release; default: the model's newest.")] = "",
    choice: Annotated[
        list[str] | None, typer.Option("--choice", help="CLASS=VARIANT; default: best by the objective.")
    ] = None,
    waves: Annotated[
        str, typer.Option("--waves", help="Sizes: counts or per cent, the last 100%.")
    ] = "1,25%,100%",
    watch: options.Watch = False,
    timeout: options.Timeout = "",
    yes: options.Yes = False,
    dry_run: options.DryRun = False,
    reason: options.Reason = "",
    form: options.Format = "",
    as_json: options.Json = False,
) -> None:
    """Moves an endpoint to a release, wave by wave. Example: shoal rollout create digits --waves 1,100% -w"""
    wanted = schemas.RolloutCreate(
        endpoint=endpoint,
        release=release,
        choice=parse_choice(choice or []),
        waves=[wave.strip() for wave in waves.split(",") if wave.strip()],
        reason=reason,
        dry_run=True,
    )
    with connect(ctx) as client:
        plan = client.create_rollout(wanted)
        sizes = ", ".join(f"{wave.name}: {wave.devices}" for wave in plan.waves)
        count = sum(wave.devices for wave in plan.waves)
        changes.confirm(
            f"'{endpoint}' moves from {plan.from_label or 'nothing'} to {plan.to_label} on "
            f"{changes.devices(count)} in {len(plan.waves)} wave(s) ({sizes}). Devices serve on while they "
            "switch; a stop brings all back.",
            yes=yes,
            dry_run=dry_run and not as_json,
        )
        if dry_run:
            output.print_json(plan)
            return
        started = client.create_rollout(wanted.model_copy(update={"dry_run": False}))
        if watch:
            form = output.resolve_form(form, as_json)
            raise typer.Exit(EXIT_CODES[follow(client, started.id, form, timeout).state])
    if as_json:
        output.print_json(started)
    else:
        typer.echo(started.id)


def steer(
    ctx: typer.Context,
    rollout: str,
    verb: str,
    sentence: str,
    *,
    yes: bool,
    dry_run: bool,
    reason: str,
    as_json: bool,
) -> None:
    """Says what a verb will do to how many devices, then does it."""
    with connect(ctx) as client:
        present = client.rollout(rollout)
        total = sum(wave.devices for wave in present.waves)
        moved = sum(wave.switched for wave in present.waves)
        text = sentence.format(
            id=present.id,
            moved=changes.devices(moved),
            rest=changes.devices(total - moved),
            origin=present.from_label or "nothing",
        )
        changes.confirm(text, yes=yes, dry_run=dry_run)
        changed = client.steer_rollout(present.id, verb, reason)
    if as_json:
        output.print_json(changed)
    else:
        output.say(f"{changed.id} is {changed.state}. {changed.sentence}")


@app.command("pause")
def pause_rollout(
    ctx: typer.Context,
    rollout: Rollout,
    yes: options.Yes = False,
    dry_run: options.DryRun = False,
    reason: options.Reason = "",
    as_json: options.Json = False,
) -> None:
    """Starts no further wave. Example: shoal rollout pause r-0002 --yes --reason 'fair on site'"""
    sentence = "{id} starts no further wave: {moved} stay on the new assignment, {rest} on {origin}."
    steer(ctx, rollout, "pause", sentence, yes=yes, dry_run=dry_run, reason=reason, as_json=as_json)


@app.command("resume")
def resume_rollout(
    ctx: typer.Context,
    rollout: Rollout,
    yes: options.Yes = False,
    dry_run: options.DryRun = False,
    reason: options.Reason = "",
    as_json: options.Json = False,
) -> None:
    """Goes on after a pause. Example: shoal rollout resume r-0002 --yes"""
    sentence = "{id} goes on: {rest} are still to move."
    steer(ctx, rollout, "resume", sentence, yes=yes, dry_run=dry_run, reason=reason, as_json=as_json)


@app.command("abort")
def abort_rollout(
    ctx: typer.Context,
    rollout: Rollout,
    yes: options.Yes = False,
    dry_run: options.DryRun = False,
    reason: options.Reason = "",
    as_json: options.Json = False,
) -> None:
    """Brings every device back. Example: shoal rollout abort r-0002 --yes --reason 'wrong release'"""
    sentence = "{id} ends: {moved} go back to {origin}, also offline ones when they return."
    steer(ctx, rollout, "abort", sentence, yes=yes, dry_run=dry_run, reason=reason, as_json=as_json)


@app.command("promote")
def promote_rollout(
    ctx: typer.Context,
    rollout: Rollout,
    yes: options.Yes = False,
    dry_run: options.DryRun = False,
    reason: options.Reason = "",
    as_json: options.Json = False,
) -> None:
    """Moves the rest now, without waiting for verdicts. Example: shoal rollout promote r-0002 --yes"""
    sentence = "{id} is promoted now: {rest} move at once, without waiting for verdicts."
    steer(ctx, rollout, "promote", sentence, yes=yes, dry_run=dry_run, reason=reason, as_json=as_json)
