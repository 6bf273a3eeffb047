"""The fleet's figures: recent ones read from windows, and the series that `/metrics` shows."""

from __future__ import annotations

import threading
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector
from sqlalchemy import case, func, select
from sqlalchemy.orm import Session

from shoal_agent.telemetry import histograms
from shoal_agent.telemetry.intervals import wilson
from shoal_controller import windows
from shoal_controller.clock import Clock
from shoal_controller.store.repositories import Store
from shoal_controller.store.tables import Device, Finding, Optimization, Rollout, Window
from shoal_protos import __version__
from shoal_protos.v1 import telemetry_pb2

if TYPE_CHECKING:
    from shoal_controller.services import Services

RECENT_SECONDS = 300
MAX_SERIES = 500  # (endpoint, class) pairs; what comes later is counted as "other"
MAX_ROWS = 50_000  # windows read for one answer, newest first
BUCKETS_S = (1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 1e-2, 2.5e-2, 5e-2, 0.1, 0.25, 0.5, 1.0, 2.5)


# ---------------------------------------------------------------------------- recent figures


@dataclass
class Figures:
    """Requests of several windows together. `seconds` is the span that they cover."""

    requests: int = 0
    errors: int = 0
    labelled: int = 0
    correct: int = 0
    seconds: float = 0.0
    latency: telemetry_pb2.Histogram = field(default_factory=telemetry_pb2.Histogram)

    @property
    def p50_ms(self) -> float | None:
        return windows.quantile_ms(self.latency, 0.5)

    @property
    def p95_ms(self) -> float | None:
        return windows.quantile_ms(self.latency, 0.95)

    @property
    def error_share(self) -> float | None:
        return self.errors / self.requests if self.requests else None

    @property
    def requests_per_s(self) -> float:
        return self.requests / self.seconds if self.seconds else 0.0

    def accuracy(self) -> dict[str, Any] | None:
        """Share of posted labels that were predicted right, with its 95 % (Wilson) interval."""
        if not self.labelled:
            return None
        low, high = wilson(self.correct, self.labelled)
        value = self.correct / self.labelled
        return {"value": value, "low": low, "high": high, "n": self.labelled, "source": "telemetry"}

    def add(self, other: Figures) -> None:
        self.requests += other.requests
        self.errors += other.errors
        self.labelled += other.labelled
        self.correct += other.correct
        self.seconds = max(self.seconds, other.seconds)
        self.latency = histograms.merge(self.latency, other.latency)


def recent_figures(
    session: Session, now_ms: int, seconds: int = RECENT_SECONDS
) -> dict[tuple[str, str], Figures]:
    """(endpoint, class) -> figures of primary placements over the last `seconds`."""
    since = now_ms - seconds * 1000
    rows = session.execute(
        select(
            Window.endpoint,
            Device.profile_class,
            Window.requests,
            Window.errors,
            case((Device.quarantined, 0), else_=Window.labelled).label("labelled"),
            case((Device.quarantined, 0), else_=Window.correct).label("correct"),
            Window.latency,
            Window.start_ms,
        )
        .join(Device, Device.id == Window.device)
        .where(Window.endpoint != "", Window.end_ms > since, Window.role == "primary")
        .order_by(Window.end_ms.desc())
        .limit(MAX_ROWS)
    )
    groups: dict[tuple[str, str], list[Any]] = defaultdict(list)
    for row in rows:
        groups[(row[0], row[1])].append(row)
    return {key: _together(members, now_ms, since) for key, members in groups.items()}


def _together(rows: list[Any], now_ms: int, since_ms: int) -> Figures:
    begin = max(since_ms, min(row.start_ms for row in rows))
    return Figures(
        requests=sum(row.requests for row in rows),
        errors=sum(row.errors for row in rows),
        labelled=sum(row.labelled for row in rows),
        correct=sum(row.correct for row in rows),
        seconds=max(1.0, (now_ms - begin) / 1000),
        latency=histograms.merge_all(
            telemetry_pb2.Histogram.FromString(row.latency) for row in rows if row.latency
        ),
    )


def by(index: int, figures: Mapping[tuple[str, str], Figures]) -> dict[str, Figures]:
    """Figures by endpoint (index 0) or class (index 1)."""
    found: dict[str, Figures] = defaultdict(Figures)
    for key, value in figures.items():
        found[key[index]].add(value)
    return dict(found)


class Recent:
    """Recent figures, read at most every other second."""

    def __init__(self, store: Store, clock: Clock, max_age_ms: int = 2000) -> None:
        self._store, self._clock, self._max_age_ms = store, clock, max_age_ms
        self._lock = threading.Lock()
        self._read_ms: int | None = None
        self._figures: dict[tuple[str, str], Figures] = {}

    def figures(self) -> dict[tuple[str, str], Figures]:
        with self._lock:
            now = self._clock()
            if self._read_ms is None or not 0 <= now - self._read_ms <= self._max_age_ms:
                with self._store.read() as session:
                    self._figures = recent_figures(session, now)
                self._read_ms = now
            return self._figures


# ---------------------------------------------------------------------------- counters


@dataclass
class Traffic:
    """What one endpoint's class counted since this controller started."""

    requests: int = 0
    errors: int = 0
    labelled: int = 0
    correct: int = 0
    latency: telemetry_pb2.Histogram = field(default_factory=telemetry_pb2.Histogram)


