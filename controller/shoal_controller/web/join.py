"""The page that lets devices in: the line, its QR code, who arrives, and the tokens that are out."""

from __future__ import annotations

import time
from typing import Annotated, Any

import segno
from fastapi import Form, Request, Response
from fastapi.responses import RedirectResponse
from segno.encoder import DataOverflowError

from shoal_controller.api import schemas as s
from shoal_controller.web.data import Data
from shoal_controller.web.page import data, new_router, render, together
from shoal_protos.errors import InvalidInput, NotFound

router = new_router()

ARRIVALS = 6
MAX_HOURS = 90 * 24
QUIET = 4  # modules of white around a QR code, as its standard asks


@router.get("/join")
async def join(request: Request) -> Response:
    return await _page(request, None)


@router.post("/join")
async def create(
    request: Request, uses: Annotated[int, Form()] = 1, hours: Annotated[float, Form()] = 1.0
) -> Response:
    return await _page(request, await new_token(data(request), uses, hours))


@router.post("/join/{token}/revoke")
async def revoke(request: Request, token: str) -> Response:
    await data(request).revoke_token(token)
    return RedirectResponse("/join", 303)


async def new_token(api: Data, uses: int, hours: float) -> s.TokenCreated:
    """A join token. Raises InvalidInput for a time that cannot be."""
    if not 0 < hours <= MAX_HOURS:
        raise InvalidInput(
            "A token is good for 1 second up to 90 days.", "Go back and give the hours, for example 1 or 24."
        )
    return await api.create_token(uses, max(1, round(hours * 3600)))


async def _page(request: Request, token: s.TokenCreated | None) -> Response:
    api = data(request)
    newest, tokens, wheels = await together(
        api.devices("", "-joined_ms", 0, ARRIVALS), api.tokens(), _wheels(api)
    )
    now = time.time() * 1000
    open_tokens = [t for t in tokens if not t.revoked and t.uses_left > 0 and t.expires_ms > now]
    return await render(
        request, "join.html", "join", token=token, newest=newest, tokens=open_tokens,
        closed=len(tokens) - len(open_tokens), wheels=wheels, qr=qr(token.join_line) if token else None,
    )  # fmt: skip


async def _wheels(api: Data) -> list[s.WheelSet]:
    """What bare devices install from; a controller without an installer has none."""
    try:
        return await api.wheels()
    except NotFound:
        return []


def qr(text: str) -> dict[str, Any] | None:
    """A QR code as the template draws it: {"size": modules a side, "path": SVG path of the dark ones}.

    None for an empty text and for one that no QR code can hold (above 2,953 bytes).
    """
    if not text:
        return None
    try:
        matrix = segno.make(text, error="l", boost_error=False, micro=False).matrix
    except DataOverflowError:
        return None
    path = []
    for y, row in enumerate(matrix):
        x = 0
        while x < len(row):
            width = 0
            while x + width < len(row) and row[x + width]:
                width += 1
            if width:
                path.append(f"M{x + QUIET} {y + QUIET}h{width}v1h-{width}z")
            x += width + 1
    return {"size": len(matrix) + 2 * QUIET, "path": "".join(path)}
