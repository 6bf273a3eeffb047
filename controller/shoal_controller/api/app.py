"""The HTTP application: every router, one way of refusing, one door check."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from fastapi.responses import JSONResponse
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from shoal_controller import auth
from shoal_controller.api import blobs, devices, events, problems, prometheus, status, stream, tokens
from shoal_controller.api.problems import MEDIA_TYPE
from shoal_controller.api.schemas import Problem
from shoal_controller.app import optional
from shoal_protos import __version__
from shoal_protos.errors import Denied

if TYPE_CHECKING:
    from shoal_controller.app import Controller

PREFIX = "/api/v1"
OWN = (status, devices, tokens, events, stream, blobs, prometheus)
# Routers that other rooms bring, each module with a `router`.
OTHERS = (
    "models",
    "uploads",
    "variants",
    "releases",
    "endpoints",
    "optimizations",
    "rollouts",
    "findings",
    "story",
    "wheels",
)


def create_api(controller: Controller) -> FastAPI:
    """The application for an opened controller: API under `/api/v1`, `/metrics`, `/healthz` and, where
    it is switched on, the dashboard."""
    app = FastAPI(
        title="Shoal controller",
        version=__version__,
        openapi_url=f"{PREFIX}/openapi.json",
        docs_url=None,
        redoc_url=None,
        responses={"default": {"model": Problem, "description": "What was refused and what to do next."}},
    )
    app.state.controller = controller
    app.state.services = controller.services
    app.state.stopping = controller.stopping
    app.state.hub = stream.Hub(controller.services, controller.stopping)
    problems.install(app)
    for module in OWN:
        app.include_router(module.router, prefix=PREFIX)
    for name in OTHERS:
        module = optional(f"shoal_controller.api.{name}")
        if module is not None:
            app.include_router(module.router, prefix=PREFIX)
    app.include_router(prometheus.text_router)
    if controller.settings.ui:
        _add_dashboard(app)
    app.add_middleware(_Door)
    return app


def _add_dashboard(app: FastAPI) -> None:
    web = optional("shoal_controller.web.routes")
    if web is None:
        return
    app.include_router(web.router)
    mount = getattr(web, "mount", None)
    if mount is not None:
        mount(app)


class _Door:
    """Checks host and origin, gives every request an id, adds the headers that browsers should have."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id = secrets.token_hex(8)
        scope.setdefault("state", {})["request_id"] = request_id

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["X-Request-Id"] = request_id
                headers.setdefault("X-Content-Type-Options", "nosniff")
                headers.setdefault("Referrer-Policy", "same-origin")
                headers.setdefault("Cross-Origin-Resource-Policy", "same-origin")
            await send(message)

        try:
            _check(scope)
        except Denied as error:
            await _refusal(error, request_id)(scope, receive, send_with_headers)
            return
        await self.app(scope, receive, send_with_headers)


def _check(scope: Scope) -> None:
    headers = Headers(scope=scope)
    host = headers.get("host", "")
    auth.check_host(host)
    auth.check_origin(scope["method"], host, headers.get("origin"), headers.get("sec-fetch-site"))


def _refusal(error: Denied, request_id: str) -> Any:
    content = Problem(
        title="Forbidden",
        status=403,
        code=error.code,
        detail=error.message,
        remedy=error.remedy,
        request_id=request_id,
    )
    return JSONResponse(content.model_dump(), 403, media_type=MEDIA_TYPE)
