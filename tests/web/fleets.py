"""Fleets to look at: empty, small and huge, as the API would describe them, and an API that serves one.

`Fleet` holds the API's own schema objects; `api()` answers the routes that the dashboard reads, in the shapes
of `shoal_controller.api.schemas`. Everything follows from a seed and one moment.
"""

# ruff: noqa: E501  (tables of sample data read better unwrapped)

from __future__ import annotations

import asyncio
import json
import math
import random
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import JSONResponse
from fastapi.sse import EventSourceResponse, ServerSentEvent

from shoal_controller.api import schemas as s
from shoal_controller.rollouts.gates import Gates
from shoal_protos.errors import Conflict, InvalidInput, NotFound, ShoalError

NOW = 1_795_510_000_000  # 24 Nov 2026, 08:46 UTC
MINUTE = 60_000
ORT = "x86_64.avx512vnni.2c+onnxruntime"
OV = "x86_64.avx512vnni.2c+openvino"
BOTH = "x86_64.avx512vnni.2c+onnxruntime+openvino"
PI4 = "aarch64.neon.4c+litert"
PI5 = "aarch64.dotprod.4c+onnxruntime+litert"
ORIN = "aarch64.orin-nano+tensorrt"
LETTER = {
    "healthy": "h", "updating": "u", "degraded": "d", "drifting": "r", "offline": "o", "revoked": "x",
}  # fmt: skip


def shift() -> None:
    """Let fleets made from here on end now, so that ages on live pages are small."""
    global NOW
    NOW = int(time.time() * 1000)


@dataclass
class Fleet:
    now: int = NOW
    devices: list[s.DeviceDetail] = field(default_factory=list)
    models: list[s.ModelDetail] = field(default_factory=list)
    variants: list[s.Variant] = field(default_factory=list)
    endpoints: list[s.Endpoint] = field(default_factory=list)
    optimizations: list[s.Optimization] = field(default_factory=list)
    rollouts: list[s.Rollout] = field(default_factory=list)
    findings: list[s.Finding] = field(default_factory=list)
    events: list[s.Event] = field(default_factory=list)
    story: list[s.StoryItem] = field(default_factory=list)
    latency: s.FleetLatency = field(default_factory=lambda: s.FleetLatency(times_ms=[], series={}))
    sentence: str = "No devices yet."
    next_step: str = ""
    listeners: list[tuple[asyncio.AbstractEventLoop, asyncio.Queue[dict[str, Any]]]] = field(
        default_factory=list
    )
    tokens: list[s.Token] = field(default_factory=list)
    requests: list[s.DeviceRequest] = field(default_factory=list)
    wheels: list[s.WheelSet] = field(default_factory=list)
    lan: bool = True  # the installer's door is open, so tokens come with a join line
    done: list[tuple[str, str, str]] = field(default_factory=list)  # what people did: object, verb, reason

    def change(self, kind: str, object: str = "") -> None:
        """Tell every open stream that something changed; from any thread."""
        for loop, queue in list(self.listeners):
            message = {"kinds": [kind], "objects": {kind: [object]}}
            loop.call_soon_threadsafe(queue.put_nowait, message)

    def status(self) -> s.Status:
        return s.Status(
            fleet="lab", version="0.1.0", devices=dict(Counter(d.status for d in self.devices)),
            findings_open=sum(f.state in ("open", "acting") for f in self.findings),
            rollouts_running=sum(r.state == "running" for r in self.rollouts),
            optimizations_running=sum(o.state == "running" for o in self.optimizations),
            endpoints=[{"name": e.name, "objective": e.objective, "met": e.p95_ms is not None and e.p95_ms < 5,
                        "p95_ms": e.p95_ms, "error_share": e.error_share, "accuracy": None} for e in self.endpoints],
            sentence=self.sentence, next_step=self.next_step, needs_attention=bool(self.findings),
        )  # fmt: skip


def event(id: int, ago_ms: int, actor: str, verb: str, kind: str, object: str, **more: Any) -> s.Event:
    return s.Event(
        id=id, time_ms=NOW - ago_ms, project="default", actor=actor, verb=verb, kind=kind, object=object,
        before=more.get("before"), after=more.get("after"), reason=more.get("reason", ""),
    )  # fmt: skip


