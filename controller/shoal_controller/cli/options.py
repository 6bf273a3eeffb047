"""Options that mean the same in every command."""

from __future__ import annotations

from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="Print the API's object, exactly, as JSON.")]
Format = Annotated[
    str,
    typer.Option("-o", "--output", help="table, tsv, json, or name (ids only, for xargs).", metavar="FORM"),
]
Columns = Annotated[str, typer.Option("--columns", help="Which columns, comma-separated.", metavar="NAMES")]
Filter = Annotated[
    str, typer.Option("-l", "--filter", help="Filter language: 'status:degraded class:aarch64* p95>50'.")
]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask; needed where no terminal is.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would happen and change nothing.")]
Reason = Annotated[str, typer.Option("--reason", help="Why; kept with the event.")]
Watch = Annotated[bool, typer.Option("-w", "--watch", help="Follow until it ends.")]
Timeout = Annotated[
    str, typer.Option("--timeout", help="Give up watching after so long (30s, 10m, 2h); exit code 6.")
]