class TrafficCounters:
    """Cumulative counters by (project, endpoint, class); bounded, thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._by_key: dict[tuple[str, str, str], Traffic] = {}

    def add(self, project: str, profile_class: str, rows: Iterable[Window]) -> None:
        """Counts the placement rows of one accepted window."""
        with self._lock:
            for row in rows:
                if not row.endpoint or row.role != "primary":
                    continue
                traffic = self._traffic((project, row.endpoint, profile_class))
                traffic.requests += row.requests
                traffic.errors += row.errors
                traffic.labelled += row.labelled
                traffic.correct += row.correct
                if row.latency:
                    latency = telemetry_pb2.Histogram.FromString(row.latency)
                    traffic.latency = histograms.merge(traffic.latency, latency)

    def _traffic(self, key: tuple[str, str, str]) -> Traffic:
        if key not in self._by_key and len(self._by_key) >= MAX_SERIES:
            key = ("other", "other", "other")
        return self._by_key.setdefault(key, Traffic())

    def items(self) -> list[tuple[tuple[str, str, str], Traffic]]:
        with self._lock:
            return sorted(self._by_key.items(), key=lambda item: item[0])


def cumulative_buckets(histogram: telemetry_pb2.Histogram) -> list[tuple[str, float]]:
    """Prometheus buckets (upper bound in seconds as text, cumulative count) of an exponential histogram.

    A fine bucket is counted under the first bound at or above its own upper end.
    """
    fine = histograms.bucket_bounds(histogram)
    buckets = [
        (repr(bound), float(sum(count for upper, count in fine if upper <= bound * 1e6 * (1 + 1e-9))))
        for bound in BUCKETS_S
    ]
    return [*buckets, ("+Inf", float(histogram.count))]


# ---------------------------------------------------------------------------- /metrics


class FleetCollector(Collector):
    """The fleet's series, made when they are asked for."""

    def __init__(self, services: Services) -> None:
        self._services = services

    def describe(self) -> Iterator[Metric]:
        return iter(())  # nothing is collected at registration

    def collect(self) -> Iterator[Metric]:
        services = self._services
        yield InfoMetricFamily(
            "shoal_controller", "The controller.", {"version": __version__, "fleet": services.keys.fleet}
        )
        yield self._devices()
        yield from self._traffic()
        yield from self._database()
        yield GaugeMetricFamily(
            "shoal_agent_streams", "Open streams of agents.", value=len(services.connections)
        )
        intake = services.intake
        for name, text, value in (
            ("windows", "Telemetry windows accepted.", intake.windows_total),
            ("duplicates", "Spooled items received again.", intake.duplicates_total),
            ("refused", "Spooled items refused for good.", intake.refused_total),
        ):
            yield CounterMetricFamily(f"shoal_intake_{name}", text, value=value)

    def _devices(self) -> Metric:
        family = GaugeMetricFamily(
            "shoal_devices", "Devices by profile class and status.", labels=("profile_class", "status")
        )
        counts = Counter((view.profile_class, view.status) for view in self._services.fleet.views())
        classes = {name for (name, _), _ in counts.most_common(MAX_SERIES)}
        folded: Counter[tuple[str, str]] = Counter()
        for (name, status), count in counts.items():
            folded[(name if name in classes else "other", status)] += count
        for labels, count in sorted(folded.items()):
            family.add_metric(labels, count)
        return family

    def _traffic(self) -> Iterator[Metric]:
        labels = ("project", "endpoint", "profile_class")
        counters = {
            "requests": CounterMetricFamily(
                "shoal_requests", "Requests that agents answered.", labels=labels
            ),
            "errors": CounterMetricFamily("shoal_request_errors", "Requests that failed.", labels=labels),
            "labelled": CounterMetricFamily(
                "shoal_labels", "Posted labels matched to a request.", labels=labels
            ),
            "correct": CounterMetricFamily(
                "shoal_labels_correct", "Of those, predicted right.", labels=labels
            ),
        }
        durations = HistogramMetricFamily(
            "shoal_request_duration_seconds", "Time of a request in the agent's server.", labels=labels
        )
        for key, traffic in self._services.intake.traffic.items():
            for name, family in counters.items():
                family.add_metric(key, getattr(traffic, name))
            durations.add_metric(key, cumulative_buckets(traffic.latency), traffic.latency.sum / 1e6)
        yield from counters.values()
        yield durations

    def _database(self) -> Iterator[Metric]:
        with self._services.store.read() as session:
            findings = session.execute(
                select(Finding.kind, func.count())
                .where(Finding.state.in_(("open", "acting")))
                .group_by(Finding.kind)
            ).all()
            rollouts = session.execute(select(Rollout.state, func.count()).group_by(Rollout.state)).all()
            work = session.execute(
                select(Optimization.state, func.count()).group_by(Optimization.state)
            ).all()
        for name, text, label, rows in (
            ("shoal_findings_open", "Open findings by kind.", "kind", findings),
            ("shoal_rollouts", "Rollouts by state.", "state", rollouts),
            ("shoal_optimizations", "Optimizations by state.", "state", work),
        ):
            family = GaugeMetricFamily(name, text, labels=(label,))
            for value, count in rows:
                family.add_metric((value,), count)
            yield family


def registry_of(services: Services) -> CollectorRegistry:
    """The registry that `/metrics` prints: the fleet and this process."""
    registry = CollectorRegistry()
    registry.register(FleetCollector(services))
    ProcessCollector(registry=registry)
    return registry
