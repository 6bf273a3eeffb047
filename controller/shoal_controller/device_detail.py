"""What one device's page shows beside its view: why its class, figures over time, drift, logs."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from shoal_controller import windows
from shoal_controller.api import schemas
from shoal_controller.blobs import BlobStore
from shoal_controller.devices import DeviceView
from shoal_controller.loop import drift as distances
from shoal_controller.loop.facts import References
from shoal_controller.store.tables import RolloutDevice, Window
from shoal_protos.v1 import agents_pb2, profile_pb2, telemetry_pb2

MAX_WINDOWS = 120
DRIFT_MS = 15 * 60_000  # how far back inputs are judged
DRIFT_ITEMS = 50  # inputs that a judgement needs
DRIFT_CAP = 1000


def class_reason(profile: profile_pb2.Profile, profile_class: str) -> str:
    """Why a device is of its class, in words."""
    runtimes = ", ".join(f"{runtime.name} {runtime.version}" for runtime in profile.runtimes) or "no runtime"
    accelerators = ", ".join(item.name or item.kind for item in profile.accelerators)
    cores = f"{profile.cores} usable core{'' if profile.cores == 1 else 's'}"
    parts = [
        f"{profile.architecture} with {cores}",
        f"instructions {', '.join(profile.isa_features) or 'of the base set'}",
        *([f"accelerators {accelerators}"] if accelerators else []),
        f"runtimes {runtimes}",
        *(["emulated, so its times say nothing about real hardware"] if profile.emulated else []),
    ]
    return f"{profile_class}: {'; '.join(parts)}."


def recent_windows(session: Session, device: str, *, emulated: bool = False) -> list[dict[str, Any]]:
    """The device's latest windows, oldest first, its endpoints together; temperatures where known.
    An emulated device's latencies are unmeasured."""
    rows = session.scalars(
        select(Window)
        .where(Window.device == device, Window.endpoint != "", Window.role == "primary")
        .order_by(Window.end_ms.desc())
        .limit(MAX_WINDOWS)
    ).all()
    by_time: dict[int, list[Window]] = defaultdict(list)
    for row in rows:
        by_time[row.end_ms].append(row)
    temperatures = _temperatures(session, device)
    found = []
    for end_ms, members in sorted(by_time.items()):
        latency = windows.merged_latency(members)
        found.append(
            {
                "time_ms": end_ms,
                "requests": sum(m.requests for m in members),
                "errors": sum(m.errors for m in members),
                "p50_ms": None if emulated else windows.quantile_ms(latency, 0.5),
                "p95_ms": None if emulated else windows.quantile_ms(latency, 0.95),
                "temperature_celsius": temperatures.get(end_ms),
            }
        )
    return found


def _temperatures(session: Session, device: str) -> dict[int, float]:
    """End of a window -> degrees Celsius: a window's system facts lie in a row of their own."""
    rows = session.execute(
        select(Window.end_ms, Window.system)
        .where(Window.device == device, Window.endpoint == "")
        .order_by(Window.end_ms.desc())
        .limit(MAX_WINDOWS)
    )
    readings = ((end_ms, (system or {}).get("temperature_celsius")) for end_ms, system in rows)
    return {end_ms: float(value) for end_ms, value in readings if isinstance(value, (int, float))}


def drift(session: Session, blobs: BlobStore, view: DeviceView, now_ms: int) -> list[schemas.Drift]:
    """How far the device's own newest inputs lie from each serving variant's reference; an endpoint with
    no reference or too few inputs is left out."""
    references = References(blobs)
    found = []
    for placement in view.placements:
        reference, thresholds = references.of(placement.serving) if placement.serving else (None, {})
        if reference is None:
            continue
        rows = session.execute(
            select(Window.inputs, Window.end_ms)
            .where(
                Window.device == view.id,
                Window.endpoint == placement.endpoint,
                Window.bundle == placement.serving,
                Window.end_ms > now_ms - DRIFT_MS,
                Window.inputs.is_not(None),
            )
            .order_by(Window.end_ms)
        ).all()
        inputs = [telemetry_pb2.SketchSet.FromString(row.inputs or b"") for row in rows]
        newest = distances.blocks(inputs, [row.end_ms for row in rows], DRIFT_ITEMS, 1)
        scored = distances.score(reference, newest[0], thresholds, DRIFT_CAP) if newest else None
        if scored is not None:
            value, evidence = scored
            found.append(
                schemas.Drift(
                    endpoint=placement.endpoint,
                    score=value,
                    psi=evidence.get("psi"),
                    statistic=str(evidence.get("psi_statistic", "")),
                    n=evidence["n"],
                    end_ms=evidence["end_ms"],
                )
            )
    return found


def failure_logs(session: Session, device: str, reported: agents_pb2.Reported) -> str:
    """What the device's last failed step carried: of its report, else of its newest rollout that failed."""
    now = "\n".join(status.logs.decode(errors="replace") for status in reported.placements if status.logs)
    if now:
        return now
    kept = session.scalar(
        select(RolloutDevice.logs)
        .where(RolloutDevice.device == device, RolloutDevice.logs.is_not(None))
        .order_by(RolloutDevice.updated_ms.desc())
        .limit(1)
    )
    return (kept or b"").decode(errors="replace")
