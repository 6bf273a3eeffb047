"""Errors as problem documents (RFC 9457), mapped once for the whole API."""

from __future__ import annotations

import logging
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.responses import Response

from shoal_controller.api.schemas import Problem
from shoal_protos import errors

log = logging.getLogger("shoal.api")

MEDIA_TYPE = "application/problem+json"
STATUSES = {
    errors.InvalidInput: 422,
    errors.NotFound: 404,
    errors.Conflict: 409,
    errors.Denied: 403,
    errors.Overloaded: 429,
    errors.Unavailable: 503,
    errors.TamperedData: 422,
    errors.Unsupported: 501,
}
_CODES = {404: "not_found", 405: "method_not_allowed", 409: "conflict", 413: "too_large", 422: "invalid"}


def status_of(error: errors.ShoalError) -> int:
    return next((STATUSES[kind] for kind in type(error).__mro__ if kind in STATUSES), 500)


def problem(
    request: Request, status: int, code: str, detail: str, remedy: str = "", headers: Any = None
) -> Response:
    """A problem document as an answer."""
    content = Problem(
        title=HTTPStatus(status).phrase,
        status=status,
        code=code,
        detail=detail,
        remedy=remedy,
        request_id=request_id(request),
    )
    return JSONResponse(content.model_dump(), status, headers, media_type=MEDIA_TYPE)


def request_id(request: Request) -> str:
    found: str = request.scope.get("state", {}).get("request_id", "")
    return found


def _shoal_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, errors.ShoalError)
    return problem(request, status_of(error), error.code, error.message, error.remedy)


def _validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    parts = [
        f"{'.'.join(str(step) for step in item['loc'] if step != 'body') or 'body'}: {item['msg']}"
        for item in error.errors()[:5]
    ]
    return problem(request, 422, "invalid", "; ".join(parts) + ".", "Correct the named fields.")


def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    code = _CODES.get(error.status_code, "error")
    remedy = "See /api/v1/openapi.json for what there is." if error.status_code in (404, 405) else ""
    return problem(request, error.status_code, code, str(error.detail), remedy, error.headers)


def _unexpected(request: Request, error: Exception) -> Response:
    log.error("Request %s failed", request_id(request), exc_info=error)
    return problem(
        request,
        500,
        "internal",
        "The controller failed to answer.",
        f"Its log says why, under the request id {request_id(request)}.",
    )


def install(app: FastAPI) -> None:
    app.add_exception_handler(errors.ShoalError, _shoal_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _unexpected)
