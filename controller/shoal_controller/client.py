"""A typed client of the controller's REST API, used by the command line, the demo and anyone's scripts.

Answers are the API's own schemas. A newer controller may send fields that this version does not know:
they are kept as extra fields of the schema, never refused.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import httpx
from pydantic import BaseModel

from shoal_controller import sending
from shoal_controller.api import schemas
from shoal_protos import errors

M = TypeVar("M", bound=BaseModel)

PREFIX = "/api/v1"
TIMEOUT_S = 30.0  # one request; the stream has none
ERRORS = {
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
_BY_STATUS = {
    400: errors.InvalidInput,
    401: errors.Denied,
    403: errors.Denied,
    404: errors.NotFound,
    409: errors.Conflict,
    413: errors.InvalidInput,
    422: errors.InvalidInput,
    429: errors.Overloaded,
    503: errors.Unavailable,
}


def error_from(response: httpx.Response) -> errors.ShoalError:
    """The Shoal error that a refusing answer stands for; its request id is kept as `request_id`."""
    try:
        body = json.loads(response.content)
    except ValueError:
        body = {}
    if not isinstance(body, dict):
        body = {}
    kind = ERRORS.get(body.get("code", "")) or _BY_STATUS.get(response.status_code, errors.ShoalError)
    detail = body.get("detail") or body.get("title") or f"The controller answered {response.status_code}."
    error = kind(detail if isinstance(detail, str) else json.dumps(detail), str(body.get("remedy") or ""))
    error.request_id = str(body.get("request_id") or "")  # type: ignore[attr-defined]
    return error


class Client:
    """One connection to one controller.

    Every method raises a `shoal_protos.errors.ShoalError`: `Unavailable` when nobody answers at `url`,
    otherwise what the controller said.
    """

    def __init__(
        self,
        url: str,
        token: str = "",
        timeout_s: float = TIMEOUT_S,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self.url = url.rstrip("/")
        headers = {"accept": "application/json"}
        if token:
            headers["authorization"] = f"Bearer {token}"
        try:
            self._http = httpx.Client(
                base_url=self.url + PREFIX,
                headers=headers,
                timeout=timeout_s,
                transport=transport,
                trust_env=False,
            )
        except (httpx.InvalidURL, ValueError) as error:
            raise errors.InvalidInput(
                f"'{url}' is not an address of a controller: {error}.", "Give it as http://HOST:PORT."
            ) from error

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    # -------------------------------------------------------------- plumbing

    def request(self, method: str, path: str, **options: Any) -> httpx.Response:
        """One call below `/api/v1`. Raises the Shoal error of a refusal, `Unavailable` without an answer."""
        try:
            response = self._http.request(method, path, **options)
        except httpx.UnsupportedProtocol as error:
            raise errors.InvalidInput(
                f"'{self.url}' is not an address of a controller.", "Give it as http://HOST:PORT."
            ) from error
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error
        if response.status_code >= 400:
            raise error_from(response)
        return response

    def _unreachable(self, error: Exception) -> errors.Unavailable:
        why = str(error) or type(error).__name__
        return errors.Unavailable(
            f"No controller answers at {self.url} ({why}).",
            "Start one with `shoal up`, or name another with --url, SHOAL_URL or `shoal context use`.",
        )

    def _one(self, kind: type[M], method: str, path: str, **options: Any) -> M:
        return kind.model_validate(self.request(method, path, **options).json(), extra="allow")

    def _many(self, schema: type[M], path: str, /, **params: Any) -> list[M]:
        given = {key: value for key, value in params.items() if value not in (None, "")}
        body = self.request("GET", path, params=given).json()
        items = body["items"] if isinstance(body, dict) else body
        return [schema.model_validate(item, extra="allow") for item in items]

    # -------------------------------------------------------------- fleet

    def status(self) -> schemas.Status:
        return self._one(schemas.Status, "GET", "/status")

    def devices(
        self, filter: str = "", sort: str = "", offset: int = 0, limit: int = 1000
    ) -> schemas.Page[schemas.Device]:
        """One window of the fleet; `filter` is the filter language, `sort` a column, `-column` descending."""
        params = {"filter": filter, "sort": sort, "offset": offset, "limit": limit}
        given = {key: value for key, value in params.items() if value != ""}
        return self._one(schemas.Page[schemas.Device], "GET", "/devices", params=given)

    def all_devices(self, filter: str = "", sort: str = "", page: int = 1000) -> list[schemas.Device]:
        """Every device that the filter lets through, fetched page by page."""
        found: list[schemas.Device] = []
        while True:
            window = self.devices(filter, sort, len(found), page)
            found += window.items
            if not window.items or len(found) >= window.total:
                return found

    def device(self, device: str) -> schemas.DeviceDetail:
        return self._one(schemas.DeviceDetail, "GET", f"/devices/{device}")

    def change_device(self, device: str, patch: schemas.DevicePatch) -> schemas.Device:
        return self._one(
            schemas.Device, "PATCH", f"/devices/{device}", json=patch.model_dump(exclude_unset=True)
        )

    def revoke_device(self, device: str, reason: str = "") -> schemas.Device:
        params = {"reason": reason} if reason else None
        return self._one(schemas.Device, "DELETE", f"/devices/{device}", params=params)

    def ask_device(self, device: str, kind: str) -> schemas.DeviceRequest:
        """Asks for "logs", a "diagnose" or a new "profile"; the device answers when it is there."""
        return self._one(schemas.DeviceRequest, "POST", f"/devices/{device}/requests", json={"kind": kind})

    def device_requests(self, device: str) -> list[schemas.DeviceRequest]:
        """What was asked of a device, newest first."""
        return self._many(schemas.DeviceRequest, f"/devices/{device}/requests")

    def classes(self) -> list[schemas.ClassSummary]:
        return self._many(schemas.ClassSummary, "/classes")

    def fleet_map(self, filter: str = "") -> schemas.FleetMap:
        return self._one(schemas.FleetMap, "GET", "/fleet/map", params={"filter": filter} if filter else None)

    def fleet_latency(self, minutes: float = 60) -> schemas.FleetLatency:
        return self._one(schemas.FleetLatency, "GET", "/fleet/latency", params={"minutes": minutes})

    def tokens(self) -> list[schemas.Token]:
        return self._many(schemas.Token, "/tokens")

    def wheels(self) -> list[schemas.WheelSet]:
        return self._many(schemas.WheelSet, "/wheels")

    def create_token(self, token: schemas.TokenCreate) -> schemas.TokenCreated:
        return self._one(schemas.TokenCreated, "POST", "/tokens", json=token.model_dump())

    def revoke_token(self, token: str) -> None:
        self.request("DELETE", f"/tokens/{token}")

    # -------------------------------------------------------------- models

    def models(self) -> list[schemas.Model]:
        return self._many(schemas.Model, "/models")

    def model(self, name: str) -> schemas.ModelDetail:
        return self._one(schemas.ModelDetail, "GET", f"/models/{name}")

    def upload(self, digest: str) -> schemas.Upload:
        """How much of an upload the controller has. Raises NotFound from one that knows no uploads."""
        return self._one(schemas.Upload, "GET", f"/uploads/{digest}")

    def append(self, digest: str, offset: int, size: int, data: bytes) -> schemas.Upload:
        """Sends one piece of an upload. Raises Conflict when it stands elsewhere than at `offset`."""
        return self._one(
            schemas.Upload,
            "PUT",
            f"/uploads/{digest}",
            params={"offset": offset, "size": size},
            content=data,
            headers={"content-type": "application/octet-stream"},
            timeout=httpx.Timeout(TIMEOUT_S, read=300.0),  # the last piece waits for the whole's hash
        )

    def push(
        self,
        name: str,
        source: Path,
        note: str = "",
        progress: Callable[[sending.Sent], None] | None = None,
    ) -> schemas.Version:
        """Uploads `source` (a tar of the task file and its files) as the next version of a model.

        The upload resumes after a dropped line, also in a later call with the same bytes, and is
        skipped when the controller has them. `progress` is called after every piece.

        Raises:
            Unavailable: no piece got through for a while; what did is kept for a day.
        """
        digest = sending.Sender(self, progress or (lambda _sent: None)).send(source)
        if digest:
            return self._one(
                schemas.Version, "POST", f"/models/{name}/versions", data={"upload": digest, "note": note}
            )
        with source.open("rb") as file:  # an older controller takes it only whole
            return self._one(
                schemas.Version,
                "POST",
                f"/models/{name}/versions",
                files={"source": (source.name, file, "application/x-tar")},
                data={"note": note},
                timeout=httpx.Timeout(TIMEOUT_S, read=300.0, write=300.0),
            )

    def version(self, model: str, number: int) -> schemas.Version:
        return self._one(schemas.Version, "GET", f"/models/{model}/versions/{number}")

    def variants(
        self, model: str = "", version: int | None = None, profile_class: str = ""
    ) -> list[schemas.Variant]:
        return self._many(
            schemas.Variant, "/variants", **{"model": model, "version": version, "class": profile_class}
        )

    def variant(self, variant: str) -> schemas.Variant:
        return self._one(schemas.Variant, "GET", f"/variants/{variant}")

    def releases(self, model: str = "") -> list[schemas.Release]:
        return self._many(schemas.Release, "/releases", model=model)

    def release(self, release: str) -> schemas.Release:
        return self._one(schemas.Release, "GET", f"/releases/{release}")

    def create_release(self, release: schemas.ReleaseCreate) -> schemas.Release:
        return self._one(schemas.Release, "POST", "/releases", json=release.model_dump())

    def optimizations(self) -> list[schemas.Optimization]:
        return self._many(schemas.Optimization, "/optimizations")

    def optimization(self, optimization: str) -> schemas.Optimization:
        return self._one(schemas.Optimization, "GET", f"/optimizations/{optimization}")

    def start_optimization(self, wanted: schemas.OptimizationCreate) -> schemas.Optimization:
        return self._one(schemas.Optimization, "POST", "/optimizations", json=wanted.model_dump())

    def cancel_optimization(self, optimization: str) -> schemas.Optimization:
        return self._one(schemas.Optimization, "POST", f"/optimizations/{optimization}/cancel")

    def report(self, optimization: str) -> str:
        """The optimization's report, a whole HTML page."""
        return self.request(
            "GET", f"/optimizations/{optimization}/report", headers={"accept": "text/html"}
        ).text

    # -------------------------------------------------------------- endpoints and rollouts

    def endpoints(self) -> list[schemas.Endpoint]:
        return self._many(schemas.Endpoint, "/endpoints")

    def endpoint(self, name: str) -> schemas.Endpoint:
        return self._one(schemas.Endpoint, "GET", f"/endpoints/{name}")

    def create_endpoint(self, endpoint: schemas.EndpointCreate) -> schemas.Endpoint:
        return self._one(schemas.Endpoint, "POST", "/endpoints", json=endpoint.model_dump())

    def change_endpoint(self, name: str, patch: schemas.EndpointPatch) -> schemas.Endpoint:
        return self._one(
            schemas.Endpoint, "PATCH", f"/endpoints/{name}", json=patch.model_dump(exclude_unset=True)
        )

    def rollouts(self) -> list[schemas.Rollout]:
        return self._many(schemas.Rollout, "/rollouts")

    def rollout(self, rollout: str) -> schemas.Rollout:
        return self._one(schemas.Rollout, "GET", f"/rollouts/{rollout}")

    def create_rollout(self, wanted: schemas.RolloutCreate) -> schemas.Rollout:
        """Starts a rollout; with `dry_run` the answer says what it would do and nothing is stored."""
        return self._one(schemas.Rollout, "POST", "/rollouts", json=wanted.model_dump())

    def steer_rollout(self, rollout: str, verb: str, reason: str = "") -> schemas.Rollout:
        """`verb` is pause, resume, abort or promote."""
        return self._one(schemas.Rollout, "POST", f"/rollouts/{rollout}/{verb}", json={"reason": reason})

    # -------------------------------------------------------------- the loop

    def findings(self, state: str = "") -> list[schemas.Finding]:
        return self._many(schemas.Finding, "/findings", state=state)

    def finding(self, finding: str) -> schemas.Finding:
        return self._one(schemas.Finding, "GET", f"/findings/{finding}")

    def dismiss_finding(self, finding: str, reason: str = "") -> schemas.Finding:
        return self._one(schemas.Finding, "POST", f"/findings/{finding}/dismiss", json={"reason": reason})

    def events(
        self, kind: str = "", object: str = "", after: int | None = None, limit: int = 200
    ) -> list[schemas.Event]:
        return self._many(schemas.Event, "/events", kind=kind, object=object, after=after, limit=limit)

    def story(self, endpoint: str = "") -> list[schemas.StoryItem]:
        return self._many(schemas.StoryItem, "/story", endpoint=endpoint)

    # -------------------------------------------------------------- streams and bytes

    def watch(self, topics: str = "", timeout_s: float | None = None) -> Iterator[Mapping[str, Any]]:
        """Yields `{"event": NAME, "data": ...}` of the server-sent stream until it or the caller ends.

        `timeout_s` is the longest silence; the stream's keep-alive comments count as life.
        """
        params = {"topics": topics} if topics else None
        limits = httpx.Timeout(TIMEOUT_S, read=timeout_s)
        try:
            with self._http.stream("GET", "/stream", params=params, timeout=limits) as response:
                if response.status_code >= 400:
                    response.read()
                    raise error_from(response)
                yield from parse_events(response.iter_lines())
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error

    def blob(self, digest: str) -> bytes:
        return self.request("GET", f"/blobs/{digest}").content


def parse_events(lines: Iterator[str]) -> Iterator[Mapping[str, Any]]:
    """Reads server-sent events; data that is not JSON stays text."""
    name, data = "message", list[str]()
    for line in lines:
        if not line:
            if data:
                text = "\n".join(data)
                try:
                    yield {"event": name, "data": json.loads(text)}
                except ValueError:
                    yield {"event": name, "data": text}
            name, data = "message", []
        elif not line.startswith(":"):
            field, _, value = line.partition(":")
            value = value.removeprefix(" ")
            if field == "event":
                name = value
            elif field == "data":
                data.append(value)
