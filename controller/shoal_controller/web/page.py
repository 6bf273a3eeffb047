"""What every page has: its shell, headers, refusals for people, and who may post a form."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Awaitable, Callable
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import jinja2
from fastapi import APIRouter, Request, Response
from fastapi.responses import HTMLResponse
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

from shoal_controller.web import plots, view
from shoal_controller.web.data import Data
from shoal_protos.errors import Conflict, Denied, InvalidInput, NotFound, ShoalError, Unavailable

HERE = Path(__file__).parent
__version__ = metadata.version("shoal")
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'self'; base-uri 'none'; object-src 'none'; form-action 'self'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
    "Cache-Control": "no-store",
    "Vary": "HX-Request",
}
_STATUS = {NotFound: 404, InvalidInput: 400, Conflict: 409, Denied: 403, Unavailable: 503}


def _static_version() -> str:
    """Part of every static address: the release and what the files hold, so caches may keep them."""
    digest = hashlib.sha256()
    for path in sorted((HERE / "static").rglob("*")):
        if path.is_file():
            digest.update(path.read_bytes())
    return f"{__version__}-{digest.hexdigest()[:8]}"


STATIC = f"/static/{_static_version()}"

_templates = jinja2.Environment(
    loader=jinja2.FileSystemLoader(HERE / "templates"),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
)
_templates.filters.update(view.FILTERS)
_templates.globals.update(
    static=STATIC, shoal_version=__version__, plots=plots, view=view, statuses=view.STATUSES
)


class Page(APIRoute):
    """A route whose refusals are pages for people."""

    def get_route_handler(self) -> Callable[[Request], Any]:
        handle = super().get_route_handler()

        async def guarded(request: Request) -> Response:
            try:
                if request.method == "POST":
                    _same_origin(request)
                return await handle(request)
            except ShoalError as error:
                status = next((v for k, v in _STATUS.items() if isinstance(error, k)), 500)
                return await error_page(request, status, error.message, error.remedy)
            except HTTPException as error:
                return await error_page(request, error.status_code, str(error.detail), "")

        return guarded


def _same_origin(request: Request) -> None:
    """Forms act only from our own pages: another site's form carries another origin.

    Raises:
        Denied: the request comes from elsewhere.
    """
    origin = request.headers.get("origin")
    foreign = origin is not None and urlsplit(origin).netloc != request.headers.get("host")
    if foreign or request.headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
        raise Denied("This form came from another site.", "Open the page here and try again.")


def data(request: Request) -> Data:
    """The API as the person behind this request sees it."""
    kept = ("authorization", "cookie")
    return Data(request.app, {k: v for k, v in request.headers.items() if k in kept})


async def render(
    request: Request, template: str, page: str, status_code: int = 200, **context: Any
) -> HTMLResponse:
    """The whole page, or only its content where htmx asks for a refresh."""
    partial = request.headers.get("hx-request-type") == "partial"
    query = f"?{request.url.query}" if request.url.query else ""
    if "status" not in context:
        context["status"] = await _status_or_none(request)
    html = _templates.get_template(template).render(
        layout="_fragment.html" if partial else "base.html",
        page=page,
        url=f"{request.url.path}{query}",
        now=int(time.time() * 1000),
        **context,
    )
    return HTMLResponse(html, status_code, headers=HEADERS)


async def _status_or_none(request: Request) -> Any:
    try:
        return await data(request).status()
    except ShoalError:
        return None


async def error_page(request: Request, code: int, message: str, remedy: str) -> HTMLResponse:
    return await render(request, "error.html", "", code, code=code, message=message, remedy=remedy)


async def together(*calls: Awaitable[Any]) -> list[Any]:
    return list(await asyncio.gather(*calls))


def new_router() -> APIRouter:
    """A router whose routes are pages: out of the API's schema, refusals as HTML."""
    return APIRouter(route_class=Page, include_in_schema=False, default_response_class=HTMLResponse)
