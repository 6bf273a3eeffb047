"""How answers are printed: a table on a terminal, tab-separated text when piped, JSON when asked.

Data goes to stdout, everything else to stderr. A table shows values for people (`3m ago`, `76 kB`); the
tab-separated form shows them for programs (ISO times, bytes), one line an object after a line of names.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from shoal_controller.cli import durations
from shoal_protos.errors import InvalidInput

if TYPE_CHECKING:
    from pydantic import BaseModel
    from rich.console import Console

STATUS_STYLES = {
    "healthy": "green",
    "ready": "green",
    "done": "green",
    "promoted": "green",
    "passed": "green",
    "switched": "green",
    "resolved": "green",
    "met": "green",
    "updating": "cyan",
    "running": "cyan",
    "acting": "cyan",
    "ingesting": "cyan",
    "queued": "dim",
    "waiting": "dim",
    "dismissed": "dim",
    "paused": "yellow",
    "degraded": "yellow",
    "drifting": "yellow",
    "open": "yellow",
    "missed": "yellow",
    "offline": "red",
    "failed": "red",
    "revoked": "red",
    "stopping": "red",
    "stopped": "red",
    "rolled_back": "red",
    "aborted": "red",
}


@dataclass(frozen=True)
class Column:
    """`kind`: text, id, status, number, ms, bytes, time, points."""

    name: str
    value: Callable[[Any], Any]
    kind: str = "text"


def stdout() -> Console:
    from rich.console import Console

    return Console(file=sys.stdout, highlight=False, soft_wrap=False)


def stderr() -> Console:
    from rich.console import Console

    return Console(file=sys.stderr, highlight=False)


def is_terminal() -> bool:
    return sys.stdout.isatty() and os.environ.get("TERM") != "dumb"


def resolve_form(form: str, as_json: bool) -> str:
    """The form that was asked for, or the one that fits where stdout goes."""
    if as_json:
        return "json"
    if form not in ("", "table", "tsv", "json", "name"):
        raise InvalidInput(f"There is no output form '{form}'.", "Forms: table, tsv, json, name.")
    return form or ("table" if is_terminal() else "tsv")


def dump(value: Any) -> Any:
    """Plain JSON values of schemas, with the fields that only a newer controller knows."""
    from pydantic import BaseModel

    if isinstance(value, BaseModel):
        fields = {name: getattr(value, name) for name in type(value).model_fields}
        return dump({**fields, **(value.__pydantic_extra__ or {})})
    if isinstance(value, (list, tuple)):
        return [dump(item) for item in value]
    if isinstance(value, dict):
        return {key: dump(item) for key, item in value.items()}
    return value


def print_json(value: Any, indent: int | None = 2) -> None:
    sys.stdout.write(json.dumps(dump(value), indent=indent, ensure_ascii=False) + "\n")
    sys.stdout.flush()


def say(text: str, style: str = "") -> None:
    """One line for people, on stderr."""
    stderr().print(text, style=style or None, markup=False, soft_wrap=True)


def show_many(
    items: Sequence[Any],
    columns: Sequence[Column],
    *,
    form: str = "",
    as_json: bool = False,
    names: str = "",
    document: Any = None,
    empty: str = "",
) -> None:
    """Prints a list. `document` is what `--json` prints where it is more than the items; `empty` is said
    instead of an empty table."""
    form = resolve_form(form, as_json)
    chosen = choose_columns(columns, names)
    if form == "json":
        print_json(items if document is None else document)
    elif form == "name":
        sys.stdout.writelines(f"{columns[0].value(item)}\n" for item in items)
    elif form == "tsv":
        print_tsv(items, chosen)
    elif not items and empty:
        say(empty)
    else:
        stdout().print(table(items, chosen))


def choose_columns(columns: Sequence[Column], names: str) -> Sequence[Column]:
    if not names:
        return columns
    by_name = {column.name: column for column in columns}
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    for name in wanted:
        if name not in by_name:
            raise InvalidInput(f"There is no column '{name}'.", f"Columns: {', '.join(by_name)}.")
    return [by_name[name] for name in wanted]


def print_tsv(items: Iterable[Any], columns: Sequence[Column]) -> None:
    lines = ["\t".join(column.name for column in columns)]
    lines += ["\t".join(plain(column, item) for column in columns) for item in items]
    sys.stdout.write("\n".join(lines) + "\n")


def plain(column: Column, item: Any) -> str:
    """A value for programs: no tabs, no line breaks, times in ISO 8601 UTC."""
    value = column.value(item)
    if value is None or value == "":
        return ""
    if column.kind == "time":
        return iso(value)
    return " ".join(str(value).split())


def iso(time_ms: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time_ms / 1000)) if time_ms else ""


def pretty(kind: str, value: Any) -> str:
    """A value for people; `-` where there is none."""
    if value is None or value == "" or (kind == "time" and not value):
        return "-"
    if kind == "time":
        return f"{durations.text(time.time() - value / 1000)} ago"
    if kind == "bytes":
        return size(value)
    if kind == "ms":
        return f"{value:.2f} ms" if value < 10 else f"{value:.0f} ms"
    if kind == "points":
        return f"{100 * value:.1f} %"
    if kind == "number" and isinstance(value, int):
        return f"{value:,}"
    return str(value)


def size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError


def cell(column: Column, item: Any) -> Any:
    from rich.text import Text

    value = pretty(column.kind, column.value(item))
    style = STATUS_STYLES.get(value, "") if column.kind == "status" else ""
    return Text(value, style=style or ("dim" if value == "-" else ""))


def table(items: Iterable[Any], columns: Sequence[Column]) -> Any:
    """A rich table without frames; ids are never wrapped or cut."""
    from rich.table import Table

    grid = Table(box=None, pad_edge=False, header_style="dim", show_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        grid.add_column(
            column.name.replace("_", " "),
            justify="right" if column.kind in ("number", "ms", "bytes", "points") else "left",
            no_wrap=column.kind != "text",
            overflow="fold" if column.kind == "id" else "ellipsis",
        )
    for item in items:
        grid.add_row(*(cell(column, item) for column in columns))
    return grid


def show_one(item: BaseModel, fields: Sequence[Column], *, form: str = "", as_json: bool = False) -> None:
    """Prints one object as name and value, a line each."""
    form = resolve_form(form, as_json)
    if form == "json":
        print_json(item)
    elif form == "name":
        sys.stdout.write(f"{fields[0].value(item)}\n")
    elif form == "tsv":
        sys.stdout.writelines(f"{field.name}\t{plain(field, item)}\n" for field in fields)
    else:
        from rich.table import Table

        grid = Table.grid(padding=(0, 2))
        for field in fields:
            grid.add_row(f"[dim]{field.name.replace('_', ' ')}[/dim]", cell(field, item))
        stdout().print(grid)
