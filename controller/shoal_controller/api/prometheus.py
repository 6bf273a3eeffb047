"""For Prometheus: the fleet's series, devices to scrape, and whether the controller lives."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from sqlalchemy import select, text

from shoal_controller.api.deps import ServicesDep
from shoal_controller.metrics import registry_of
from shoal_controller.store.tables import Device
from shoal_protos.v1 import profile_pb2

router = APIRouter(tags=["prometheus"])
text_router = APIRouter(include_in_schema=False)

WILDCARDS = frozenset({"", "0.0.0.0", "::"})  # noqa: S104  # compared with, not bound


@router.get("/prometheus/devices")
def device_targets(services: ServicesDep) -> list[dict[str, Any]]:
    """Devices whose metrics port is open, in the form of Prometheus's `http_sd_config`."""
    targets = []
    with services.store.read() as session:
        for row in session.scalars(select(Device).where(Device.revoked.is_(False)).order_by(Device.name)):
            ports = profile_pb2.Profile.FromString(row.profile).ports
            # Bound to every address: then it is reached where it came from.
            host = ports.host if ports.host not in WILDCARDS else services.connections.address(row.id)
            if ports.metrics and host:
                name = f"[{host}]" if ":" in host else host
                targets.append({"targets": [f"{name}:{ports.metrics}"], "labels": _labels(row)})
    return targets


def _labels(row: Device) -> dict[str, str]:
    labels = {
        "device": row.id,
        "device_name": row.name,
        "project": row.project,
        "profile_class": row.profile_class,
    }
    for key, value in row.labels.items():
        safe = "".join(c if c.isascii() and c.isalnum() else "_" for c in key)
        labels[f"label_{safe}"] = str(value)
    return labels


@text_router.get("/metrics")
def get_metrics(request: Request, services: ServicesDep) -> Response:
    """The fleet's series by endpoint and class."""
    state = request.app.state
    registry: CollectorRegistry | None = getattr(state, "metrics", None)
    if registry is None:
        registry = state.metrics = registry_of(services)
    return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)


@text_router.get("/healthz")
def get_health(services: ServicesDep) -> PlainTextResponse:
    """200 when the controller answers and its database does."""
    with services.store.read() as session:
        session.execute(text("SELECT 1"))
    return PlainTextResponse("ok\n")
