"""`shoal token`: what devices join with."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from shoal_controller.api import schemas
from shoal_controller.cli import changes, durations, options, output
from shoal_controller.cli.connect import connect
from shoal_controller.cli.device import parse_labels
from shoal_controller.cli.output import Column
from shoal_protos.errors import InvalidInput

app = typer.Typer(no_args_is_help=True, help="Join tokens.")

COLUMNS = (
    Column("id", lambda t: t.id, "id"),
    Column("uses_left", lambda t: t.uses_left, "number"),
    Column("uses", lambda t: t.uses, "number"),
    Column("state", lambda t: "revoked" if t.revoked else "", "status"),
    Column("created", lambda t: t.created_ms, "time"),
    Column("expires", lambda t: output.iso(t.expires_ms), "id"),
    Column("labels", lambda t: ",".join(f"{key}={value}" for key, value in sorted(t.labels.items()))),
)


BY_LINE = (
    "Paste the line on the device, as root for a\n"
    "system service. It fetches the agent from this controller, checks it, joins and starts it.\n"
    "The token alone, for a machine where Shoal is installed: --json, field `token`."
)
BY_HAND = (
    "On a machine with internet and pip, in a checkout of Shoal:\n"
    "  pip install '.[agent,onnxruntime]'\n"
    "  shoal-agent join   (asks for the token; or SHOAL_JOIN_TOKEN, or --token-file FILE)"
)


@app.command("create")
def create_token(
    ctx: typer.Context,
    join: Annotated[bool, typer.Option("--join", help="A token that devices join with.")] = False,
    uses: Annotated[int, typer.Option("--uses", min=1, help="How many devices may join.")] = 1,
    ttl: Annotated[str, typer.Option("--ttl", help="How long it is good for (30m, 1h, 7d).")] = "1h",
    label: Annotated[
        list[str] | None, typer.Option("--label", help="key=value that joining devices get.")
    ] = None,
    out: Annotated[str, typer.Option("--out", help="Write the token to this file (0600) instead.")] = "",
    as_json: options.Json = False,
) -> None:
    """Makes a join token; it is shown once. Example: shoal token create --join --uses 10 --ttl 1h"""
    if not join:
        raise InvalidInput("Only join tokens exist yet.", "Add --join.")
    wanted = schemas.TokenCreate(
        uses=uses, ttl_s=max(1, int(durations.parse(ttl))), labels=parse_labels(label or [], {})
    )
    with connect(ctx) as client:
        token = client.create_token(wanted)
    if out:
        write_secret(Path(out), token.token)
        output.say(f"Token {token.id} is in {out}: {uses} use(s), {ttl}.")
    if as_json:
        output.print_json(token)
    elif not out:
        typer.echo(token.join_line or token.token)
        output.say(
            f"{token.id}: good for {changes.devices(uses)} within {ttl}, not shown again. "
            + (BY_LINE if token.join_line else BY_HAND)
        )
        if token.note:
            output.say(token.note)


def write_secret(path: Path, secret: str) -> None:
    """A file that only its owner reads, from its first byte on."""
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        os.fchmod(file.fileno(), 0o600)
        file.write(secret + "\n")


@app.command("list")
def list_tokens(
    ctx: typer.Context,
    form: options.Format = "",
    columns: options.Columns = "",
    as_json: options.Json = False,
) -> None:
    """Lists join tokens, never their secrets. Example: shoal token list"""
    with connect(ctx) as client:
        found = client.tokens()
    output.show_many(found, COLUMNS, form=form, as_json=as_json, names=columns, empty="No join token.")


@app.command("revoke")
def revoke_token(
    ctx: typer.Context,
    token: Annotated[str, typer.Argument(help="Id of the token.")],
    yes: options.Yes = False,
    dry_run: options.DryRun = False,
    as_json: options.Json = False,
) -> None:
    """Makes a join token useless; devices that joined stay. Example: shoal token revoke j-0001 --yes"""
    with connect(ctx) as client:
        changes.confirm(
            f"Token {token} will not join any more devices. Joined devices stay joined.",
            yes=yes,
            dry_run=dry_run,
        )
        client.revoke_token(token)
        if as_json:
            output.print_json([found for found in client.tokens() if found.id == token])
    output.say(f"Token {token} is revoked.")
