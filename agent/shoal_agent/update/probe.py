"""The throwaway process that tries a bundle before it may answer.

It loads the bundle, reproduces the golden outputs, and holds latency, memory and int8 share against
what was measured for the class. A model that crashes its runtime takes this process down and no other.
"""

from __future__ import annotations

import argparse
import base64
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from google.protobuf import json_format

from shoal_agent import processor, runtimes
from shoal_agent.bench import rss_bytes
from shoal_agent.runtimes.base import Instance, Options
from shoal_agent.runtimes.golden import check_golden, example_inputs
from shoal_agent.runtimes.tensors import Array
from shoal_protos.bundle import Bundle, open_bundle
from shoal_protos.errors import ShoalError
from shoal_protos.v1.agents_pb2 import ProbeReport
from shoal_protos.v1.desired_pb2 import Envelope, PlacementSettings

WARM_UP_S, MEASURE_S = 0.2, 0.8
MIN_RUNS, MAX_RUNS = 20, 2000
# Resident memory is counted in pages and arenas: a limit is passed only beyond this.
MEMORY_RATIO, MEMORY_SLACK_BYTES = 1.25, 16 << 20
EMULATED = "emulated"  # what an emulator's times and memory are no figures for: the device it stands for
EMULATED_RUNS = 3
SHARE_SLACK = 0.01


def probe(
    bundle: Bundle, settings: PlacementSettings, *, emulated: bool | None = None
) -> tuple[ProbeReport, str]:
    """Tries a bundle; returns its figures and the reason of a refusal, "" when it passed.

    Reasons are short, for grouping: "golden mismatch", "latency 12.1 ms above 5.0 ms".

    Args:
        emulated: times and memory say nothing about a device, so they are neither reported nor judged;
            None = as this process finds itself.
    """
    emulated = processor.emulated_here() if emulated is None else emulated
    report = ProbeReport(
        latency_p50_ms=math.nan,
        latency_p95_ms=math.nan,
        int8_share=math.nan,
        max_abs_error=math.nan,
        agreement=math.nan,
        unmeasured=EMULATED if emulated else "",
    )
    try:
        runtime = runtimes.find(bundle.config.runtime.name)
        report.runtime_version = runtime.version()
        inputs = example_inputs(bundle)
        before = rss_bytes()
        with runtime.load(bundle, Options.from_proto(settings.options)) as instance:
            golden = check_golden(bundle, instance)
            report.max_abs_error, report.agreement = golden.max_abs_error, golden.agreement
            if not golden.ok:
                return report, "golden mismatch"
            if emulated:
                report.runs = _run(instance, inputs, EMULATED_RUNS)
            else:
                readings = _time(instance, inputs)
                report.memory_bytes = max(0, rss_bytes() - before)
                report.runs = len(readings)
                report.latency_p50_ms = readings[len(readings) // 2]
                report.latency_p95_ms = readings[math.ceil(0.95 * len(readings)) - 1]
            report.int8_share = instance.facts().int8_share
    except ShoalError as error:
        return report, error.message[:200]
    refusal = judge(report, settings)
    report.ok = not refusal
    return report, refusal


def judge(report: ProbeReport, settings: PlacementSettings) -> str:
    """The reason to refuse figures against a placement's settings, "" = none. Pure."""
    promised = settings.promised_int8_share
    if promised > 0 and not report.int8_share >= promised - SHARE_SLACK:
        found = "unmeasured" if math.isnan(report.int8_share) else f"{report.int8_share:.2g}"
        return f"int8 share {found} below {promised:.2g}"
    if report.unmeasured or not settings.HasField("envelope"):
        return ""
    envelope: Envelope = settings.envelope
    limit = envelope.latency_p95_ms * max(1.0, envelope.latency_tolerance)
    if limit > 0 and report.latency_p95_ms > limit:
        return f"latency {_ms(report.latency_p95_ms)} ms above {_ms(limit)} ms"
    allowed = envelope.memory_bytes * MEMORY_RATIO + MEMORY_SLACK_BYTES
    if envelope.memory_bytes and report.memory_bytes > allowed:
        return f"memory {report.memory_bytes >> 20} MiB above {envelope.memory_bytes >> 20} MiB"
    return ""


def _ms(value: float) -> str:
    return f"{value:.1f}" if value >= 1 else f"{value:.2g}"


def _run(instance: Instance, inputs: Sequence[dict[str, Array]], runs: int) -> int:
    """Answers some inputs untimed: a model that crashes on its second one is found here too."""
    for number in range(runs):
        instance.run(inputs[number % len(inputs)])
    return runs


def _time(instance: Instance, inputs: Sequence[dict[str, Array]]) -> list[float]:
    """Sorted milliseconds a run, after a warm-up."""
    start = time.perf_counter()
    runs = 0
    while runs < 5 or time.perf_counter() - start < WARM_UP_S:
        instance.run(inputs[runs % len(inputs)])
        runs += 1
    readings: list[float] = []
    start = time.perf_counter()
    while len(readings) < MAX_RUNS and (len(readings) < MIN_RUNS or time.perf_counter() - start < MEASURE_S):
        began = time.perf_counter_ns()
        instance.run(inputs[len(readings) % len(inputs)])
        readings.append((time.perf_counter_ns() - began) / 1e6)
    return sorted(readings)


def as_json(report: ProbeReport, reason: str) -> str:
    """One JSON object: `ProbeReport` fields by their proto names plus `reason`; NaN is null."""
    fields = json_format.MessageToDict(
        report, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    fields["memory_bytes"] = report.memory_bytes  # a number, where protobuf's JSON has text
    for name, value in fields.items():
        if value in ("NaN", "Infinity", "-Infinity"):
            fields[name] = None
    fields["reason"] = reason
    return json.dumps(fields, allow_nan=False)


def main(argv: Sequence[str], write: Callable[[str], object] = sys.stdout.write) -> int:
    """`probe --store DIR --bundle DIGEST --settings BASE64`: one JSON line; exit 0 passed, 1 refused."""
    parser = argparse.ArgumentParser(prog="shoal-agent probe", description="Tries one bundle.")
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--bundle", default="", help="digest; may be left out where the store holds one")
    parser.add_argument("--settings", default="", help="serialized shoal.v1.PlacementSettings, base64")
    arguments = parser.parse_args(list(argv))
    try:
        settings = PlacementSettings.FromString(base64.b64decode(arguments.settings, validate=True))
    except Exception:  # protobuf's DecodeError and binascii's Error share no base
        sys.stderr.write("--settings is not a serialized PlacementSettings in base64.\n")
        return 2
    try:
        bundle = open_bundle(arguments.store, arguments.bundle)
    except ShoalError as error:
        report, reason = ProbeReport(), error.message[:200]
    else:
        report, reason = probe(bundle, settings)
    write(as_json(report, reason) + "\n")
    return 0 if report.ok else 1
