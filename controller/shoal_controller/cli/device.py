"""`shoal device`: the joined machines."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from shoal_controller.api import schemas
from shoal_controller.cli import changes, device_answers, options, output
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
    Column("marks", lambda d: ", ".join(marks(d))),
    Column("reason", lambda d: d.status_reason),
    Column("labels", lambda d: ",".join(f"{key}={value}" for key, value in sorted(d.labels.items()))),
)

DETAILS = (
    *COLUMNS[:-3],
    *COLUMNS[-2:],
    Column("hardware", lambda d: hardware(d.profile)),
    Column("class_reason", lambda d: d.class_reason),
    Column("emulated", lambda d: "yes: its times are unmeasured (emulated)" if d.emulated else "no"),
    Column("agent_version", lambda d: d.agent_version),
    Column("joined", lambda d: d.joined_ms, "time"),
    Column("temperature_celsius", lambda d: d.temperature_celsius),
    Column("quarantined", lambda d: "yes: serves on, gets no rollout" if d.quarantined else "no"),
    Column("pins", lambda d: ", ".join(f"{e}={v}" for e, v in sorted(d.pins.items()))),
    Column("generation", lambda d: gap(d)),
    Column("placements", lambda d: "; ".join(placement(p) for p in d.placements)),
    Column("causes", lambda d: " ".join(f"({n}) {text}" for n, text in enumerate(d.causes, 1))),
    Column("next_step", lambda d: d.next_step),
)

Device = Annotated[str, typer.Argument(help="Id, name or a unique prefix.")]


def marks(device: schemas.Device) -> list[str]:
    """What is special about a device, a word each."""
    found = {
        "quarantined": device.quarantined,
        "pinned": bool(device.pins),
        "fallback": any(p.fallback for p in device.placements),
        "emulated": device.emulated,
    }
    return [word for word, so in found.items() if so]


def hardware(profile: dict[str, object]) -> str:
    """`Raspberry Pi 5, 4 cores, 8.6 GB, linux 6.12 debian 13`."""
    name = profile.get("hardware_part") or profile.get("cpu_model") or profile.get("architecture")
    memory = int(str(profile.get("memory_bytes") or 0))
    parts = [name, f"{profile['cores']} cores" if profile.get("cores") else ""]
    parts += [output.size(memory) if memory else "", profile.get("os")]
    return ", ".join(str(part) for part in parts if part)


def gap(device: schemas.DeviceDetail) -> str:
    """How far the device is behind what it should have."""
    if device.reported_generation >= device.generation:
        return f"{device.generation}, adopted"
    since = f", published {output.pretty('time', device.desired_ms)}" if device.desired_ms else ""
    return f"{device.reported_generation} of {device.generation}{since}"


def placement(view: schemas.PlacementView) -> str:
    """`digits: int8-onnxruntime (commit)`; what it should have where that differs, and why."""
    serving = view.variant or view.serving[:19] or "nothing yet"
    differs = bool(view.wanted) and view.wanted != serving and not view.serving.startswith(view.wanted)
    notes = [
        f"should have {view.wanted}" if differs else "",
        (view.step or "not reported yet") if view.current else "newer wish not reported yet",
        "fallback" if view.fallback else "",
        "pinned" if view.pinned else "",
        view.reason,
        view.detail,
    ]
    return f"{view.endpoint}: {serving} ({', '.join(note for note in notes if note)})"


@app.command("list")
def list_devices(
    ctx: typer.Context,
    filter: options.Filter = "",
    sort: Annotated[str, typer.Option("--sort", help="A column; -column = descending.")] = "",
    form: options.Format = "",
    columns: options.Columns = "",
    as_json: options.Json = False,
) -> None:
    """Lists devices. Example: shoal device list -l 'status:degraded' or 'is:fallback'"""
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
    """Shows one device, and what to do if it is not well. Example: shoal device get kitchen --json"""
    with connect(ctx) as client:
        found = client.device(device)
    form = output.resolve_form(form, as_json)
    if form != "table":
        output.show_one(found, DETAILS, form=form, as_json=as_json)
        return
    from shoal_controller.cli import device_page

    device_page.show(found)


app.command("logs")(device_answers.logs)
app.command("diagnose")(device_answers.diagnose)
app.command("profile")(device_answers.profile)


# ---------------------------------------------------------------------------- changes


def changed(reason: str, **values: Any) -> schemas.DevicePatch:
    """A patch of just these fields."""
    return schemas.DevicePatch(**(values | ({"reason": reason} if reason else {})))


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
    name: Annotated[str, typer.Option("--name", help="A new name; like `rename`.", hidden=True)] = "",
    dry_run: options.DryRun = False,
    reason: options.Reason = "",
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
        removed = {key: "" for key in present.labels if key not in wanted}
        patch = changed(reason, labels=wanted | removed)
        if name:
            patch.name = name
        answer = client.change_device(present.id, patch)
    if as_json:
        output.print_json(answer)


@app.command("rename")
def rename_device(
    ctx: typer.Context,
    device: Device,
    name: Annotated[str, typer.Argument(help="Lower-case letters, digits, '.', '_' and '-'.")],
    dry_run: options.DryRun = False,
    reason: options.Reason = "",
    as_json: options.Json = False,
) -> None:
    """Gives a device another name; its id stays. Example: shoal device rename d-7kq2 kitchen"""
    with connect(ctx) as client:
        present = client.device(device)
        output.say(f"{present.name} ({present.id}) is called {name} from now on.")
        if dry_run:
            return
        answer = client.change_device(present.id, changed(reason, name=name))
    if as_json:
        output.print_json(answer)


def _act(
    ctx: typer.Context,
    device: str,
    sentence: str,
    done: str,
    patch: schemas.DevicePatch,
    *,
    yes: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Says what happens to one device, asks, does it. `{name}` stands for the device."""
    with connect(ctx) as client:
        present = client.device(device)
        changes.confirm(
            f"{changes.devices(1)}: {sentence.format(name=present.name)}", yes=yes, dry_run=dry_run
        )
        answer = client.change_device(present.id, patch)
    if as_json:
        output.print_json(answer)
    else:
        output.say(done.format(name=present.name))