def device(
    index: int, name: str, profile_class: str, status: str, dice: random.Random, full: bool = True
) -> s.DeviceDetail:
    p95 = {ORT: 1.9, OV: 1.4, BOTH: 1.3, PI4: 41.0, PI5: 11.0, ORIN: 3.2}.get(
        profile_class, 8.0
    ) * dice.uniform(0.9, 1.1)
    windows: list[dict[str, Any]] = [
        {"time_ms": NOW - (60 - i) * 10_000, "requests": 180 + int(40 * math.sin(i / 6)) + dice.randrange(20),
         "errors": 1 if i in (31, 32) else 0, "p50_ms": round(p95 * 0.6 * dice.uniform(0.95, 1.05), 3),
         "p95_ms": None if 40 < i < 44 else round(p95 * dice.uniform(0.9, 1.15), 3)} for i in range(60)
    ] if full else []  # fmt: skip
    step = {"updating": "settle", "degraded": "rolled_back"}.get(status, "commit")
    runtimes = profile_class.split("+")[1:]
    return s.DeviceDetail(
        id=f"d{index:05d}", name=name, project="default", profile_class=profile_class, status=status,
        status_reason={"degraded": "p95 is 2.1 times its baseline since 08:31", "drifting": "inputs left the reference: brightness, PSI 0.41",
                       "offline": "no contact for 6 min; next expected 08:41"}.get(status, ""),
        labels={"site": f"lab-{index % 7}"}, version="digits v2" if status == "updating" else "digits v1", p95_ms=round(p95, 2),
        temperature_celsius=round(dice.uniform(44, 63), 1), last_seen_ms=NOW - dice.randrange(1000, 29_000) - (360_000 if status == "offline" else 0),
        joined_ms=NOW - 3 * 86_400_000 - index, agent_version="0.1.0",
        placements=[s.PlacementView(endpoint="digits", wanted="pruned50-int8-onnxruntime", serving="sha256:" + "4b" * 32, variant="plain-fp32-onnxruntime" if status == "updating" else "pruned50-int8-onnxruntime", step=step,
                                    reason="" if step == "commit" else "probe", detail="" if step == "commit" else "p95 3.9 ms, at most 2.5 ms here")],
        profile={"architecture": profile_class.split(".")[0], "cpu_model": "Intel Xeon (Ice Lake)", "isa_features": ["avx2", "avx512f", "avx512_vnni"], "cores": 2, "memory_bytes": 8 << 30,
                 "runtimes": [{"name": r, "version": "1.32.0", "providers": ["CPUExecutionProvider"]} for r in runtimes], "os": "linux 6.1.0 debian 12 glibc 2.36",
                 "ports": {"http": 8000, "grpc": 8001, "metrics": 8002, "host": "127.0.0.1"}, "agent_version": "0.1.0"},
        class_reason=f"{profile_class}: {profile_class.split('.')[0]} with {profile_class.split('+')[0].split('.')[2].rstrip('c') if profile_class.count('.') > 1 else 6} usable cores; instructions {profile_class.split('+')[0].split('.')[1]}; runtimes {', '.join(f'{r} 1.32.0' for r in runtimes)}.",
        system={"cpu_share": 0.31, "memory_used_bytes": 2_310_000_000, "agent_rss_bytes": 41_000_000, "server_rss_bytes": 166_000_000, "disk_free_bytes": 21_000_000_000, "throttled": False},
        generation=7, reported_generation=6 if status == "updating" else 7, windows=windows,
        events=[event(12, 4 * MINUTE, "device:d00000", "switched", "device", f"d{index:05d}", reason="rollout r-0002, wave 2"),
                event(3, 40 * MINUTE, f"device:d{index:05d}", "joined", "device", f"d{index:05d}")] if full else [],
        logs="[08:31:02] probe: loading sha256:4be1...\n[08:31:03] probe: 16 golden cases agree\n[08:31:04] probe: p95 3.9 ms is over the envelope of 2.5 ms\n[08:31:04] update: back to sha256:aa02...\n" if status == "degraded" else "",
    )  # fmt: skip


def _figure(value: float | None, spread: float, n: int = 360) -> s.Figure:
    if value is None:
        return s.Figure(value=None, source="unmeasured")
    return s.Figure(value=value, low=value - spread, high=value + spread, n=n, source="trial")


def _variants(classes: list[str], version: int, serving: dict[str, int]) -> list[s.Variant]:
    #       name, target, precision, accuracy, p95, kB, plain, front
    table = [
        ("plain-fp32-onnxruntime", "onnxruntime", "fp32", 0.978, 2.90, 1240, True, False, []),
        ("plain-fp32-openvino", "openvino", "fp32", 0.978, 2.41, 1252, True, True, []),
        ("plain-int8-onnxruntime", "onnxruntime", "int8", 0.975, 1.72, 330, True, False, [{"technique": "quantization", "parameters": {"scheme": "u8s8"}}]),
        ("pruned30-int8-onnxruntime", "onnxruntime", "int8", 0.9762, 1.31, 214, False, True, [{"technique": "channel_pruning", "parameters": {"share": 0.3}}, {"technique": "distillation", "parameters": {"epochs": 12}}, {"technique": "quantization", "parameters": {"scheme": "u8s8"}}]),
        ("pruned50-int8-onnxruntime", "onnxruntime", "int8", 0.9741, 0.92, 131, False, True, [{"technique": "channel_pruning", "parameters": {"share": 0.5}}, {"technique": "distillation", "parameters": {"epochs": 12}}, {"technique": "quantization", "parameters": {"scheme": "u8s8"}}]),
        ("pruned50-int8-openvino", "openvino", "int8", 0.9736, 0.95, 138, False, False, [{"technique": "channel_pruning", "parameters": {"share": 0.5}}, {"technique": "distillation", "parameters": {"epochs": 12}}, {"technique": "quantization", "parameters": {"preset": "mixed"}}]),
        ("pruned70-int8-onnxruntime", "onnxruntime", "int8", 0.962, 0.61, 72, False, True, [{"technique": "channel_pruning", "parameters": {"share": 0.7}}, {"technique": "distillation", "parameters": {"epochs": 20}}, {"technique": "quantization", "parameters": {"scheme": "u8s8"}}]),
        ("pruned70-fp32-onnxruntime", "onnxruntime", "fp32", 0.965, 0.74, 268, False, False, [{"technique": "channel_pruning", "parameters": {"share": 0.7}}, {"technique": "distillation", "parameters": {"epochs": 20}}]),
    ]  # fmt: skip
    out = []
    for i, (name, target, precision, accuracy, p95, kb, plain, front, recipe) in enumerate(table):
        figures = []
        for c in classes:
            if target not in c and c not in (PI4, ORIN):
                continue
            slow = {PI4: 24.0, PI5: 8.0, ORIN: 2.4}.get(c, 1.0)
            unknown = c == ORIN and not plain
            figures.append(s.VariantFigures(
                profile_class=c, accuracy=_figure(None if unknown else accuracy, 0.006), latency_p95_ms=_figure(None if unknown else round(p95 * slow, 3), p95 * slow * 0.06, 200),
                memory_bytes=s.Figure(value=28e6 + kb * 1000, source="trial"), int8_share=s.Figure(value=0.94 if precision == "int8" else 0.0, source="trial"),
                device="d00001", on_front=front and not unknown, chosen=name.startswith("pruned50-int8-onnx"), serving=serving.get(c, 0) if name == "pruned50-int8-onnxruntime" else 0))  # fmt: skip
        out.append(s.Variant(id=f"k-{version}{i:03d}", model="digits", version=version, name=name, bundle=f"sha256:{i:064x}", target=target, precision=precision,
                             recipe=recipe, size_bytes=kb * 1100, wire_bytes=kb * 1000, plain=plain, created_ms=NOW - 30 * MINUTE, classes=figures))  # fmt: skip
    return out


