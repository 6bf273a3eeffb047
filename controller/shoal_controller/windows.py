"""Telemetry windows: from messages to rows, and from fine rows to coarse ones. No clock, little IO."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from google.protobuf.json_format import MessageToDict
from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from shoal_agent.telemetry import histograms
from shoal_controller.store.tables import Window
from shoal_protos.bundle import check_digest
from shoal_protos.errors import InvalidInput
from shoal_protos.v1 import desired_pb2, telemetry_pb2

MAX_PLACEMENTS = 64
MAX_SKETCHES = 256
MAX_BINS = 4096
MAX_WINDOW_MS = 24 * 3600 * 1000
MAX_REASONS = 32

# resolution -> (its bucket in ms, next coarser one, age in ms at which it is folded into that)
HOUR_MS = 3_600_000
FOLDS = (
    ("raw", "5m", 300_000, 2 * HOUR_MS),
    ("5m", "1h", HOUR_MS, 48 * HOUR_MS),
)
FORGET_MS = 30 * 24 * HOUR_MS
FOLD_ROWS = 2000  # in one transaction


def check_window(window: telemetry_pb2.TelemetryWindow) -> None:
    """Refuses what no agent sends. Raises InvalidInput."""
    length = (window.monotonic_end_ns - window.monotonic_start_ns) / 1e6
    if not 0 <= length <= MAX_WINDOW_MS:
        raise InvalidInput(f"A telemetry window of {length:.0f} ms is out of range.")
    if len(window.placements) > MAX_PLACEMENTS:
        raise InvalidInput(f"A telemetry window of {len(window.placements)} placements is too large.")
    for placement in window.placements:
        check_digest(placement.bundle)
        if not placement.endpoint or len(placement.endpoint) > 128:
            raise InvalidInput("A telemetry window names no endpoint.")
        for histogram in (placement.latency, placement.inference):
            histograms.check(histogram)
        for sketches in (placement.inputs, placement.outputs):
            _check_sketches(sketches)


def _check_sketches(sketches: telemetry_pb2.SketchSet) -> None:
    if len(sketches.sketches) > MAX_SKETCHES or any(len(s.counts) > MAX_BINS for s in sketches.sketches):
        raise InvalidInput("A telemetry window's sketches are too large.")


def rows_of(window: telemetry_pb2.TelemetryWindow, device: str, start_ms: int, end_ms: int) -> list[Window]:
    """One row for the device itself and one a placement."""
    base = {"device": device, "start_ms": start_ms, "end_ms": end_ms, "resolution": "raw"}
    rows = [
        Window(
            **base,
            endpoint="",
            bundle="",
            system=system_json(window.system),
            latency=None,
            inputs=None,
            outputs=None,
            detail={"wire_bytes": dict(window.wire_bytes)} if window.wire_bytes else None,
        )
    ]
    for placement in window.placements:
        reasons = dict(sorted(placement.errors_by_reason.items())[:MAX_REASONS])
        detail: dict[str, Any] = {"errors_by_reason": reasons} if reasons else {}
        if placement.label_unmatched:
            detail["label_unmatched"] = placement.label_unmatched
        rows.append(
            Window(
                **base,
                endpoint=placement.endpoint,
                bundle=placement.bundle,
                role="shadow" if placement.role == desired_pb2.ROLE_SHADOW else "primary",
                requests=placement.requests,
                errors=placement.errors,
                labelled=placement.labelled,
                correct=placement.correct,
                latency=_bytes(placement.latency, placement.latency.count),
                inputs=_bytes(placement.inputs, placement.inputs.count),
                outputs=_bytes(placement.outputs, placement.outputs.count),
                system=None,
                detail=detail or None,
            )
        )
    return rows


def _bytes(message: Any, count: int) -> bytes | None:
    return message.SerializeToString(deterministic=True) if count else None


def system_json(system: telemetry_pb2.System) -> dict[str, Any]:
    """System facts as JSON values; what is unmeasured (NaN) is None."""
    values = {
        "cpu_share": system.cpu_share,
        "memory_used_bytes": system.memory_used_bytes,
        "agent_rss_bytes": system.agent_rss_bytes,
        "server_rss_bytes": system.server_rss_bytes,
        "temperature_celsius": system.temperature_celsius,
        "throttled": system.throttled,
        "disk_free_bytes": system.disk_free_bytes,
    }
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in values.items()
    }


def figures_of(window: telemetry_pb2.TelemetryWindow, start_ms: int, end_ms: int) -> dict[str, Any] | None:
    """What a device's view shows of its latest window: all primary placements together."""
    busy = [p for p in window.placements if p.requests and p.role != desired_pb2.ROLE_SHADOW]
    if not busy:
        return None
    latency = histograms.merge_all(p.latency for p in busy)
    return {
        "endpoint": max(busy, key=lambda p: p.requests).endpoint,
        "requests": sum(p.requests for p in busy),
        "errors": sum(p.errors for p in busy),
        "p50_ms": quantile_ms(latency, 0.5),
        "p95_ms": quantile_ms(latency, 0.95),
        "seconds": max(0.001, (end_ms - start_ms) / 1000),
        "end_ms": end_ms,
    }


