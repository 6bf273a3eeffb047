"""What `shoal optimize` prints: progress while it works, tables at the end."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shoal_optimizer import objective

if TYPE_CHECKING:
    from rich.console import Console


def shown(path: Path) -> str:
    """The path as one would type it here."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def show(result: Mapping[str, Any], *, as_json: bool, console: Console) -> None:
    """Prints a result: JSON if asked, a table on a terminal, tab-separated text when piped."""
    if as_json:
        sys.stdout.write(json.dumps(result, indent=2, ensure_ascii=False) + "\n")
        return
    terminal = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
    if terminal:
        _print_tables(result)
    else:
        _print_rows(result)
    for entry in result["classes"]:
        if entry["choice"] is None:
            say(console, f"{entry['name']}: nothing could be exported for this class.")
            continue
        say(console, entry["choice"]["sentence"])
        say(console, f"Serve it with: {entry['serve']}")
    say(console, f"Report: {shown(Path(result['report']['html']))}")


def show_replay(result: Mapping[str, Any], *, as_json: bool, console: Console) -> None:
    """Prints what a replay gave."""
    if as_json:
        sys.stdout.write(json.dumps(result, indent=2, ensure_ascii=False) + "\n")
        return
    sys.stdout.write(result["sentence"] + "\n")
    for kind in ("files", "causes"):
        for item in result[kind]:
            then, now = item["then"] or "none", item["now"] or "none"
            say(console, f"  {item['name']}: then {then[:60]}, now {now[:60]}")
    say(console, f"The bundle made: {shown(Path(result['layout']))}")


WIDE = 110  # columns of a terminal that have room for every metric
_COLUMNS = ("points", "p50", "faster", "size", "smaller", "p95", "memory")


def _cells(entry: Mapping[str, Any], wide: bool) -> list[str]:
    change = entry.get("against_original") or {}
    gained = change.get("accuracy")
    cells = [
        objective.show("accuracy", entry["accuracy"]),
        "" if gained is None else f"{100 * gained:+.1f}",
        objective.show("latency_p50", entry["latency_p50_ms"]),
        _times(change.get("faster")),
        objective.show("size", float(entry["size_bytes"])),
        _times(change.get("smaller")),
        objective.show("latency_p95", entry["latency_p95_ms"]),
        objective.show("memory", entry["memory_bytes"]),
    ]
    return cells if wide else cells[:-2]


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.3g}x"


def _print_tables(result: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(file=sys.stdout, highlight=False)
    wide = console.width >= WIDE
    for entry in result["classes"]:
        table = Table(title=entry["name"], title_justify="left", box=None, pad_edge=False)
        table.add_column("")
        table.add_column("candidate", overflow="fold")
        for name in (result["metric"], *(_COLUMNS if wide else _COLUMNS[:-2])):
            table.add_column(name, justify="right", no_wrap=True)
        for row in entry["front"]:
            chosen = entry["choice"] is not None and row["bundle"] == entry["choice"]["bundle"]
            table.add_row(
                "✔" if chosen else "", row["name"], *_cells(row, wide), style="bold" if chosen else ""
            )
        if entry.get("original"):
            original = entry["original"]
            name = f"{original['name']}, the original"
            table.add_row("", name, *_cells(original, wide), style="dim")
        console.print(table)


def _print_rows(result: Mapping[str, Any]) -> None:
    names = ["class", "name", "chosen", "accuracy", "latency_p50_ms", "latency_p95_ms", "size_bytes"]
    names += ["memory_bytes", "smaller", "faster", "layout"]
    lines = ["\t".join(names)]
    for entry in result["classes"]:
        for row in entry["front"]:
            chosen = entry["choice"] is not None and row["bundle"] == entry["choice"]["bundle"]
            values = {
                **row,
                **row["against_original"],
                "accuracy": row["accuracy"],
                "class": entry["name"],
                "chosen": "yes" if chosen else "no",
            }
            lines.append("\t".join("" if values[n] is None else str(values[n]) for n in names))
    sys.stdout.write("\n".join(lines) + "\n")


# ---------------------------------------------------------------------------- progress


def stderr() -> Console:
    from rich.console import Console

    return Console(file=sys.stderr, highlight=False)


def say(console: Console, text: str) -> None:
    console.print(text, markup=False, soft_wrap=True)


class Follower:
    """Shows a job's progress: one bar on a terminal, a line for each new step when piped."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar: Any = None
        self._task: Any = None
        self._last = ""

    def __call__(self, event: Mapping[str, Any]) -> None:
        if event["event"] == "variant":
            self._note(f"made {event['name']}, {objective.show('size', float(event['size_bytes']))}")
        elif event["event"] == "ingested":
            base = event["baseline"]
            interval = f"{base['low']:.3f} to {base['high']:.3f}"
            self._note(f"the original: {event['metric']} {base['value']:.4g} ({interval})")
        elif event["event"] == "progress":
            self._progress(event["step"], event["share"], event["message"])

    def _note(self, text: str) -> None:
        say(self._bar.console if self._bar is not None else self._console, text)

    def _progress(self, step: str, share: float | None, message: str) -> None:
        if not self._console.is_terminal:
            if step != self._last:
                self._last = step
                say(self._console, f"{step}: {message}" if message else step)
            return
        if self._bar is None:
            from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

            self._bar = Progress(
                TextColumn("{task.description:<9}"),
                BarColumn(bar_width=24),
                TimeElapsedColumn(),
                TextColumn("{task.fields[message]}", markup=False),
                console=self._console,
                transient=True,
            )
            self._bar.start()
            self._task = self._bar.add_task(step, total=1.0, message="")
        self._bar.update(
            self._task,
            description=step,
            message=message,
            total=None if share is None else 1.0,
            completed=share or 0.0,
        )

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
