"""`shoal endpoint`: the names that applications call."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from shoal_controller.api import schemas
from shoal_controller.cli import changes, durations, options, output
from shoal_controller.cli.connect import connect
from shoal_controller.cli.output import Column

app = typer.Typer(no_args_is_help=True, help="Names that applications call.")

COLUMNS = (
    Column("name", lambda e: e.name, "id"),
    Column("model", lambda e: e.model, "id"),
    Column("version", lambda e: e.version, "number"),
    Column("devices", lambda e: e.devices, "number"),
    Column("p50_ms", lambda e: e.p50_ms, "ms"),
    Column("p95_ms", lambda e: e.p95_ms, "ms"),
    Column("error_share", lambda e: e.error_share, "points"),
    Column("accuracy", lambda e: e.accuracy.value if e.accuracy else None, "points"),
    Column("rollout", lambda e: e.rollout, "id"),
    Column("objective", lambda e: e.objective),
)

DETAILS = (
    *COLUMNS,
    Column("id", lambda e: e.id, "id"),
    Column("filter", lambda e: e.filter or "every device"),
    Column("release", lambda e: e.release, "id"),
    Column("choice", lambda e: "; ".join(f"{name}: {variant}" for name, variant in sorted(e.choice.items()))),
    Column("settings", lambda e: ", ".join(f"{key}={value}" for key, value in sorted(e.settings.items()))),
    Column("requests_per_s", lambda e: round(e.requests_per_s, 2), "number"),
    Column("created", lambda e: e.created_ms, "time"),
)

Name = Annotated[str, typer.Argument(help="Name of the endpoint.")]
Sampling = Annotated[
    float | None,
    typer.Option(
        "--sampling-share", min=0, max=1, help="Share of inputs that may leave a device (0 = none)."
    ),
]
Settle = Annotated[
    str, typer.Option("--settle", help="Real traffic within limits for so long before a switch is final.")
]


@app.command("list")
def list_endpoints(
    ctx: typer.Context,
    form: options.Format = "",
    columns: options.Columns = "",
    as_json: options.Json = False,
) -> None:
    """Lists endpoints. Example: shoal endpoint list"""
    with connect(ctx) as client:
        found = client.endpoints()
    empty = "No endpoint. Create one: shoal endpoint create digits --model digits"
    output.show_many(found, COLUMNS, form=form, as_json=as_json, names=columns, empty=empty)


@app.command("get")
def get_endpoint(
    ctx: typer.Context, name: Name, form: options.Format = "", as_json: options.Json = False
) -> None:
    """Shows one endpoint. Example: shoal endpoint get digits"""
    with connect(ctx) as client:
        found = client.endpoint(name)
    output.show_one(found, DETAILS, form=form, as_json=as_json)


@app.command("create")
def create_endpoint(
    ctx: typer.Context,
    name: Name,
    model: Annotated[str, typer.Option("--model", help="Model that it serves.")],
    objective: Annotated[
        str, typer.Option("--objective", help='"accuracy>=0.97, latency_p95<=5ms; minimise size".')
    ] = "accuracy>=0; minimise latency_p95",
    filter: options.Filter = "",
    sampling_share: Sampling = None,
    settle: Settle = "10s",
    automatic: Annotated[
        bool, typer.Option("--automatic/--ask", help="May policies act without a person?")
    ] = True,
    yes: options.Yes = False,
    dry_run: options.DryRun = False,
    as_json: options.Json = False,
) -> None:
    """Makes a name that applications call on each device that the filter lets through.

    Example: shoal endpoint create digits --model digits --objective "accuracy>=0.95; minimise size" --yes
    """
    wanted = schemas.EndpointCreate(
        name=name,
        model=model,
        objective=objective,
        filter=filter,
        sampling_share=sampling_share or 0.0,
        settle_s=int(durations.parse(settle)),
        automatic=automatic,
    )
    with connect(ctx) as client:
        count = client.devices(filter, limit=1).total
        sampled = (
            f" {100 * wanted.sampling_share:g} % of inputs may leave the devices."
            if wanted.sampling_share
            else ""
        )
        changes.confirm(
            f"'{name}' will serve {model} on {changes.devices(count)}, each as soon as it has "
            f"a proved variant.{sampled}",
            yes=yes,
            dry_run=dry_run,
        )
        created = client.create_endpoint(wanted)
    if as_json:
        output.print_json(created)
    else:
        output.say(f"Endpoint {created.name} ({created.id}) is there.")


@app.command("update")
def update_endpoint(
    ctx: typer.Context,
    name: Name,
    objective: Annotated[str | None, typer.Option("--objective", help="A new objective.")] = None,
    filter: Annotated[
        str | None, typer.Option("-l", "--filter", help="A new filter; '' = every device.")
    ] = None,
    sampling_share: Sampling = None,
    settle: Annotated[str | None, typer.Option("--settle", help="A new settling time.")] = None,
    automatic: Annotated[
        bool | None, typer.Option("--automatic/--ask", help="May policies act alone?")
    ] = None,
    yes: options.Yes = False,
    dry_run: options.DryRun = False,
    as_json: options.Json = False,
) -> None:
    """Changes an endpoint. Example: shoal endpoint update digits --sampling-share 0.1 --yes"""
    given: dict[str, Any] = {
        "objective": objective,
        "filter": filter,
        "sampling_share": sampling_share,
        "settle_s": None if settle is None else int(durations.parse(settle)),
        "automatic": automatic,
    }
    patch = schemas.EndpointPatch(**{key: value for key, value in given.items() if value is not None})
    changed = ", ".join(f"{key} = {value}" for key, value in patch.model_dump(exclude_unset=True).items())
    with connect(ctx) as client:
        count = client.endpoint(name).devices if filter is None else client.devices(filter, limit=1).total
        changes.confirm(
            f"'{name}' changes on {changes.devices(count)}: {changed or 'nothing'}.", yes=yes, dry_run=dry_run
        )
        updated = client.change_endpoint(name, patch)
    if as_json:
        output.print_json(updated)
    else:
        output.say(f"Endpoint {updated.name} is changed.")