def quantile_ms(histogram: telemetry_pb2.Histogram, q: float) -> float | None:
    """A quantile in milliseconds; None when nothing was counted."""
    return round(histograms.quantile(histogram, q) / 1000, 4) if histogram.count else None


def merged_latency(rows: Iterable[Window]) -> telemetry_pb2.Histogram:
    """One histogram (microseconds) of several rows."""
    return histograms.merge_all(
        telemetry_pb2.Histogram.FromString(row.latency) for row in rows if row.latency
    )


# ---------------------------------------------------------------------------- retention


def compact(session: Session, now_ms: int) -> int:
    """Folds old windows into coarser ones and forgets the oldest; returns how many rows it read.

    At most a few thousand rows at a time: call again while it returns something.
    """
    handled = 0
    for fine, coarse, bucket_ms, age_ms in FOLDS:
        # Whole buckets only: a bucket is folded when no more fine rows can fall into it.
        before = (now_ms - age_ms) // bucket_ms * bucket_ms
        rows = session.scalars(
            select(Window)
            .where(Window.resolution == fine, Window.start_ms < before)
            .order_by(Window.start_ms)
            .limit(FOLD_ROWS)
        ).all()
        handled += len(rows)
        _fold(session, rows, coarse, bucket_ms)
    gone = session.execute(
        delete(Window).where(Window.resolution == "1h", Window.end_ms < now_ms - FORGET_MS)
    )
    return handled + max(0, int(getattr(gone, "rowcount", 0)))


def _fold(session: Session, rows: Sequence[Window], coarse: str, bucket_ms: int) -> None:
    groups: dict[tuple[str, str, str, int], list[Window]] = defaultdict(list)
    for row in rows:
        groups[(row.device, row.endpoint, row.bundle, row.start_ms // bucket_ms * bucket_ms)].append(row)
    for (device, endpoint, bundle, start), members in groups.items():
        earlier = session.get(Window, (device, endpoint, bundle, start))
        if earlier is not None and earlier.resolution == coarse:
            members.append(earlier)
        merged = merge_rows(members, start, start + bucket_ms, coarse)
        for member in members:
            session.delete(member)
        session.flush()  # a fine row may have the key that the coarse one gets
        session.add(merged)
    session.flush()


def merge_rows(rows: Sequence[Window], start_ms: int, end_ms: int, resolution: str) -> Window:
    """One row that stands for several of one device, endpoint and bundle."""
    first = rows[0]
    return Window(
        device=first.device,
        endpoint=first.endpoint,
        bundle=first.bundle,
        start_ms=start_ms,
        end_ms=end_ms,
        resolution=resolution,
        role=first.role,
        requests=sum(row.requests for row in rows),
        errors=sum(row.errors for row in rows),
        labelled=sum(row.labelled for row in rows),
        correct=sum(row.correct for row in rows),
        latency=_bytes(latency, latency.count) if (latency := merged_latency(rows)).count else None,
        inputs=merge_sketches(row.inputs for row in rows),
        outputs=merge_sketches(row.outputs for row in rows),
        system=_merge_system([row.system for row in rows if row.system]),
        detail=_merge_detail([row.detail for row in rows if row.detail]),
    )


def merge_sketches(parts: Iterable[bytes | None]) -> bytes | None:
    """Merges serialized sketch sets; one of another kind or rule (a new release) starts afresh."""
    from shoal_agent.telemetry import sketches  # numpy: only where windows are folded

    total: telemetry_pb2.SketchSet | None = None
    for part in parts:
        if not part:
            continue
        new = telemetry_pb2.SketchSet.FromString(part)
        try:
            total = new if total is None else sketches.merge(total, new)
        except InvalidInput:
            total = new
    return None if total is None else total.SerializeToString(deterministic=True)


def _merge_system(parts: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Means of shares and sizes, the hottest temperature, throttled if it ever was."""
    if not parts:
        return None
    merged: dict[str, Any] = dict(parts[-1])
    for key in ("cpu_share", "memory_used_bytes", "agent_rss_bytes", "server_rss_bytes"):
        values = [part[key] for part in parts if part.get(key) is not None]
        merged[key] = sum(values) / len(values) if values else None
    hot = [part["temperature_celsius"] for part in parts if part.get("temperature_celsius") is not None]
    merged["temperature_celsius"] = max(hot) if hot else None
    merged["throttled"] = any(part.get("throttled") for part in parts)
    return merged


def _merge_detail(parts: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Adds the counters of all parts."""
    merged: dict[str, Any] = {}
    for part in parts:
        for key, value in part.items():
            if isinstance(value, dict):
                target = merged.setdefault(key, {})
                for name, count in value.items():
                    target[name] = target.get(name, 0) + count
            else:
                merged[key] = merged.get(key, 0) + value
    return merged or None


def message_json(message: Any) -> dict[str, Any]:
    """A protobuf message as JSON values with its field names, NaN as None."""
    values = MessageToDict(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    cleaned: dict[str, Any] = _clean(values)
    return cleaned


def _clean(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _clean(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_clean(item) for item in value]
    return None if value in ("NaN", "Infinity", "-Infinity") else value
