"""`shoal status` and `shoal open`."""

from __future__ import annotations

import typer

from shoal_controller.api import schemas
from shoal_controller.cli import exits, options, output
from shoal_controller.cli.connect import connect


def status(ctx: typer.Context, form: options.Format = "", as_json: options.Json = False) -> None:
    """Says in a dozen lines what needs you now; exit code 1 when something does. Example: shoal status"""
    with connect(ctx) as client:
        found = client.status()
        url = client.url
    if output.resolve_form(form, as_json) == "json":
        output.print_json(found)
    else:
        output.stdout().print("\n".join(lines(found, url)), markup=False)
    raise typer.Exit(exits.FAILED if found.needs_attention else exits.OK)


def lines(found: schemas.Status, url: str) -> list[str]:
    """The dozen lines of `shoal status`."""
    devices = ", ".join(f"{count:,} {name}" for name, count in found.devices.items() if count)
    shown = [
        found.sentence,
        "",
        f"controller     {found.fleet}, version {found.version}, {url}",
        f"devices        {devices or 'none joined yet'}",
        f"findings       {found.findings_open} open",
        f"rollouts       {found.rollouts_running} running",
        f"optimizations  {found.optimizations_running} running",
    ]
    shown += [f"endpoint       {endpoint_line(endpoint)}" for endpoint in found.endpoints]
    if found.next_step:
        shown += ["", f"next: {found.next_step}"]
    return shown


def endpoint_line(endpoint: dict[str, object]) -> str:
    """`digits  met  p95 0.41 ms, errors 0.0 %, accuracy 98.5 %  (objective)`."""
    parts = []
    if isinstance(p95 := endpoint.get("p95_ms"), int | float):
        parts.append(f"p95 {p95:.2f} ms")
    if isinstance(errors := endpoint.get("error_share"), int | float):
        parts.append(f"errors {100 * errors:.1f} %")
    accuracy = endpoint.get("accuracy")
    value = accuracy.get("value") if isinstance(accuracy, dict) else accuracy
    if isinstance(value, int | float):
        parts.append(f"accuracy {100 * value:.1f} %")
    met = {True: "met", False: "MISSED", None: "no data"}.get(endpoint.get("met"), "no data")  # type: ignore[call-overload]
    return f"{endpoint.get('name')}  {met}  {', '.join(parts) or 'no traffic'}  ({endpoint.get('objective')})"


def open_dashboard(
    ctx: typer.Context,
    page: str = typer.Argument("", help="Page, such as rollouts/r-0002."),
    as_json: options.Json = False,
) -> None:
    """Opens the dashboard in the browser; without one, or with --json, it prints the address."""
    import webbrowser

    from shoal_controller.cli.connect import resolve

    url = f"{resolve(ctx.find_root().obj or {}).url}/{page.lstrip('/')}"
    if as_json:
        output.print_json({"url": url})
        return
    typer.echo(url)
    if output.is_terminal():
        webbrowser.open(url)