@app.command("quarantine")
def quarantine_device(
    ctx: typer.Context,
    device: Device,
    yes: options.Yes = False,
    dry_run: options.DryRun = False,
    reason: options.Reason = "",
    as_json: options.Json = False,
) -> None:
    """Leaves a device out of rollouts and verdicts. Example: shoal device quarantine kitchen --yes"""
    _act(
        ctx,
        device,
        "{name} serves on with what it has. It gets no rollout and counts in no verdict, drift or accuracy "
        "until it is released.",
        "{name} is quarantined. `shoal device release {name}` ends that.",
        changed(reason, quarantined=True),
        yes=yes,
        dry_run=dry_run,
        as_json=as_json,
    )


@app.command("release")
def release_device(
    ctx: typer.Context,
    device: Device,
    yes: options.Yes = False,
    dry_run: options.DryRun = False,
    reason: options.Reason = "",
    as_json: options.Json = False,
) -> None:
    """Ends a quarantine. Example: shoal device release kitchen --yes"""
    _act(
        ctx,
        device,
        "{name} follows its endpoints again and switches at once to what they serve now.",
        "{name} is released.",
        changed(reason, quarantined=False),
        yes=yes,
        dry_run=dry_run,
        as_json=as_json,
    )


Endpoint = Annotated[str, typer.Argument(help="Name of the endpoint.")]


@app.command("pin")
def pin_device(
    ctx: typer.Context,
    device: Device,
    endpoint: Endpoint,
    variant: Annotated[str, typer.Argument(help="Id or name of a variant of the endpoint's model.")],
    yes: options.Yes = False,
    dry_run: options.DryRun = False,
    reason: options.Reason = "",
    as_json: options.Json = False,
) -> None:
    """Keeps one variant on a device. Example: shoal device pin kitchen digits k-0004"""
    with connect(ctx) as client:
        pins = client.device(device).pins
    _act(
        ctx,
        device,
        f"{{name}} gets {variant} at '{endpoint}' after its own probe and keeps it; rollouts leave it out.",
        f"{{name}} keeps {variant} at '{endpoint}' until `shoal device unpin {{name}} {endpoint}`.",
        changed(reason, pins={**pins, endpoint: variant}),
        yes=yes,
        dry_run=dry_run,
        as_json=as_json,
    )


@app.command("unpin")
def unpin_device(
    ctx: typer.Context,
    device: Device,
    endpoint: Endpoint,
    yes: options.Yes = False,
    dry_run: options.DryRun = False,
    reason: options.Reason = "",
    as_json: options.Json = False,
) -> None:
    """Lets rollouts decide again. Example: shoal device unpin kitchen digits --yes"""
    with connect(ctx) as client:
        pins = client.device(device).pins
    if endpoint not in pins:
        pinned = ", ".join(f"'{name}'" for name in sorted(pins)) or "nothing"
        raise InvalidInput(f"{device} is not pinned at '{endpoint}'.", f"It is pinned at {pinned}.")
    _act(
        ctx,
        device,
        f"{{name}} switches at once to what '{endpoint}' serves now, and rollouts decide again.",
        f"{{name}} is not pinned at '{endpoint}' any more.",
        changed(reason, pins={k: v for k, v in pins.items() if k != endpoint}),
        yes=yes,
        dry_run=dry_run,
        as_json=as_json,
    )


@app.command("revoke", hidden=True)
@app.command("remove")
def remove_device(
    ctx: typer.Context,
    device: Device,
    yes: options.Yes = False,
    dry_run: options.DryRun = False,
    reason: options.Reason = "",
    as_json: options.Json = False,
) -> None:
    """Takes a device out of the fleet for good. Example: shoal device remove kitchen --reason sold"""
    with connect(ctx) as client:
        present = client.device(device)
        changes.confirm(
            f"{changes.devices(1)}: {present.name} ({present.id}) will be disconnected and refused. It keeps "
            "serving what it has, gets no updates and must join again with a new token.",
            yes=yes,
            dry_run=dry_run,
        )
        removed = client.revoke_device(present.id, reason)
    if as_json:
        output.print_json(removed)
    else:
        output.say(f"{present.name} is removed. Its history stays: shoal event list --object {present.id}")
