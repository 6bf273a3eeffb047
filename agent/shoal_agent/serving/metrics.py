"""Prometheus metrics of the server, from counters that the hot path keeps by itself.

Triton's names are served too. Its names with a unit (`nv_inference_request_duration_us`) break
Prometheus' naming rules, so they come only when asked for: `/metrics?names=triton`. Its counts have no
`_total` and so no type.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

from shoal_agent.serving.observer import Totals
from shoal_agent.telemetry.histograms import bucket_bounds

if TYPE_CHECKING:
    from prometheus_client import Metric

    from shoal_agent.serving.dataplane import DataPlane
    from shoal_agent.serving.loading import Loaded

CONTENT_TYPE = b"text/plain; version=0.0.4; charset=utf-8"
# Upper bounds in seconds: from a small network's 50 us to a stalled second.
BOUNDS = (5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
_LABELS = ("model", "version", "role", "bundle")


class _Collector:
    """Makes metric families of a data plane's counters at each scrape."""

    def __init__(self, plane: DataPlane, triton: bool) -> None:
        self._plane, self._triton = plane, triton

    def collect(self) -> Iterator[Metric]:
        loaded = self._plane.loaded()
        yield from _own(loaded)
        primaries = [part for part in loaded if part.role == "primary"]
        yield from _triton_counts(primaries)
        if self._triton:
            yield from _triton_durations(primaries)


_Read = Callable[[Totals], float]
_COUNTERS: tuple[tuple[str, str, _Read], ...] = (
    ("shoal_requests", "Requests answered.", lambda t: t.success),
    ("shoal_request_failures", "Requests that the model or the queue failed.", lambda t: t.failed),
    ("shoal_requests_invalid", "Requests that did not fit the signature.", lambda t: t.invalid),
    ("shoal_items", "Items inferred.", lambda t: t.items),
    ("shoal_labels", "Labels posted and matched.", lambda t: t.labelled),
    ("shoal_labels_correct", "Matched labels that equal the prediction.", lambda t: t.correct),
    ("shoal_shadow_compared", "Items on which a shadow was compared.", lambda t: t.compared),
    ("shoal_shadow_agreed", "Compared items with the primary's arg-max.", lambda t: t.agreed),
)
_TRITON_COUNTS: tuple[tuple[str, str, _Read], ...] = (
    ("nv_inference_request_success", "Number of successful inference requests.", lambda t: t.success),
    ("nv_inference_request_failure", "Number of failed inference requests.", lambda t: t.failed),
    ("nv_inference_count", "Number of inferences performed.", lambda t: t.items),
    ("nv_inference_exec_count", "Number of model executions.", lambda t: round(t.executions)),
)
_TRITON_DURATIONS: tuple[tuple[str, str, _Read], ...] = (
    ("nv_inference_request_duration_us", "Cumulative request duration.", lambda t: t.success_ns // 1000),
    ("nv_inference_queue_duration_us", "Cumulative queuing duration.", lambda t: t.queue_ns // 1000),
    (
        "nv_inference_compute_infer_duration_us",
        "Cumulative compute duration.",
        lambda t: t.compute_ns // 1000,
    ),
)


def _own(loaded: Iterable[Loaded]) -> Iterator[Metric]:
    from prometheus_client.core import (
        CounterMetricFamily,
        GaugeMetricFamily,
        HistogramMetricFamily,
        InfoMetricFamily,
    )

    parts = list(loaded)
    for name, text, read in _COUNTERS:
        family = CounterMetricFamily(name, text, labels=_LABELS)
        for part in parts:
            family.add_metric(_values(part), read(part.observer.totals))
        yield family
    latency = HistogramMetricFamily(
        "shoal_request_duration_seconds", "Time of a request in the server.", labels=_LABELS
    )
    for part in parts:
        latency.add_metric(_values(part), *_buckets(part))
    yield latency
    single = GaugeMetricFamily(
        "shoal_model_duration_seconds", "Time of one item in the runtime, measured at load.", labels=_LABELS
    )
    for part in parts:
        single.add_metric(_values(part), part.speed.single_ns / 1e9)
    yield single
    about = InfoMetricFamily("shoal_model", "What serves under a name.", labels=_LABELS)
    for part in parts:
        facts = part.facts
        about.add_metric(_values(part), {"runtime": facts.runtime, "runtime_version": facts.version})
    yield about


def _triton_counts(parts: list[Loaded]) -> Iterator[Metric]:
    from prometheus_client.core import UntypedMetricFamily

    for name, text, read in _TRITON_COUNTS:
        family = UntypedMetricFamily(name, text, labels=("model", "version"))
        for part in parts:
            family.add_metric((part.endpoint, part.version), read(part.observer.totals))
        yield family
    pending = UntypedMetricFamily(
        "nv_inference_pending_request_count",
        "Number of requests that wait for execution.",
        labels=("model", "version"),
    )
    for part in parts:
        pending.add_metric((part.endpoint, part.version), part.lane.queued)
    yield pending


def _triton_durations(parts: list[Loaded]) -> Iterator[Metric]:
    from prometheus_client.core import UntypedMetricFamily

    for name, text, read in _TRITON_DURATIONS:
        family = UntypedMetricFamily(name, text, labels=("model", "version"))
        for part in parts:
            family.add_metric((part.endpoint, part.version), read(part.observer.totals))
        yield family


def _values(part: Loaded) -> tuple[str, str, str, str]:
    return part.endpoint, part.version, part.role, part.bundle.digest.removeprefix("sha256:")[:12]


def _buckets(part: Loaded) -> tuple[list[tuple[str, float]], float]:
    """Cumulative counts at `BOUNDS`, and the sum in seconds."""
    histogram = part.observer.latency_so_far().to_proto()
    counts = [0] * (len(BOUNDS) + 1)
    for upper_us, count in bucket_bounds(histogram):
        place = next((i for i, bound in enumerate(BOUNDS) if upper_us <= bound * 1e6), len(BOUNDS))
        counts[place] += count
    names = [*(repr(bound) for bound in BOUNDS), "+Inf"]
    return list(zip(names, itertools.accumulate(counts), strict=True)), histogram.sum / 1e6


def render(plane: DataPlane, *, triton: bool = False) -> bytes:
    """The text that Prometheus scrapes."""
    from prometheus_client import CollectorRegistry, generate_latest

    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collector(plane, triton))
    return generate_latest(registry)
