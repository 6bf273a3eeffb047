"""`shoal variant`: what optimizations made of a version."""

from __future__ import annotations

from typing import Annotated

import typer

from shoal_controller.api import schemas
from shoal_controller.cli import options, output
from shoal_controller.cli.connect import connect
from shoal_controller.cli.output import Column

app = typer.Typer(no_args_is_help=True, help="What optimizations made of a version.")


def _value(figure: schemas.Figure | None) -> float | None:
    return figure.value if figure else None


# One row a variant and class.
Row = tuple[schemas.Variant, schemas.VariantFigures]

COLUMNS = (
    Column("id", lambda r: r[0].id, "id"),
    Column("name", lambda r: r[0].name, "id"),
    Column("version", lambda r: f"{r[0].model} v{r[0].version}"),
    Column("profile_class", lambda r: r[1].profile_class, "id"),
    Column("accuracy", lambda r: _value(r[1].accuracy), "points"),
    Column("latency_p50_ms", lambda r: _value(r[1].latency_p50_ms), "ms"),
    Column("latency_p95_ms", lambda r: _value(r[1].latency_p95_ms), "ms"),
    Column("size_bytes", lambda r: r[0].size_bytes, "bytes"),
    Column("wire_bytes", lambda r: r[0].wire_bytes, "bytes"),
    Column("front", lambda r: "chosen" if r[1].chosen else ("front" if r[1].on_front else "")),
    Column("serving", lambda r: r[1].serving, "number"),
    Column("measured", lambda r: measured(r[1])),
)


def measured(figures: schemas.VariantFigures) -> str:
    """Where a class's figures come from: "local", "trial"; of an emulated device what it cannot tell."""
    latency = figures.latency_p95_ms
    times = latency.source if latency is not None else "unmeasured"
    accuracy = figures.accuracy.source if figures.accuracy is not None else "unmeasured"
    if accuracy == times or not accuracy:
        return times
    return f"accuracy {accuracy}, times {times}"


def rows(variants: list[schemas.Variant], profile_class: str = "") -> list[Row]:
    """A row for each variant and class; a variant that no class measured has one row of unmeasured."""
    found: list[Row] = []
    for variant in variants:
        figures = [f for f in variant.classes if profile_class in ("", f.profile_class)]
        found += [(variant, f) for f in figures] or [(variant, schemas.VariantFigures(profile_class=""))]
    return found


@app.command("list")
def list_variants(
    ctx: typer.Context,
    model: Annotated[str, typer.Option("--model", help="Only of this model.")] = "",
    version: Annotated[int | None, typer.Option("--version", help="Only of this version.")] = None,
    profile_class: Annotated[str, typer.Option("--class", help="Only for this profile class.")] = "",
    form: options.Format = "",
    columns: options.Columns = "",
    as_json: options.Json = False,
) -> None:
    """Lists variants with their figures per class. Example: shoal variant list --model digits"""
    with connect(ctx) as client:
        found = client.variants(model, version, profile_class)
    if output.resolve_form(form, as_json) in ("json", "name"):
        names = (Column("id", lambda v: v.id, "id"),)
        output.show_many(found, names, form=form, as_json=as_json)
    else:
        table = rows(found, profile_class)
        output.show_many(table, COLUMNS, form=form, names=columns, empty="No variant yet.")


@app.command("get")
def get_variant(
    ctx: typer.Context,
    variant: Annotated[str, typer.Argument(help="Id or a unique prefix.")],
    form: options.Format = "",
    as_json: options.Json = False,
) -> None:
    """Shows one variant: recipe, bundle, figures per class. Example: shoal variant get k-0003"""
    fields = (
        Column("id", lambda v: v.id, "id"),
        Column("name", lambda v: v.name),
        Column("version", lambda v: f"{v.model} v{v.version}"),
        Column("bundle", lambda v: v.bundle, "id"),
        Column("target", lambda v: f"{v.target} {v.precision}"),
        Column("recipe", lambda v: " -> ".join(step_text(step) for step in v.recipe) or "converted only"),
        Column("size_bytes", lambda v: v.size_bytes, "bytes"),
        Column("wire_bytes", lambda v: v.wire_bytes, "bytes"),
        Column("created", lambda v: v.created_ms, "time"),
    )
    with connect(ctx) as client:
        found = client.variant(variant)
    output.show_one(found, fields, form=form, as_json=as_json)
    if output.resolve_form(form, as_json) == "table":
        output.stdout().print()
        output.stdout().print(output.table(rows([found]), COLUMNS[3:]))


def step_text(step: dict[str, object]) -> str:
    """`channel_pruning(ratio=0.5)`."""
    name = step.get("technique") or step.get("name") or "step"
    given = step.get("parameters")
    parameters = (
        given
        if isinstance(given, dict)
        else {k: v for k, v in step.items() if k not in ("technique", "name")}
    )
    shown = ", ".join(f"{key}={value}" for key, value in parameters.items())
    return f"{name}({shown})" if shown else str(name)
