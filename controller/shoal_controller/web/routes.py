"""The pages. Each route asks the API (`data.py`) for what its template prints, and nothing else."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Awaitable, Callable
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlencode, urlsplit

import jinja2
from fastapi import APIRouter, FastAPI, Form, Request, Response
from fastapi.responses import HTMLResponse, RedirectResponse
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.middleware.gzip import GZipMiddleware
from starlette.staticfiles import StaticFiles
from starlette.types import Receive, Scope, Send

from shoal_controller.web import models as model_page
from shoal_controller.web import plots, view
from shoal_controller.web.data import Data
from shoal_protos.errors import Conflict, Denied, InvalidInput, NotFound, ShoalError, Unavailable

HERE = Path(__file__).parent
__version__ = metadata.version("shoal")
WINDOW = 36  # rows of the device table
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


router = APIRouter(route_class=Page, include_in_schema=False, default_response_class=HTMLResponse)


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


async def _together(*calls: Awaitable[Any]) -> list[Any]:
    return list(await asyncio.gather(*calls))


# ------------------------------------------------------------------ fleet


@router.get("/")
async def fleet(request: Request, filter: str = "", sort: str = "name", offset: int = 0) -> Response:
    api = data(request)
    status, running, findings = await _together(api.status(), api.rollouts(), api.findings("open,acting"))
    problem, found = "", None
    try:
        found = await api.devices(filter, sort, max(0, offset), WINDOW)
    except InvalidInput as error:
        problem = str(error)

    def link(**changes: Any) -> str:
        wanted = {"filter": filter, "sort": sort, "offset": 0, **changes}
        default = {"sort": "name", "offset": 0, "filter": ""}
        return "/?" + urlencode({k: v for k, v in wanted.items() if v != default[k]})

    return await render(
        request, "fleet.html", "fleet", status=status, found=found, problem=problem, filter=filter, sort=sort,
        offset=max(0, offset), window=WINDOW, link=link, findings=findings[:4],
        running=[r for r in running if r.state in ("running", "paused", "stopping")],
    )  # fmt: skip


@router.get("/devices")
async def devices() -> Response:
    return RedirectResponse("/", 307)


@router.get("/devices/{id}")
async def device(request: Request, id: str) -> Response:
    return await render(request, "device.html", "fleet", device=await data(request).device(id))


# ------------------------------------------------------------------ models and optimizations


@router.get("/models")
async def models(request: Request) -> Response:
    return await render(request, "models.html", "models", models=await data(request).models())


@router.get("/models/{name}")
async def model(request: Request, name: str, version: int | None = None) -> Response:
    api = data(request)
    found = await api.model(name)
    chosen = model_page.choose_version(found, version)
    variants, endpoints = await _together(
        api.variants(found.name, chosen.number if chosen else None), api.endpoints()
    )
    context = model_page.context(
        found,
        chosen,
        variants,
        [e for e in endpoints if e.model == found.name],
        request.query_params.get("class"),
    )
    return await render(request, "model.html", "models", **context)


@router.get("/optimizations")
async def optimizations(request: Request) -> Response:
    found = await data(request).optimizations()
    return await render(request, "optimizations.html", "optimizations", optimizations=found)


@router.get("/optimizations/{id}")
async def optimization(request: Request, id: str) -> Response:
    found = await data(request).optimization(id)
    return await render(request, "optimization.html", "optimizations", job=found)


@router.post("/optimizations/{id}/cancel")
async def cancel(request: Request, id: str) -> Response:
    await data(request).cancel(id)
    return RedirectResponse(f"/optimizations/{id}", 303)


# ------------------------------------------------------------------ endpoints and rollouts


@router.get("/endpoints")
async def endpoints(request: Request) -> Response:
    return await render(request, "endpoints.html", "endpoints", endpoints=await data(request).endpoints())


@router.get("/endpoints/{name}")
async def endpoint(request: Request, name: str) -> Response:
    api = data(request)
    found = await api.endpoint(name)
    variants, rollouts, findings = await _together(
        api.variants(found.model), api.rollouts(), api.findings("open,acting")
    )
    return await render(
        request, "endpoint.html", "endpoints", endpoint=found,
        split=model_page.version_split(variants), chosen=model_page.chosen_rows(found, variants),
        rollouts=[r for r in rollouts if r.endpoint == found.name][:8],
        findings=[f for f in findings if f.endpoint in (found.name, found.id)],
    )  # fmt: skip


@router.get("/rollouts")
async def rollouts(request: Request) -> Response:
    return await render(request, "rollouts.html", "rollouts", rollouts=await data(request).rollouts())


@router.get("/rollouts/{id}")
async def rollout(request: Request, id: str) -> Response:
    found = await data(request).rollout(id)
    names = list(dict.fromkeys(e.name for wave in found.waves for e in wave.effects))
    columns = {}
    for name in names:
        effects = [next((e for e in w.effects if e.name == name), None) for w in found.waves]
        drawn = iter(plots.forest([e for e in effects if e is not None]))
        columns[name] = [(e, next(drawn)) if e is not None else None for e in effects]
    return await render(
        request, "rollout.html", "rollouts", rollout=found, columns=columns,
        groups=view.by_reason(found.devices), touched=view.touched(found),
    )  # fmt: skip


@router.post("/rollouts/{id}/{verb}")
async def rollout_act(request: Request, id: str, verb: str, reason: Annotated[str, Form()] = "") -> Response:
    if verb not in ("pause", "resume", "abort", "promote"):
        raise NotFound(f"A rollout has no action '{verb[:40]}'.", "It can pause, resume, abort or promote.")
    await data(request).rollout_act(id, verb, reason.strip())
    return RedirectResponse(f"/rollouts/{id}", 303)


# ------------------------------------------------------------------ findings, story, audit


@router.get("/findings")
async def findings(request: Request) -> Response:
    return await render(request, "findings.html", "findings", findings=await data(request).findings())


@router.get("/findings/{id}")
async def finding(request: Request, id: str) -> Response:
    api = data(request)
    found = await api.finding(id)
    events = await api.events("finding", found.id)
    return await render(request, "finding.html", "findings", finding=found, events=events)


@router.post("/findings/{id}/dismiss")
async def dismiss(request: Request, id: str, reason: Annotated[str, Form()] = "") -> Response:
    await data(request).dismiss(id, reason.strip())
    return RedirectResponse(f"/findings/{id}", 303)


@router.get("/story")
async def story(request: Request, endpoint: str = "") -> Response:
    api = data(request)
    items, endpoints = await _together(api.story(endpoint), api.endpoints())
    items.sort(key=lambda item: item.time_ms, reverse=True)
    return await render(request, "story.html", "story", items=items, endpoints=endpoints, endpoint=endpoint)


@router.get("/audit")
async def audit(request: Request, kind: str = "", object: str = "") -> Response:
    events = await data(request).events(kind, object, 150)
    events.sort(key=lambda event: event.id, reverse=True)
    return await render(request, "audit.html", "audit", events=events, kind=kind, object=object)


# ------------------------------------------------------------------ join


@router.get("/join")
async def join(request: Request) -> Response:
    return await _join_page(request, None)


@router.post("/join")
async def join_token(
    request: Request, uses: Annotated[int, Form()] = 1, hours: Annotated[float, Form()] = 1.0
) -> Response:
    return await _join_page(request, await data(request).create_token(uses, int(hours * 3600)))


async def _join_page(request: Request, token: Any) -> Response:
    newest = await data(request).devices("", "-joined_ms", 0, 8)
    return await render(request, "join.html", "join", token=token, newest=newest)


# ------------------------------------------------------------------ mounting


class _Static(StaticFiles):
    """Static files under an address that names their content: caches may keep them for a year."""

    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        answer = super().file_response(*args, **kwargs)
        answer.headers["Cache-Control"] = "public, max-age=31536000, immutable"
        answer.headers["X-Content-Type-Options"] = "nosniff"
        return answer


def mount(app: FastAPI, controller: Any = None) -> None:
    """Add the dashboard to the API's application: pages, static files, compression, 404s for people.

    `controller` is not needed: pages reach everything through the API of `app`.
    """
    app.mount(STATIC, _Static(directory=HERE / "static"), name="static")
    if not any(getattr(route, "path", "") == "/join" for route in app.routes):
        app.include_router(router)
    if not any(getattr(m.cls, "__name__", "") == GZipMiddleware.__name__ for m in app.user_middleware):
        app.add_middleware(GZipMiddleware, minimum_size=600)  # leaves event streams alone
    otherwise = app.router.default

    async def unknown(scope: Scope, receive: Receive, send: Send) -> None:
        machine = scope["type"] != "http" or scope["path"].startswith(
            ("/api/", "/metrics", "/static/", "/v2/")
        )
        if machine or scope["method"] not in ("GET", "HEAD"):
            await otherwise(scope, receive, send)
            return
        request = Request(scope, receive)
        page = await error_page(
            request, 404, "There is no such page.", "Look it up in the menu or filter the fleet."
        )
        await page(scope, receive, send)

    app.router.default = unknown