def _effects(p95: tuple[float, float, float], accuracy: tuple[float, float, float], n: int) -> list[s.Effect]:
    return [
        s.Effect(name="latency_p95", value=p95[0], low=p95[1], high=p95[2], gate=5.0, unit="%", n=n),
        s.Effect(name="error_share", value=0.0, low=-0.1, high=0.1, gate=0.5, unit="points", n=n),
        s.Effect(
            name="accuracy",
            value=accuracy[0],
            low=accuracy[1],
            high=accuracy[2],
            gate=-1.0,
            unit="points",
            n=n,
        ),
    ]


def _rollouts(devices: list[s.DeviceDetail]) -> list[s.Rollout]:
    total = len(devices)
    first, second = max(1, total // 100), max(1, total // 5)
    rest = max(0, total - first - second)
    outcome = [s.RolloutDevice(device=d.id, name=d.name, profile_class=d.profile_class, wave=0 if i < first else 1 if i < first + second else 2,
                               state="failed" if d.status == "degraded" else "switched" if i < first + second else "waiting",
                               reason="probe_latency" if d.status == "degraded" else "", detail="p95 3.9 ms, at most 2.5 ms here" if d.status == "degraded" else "", logs=d.logs)
               for i, d in enumerate(devices)]  # fmt: skip
    waves = [
        s.Wave(name="1", state="passed", devices=first, switched=first, failed=0, effects=_effects((-11.8, -14.9, -8.7), (0.2, -0.4, 0.8), first), decision="go", started_ms=NOW - 20 * MINUTE, decided_ms=NOW - 15 * MINUTE),
        s.Wave(name="20%", state="running", devices=second, switched=max(1, second * 3 // 5), failed=sum(d.state == "failed" for d in outcome), effects=_effects((-9.1, -10.4, -7.8), (-0.1, -0.4, 0.2), second), decision="collecting", started_ms=NOW - 15 * MINUTE),
        s.Wave(name="100%", state="waiting", devices=rest, switched=0, failed=0),
    ]  # fmt: skip
    gates = Gates(latency_p95_increase=0.05, error_share_increase=0.005, accuracy_drop=0.01).to_json()
    live = s.Rollout(id="r-0002", endpoint="digits", from_label="v1", to_label="v2", state="running",
                     sentence=f"Wave 2 of 3 is running. {waves[1].switched} of {second} devices switched; p95 is 9.1 % lower than on v1 (95 % interval 7.8 to 10.4 % lower), accuracy unchanged within 0.4 points. No stop so far.",
                     waves=waves, gates=gates, devices=outcome, actor="loop", reason="adapted to the field", finding="f-0002", created_ms=NOW - 21 * MINUTE, finished_ms=0)  # fmt: skip
    stopped = s.Wave(
        name="canary",
        state="stopped",
        devices=first,
        switched=first,
        failed=0,
        effects=_effects((17.2, 9.1, 25.5), (0.0, -0.6, 0.6), first),
        decision="stop",
        sentence="p95 is at least 9.1 % higher; the gate is 5 %.",
        started_ms=NOW - 90 * MINUTE,
        decided_ms=NOW - 88 * MINUTE,
    )
    past = [
        s.Rollout(id="r-0001", endpoint="digits", from_label="", to_label="v1", state="promoted", sentence=f"All {total} devices serve v1.", waves=[w.model_copy(update={"state": "passed", "switched": w.devices}) for w in waves], gates=gates, actor="person:local", reason="first release", created_ms=NOW - 130 * MINUTE, finished_ms=NOW - 120 * MINUTE),
        s.Rollout(id="r-0003", endpoint="digits", from_label="v1", to_label="v1", state="rolled_back", sentence="Stopped in canary: p95 17.2 % higher (9.1 to 25.5), the gate is 5 %. Every device went back.", waves=[stopped, waves[2]], gates=gates, actor="loop", reason="step along the front", created_ms=NOW - 92 * MINUTE, finished_ms=NOW - 88 * MINUTE),
    ]  # fmt: skip
    return [live, *past]


def _findings(classes: list[str]) -> list[s.Finding]:
    return [
        s.Finding(id="f-0002", kind="input_drift", subject=f"endpoint:e-0001/{classes[0]}", endpoint="digits", profile_class=classes[0], state="acting", severity="warning",
                  sentence="Inputs of digits have left the reference for 4 windows: noise and contrast moved most (PSI 0.63, limit 0.25); accuracy by 41 labels fell from 97.4 % to 73.1 %.",
                  evidence={"psi": 0.63, "psi_statistic": "noise", "psi_threshold": 0.25, "windows": 4, "labels": 41, "accuracy_before": 0.974, "accuracy_now": 0.731, "accuracy": {"low": 0.57, "high": 0.85}},
                  action={"policy": "adapt", "optimization": "o-0003", "rollout": "r-0002", "sentence": "Adapts the original to the field, distils it into the variants, and rolls them out."}, opened_ms=NOW - 26 * MINUTE, closed_ms=0),
        s.Finding(id="f-0003", kind="device_failed", subject="device:d00002", endpoint="", profile_class=classes[-1], state="open", severity="critical", sentence="One device went back to its old variant twice: its p95 is over the envelope of its class.", evidence={"p95_ms": 3.9, "envelope_ms": 2.5, "attempts": 2}, action={}, opened_ms=NOW - 9 * MINUTE, closed_ms=0),
        s.Finding(id="f-0001", kind="new_class", subject=f"endpoint:e-0001/{classes[-1]}", endpoint="digits", profile_class=classes[-1], state="resolved", severity="info", sentence="A class without a variant joined; a search found 3 for it.", evidence={"devices": 1}, action={"policy": "search", "optimization": "o-0002", "sentence": "Searched variants for the class."}, opened_ms=NOW - 110 * MINUTE, closed_ms=NOW - 104 * MINUTE),
    ]  # fmt: skip


def _story() -> list[s.StoryItem]:
    return [
        s.StoryItem(time_ms=NOW - 26 * MINUTE, kind="finding", title="The inputs of digits changed", text="Noise rose and contrast fell on all three classes at once. 41 posted labels say that accuracy fell from 97.4 % to 73.1 % (57 to 85).", link="/findings/f-0002", actor="loop", figures={"psi": 0.63, "accuracy_before": 0.974, "accuracy_now": 0.731}),
        s.StoryItem(time_ms=NOW - 25 * MINUTE, kind="optimization", title="The original was adapted, then distilled", text="Training data moved to the field's measured statistics; on the posted labels the adapted original scores 94.9 % where the old one scored 73.1 %. Its variants were distilled and quantized again.", link="/optimizations/o-0003", actor="worker", figures={"before": 0.731, "after": 0.949, "labels": 41}),
        s.StoryItem(time_ms=NOW - 21 * MINUTE, kind="rollout", title="digits moves from v1 to v2", text="One device first, then a fifth, then all. The canary passed: p95 11.8 % lower, errors unchanged.", link="/rollouts/r-0002", actor="loop", figures={"latency_p95": -11.8, "error_share": 0.0}),
        s.StoryItem(time_ms=NOW - 4 * MINUTE, kind="effect", title="Accuracy is back at 94.6 %", text="88 labels since the switch: 94.6 % (88.6 to 97.9). Of the 24.3 points lost, 88 % are recovered.", link="/endpoints/digits", actor="loop", figures={"accuracy_after": 0.946, "recovered_share": 0.885}),
    ]  # fmt: skip


def _optimizations(model: str = "digits") -> list[s.Optimization]:
    steps = [{"name": n, "state": "done", "message": m, "started_ms": NOW - 24 * MINUTE + i * 20_000, "finished_ms": NOW - 24 * MINUTE + (i + 1) * 20_000}
             for i, (n, m) in enumerate([("analyse", "1.2 M parameters, 88 % in convolutions"), ("adapt", "41 labels, matched augmentation from 12 sketches"), ("prune", "50 % of the channels")])]  # fmt: skip
    return [
        s.Optimization(id="o-0003", kind="adapt", model=model, version=1, endpoint="digits", objective="accuracy>=0.96, latency_p95<=2ms; minimise latency_p95", state="running",
                       progress={"step": "distil", "share": 0.42, "message": "epoch 5 of 12, validation 95.1 %", "steps": [*steps, {"name": "distil", "state": "running", "started_ms": NOW - MINUTE}]}, result={},
                       trials=[{"id": "t-0004", "kind": "timing", "profile_class": ORT, "device": "kiln", "state": "done", "figures": {"latency": {"p50_ms": 0.71, "p95_ms": 0.92, "n": 200}}, "winner": "candidate"}, {"id": "t-0005", "kind": "outputs", "profile_class": OV, "device": "", "state": "pending"}],
                       created_ms=NOW - 25 * MINUTE, started_ms=NOW - 24 * MINUTE, finished_ms=0),
        s.Optimization(id="o-0002", kind="optimize", model=model, version=1, endpoint="digits", objective="accuracy>=0.96, latency_p95<=2ms; minimise latency_p95", state="done", progress={"step": "pack", "share": 1.0, "steps": ["analyse", "plain", "prune", "distil", "quantize", "measure", "pack"]},
                       result={"choice": {ORT: {"feasible": True, "sentence": "pruned50-int8-onnxruntime: 97.4 %, p95 0.92 ms, the fastest that keeps 96 %."}, ORIN: {"feasible": False, "sentence": "No variant is measured on this class yet."}}}, release="l-0001", created_ms=NOW - 110 * MINUTE, started_ms=NOW - 109 * MINUTE, finished_ms=NOW - 104 * MINUTE),
        s.Optimization(id="o-0001", kind="ingest", model=model, version=1, endpoint="", objective="", state="failed", progress={"step": "baseline", "steps": ["unpack", "baseline"]}, result={}, error="evaluation() yielded nothing. Return at least one batch.", created_ms=NOW - 140 * MINUTE, started_ms=NOW - 139 * MINUTE, finished_ms=NOW - 138 * MINUTE),
    ]  # fmt: skip


def _latency(classes: list[str], dice: random.Random) -> s.FleetLatency:
    base = {ORT: 1.9, OV: 1.4, BOTH: 1.3, PI4: 41.0, PI5: 11.0, ORIN: 3.2}
    times = [NOW - (90 - i) * 10_000 for i in range(90)]
    return s.FleetLatency(
        times_ms=times,
        series={
            c: [
                None
                if 30 < i < 34
                else round(base[c] * (1 + 0.06 * math.sin(i / 11 + len(c))) * dice.uniform(0.98, 1.02), 3)
                for i in range(90)
            ]
            for c in classes
        },
    )


def _fill(fleet: Fleet, classes: list[str]) -> Fleet:
    serving = Counter(d.profile_class for d in fleet.devices)
    fleet.variants = _variants(classes, 1, {}) + _variants(classes, 2, dict(serving))
    signature = {
        "inputs": [
            {
                "name": "image",
                "datatype": "UINT8",
                "shape": [-1, 8, 8, 1],
                "layout": "NHWC",
                "low": 0,
                "high": 255,
            }
        ],
        "outputs": [{"name": "logits", "datatype": "FP32", "shape": [-1, 10], "layout": "NC"}],
        "labels": [str(i) for i in range(10)],
    }
    versions = [
        s.Version(
            id=f"v-000{n}",
            model="digits",
            number=n,
            state="ready",
            note=note,
            metric="accuracy",
            baseline=_figure(0.978, 0.008),
            signature=signature,
            created_ms=NOW - 140 * MINUTE // n,
        )
        for n, note in ((1, ""), (2, "adapted to the field"))
    ]
    fleet.models = [
        s.ModelDetail(
            id="m-0001",
            name="digits",
            project="default",
            versions=2,
            latest=2,
            state="ready",
            accuracy=_figure(0.978, 0.008),
            variants=len(fleet.variants),
            endpoints=["digits"],
            findings_open=2,
            created_ms=NOW - 140 * MINUTE,
            version_list=versions,
        )
    ]
    fleet.endpoints = [
        s.Endpoint(
            id="e-0001",
            name="digits",
            project="default",
            model="digits",
            objective="accuracy>=0.96, latency_p95<=2ms; minimise latency_p95",
            filter="",
            signature=signature,
            settings={"sampling": {"share": 0.1}, "settle_s": 10, "policy": {"automatic": True}},
            assignment="a-0001",
            release="l-0001",
            version=1,
            choice=dict.fromkeys(classes, "pruned50-int8-onnxruntime"),
            devices=len(fleet.devices),
            p50_ms=0.7,
            p95_ms=1.4,
            error_share=0.0004,
            accuracy=_figure(0.946, 0.03, 88),
            requests_per_s=58.2,
            rollout="r-0002",
            created_ms=NOW - 130 * MINUTE,
        )
    ]
    fleet.optimizations, fleet.rollouts, fleet.findings, fleet.story = (
        _optimizations(),
        _rollouts(fleet.devices),
        _findings(classes),
        _story(),
    )
    fleet.latency = _latency(classes, random.Random(3))
    log = [
        ("device:d00000", "joined", "device", "d00000"),
        ("person:local", "pushed", "version", "v-0001"),
        ("worker", "finished", "optimization", "o-0002"),
        ("person:local", "created", "rollout", "r-0001"),
        ("controller", "promoted", "rollout", "r-0001"),
        ("loop", "opened", "finding", "f-0002"),
        ("loop", "created", "rollout", "r-0002"),
    ]
    fleet.events = [
        event(
            i + 1,
            (40 - i * 5) * MINUTE,
            a,
            v,
            k,
            o,
            before={"state": "open"} if i % 2 else None,
            after={"state": "running", "wave": i},
            reason="first release" if i == 3 else "",
        )
        for i, (a, v, k, o) in enumerate(log)
    ]
    return fleet  # fmt: skip


def empty() -> Fleet:
    return Fleet()


def small() -> Fleet:
    """The demo's fleet: three devices of three classes in the middle of the second rollout."""
    dice = random.Random(7)
    names = [("kiln", ORT, "healthy"), ("loom", OV, "updating"), ("mill", BOTH, "drifting")]
    fleet = Fleet(devices=[device(i, n, c, st, dice) for i, (n, c, st) in enumerate(names)])
    fleet.sentence = (
        "2 of 3 devices are well; mill is drifting since 08:20. A rollout of digits v2 is running."
    )
    fleet.next_step = "shoal finding list"
    return _fill(fleet, [ORT, OV, BOTH])


def medium() -> Fleet:
    dice = random.Random(5)
    kinds = [(PI4, 90), (PI5, 60), (ORIN, 30), (BOTH, 12)]
    states = ["healthy"] * 88 + ["updating"] * 5 + ["degraded"] * 4 + ["drifting"] + ["offline"] * 2
    fleet = Fleet()
    for c, count in kinds:
        for _ in range(count):
            i = len(fleet.devices)
            fleet.devices.append(
                device(i, f"{c.split('.')[1][:4]}-{i:04d}", c, dice.choice(states), dice, full=i < 4)
            )
    fleet.sentence = "174 of 192 devices are healthy; 8 are degraded."
    return _fill(fleet, [c for c, _ in kinds])


def huge(count: int = 10_000) -> Fleet:
    """Ten thousand devices of six classes."""
    dice = random.Random(11)
    kinds = [PI4] * 38 + [PI5] * 27 + [ORIN] * 14 + [ORT] * 11 + [OV] * 6 + [BOTH] * 4
    states = ["healthy"] * 900 + ["updating"] * 40 + ["degraded"] * 28 + ["drifting"] * 12 + ["offline"] * 20
    short = {PI4: "pi4", PI5: "pi5", ORIN: "orin", ORT: "edge", OV: "nuc", BOTH: "gate"}
    fleet = Fleet()
    for i in range(count):
        c = kinds[i % len(kinds)]
        fleet.devices.append(device(i, f"{short[c]}-{i:05d}", c, dice.choice(states), dice, full=i < 4))
    counts = Counter(d.status for d in fleet.devices)
    fleet.sentence = f"{counts['healthy']:,} of {count:,} devices are healthy; {counts['degraded']} are degraded, {counts['offline']} offline. A rollout of digits v2 is in wave 1."
    return _fill(fleet, [PI4, PI5, ORIN, ORT, OV, BOTH])


# ------------------------------------------------------------------ an API over a fleet


def marks(device: s.Device) -> set[str]:
    found = {"quarantined": device.quarantined, "pinned": bool(device.pins), "emulated": device.emulated,
             "fallback": any(p.fallback for p in device.placements)}  # fmt: skip
    return {word for word, so in found.items() if so}


def _filtered(fleet: Fleet, text: str) -> list[s.DeviceDetail]:
    found = fleet.devices
    for term in text.split():
        name, colon, value = term.partition(":")
        value = value.strip('"')
        if colon and name == "status":
            found = [d for d in found if d.status == value]
        elif colon and name == "class":
            found = [d for d in found if d.profile_class == value]
        elif colon and name == "endpoint":
            found = [d for d in found if value in [p.endpoint for p in d.placements]]
        elif colon and name == "is":
            found = [d for d in found if value in marks(d)]
        elif colon:
            raise InvalidInput(
                f"There is no field '{name}' (at character 1).", "Fields: status, class, name."
            )
        else:
            found = [d for d in found if term in d.name]
    return found


def _one(items: list[Any], key: str, kind: str) -> Any:
    for item in items:
        if key in (item.id, getattr(item, "name", None)):
            return item
    raise NotFound(f"There is no {kind} '{key}'.", f"List them with: shoal {kind} list")


KEYS = {
    "p95": "p95_ms",
    "class": "profile_class",
    "temperature": "temperature_celsius",
    "last_seen": "last_seen_ms",
}


def api(fleet: Fleet) -> FastAPI:
    """The routes that the dashboard reads and acts through, over `fleet`."""
    app = FastAPI()
    router = APIRouter(prefix="/api/v1")

    @app.exception_handler(ShoalError)
    async def problem(_request: Request, error: ShoalError) -> JSONResponse:
        status = {NotFound: 404, InvalidInput: 400, Conflict: 409}.get(type(error), 500)
        body = s.Problem(
            title="Refused", status=status, code=error.code, detail=error.message, remedy=error.remedy
        )
        return JSONResponse(body.model_dump(), status, media_type="application/problem+json")

    @router.get("/status")
    def status() -> s.Status:
        return fleet.status()

    @router.get("/devices")
    def devices(filter: str = "", sort: str = "name", offset: int = 0, limit: int = 36) -> s.Page[s.Device]:
        found = _filtered(fleet, filter)
        key = sort.removeprefix("-")
        key = KEYS.get(key, key)
        found = sorted(found, key=lambda d: getattr(d, key), reverse=sort.startswith("-"))
        kept = [
            s.Device(**{k: getattr(d, k) for k in s.Device.model_fields})
            for d in found[offset : offset + limit]
        ]
        return s.Page[s.Device](items=kept, total=len(found), offset=offset)

    @router.get("/devices/{id}")
    def one_device(id: str) -> s.DeviceDetail:
        return _one(fleet.devices, id, "device")  # type: ignore[no-any-return]

    @router.get("/classes")
    def classes() -> list[s.ClassSummary]:
        found: dict[str, Counter[str]] = {}
        for d in fleet.devices:
            found.setdefault(d.profile_class, Counter())[d.status] += 1
        return [s.ClassSummary(name=n, devices=c.total(), by_status=dict(c)) for n, c in found.items()]

    @router.get("/fleet/map")
    def fleet_map(filter: str = "") -> s.FleetMap:
        found = _filtered(fleet, filter)
        names = sorted({d.profile_class for d in found})
        by_class = [[d for d in found if d.profile_class == n] for n in names]
        return s.FleetMap(classes=names, states=["".join(LETTER[d.status] for d in c) for c in by_class],
                          names=[[d.name for d in c] for c in by_class] if len(found) < 2000 else None)  # fmt: skip

    @router.get("/fleet/latency")
    def latency(minutes: int = 15) -> s.FleetLatency:
        return fleet.latency

    _nouns(router, fleet)
    _actions(router, fleet)
    app.include_router(router)
    return app


def _nouns(router: APIRouter, fleet: Fleet) -> None:
    @router.get("/models")
    def models() -> list[s.Model]:
        return [s.Model(**{k: getattr(m, k) for k in s.Model.model_fields}) for m in fleet.models]

    @router.get("/models/{name}")
    def model(name: str) -> s.ModelDetail:
        return _one(fleet.models, name, "model")  # type: ignore[no-any-return]

    @router.get("/variants")
    def variants(model: str = "", version: int | None = None) -> list[s.Variant]:
        return [v for v in fleet.variants if v.model == model and version in (None, v.version)]

    @router.get("/endpoints")
    def endpoints() -> list[s.Endpoint]:
        return fleet.endpoints

    @router.get("/endpoints/{name}")
    def endpoint(name: str) -> s.Endpoint:
        return _one(fleet.endpoints, name, "endpoint")  # type: ignore[no-any-return]

    @router.get("/optimizations")
    def optimizations() -> list[s.Optimization]:
        return fleet.optimizations

    @router.get("/optimizations/{id}")
    def optimization(id: str) -> s.Optimization:
        return _one(fleet.optimizations, id, "optimization")  # type: ignore[no-any-return]

    @router.get("/rollouts")
    def rollouts() -> list[s.Rollout]:
        return [r.model_copy(update={"devices": []}) for r in fleet.rollouts]

    @router.get("/rollouts/{id}")
    def rollout(id: str) -> s.Rollout:
        return _one(fleet.rollouts, id, "rollout")  # type: ignore[no-any-return]

    @router.get("/findings")
    def findings(state: str = "") -> list[s.Finding]:
        return [f for f in fleet.findings if not state or f.state in state.split(",")]

    @router.get("/findings/{id}")
    def finding(id: str) -> s.Finding:
        return _one(fleet.findings, id, "finding")  # type: ignore[no-any-return]

    @router.get("/events")
    def events(kind: str = "", object: str = "", after: int = 0, limit: int = 100) -> list[s.Event]:
        return [e for e in fleet.events if kind in ("", e.kind) and object in ("", e.object)][-limit:]

    @router.get("/story")
    def story(endpoint: str = "") -> list[s.StoryItem]:
        return fleet.story


def _actions(router: APIRouter, fleet: Fleet) -> None:
    @router.post("/rollouts/{id}/{verb}")
    def act(id: str, verb: str, reason: s.Reason) -> s.Rollout:
        rollout: s.Rollout = _one(fleet.rollouts, id, "rollout")
        if rollout.state not in ("running", "paused"):
            raise Conflict(f"Rollout {id} has ended.", "Create a new one.")
        rollout.state = {"pause": "paused", "resume": "running", "abort": "aborted", "promote": "promoted"}[
            verb
        ]
        fleet.done.append((id, verb, reason.reason))
        fleet.change("rollout", id)
        return rollout

    @router.post("/findings/{id}/dismiss")
    def dismiss(id: str, reason: s.Reason) -> s.Finding:
        finding: s.Finding = _one(fleet.findings, id, "finding")
        finding.state = "dismissed"
        fleet.done.append((id, "dismiss", reason.reason))
        fleet.change("finding", id)
        return finding

    @router.post("/optimizations/{id}/cancel")
    def cancel(id: str) -> s.Optimization:
        job: s.Optimization = _one(fleet.optimizations, id, "optimization")
        job.state = "cancelled"
        fleet.done.append((id, "cancel", ""))
        return job

    _joining(router, fleet)
    _devices(router, fleet)

    @router.get("/stream", response_class=EventSourceResponse)
    async def stream() -> AsyncIterator[ServerSentEvent]:
        queue: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        listener = (asyncio.get_running_loop(), queue)
        fleet.listeners.append(listener)
        try:
            yield ServerSentEvent(comment="open", retry=500)
            while True:
                yield ServerSentEvent(raw_data=json.dumps(await queue.get()), event="change")
        finally:
            fleet.listeners.remove(listener)


JOIN_LINE = ("f=$(mktemp) && curl -fsS http://192.168.1.20:8441/installer/" + "5e1f" * 16 + " -o $f && echo \"" + "5e1f" * 16
             + "  $f\" | sha256sum -c --quiet && SHOAL_JOIN_TOKEN=shj_" + "a1b2c3d4" * 80 + " python3 $f http://192.168.1.20:8441")  # fmt: skip


def _joining(router: APIRouter, fleet: Fleet) -> None:
    @router.get("/tokens")
    def tokens() -> list[s.Token]:
        return fleet.tokens

    @router.post("/tokens")
    def token(body: s.TokenCreate) -> s.TokenCreated:
        now = int(time.time() * 1000)
        made = s.Token(id=f"j-{len(fleet.tokens) + 1:04d}", uses=body.uses, uses_left=body.uses, created_ms=now,
                       expires_ms=now + body.ttl_s * 1000, revoked=False, labels={})  # fmt: skip
        fleet.tokens.insert(0, made)
        note = (
            "" if fleet.lan else "the installer's door is closed. Start the controller with: shoal up --lan"
        )
        return s.TokenCreated(**made.model_dump(), token="shj_" + "a1b2c3d4" * 80, note=note,
                              join_line=JOIN_LINE if fleet.lan else "", installer_sha256="5e1f" * 16 if fleet.lan else "")  # fmt: skip

    @router.delete("/tokens/{id}")
    def revoke(id: str) -> s.Token:
        found: s.Token = _one(fleet.tokens, id, "token")
        found.revoked = True
        fleet.done.append((id, "revoke", ""))
        return found

    @router.get("/wheels")
    def wheels() -> list[s.WheelSet]:
        return fleet.wheels


def _devices(router: APIRouter, fleet: Fleet) -> None:
    @router.get("/devices/{id}/requests")
    def requests(id: str) -> list[s.DeviceRequest]:
        device: s.DeviceDetail = _one(fleet.devices, id, "device")
        return [r for r in reversed(fleet.requests) if r.device == device.id]

    @router.post("/devices/{id}/requests", status_code=202)
    def ask(id: str, body: s.DeviceRequestCreate) -> s.DeviceRequest:
        device: s.DeviceDetail = _one(fleet.devices, id, "device")
        fleet.done.append((device.id, f"ask {body.kind}", ""))
        return asked(fleet, device.id, body.kind, "open")

    @router.patch("/devices/{id}")
    def patch(id: str, body: s.DevicePatch) -> s.Device:
        device: s.DeviceDetail = _one(fleet.devices, id, "device")
        given = body.model_dump(exclude_unset=True)
        reason = given.pop("reason", "")
        fleet.done.append((device.id, json.dumps(given, sort_keys=True), reason))
        labels = device.labels | (given.pop("labels", None) or {})
        for key, value in {**given, "labels": {k: v for k, v in labels.items() if v}}.items():
            setattr(device, key, value)
        fleet.change("device", device.id)
        return s.Device(**{k: getattr(device, k) for k in s.Device.model_fields})

    @router.delete("/devices/{id}")
    def remove(id: str, reason: str = "") -> s.Device:
        device: s.DeviceDetail = _one(fleet.devices, id, "device")
        device.status = "revoked"
        fleet.done.append((device.id, "remove", reason))
        return s.Device(**{k: getattr(device, k) for k in s.Device.model_fields})


def asked(
    fleet: Fleet, device: str, kind: str, state: str, body: str = "", ago_ms: int = 4000
) -> s.DeviceRequest:
    found = s.DeviceRequest(id=f"q-{len(fleet.requests) + 1:04d}", device=device, kind=kind, state=state, body=body,
                            created_ms=NOW - ago_ms - 2000, answered_ms=NOW - ago_ms if state == "answered" else 0)  # fmt: skip
    fleet.requests.append(found)
    return found


DIAGNOSIS = json.dumps({
    "checks": [
        {"name": "clock", "state": "ok", "found": "0.2 s from the controller's", "remedy": ""},
        {"name": "controller", "state": "ok", "found": "192.168.1.20:8443 answers in 4 ms", "remedy": ""},
        {"name": "disk", "state": "failed", "found": "210 MB free of 14.2 GB", "remedy": "Free at least 500 MB: sudo apt-get clean, or a larger card."},
        {"name": "runtime", "state": "ok", "found": "onnxruntime 1.32.0", "remedy": ""},
        {"name": "temperature", "state": "warning", "found": "78 °C, throttled twice today", "remedy": "Give the board a heat sink or shade."},
        {"name": "proxy", "state": "unmeasured", "found": "none is set", "remedy": ""},
    ],
    "facts": {"glibc": "2.36", "python": "3.13.1", "uptime_s": 86000, "network": {"wlan0": "192.168.1.57", "signal": "-67 dBm"}},
    "transitions": [
        {"time_ms": NOW - 240_000, "endpoint": "digits", "from": "probe", "to": "rolled_back", "reason": "p95 3.9 ms, at most 2.5 ms here"},
        {"time_ms": NOW - 244_000, "endpoint": "digits", "from": "verify", "to": "probe", "reason": ""},
        {"time_ms": NOW - 250_000, "endpoint": "digits", "from": "fetch", "to": "verify", "reason": ""},
    ],
})  # fmt: skip
CAUSES = ["The agent does not run. On the device: systemctl status shoal-agent",
          "It cannot reach the controller at 192.168.1.20:8443: a firewall, another network, or an address that changed. On the device: shoal-agent doctor",
          "Its clock is far off, so that certificates look invalid. On the device: timedatectl"]  # fmt: skip


def troubled() -> Fleet:
    """One device for every way of not being plainly well; each is named after its state."""
    fleet = small()
    dice = random.Random(3)
    start = len(fleet.devices)

    def add(name: str, profile_class: str, status: str, **changes: Any) -> s.DeviceDetail:
        base = device(start + len(fleet.devices), name, profile_class, status, dice)
        found = base.model_copy(update=changes)
        found.labels = {"site": "lab", "room": "kitchen"}
        fleet.devices.append(found)
        return found

    well = add("well", BOTH, "healthy", connected=True, expected_ms=NOW + 12_000)
    for i, window in enumerate(well.windows):
        window["temperature_celsius"] = 47 + 3 * math.sin(i / 9)
    well.drift = [s.Drift(endpoint="digits", score=0.42, psi=0.05, statistic="brightness", n=240, end_ms=NOW)]
    add("never", PI5, "offline", status_reason="it has joined but never connected", last_seen_ms=0, joined_ms=NOW - 180_000,
        version="", p95_ms=None, temperature_celsius=None, placements=[], windows=[], system={}, causes=CAUSES,
        generation=1, reported_generation=0, desired_ms=NOW - 180_000, next_step="On the device: shoal-agent doctor",
        events=[event(3, 180_000, "device:never", "joined", "device", "never")])  # fmt: skip
    add("away", PI4, "offline", next_step="Check its power and network; it serves on meanwhile.")
    failing = add("failing", ORT, "degraded", connected=True, status_reason="digits: rolled back, probe: latency over the envelope",
                  next_step="Its logs are below. It serves on with what it had; a newer variant or a rollout tries again.")  # fmt: skip
    failing.placements[0].variant = "plain-fp32-onnxruntime"
    asked(fleet, failing.id, "diagnose", "answered", DIAGNOSIS)
    asked(fleet, failing.id, "logs", "open")
    lent = add("lent", PI5, "healthy", connected=True)
    lent.placements[0].fallback = True
    lent.placements[0].variant = "plain-fp32-onnxruntime"
    add("qemu", PI5, "healthy", connected=True, emulated=True, p95_ms=None,
        class_reason=f"{PI5}: aarch64 with 4 usable cores; instructions dotprod; runtimes onnxruntime 1.23.2; emulated, so its times say nothing about real hardware.")  # fmt: skip
    for window in named(fleet, "qemu").windows:
        window["p50_ms"] = window["p95_ms"] = None
    add("quiet", ORT, "healthy", connected=True, quarantined=True)
    pinned = add("kept", ORT, "healthy", connected=True, pins={"digits": fleet.variants[0].id})
    pinned.placements[0].pinned = True
    pinned.placements[0].wanted = pinned.placements[0].variant = fleet.variants[0].name
    behind = add("behind", BOTH, "updating", connected=True, desired_ms=NOW - 190_000)
    behind.placements[0].current = False
    fleet.tokens = [s.Token(id="j-0001", uses=10, uses_left=7, created_ms=NOW, expires_ms=int(time.time() * 1000) + 3_600_000, revoked=False, labels={"site": "lab"}),
                    s.Token(id="j-0000", uses=1, uses_left=0, created_ms=NOW, expires_ms=NOW, revoked=False, labels={})]  # fmt: skip
    fleet.wheels = [s.WheelSet(platform="aarch64", python="3.13", extras=["agent", "onnxruntime"], files=21, size=61_000_000, glibc="2.28", added_ms=NOW)]  # fmt: skip
    return fleet


def named(fleet: Fleet, name: str) -> s.DeviceDetail:
    return next(d for d in fleet.devices if d.name == name)
