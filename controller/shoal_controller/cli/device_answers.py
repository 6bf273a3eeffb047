"""What is asked of a device through its desired state: `shoal device logs | diagnose | profile`."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Annotated

import typer

from shoal_controller import diagnosis
from shoal_controller.api import schemas
from shoal_controller.cli import device_page, durations, options, output
from shoal_controller.cli.connect import connect
from shoal_controller.cli.watching import StillGoing
from shoal_controller.client import Client
from shoal_protos.errors import NotFound, ShoalError

INTERVAL_S = 0.5
UNREACHED = ("offline", "revoked")

Device = Annotated[str, typer.Argument(help="Id, name or a unique prefix.")]
Last = Annotated[bool, typer.Option("--last", help="Show the newest answer; ask for nothing.")]
Timeout = Annotated[str, typer.Option("--timeout", help="How long to wait for a device that is online.")]


def logs(
    ctx: typer.Context,
    device: Device,
    last: Last = False,
    timeout: Timeout = "60s",
    as_json: options.Json = False,
) -> None:
    """Fetches the last logs of a device's processes. Example: shoal device logs kitchen > kitchen.log"""
    with connect(ctx) as client:
        _, answer = _answer(client, device, "logs", last, timeout, as_json)
    if as_json:
        output.print_json(answer)
    else:
        _write(answer.body)


def diagnose(
    ctx: typer.Context,
    device: Device,
    last: Last = False,
    timeout: Timeout = "60s",
    as_json: options.Json = False,
) -> None:
    """Lets a device examine itself; code 1 when a check failed. Example: shoal device diagnose kitchen"""
    with connect(ctx) as client:
        _, answer = _answer(client, device, "diagnose", last, timeout, as_json)
    found = diagnosis.read(answer.body)
    if as_json:
        output.print_json(answer)
    elif found is None:  # an older agent's own words
        _write(answer.body)
    else:
        device_page.show_diagnosis(found)
    if found is not None and any(check.state == "failed" for check in found.checks):
        raise typer.Exit(1)


def profile(
    ctx: typer.Context,
    device: Device,
    last: Last = False,
    timeout: Timeout = "60s",
    as_json: options.Json = False,
) -> None:
    """Lets a device measure its hardware anew. Example: shoal device profile kitchen"""
    with connect(ctx) as client:
        before, answer = _answer(client, device, "profile", last, timeout, as_json)
        after = client.device(before.id)
    if as_json:
        output.print_json(answer)
        return
    moved = "" if before.profile_class == after.profile_class else f" (it was {before.profile_class})"
    sys.stdout.write(f"{after.name} is of class {after.profile_class}{moved}\n{after.class_reason}\n")


def _write(text: str) -> None:
    sys.stdout.write(text if text.endswith("\n") else f"{text}\n")


def _answer(
    client: Client, key: str, kind: str, last: bool, timeout: str, as_json: bool
) -> tuple[schemas.DeviceDetail, schemas.DeviceRequest]:
    """The device and its answer. With `as_json` a request that stays open is printed too.

    Raises:
        NotFound: `--last`, and it never answered such a request.
        StillGoing: it is offline, or did not answer in time; it will (exit code 6).
        ShoalError: the request expired.
    """
    limit_s = durations.parse(timeout)
    device = client.device(key)
    if last:
        return device, _newest(client, device, kind)
    asked = client.ask_device(device.id, kind)
    later = f"Read it then: shoal device {kind} {device.name} --last"
    if device.status in UNREACHED:
        if as_json:
            output.print_json(asked)
        heard = (
            f"heard {output.pretty('time', device.last_seen_ms)}" if device.last_seen_ms else "never heard"
        )
        raise StillGoing(
            f"{device.name} is offline ({heard}). It answers {asked.id} when it comes back within a day.",
            later,
        )
    with _Waiting(device.name, kind) as tell:
        begun = time.monotonic()
        while time.monotonic() - begun < limit_s:
            found = next((r for r in client.device_requests(device.id) if r.id == asked.id), asked)
            if found.state == "answered":
                return device, found
            if found.state == "expired":
                raise ShoalError(f"{device.name} did not answer {asked.id} in its time.", "Ask again.")
            tell(time.monotonic() - begun)
            time.sleep(min(INTERVAL_S, max(0.0, limit_s - (time.monotonic() - begun))))
    if as_json:
        output.print_json(asked)
    raise StillGoing(
        f"{device.name} has not answered {asked.id} within {timeout}. It will when it can, within a day.",
        later,
    )


def _newest(client: Client, device: schemas.DeviceDetail, kind: str) -> schemas.DeviceRequest:
    asked = [r for r in client.device_requests(device.id) if r.kind == kind]
    found = next((r for r in asked if r.state == "answered"), None)
    if found is not None:
        output.say(f"Answered {output.pretty('time', found.answered_ms)} ({found.id}).", "dim")
        return found
    if asked and asked[0].state == "open":
        raise StillGoing(f"{device.name} has not answered {asked[0].id} yet.", "It does when it comes back.")
    raise NotFound(
        f"{device.name} was never asked, or its answer is gone.", f"Ask: shoal device {kind} {device.name}"
    )


class _Waiting:
    """A line on the terminal that counts while somebody waits; nothing where there is no terminal."""

    def __init__(self, name: str, kind: str) -> None:
        words = {"logs": "its logs", "diagnose": "a diagnosis", "profile": "a new profile"}
        self._text = f"Asked {name} for {words[kind]}"
        self._shown = sys.stderr.isatty()

    def __enter__(self) -> Callable[[float], None]:
        if not self._shown:
            output.say(f"{self._text}, waiting...", "dim")
        return self._tell

    def _tell(self, seconds: float) -> None:
        if self._shown:
            sys.stderr.write(f"\r\x1b[2K{self._text}, waiting {seconds:.0f} s")
            sys.stderr.flush()

    def __exit__(self, *_: object) -> None:
        if self._shown:
            sys.stderr.write("\r\x1b[2K")
            sys.stderr.flush()
