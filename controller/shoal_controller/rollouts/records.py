"""Rollouts between rows and frozen values."""

from __future__ import annotations

import base64
import dataclasses
from collections.abc import Mapping
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from shoal_controller.rollouts.machine import DeviceRecord, RolloutState, WaveRecord
from shoal_controller.rollouts.statistics import Period, quantile
from shoal_controller.rollouts.verdict import Verdict
from shoal_controller.store.tables import Rollout, RolloutDevice
from shoal_protos.v1.telemetry_pb2 import Histogram


def load(session: Session, row: Rollout) -> tuple[RolloutState, dict[str, RolloutDevice]]:
    """The state of a rollout and its device rows."""
    rows = {
        r.device: r
        for r in session.scalars(
            select(RolloutDevice).where(RolloutDevice.rollout == row.id).order_by(RolloutDevice.device)
        )
    }
    waves = tuple(
        WaveRecord(w["name"], tuple(w["devices"]), w["state"], w.get("started_ms", 0), w.get("decided_ms", 0))
        for w in row.waves
    )
    devices = {key: _device(r) for key, r in rows.items()}
    state = RolloutState(
        row.state,
        row.wave,
        waves,
        devices,
        str(row.verdict.get("sentence", "")),
        bool(row.verdict.get("aborted")),
        int(row.verdict.get("stopped_ms", 0)),
    )
    return state, rows


def _device(row: RolloutDevice) -> DeviceRecord:
    return DeviceRecord(
        row.device,
        row.wave,
        row.state,
        row.reason,
        row.detail,
        int(row.after.get("started_ms", 0)),
        int(row.after.get("switched_ms", 0)),
    )


def save(
    session: Session, row: Rollout, rows: Mapping[str, RolloutDevice], state: RolloutState, now_ms: int
) -> None:
    """Writes what differs; new devices get rows."""
    row.state, row.wave = state.state, state.wave
    # Assigned anew, since changes inside a JSON value go unseen.
    waves = [_wave(wave, row.waves[i] if i < len(row.waves) else None) for i, wave in enumerate(state.waves)]
    if waves != row.waves:
        row.waves = waves
    current = state.waves[state.wave].verdict if state.waves else None
    summary = {
        **row.verdict,
        "sentence": state.sentence,
        "aborted": state.aborted,
        "stopped_ms": state.stopped_ms,
    }
    if current is not None and state.state in ("running", "paused", "promoted"):
        summary |= {"decision": current.decision, "effects": effects_json(current)}
    elif state.state in ("stopping", "rolled_back", "aborted"):
        summary["decision"] = "stop"
    if summary != row.verdict:
        row.verdict = summary
    if state.ended and not row.finished_ms:
        row.finished_ms = now_ms
    for key, record in state.devices.items():
        _save_device(session, row, rows.get(key), record, now_ms)


def _save_device(
    session: Session, rollout: Rollout, row: RolloutDevice | None, record: DeviceRecord, now_ms: int
) -> None:
    if row is None:
        row = new_device(rollout.id, record.device, record.wave)
        session.add(row)
    if _device(row) == record:
        return
    row.wave, row.state, row.reason, row.detail = record.wave, record.state, record.reason, record.detail
    row.after = {**row.after, "started_ms": record.started_ms, "switched_ms": record.switched_ms}
    row.updated_ms = now_ms


def new_device(rollout: str, device: str, wave: int) -> RolloutDevice:
    """A row of a device that waits for its wave."""
    return RolloutDevice(
        rollout=rollout,
        device=device,
        wave=wave,
        state="waiting",
        reason="",
        detail="",
        baseline={},
        after={},
        probe={},
        logs=None,
        updated_ms=0,
    )


def _wave(wave: WaveRecord, before: Mapping[str, Any] | None) -> dict[str, Any]:
    found = dict((before or {}).get("verdict") or {})
    if wave.verdict is not None:
        found = {
            "decision": wave.verdict.decision,
            "sentence": wave.verdict.sentence,
            "effects": effects_json(wave.verdict),
            "deadline_ms": wave.verdict.deadline_ms,
        }
    return {
        "name": wave.name,
        "devices": list(wave.devices),
        "state": wave.state,
        "started_ms": wave.started_ms,
        "decided_ms": wave.decided_ms,
        "verdict": found,
    }


def effects_json(verdict: Verdict) -> list[dict[str, Any]]:
    return [dataclasses.asdict(effect) for effect in verdict.effects]


def period_json(period: Period) -> dict[str, Any]:
    """A period with the figures that people read and the histogram that the verdict needs."""
    p95 = quantile(period.latency, 0.95) if period.latency is not None else None
    return {
        "requests": period.requests,
        "errors": period.errors,
        "error_share": period.error_share,
        "labelled": period.labelled,
        "correct": period.correct,
        "p95_ms": None if p95 is None else p95.value,
        "latency": ""
        if period.latency is None
        else base64.b64encode(period.latency.SerializeToString(deterministic=True)).decode(),
    }


def period_of(values: Mapping[str, Any]) -> Period:
    """The inverse of `period_json`; an empty mapping is a period without requests."""
    encoded = values.get("latency") or ""
    return Period(
        int(values.get("requests", 0)),
        int(values.get("errors", 0)),
        int(values.get("labelled", 0)),
        int(values.get("correct", 0)),
        Histogram.FromString(base64.b64decode(encoded)) if encoded else None,
    )
