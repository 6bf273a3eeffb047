"""Whether a new bundle that answers real traffic may stay. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum

from shoal_agent.telemetry import histograms
from shoal_protos.v1 import desired_pb2, telemetry_pb2

EARLY_REQUESTS = 20  # from here on a clear breach ends the watching before its time


class Verdict(str, Enum):
    STAY = "stay"
    GO_BACK = "go back"
    WATCH = "watch"  # not decided yet


@dataclass(frozen=True)
class Traffic:
    """What a bundle answered while it was watched. Latency in microseconds."""

    requests: int = 0
    errors: int = 0
    latency: telemetry_pb2.Histogram = field(default_factory=telemetry_pb2.Histogram)

    def plus(self, window: telemetry_pb2.PlacementWindow) -> Traffic:
        latency = self.latency
        if window.latency.count:
            latency = histograms.merge(latency, window.latency) if latency.count else _copy(window.latency)
        return Traffic(self.requests + window.requests, self.errors + window.errors, latency)


def judge(
    settle: desired_pb2.Settle, baseline_p95_us: float, traffic: Traffic, over: bool
) -> tuple[Verdict, str, str]:
    """The verdict with its short reason and its evidence in a sentence.

    Args:
        baseline_p95_us: this device's own p95 under the bundle before; 0 = unknown, not judged.
        over: whether `settle.seconds` have passed.
    """
    enough = traffic.requests >= max(EARLY_REQUESTS, settle.min_requests)
    if traffic.requests and (over or enough):
        share = traffic.errors / traffic.requests
        if share > settle.max_error_share:
            evidence = (
                f"{traffic.errors} of {traffic.requests} requests failed, "
                f"a share of {settle.max_error_share:.3g} is allowed"
            )
            return Verdict.GO_BACK, "settle: error share", evidence
    judged = settle.max_latency_ratio > 0 and baseline_p95_us > 0 and traffic.latency.count > 0
    if over and judged and traffic.requests >= settle.min_requests:
        p95 = histograms.quantile(traffic.latency, 0.95)
        if p95 > baseline_p95_us * settle.max_latency_ratio:
            evidence = (
                f"p95 {p95 / 1000:.2f} ms against {baseline_p95_us / 1000:.2f} ms before, "
                f"{settle.max_latency_ratio:.3g} times allowed, {traffic.requests} requests"
            )
            return Verdict.GO_BACK, "settle: latency", evidence
    if not over:
        return Verdict.WATCH, "", ""
    return Verdict.STAY, "", f"{traffic.requests} requests, {traffic.errors} errors while watched"


def p95_us(windows: Iterable[telemetry_pb2.Histogram]) -> float:
    """p95 over windows in microseconds, 0 when there was no request."""
    parts = [window for window in windows if window.count]
    return histograms.quantile(histograms.merge_all(parts), 0.95) if parts else 0.0


def _copy(histogram: telemetry_pb2.Histogram) -> telemetry_pb2.Histogram:
    copy = telemetry_pb2.Histogram()
    copy.CopyFrom(histogram)
    return copy
