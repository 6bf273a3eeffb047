"""`shoal finding`: what monitoring saw and what the loop does about it."""

from __future__ import annotations

from typing import Annotated

import typer

from shoal_controller.cli import changes, options, output
from shoal_controller.cli.connect import connect
from shoal_controller.cli.output import Column

app = typer.Typer(no_args_is_help=True, help="What monitoring saw.")

COLUMNS = (
    Column("id", lambda f: f.id, "id"),
    Column("kind", lambda f: f.kind),
    Column("state", lambda f: f.state, "status"),
    Column("severity", lambda f: f.severity),
    Column("endpoint", lambda f: f.endpoint, "id"),
    Column("profile_class", lambda f: f.profile_class, "id"),
    Column("opened", lambda f: f.opened_ms, "time"),
    Column("sentence", lambda f: f.sentence),
)

DETAILS = (
    *COLUMNS,
    Column("subject", lambda f: f.subject),
    Column("action", lambda f: f.action.get("sentence") or ""),
    Column("optimization", lambda f: f.action.get("optimization") or "", "id"),
    Column("rollout", lambda f: f.action.get("rollout") or "", "id"),
    Column("closed", lambda f: f.closed_ms, "time"),
    Column("evidence", lambda f: ", ".join(f"{key}={value}" for key, value in f.evidence.items())),
)

Finding = Annotated[str, typer.Argument(help="Id or a unique prefix.")]


@app.command("list")
def list_findings(
    ctx: typer.Context,
    state: Annotated[str, typer.Option("--state", help="open, acting, resolved or dismissed.")] = "",
    form: options.Format = "",
    columns: options.Columns = "",
    as_json: options.Json = False,
) -> None:
    """Lists findings. Example: shoal finding list --state open"""
    with connect(ctx) as client:
        found = client.findings(state)
    output.show_many(found, COLUMNS, form=form, as_json=as_json, names=columns, empty="No finding.")


@app.command("get")
def get_finding(
    ctx: typer.Context, finding: Finding, form: options.Format = "", as_json: options.Json = False
) -> None:
    """Shows one finding with its evidence. Example: shoal finding get f-0001"""
    with connect(ctx) as client:
        found = client.finding(finding)
    output.show_one(found, DETAILS, form=form, as_json=as_json)


@app.command("dismiss")
def dismiss_finding(
    ctx: typer.Context,
    finding: Finding,
    yes: options.Yes = False,
    dry_run: options.DryRun = False,
    reason: options.Reason = "",
    as_json: options.Json = False,
) -> None:
    """Closes a finding without acting. Example: shoal finding dismiss f-0001 --yes --reason 'known'"""
    with connect(ctx) as client:
        present = client.finding(finding)
        changes.confirm(f"{present.id} will be closed: {present.sentence}", yes=yes, dry_run=dry_run)
        dismissed = client.dismiss_finding(present.id, reason)
    if as_json:
        output.print_json(dismissed)
    else:
        output.say(f"{dismissed.id} is {dismissed.state}.")
