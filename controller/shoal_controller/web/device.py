"""The page of one device, and what people do to a device there."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import Form, Request, Response
from fastapi.responses import RedirectResponse

from shoal_controller import diagnosis
from shoal_controller.api import schemas as s
from shoal_controller.web.data import Data
from shoal_controller.web.page import data, new_router, render, together
from shoal_protos.errors import InvalidInput, NotFound

router = new_router()

SHOWN = 6  # answers on the page
NOUNS = {"logs": "Logs", "diagnose": "Diagnosis", "profile": "New profile"}


@dataclass(frozen=True)
class Answer:
    """One request with its answer, read if it is a diagnosis."""

    request: s.DeviceRequest
    noun: str
    diagnosis: diagnosis.Diagnosis | None
    newest: bool  # of its kind


@dataclass(frozen=True)
class Choice:
    """Variants that a device may be pinned to at one endpoint."""

    endpoint: str
    variants: list[tuple[s.Variant, s.VariantFigures | None]]


@router.get("/devices/{id}")
async def device(request: Request, id: str) -> Response:
    api = data(request)
    found = await api.device(id)
    asked, choices = await together(api.requests(found.id), _choices(api, found))
    return await render(
        request, "device.html", "fleet", device=found, answers=answers(asked), choices=choices,
        labels="\n".join(f"{key}={value}" for key, value in sorted(found.labels.items())),
        pinned=_names(found, choices), unmeasured="unmeasured (emulated)" if found.emulated else "",
    )  # fmt: skip


def answers(asked: Iterable[s.DeviceRequest]) -> list[Answer]:
    """The newest requests; the first answer of each kind stands open."""
    seen: set[str] = set()
    found = []
    for request in list(asked)[:SHOWN]:
        newest = request.state == "answered" and request.kind not in seen
        if request.state == "answered":
            seen.add(request.kind)
        read = diagnosis.read(request.body) if request.kind == "diagnose" and request.body else None
        found.append(Answer(request, NOUNS.get(request.kind, request.kind), read, newest))
    return found


async def _choices(api: Data, device: s.DeviceDetail) -> list[Choice]:
    """Per endpoint of the device, the newest variants whose runtime it has, the best measured first."""
    here = {placement.endpoint for placement in device.placements}
    runtimes = {str(runtime.get("name")) for runtime in device.profile.get("runtimes") or ()}
    endpoints = [e for e in await api.endpoints() if e.name in here]
    variants = await together(*(api.variants(e.model) for e in endpoints))
    choices = []
    for endpoint, known in zip(endpoints, variants, strict=True):
        fitting = [(v, _figures(v, device.profile_class)) for v in known if v.target in runtimes]
        fitting.sort(key=lambda pair: (pair[1] is None, -pair[0].version, pair[0].name))
        choices.append(Choice(endpoint.name, fitting[:40]))
    return choices


def _figures(variant: s.Variant, profile_class: str) -> s.VariantFigures | None:
    return next((f for f in variant.classes if f.profile_class == profile_class), None)


def _names(device: s.DeviceDetail, choices: Iterable[Choice]) -> dict[str, str]:
    """Endpoint -> name of the variant that it is pinned to; the id where the name is not at hand."""
    names = {variant.id: variant.name for choice in choices for variant, _ in choice.variants}
    return {endpoint: names.get(variant, variant) for endpoint, variant in sorted(device.pins.items())}


# ------------------------------------------------------------------ what people do


@router.post("/devices/{id}/{act}")
async def act(
    request: Request,
    id: str,
    act: str,
    reason: Annotated[str, Form()] = "",
    kind: Annotated[str, Form()] = "",
    name: Annotated[str, Form()] = "",
    labels: Annotated[str, Form()] = "",
    pin: Annotated[str, Form()] = "",
    endpoint: Annotated[str, Form()] = "",
) -> Response:
    """One act, then the device's page again (the fleet's, once it is removed)."""
    api, reason = data(request), reason.strip()
    found = await api.device(id)
    changes: dict[str, Any] = {}
    anchor = ""
    if act == "ask":
        await api.ask(found.id, kind)
        anchor = "#asked"
    elif act == "describe":
        changes = {"name": name.strip() or found.name, "labels": read_labels(labels, found.labels)}
    elif act in ("quarantine", "release"):
        changes = {"quarantined": act == "quarantine"}
    elif act == "pin":
        where, _, variant = pin.partition("=")
        changes = {"pins": {**found.pins, where: variant}}
    elif act == "unpin":
        changes = {"pins": {key: value for key, value in found.pins.items() if key != endpoint}}
    elif act == "remove":
        if name.strip() != found.name:
            raise InvalidInput(
                f"'{name.strip()[:60]}' is not the name of this device; nothing was removed.",
                f"Go back and type {found.name}.",
            )
        await api.remove(found.id, reason)
        return RedirectResponse("/", 303)
    else:
        raise NotFound(f"A device has no action '{act[:40]}'.", "See its page, or: shoal device --help")
    if changes:
        await api.change(found.id, **changes, **({"reason": reason} if reason else {}))
    return RedirectResponse(f"/devices/{found.id}{anchor}", 303)


def read_labels(text: str, present: dict[str, str]) -> dict[str, str]:
    """The patch that makes a device's labels those of the text: `key=value`, one a line.

    Raises:
        InvalidInput: a line is something else.
    """
    wanted: dict[str, str] = {}
    for line in filter(None, (part.strip() for part in text.splitlines())):
        found = re.fullmatch(r"([^=:]+)[=:](.+)", line)
        if found is None:
            raise InvalidInput(f"'{line[:60]}' is not a label.", "Write key=value, one a line.")
        wanted[found[1].strip()] = found[2].strip()
    return wanted | {key: "" for key in present if key not in wanted}
