"""The pages. Each route asks the API (`data.py`) for what its template prints, and nothing else."""

from __future__ import annotations

from typing import Annotated, Any
from urllib.parse import urlencode

from fastapi import FastAPI, Form, Request, Response
from fastapi.responses import RedirectResponse
from starlette.middleware.gzip import GZipMiddleware
from starlette.staticfiles import StaticFiles
from starlette.types import Receive, Scope, Send

from shoal_controller.web import device, join, plots, view
from shoal_controller.web import models as model_page
from shoal_controller.web.page import HERE, STATIC, data, error_page, new_router, render, together
from shoal_protos.errors import InvalidInput, NotFound

__all__ = ["HERE", "STATIC", "mount", "router"]

WINDOW = 36  # rows of the device table
MARKS = {
    "fallback": "another class's variant until a search finds their own",
    "pinned": "one variant that rollouts leave alone",
    "quarantined": "what they have, outside rollouts and verdicts",
}

router = new_router()


# ------------------------------------------------------------------ fleet


@router.get("/")
async def fleet(request: Request, filter: str = "", sort: str = "name", offset: int = 0) -> Response:
    return await _fleet(request, filter, sort, offset)


@router.post("/")
async def first_token(
    request: Request, uses: Annotated[int, Form()] = 1, hours: Annotated[float, Form()] = 1.0
) -> Response:
    """The join line on the empty fleet's own page, where the first device will pop in."""
    return await _fleet(request, token=await join.new_token(data(request), uses, hours))


async def _fleet(
    request: Request, filter: str = "", sort: str = "name", offset: int = 0, token: Any = None
) -> Response:
    api = data(request)
    status, running, findings = await together(api.status(), api.rollouts(), api.findings("open,acting"))
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
        running=[r for r in running if r.state in ("running", "paused", "stopping")], token=token,
    )  # fmt: skip


@router.get("/devices")
async def devices() -> Response:
    return RedirectResponse("/", 307)


# ------------------------------------------------------------------ models and optimizations


@router.get("/models")
async def models(request: Request) -> Response:
    return await render(request, "models.html", "models", models=await data(request).models())


@router.get("/models/{name}")
async def model(request: Request, name: str, version: int | None = None) -> Response:
    api = data(request)
    found = await api.model(name)
    chosen = model_page.choose_version(found, version)
    variants, endpoints = await together(
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
    variants, rollouts, findings, *special = await together(
        api.variants(found.model), api.rollouts(), api.findings("open,acting"),
        *(api.devices(f"is:{mark} endpoint:{found.name}", "name", 0, 3) for mark in MARKS),
    )  # fmt: skip
    return await render(
        request, "endpoint.html", "endpoints", endpoint=found,
        split=model_page.version_split(variants), chosen=model_page.chosen_rows(found, variants),
        rollouts=[r for r in rollouts if r.endpoint == found.name][:8],
        findings=[f for f in findings if f.endpoint in (found.name, found.id)],
        marks=MARKS,
        special={mark: found for mark, found in zip(MARKS, special, strict=True) if found.total},
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
    items, endpoints = await together(api.story(endpoint), api.endpoints())
    items.sort(key=lambda item: item.time_ms, reverse=True)
    return await render(request, "story.html", "story", items=items, endpoints=endpoints, endpoint=endpoint)


@router.get("/audit")
async def audit(request: Request, kind: str = "", object: str = "") -> Response:
    events = await data(request).events(kind, object, 150)
    events.sort(key=lambda event: event.id, reverse=True)
    return await render(request, "audit.html", "audit", events=events, kind=kind, object=object)


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
        for part in (router, device.router, join.router):
            app.include_router(part)
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
