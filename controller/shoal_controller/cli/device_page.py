"""One device, and its diagnosis, as a terminal shows them."""

from __future__ import annotations

from typing import Any

from shoal_controller import diagnosis
from shoal_controller.api import schemas
from shoal_controller.cli import output

STATES = {"ok": "green", "warning": "yellow", "failed": "red", "unmeasured": "dim"}
MAX_TRANSITIONS = 12
LOG_TAIL = 2000  # characters of a failed step's logs


def show(device: schemas.DeviceDetail) -> None:
    """The device's state first, then what is wrong with the next step, then the facts."""
    console = output.stdout()
    console.print(_head(device))
    if device.causes:
        console.print("\nIt never reported. The likely causes:")
        for number, text in enumerate(device.causes, 1):
            console.print(f"  {number}. {text}", highlight=False, markup=False)
    if device.next_step:
        console.print(f"\n[bold]Next:[/bold] {_plain(device.next_step)}")
    console.print()
    console.print(_facts(device))
    if device.placements:
        console.print()
        console.print(_placements(device))
    if device.logs:
        output.say(f"\nLogs of the last failed step:\n{device.logs[-LOG_TAIL:]}", "dim")


def show_diagnosis(found: diagnosis.Diagnosis) -> None:
    """Checks with what to do, then facts and recent transitions."""
    from rich.text import Text

    console = output.stdout()
    grid = _grid("check", "state", "found")
    for check in found.checks:
        says = Text(check.found)
        if check.remedy and check.state != "ok":
            says.append(f"\n-> {check.remedy}", style="bold")
        grid.add_row(check.name, Text(check.state, style=STATES[check.state]), says)
    console.print(grid)
    if found.facts:
        console.print()
        facts = _grid("fact", "value")
        for name, value in found.facts:
            facts.add_row(Text(name, style="dim"), Text(value))
        console.print(facts)
    if found.transitions:
        console.print()
        steps = _grid("when", "endpoint", "step", "why")
        for step in found.transitions[:MAX_TRANSITIONS]:
            moved = f"{step.before or '-'} -> {step.after}"
            steps.add_row(output.pretty("time", step.time_ms), step.endpoint, moved, Text(step.reason))
        console.print(steps)
    output.say(f"\n{found.sentence}")


def _head(device: schemas.DeviceDetail) -> Any:
    from rich.text import Text

    from shoal_controller.cli.device import marks

    text = Text(device.name, style="bold")
    text.append(f"  {device.status}", style=output.STATUS_STYLES.get(device.status, ""))
    for mark in marks(device):
        text.append(f"  {mark}", style="yellow")
    if device.status_reason:
        text.append(f"\n{device.status_reason}", style="default")
    return text


def _facts(device: schemas.DeviceDetail) -> Any:
    from rich.table import Table
    from rich.text import Text

    from shoal_controller.cli import device as columns

    heard = output.pretty("time", device.last_seen_ms) if device.last_seen_ms else "never"
    if device.connected:
        heard += ", connected"
    facts = {
        "id": device.id,
        "hardware": columns.hardware(device.profile),
        "class": device.profile_class,
        "because": device.class_reason.partition(": ")[2],
        "times": "unmeasured (emulated)" if device.emulated else "",
        "serves": device.version or "nothing yet",
        "p95": output.pretty("ms", device.p95_ms) if device.p95_ms is not None else "",
        "temperature": f"{device.temperature_celsius:.0f} C"
        if device.temperature_celsius is not None
        else "",
        "inputs": "; ".join(drift(d) for d in device.drift),
        "last contact": heard,
        "agent": device.agent_version,
        "desired": columns.gap(device),
        "quarantined": "serves on; no rollout, no verdict" if device.quarantined else "",
        "pins": ", ".join(f"{name}: {variant}" for name, variant in sorted(device.pins.items())),
        "labels": ", ".join(f"{key}={value}" for key, value in sorted(device.labels.items())),
        "joined": output.pretty("time", device.joined_ms),
    }
    grid = Table.grid(padding=(0, 2))
    for name, value in facts.items():
        if value:
            grid.add_row(Text(name, style="dim"), Text(value))
    return grid


def drift(found: schemas.Drift) -> str:
    """`digits within the reference (0.4 of the limit, n 120)`."""
    where = "outside the reference" if found.score > 1 else "within the reference"
    return f"{found.endpoint} {where} ({found.score:.1f} of the limit, n {found.n})"


def _placements(device: schemas.DeviceDetail) -> Any:
    from rich.text import Text

    grid = _grid("endpoint", "should have", "serves", "step", "why")
    for view in device.placements:
        notes = [word for word, so in (("fallback", view.fallback), ("pinned", view.pinned)) if so]
        why = [view.reason, view.detail] if view.current else ["newer wish not reported yet"]
        grid.add_row(
            view.endpoint,
            Text(view.wanted[:19] or "-"),
            Text(view.variant or view.serving[:19] or "nothing yet"),
            view.step or "-",
            Text("; ".join(part for part in [*notes, *why] if part)),
        )
    return grid


def _grid(*names: str) -> Any:
    from rich.table import Table

    grid = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    for name in names:
        grid.add_column(name, overflow="fold")
    return grid


def _plain(text: str) -> str:
    from rich.markup import escape

    return escape(text)
