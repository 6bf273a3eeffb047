"""What the pages read and do: every noun of the public API as a typed call.

The dashboard is one more client of `/api/v1`: it calls the same application in process (no socket), so a
page can never show what the API does not say, and `--no-ui` takes nothing away.
"""

from __future__ import annotations

from typing import Any, TypeVar

import httpx
from pydantic import TypeAdapter
from starlette.types import ASGIApp

from shoal_controller.api import schemas as s
from shoal_protos import errors

T = TypeVar("T")

_ERRORS: dict[str, type[errors.ShoalError]] = {
    kind.code: kind
    for kind in (
        errors.InvalidInput,
        errors.NotFound,
        errors.Conflict,
        errors.Denied,
        errors.Overloaded,
        errors.Unavailable,
        errors.TamperedData,
        errors.Unsupported,
    )
}
_BY_STATUS = {404: errors.NotFound, 409: errors.Conflict, 401: errors.Denied, 403: errors.Denied}
_ADAPTERS: dict[Any, TypeAdapter[Any]] = {}


def _adapter(kind: Any) -> TypeAdapter[Any]:
    if kind not in _ADAPTERS:
        _ADAPTERS[kind] = TypeAdapter(kind)
    return _ADAPTERS[kind]


def _raise(answer: httpx.Response) -> None:
    """Turn a problem document back into the domain error that it came from."""
    try:
        problem = s.Problem.model_validate(answer.json())
    except ValueError:
        raise errors.ShoalError(f"The API answered {answer.status_code}.") from None
    kind = _ERRORS.get(problem.code) or _BY_STATUS.get(answer.status_code)
    if kind is None and answer.status_code in (400, 422):
        kind = errors.InvalidInput
    raise (kind or errors.ShoalError)(str(problem.detail or problem.title), str(problem.remedy))


