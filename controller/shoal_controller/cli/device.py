"""`shoal device`: the joined machines."""

from __future__ import annotations

from typing import Annotated

import typer

from shoal_controller.api import schemas
from shoal_controller.cli import changes, options, output
from shoal_controller.cli.connect import connect
from shoal_controller.cli.output import Column
from shoal_protos.errors import InvalidInput

app = typer.Typer(no_args_is_help=True, help="Joined machines.")

COLUMNS = (
    Column("name", lambda d: d.name, "id"),
    Column("id", lambda d: d.id, "id"),
    Column("status", lambda d: d.status, "status"),
    Column("profile_class", lambda d: d.profile_class, "id"),
    Column("version", lambda d: d.version),
    Column("p95_ms", lambda d: d.p95_ms, "ms"),
    Column("last_seen", lambda d: d.last_seen_ms, "time"),
    Column("reason", lambda d: d.status_reason),
    Column("labels", lambda d: ",".join(f"{key}={value}" for key, value in sorted(d.labels.items()))),
)

DETAILS = (
    *COLUMNS,
    Column("class_reason", lambda d: d.class_reason),
    Column("agent_version", lambda d: d.agent_version),
    Column("joined", lambda d: d.joined_ms, "time"),
    Column("generation", lambda d: f"{d.reported_generation} of {d.generation}"),
    Column("temperature_celsius", lambda d: d.temperature_celsius),
    Column("placements", lambda d: "; ".join(placement(p) for p in d.placements)),
)

Device = Annotated[str, typer.Argument(help="Id, name or a unique prefix.")]


def placement(view: schemas.PlacementView) -> str:
    """`digits: int8-onnxruntime (commit)`, with the reason where it failed and `fallback` where it is one."""
    notes = [view.step, *(["fallback"] if view.fallback else []), *([view.reason] if view.reason else [])]
    return f"{view.endpoint}: {view.variant or view.serving[:19] or 'nothing yet'} ({', '.join(notes)})"


@app.command("list")
def list_devices(
    ctx: typer.Context,
    filter: options.Filter = "",
    sort: Annotated[str, typer.Option("--sort", help="A column; -column = descending.")] = "",
    form: options.Format = "",
    columns: options.Columns = "",
    as_json: options.Json = False,
) -> None:
    """Lists devices. Example: shoal device list -l 'status:degraded'"""
    with connect(ctx) as client:
        found = client.all_devices(filter, sort)
    page = schemas.Page[schemas.Device](items=found, total=len(found))
    output.show_many(
        found,
        COLUMNS,
        form=form,
        as_json=as_json,
        names=columns,
        document=page,
        empty="No device." + ("" if filter else " `shoal token create --join` prints what a device needs."),
    )


@app.command("get")
def get_device(
    ctx: typer.Context, device: Device, form: options.Format = "", as_json: options.Json = False
) -> None:
    """Shows one device. Example: shoal device get kitchen --json"""
    with connect(ctx) as client:
        found = client.device(device)
    output.show_one(found, DETAILS, form=form, as_json=as_json)
    if output.resolve_form(form, as_json) == "table" and found.logs:
        output.say(f"\nLast logs:\n{found.logs[-2000:]}", "dim")


def parse_labels(pairs: list[str], present: dict[str, str]) -> dict[str, str]:
    """Applies `key=value` and `key-` (remove) to the present labels.

    Raises:
        InvalidInput: anything else.
    """
    labels = dict(present)
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if equals and key:
            labels[key] = value
        elif pair.endswith("-") and len(pair) > 1:
            labels.pop(pair[:-1], None)
        else:
            raise InvalidInput(f"'{pair}' is not a label.", "Write key=value to set one, key- to remove one.")
    return labels


@app.command("label")
def label_device(
    ctx: typer.Context,
    device: Device,
    labels: Annotated[list[str], typer.Argument(help="key=value sets, key- removes.")],
    name: Annotated[str, typer.Option("--name", help="A new name for the device.")] = "",
    dry_run: options.DryRun = False,
    as_json: options.Json = False,
) -> None:
    """Changes labels. Example: shoal device label kitchen site=lab room-"""
    with connect(ctx) as client:
        present = client.device(device)
        wanted = parse_labels(labels, present.labels)
        shown = ", ".join(f"{key}={value}" for key, value in sorted(wanted.items())) or "none"
        output.say(f"Labels of {present.name}: {shown}")
        if dry_run:
            return
        patch = schemas.DevicePatch(labels=wanted, **({"name": name} if name else {}))
        changed = client.change_device(present.id, patch)
    if as_json:
        output.print_json(changed)


@app.command("revoke")
def revoke_device(
    ctx: typer.Context,
    device: Device,
    yes: options.Yes = False,
    dry_run: options.DryRun = False,
    reason: options.Reason = "",
    as_json: options.Json = False,
) -> None:
    """Refuses a device's certificate from now on; it must join again. Example: shoal device revoke kitchen"""
    with connect(ctx) as client:
        present = client.device(device)
        changes.confirm(
            f"{present.name} ({present.id}) will be disconnected and refused. It keeps serving what it has, "
            "gets no updates and must join again with a new token.",
            yes=yes,
            dry_run=dry_run,
        )
        revoked = client.revoke_device(present.id, reason)
    if as_json:
        output.print_json(revoked)
    else:
        output.say(f"{present.name} is revoked.")