class Data:
    """Typed calls of the API of `app`, on behalf of one signed-in person (`headers`).

    Every method raises the `ShoalError` that the API's problem document names.
    """

    def __init__(self, app: ASGIApp, headers: dict[str, str] | None = None) -> None:
        self._app = app
        self._headers = {"accept-encoding": "identity", **(headers or {})}

    async def _call(self, shape: Any, method: str, path: str, **request: Any) -> Any:
        params = {k: v for k, v in request.pop("params", {}).items() if v not in (None, "")}
        transport = httpx.ASGITransport(app=self._app, raise_app_exceptions=False)
        async with httpx.AsyncClient(
            transport=transport, base_url="http://localhost/api/v1", headers=self._headers
        ) as client:
            answer = await client.request(method, path, params=params, **request)
        if answer.status_code >= 400:
            _raise(answer)
        return _adapter(shape).validate_json(answer.content)

    async def _get(self, shape: Any, path: str, /, **params: Any) -> Any:
        return await self._call(shape, "GET", path, params=params)

    # ------------------------------------------------------------------ reading

    async def status(self) -> s.Status:
        answer: s.Status = await self._get(s.Status, "/status")
        return answer

    async def devices(self, filter: str, sort: str, offset: int, limit: int) -> s.Page[s.Device]:
        answer: s.Page[s.Device] = await self._get(
            s.Page[s.Device], "/devices", filter=filter, sort=sort, offset=offset, limit=limit
        )
        return answer

    async def device(self, id: str) -> s.DeviceDetail:
        answer: s.DeviceDetail = await self._get(s.DeviceDetail, f"/devices/{id}")
        return answer

    async def requests(self, device: str) -> list[s.DeviceRequest]:
        answer: list[s.DeviceRequest] = await self._get(list[s.DeviceRequest], f"/devices/{device}/requests")
        return answer

    async def tokens(self) -> list[s.Token]:
        answer: list[s.Token] = await self._get(list[s.Token], "/tokens")
        return answer

    async def wheels(self) -> list[s.WheelSet]:
        answer: list[s.WheelSet] = await self._get(list[s.WheelSet], "/wheels")
        return answer

    async def classes(self) -> list[s.ClassSummary]:
        answer: list[s.ClassSummary] = await self._get(list[s.ClassSummary], "/classes")
        return answer

    async def models(self) -> list[s.Model]:
        answer: list[s.Model] = await self._get(list[s.Model], "/models")
        return answer

    async def model(self, name: str) -> s.ModelDetail:
        answer: s.ModelDetail = await self._get(s.ModelDetail, f"/models/{name}")
        return answer

    async def variants(self, model: str, version: int | None = None) -> list[s.Variant]:
        answer: list[s.Variant] = await self._get(list[s.Variant], "/variants", model=model, version=version)
        return answer

    async def endpoints(self) -> list[s.Endpoint]:
        answer: list[s.Endpoint] = await self._get(list[s.Endpoint], "/endpoints")
        return answer

    async def endpoint(self, name: str) -> s.Endpoint:
        answer: s.Endpoint = await self._get(s.Endpoint, f"/endpoints/{name}")
        return answer

    async def optimizations(self) -> list[s.Optimization]:
        answer: list[s.Optimization] = await self._get(list[s.Optimization], "/optimizations")
        return answer

    async def optimization(self, id: str) -> s.Optimization:
        answer: s.Optimization = await self._get(s.Optimization, f"/optimizations/{id}")
        return answer

    async def rollouts(self) -> list[s.Rollout]:
        answer: list[s.Rollout] = await self._get(list[s.Rollout], "/rollouts")
        return answer

    async def rollout(self, id: str) -> s.Rollout:
        answer: s.Rollout = await self._get(s.Rollout, f"/rollouts/{id}")
        return answer

    async def findings(self, state: str = "") -> list[s.Finding]:
        answer: list[s.Finding] = await self._get(list[s.Finding], "/findings", state=state)
        return answer

    async def finding(self, id: str) -> s.Finding:
        answer: s.Finding = await self._get(s.Finding, f"/findings/{id}")
        return answer

    async def events(self, kind: str = "", object: str = "", limit: int = 100) -> list[s.Event]:
        answer: list[s.Event] = await self._get(
            list[s.Event], "/events", kind=kind, object=object, limit=limit
        )
        return answer

    async def story(self, endpoint: str = "") -> list[s.StoryItem]:
        answer: list[s.StoryItem] = await self._get(list[s.StoryItem], "/story", endpoint=endpoint)
        return answer

    # ------------------------------------------------------------------ doing

    async def rollout_act(self, id: str, verb: str, reason: str) -> None:
        """`verb` is pause, resume, abort or promote."""
        await self._call(Any, "POST", f"/rollouts/{id}/{verb}", json={"reason": reason})

    async def dismiss(self, finding: str, reason: str) -> None:
        await self._call(Any, "POST", f"/findings/{finding}/dismiss", json={"reason": reason})

    async def cancel(self, optimization: str) -> None:
        await self._call(Any, "POST", f"/optimizations/{optimization}/cancel")

    async def create_token(self, uses: int, ttl_s: int) -> s.TokenCreated:
        answer: s.TokenCreated = await self._call(
            s.TokenCreated, "POST", "/tokens", json={"uses": uses, "ttl_s": ttl_s}
        )
        return answer

    async def revoke_token(self, token: str) -> None:
        await self._call(Any, "DELETE", f"/tokens/{token}")

    async def ask(self, device: str, kind: str) -> None:
        """`kind` is logs, diagnose or profile."""
        await self._call(Any, "POST", f"/devices/{device}/requests", json={"kind": kind})

    async def change(self, device: str, **changes: Any) -> None:
        """`changes` are fields of `DevicePatch`."""
        await self._call(Any, "PATCH", f"/devices/{device}", json=changes)

    async def remove(self, device: str, reason: str) -> None:
        await self._call(Any, "DELETE", f"/devices/{device}", params={"reason": reason})
