"""Prometheus metrics of the device: the supervisor's own, merged with the server's, on one port."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from http.server import HTTPServer
from threading import Thread

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from shoal_agent.private import PrivateClient, call
from shoal_protos.errors import InvalidInput, ShoalError

SCRAPE_TIMEOUT_S = 3.0


@dataclass(frozen=True)
class Facts:
    """The supervisor's figures at one moment."""

    fleet: str
    device: str
    version: str
    profile_class: str
    connected: bool
    generation: int
    spool_waiting: int
    spool_bytes: int
    server_up: bool
    server_restarts: int
    rss_bytes: int
    placements: tuple[tuple[str, str, str, str], ...]  # endpoint, role, step, bundle serving


class AgentCollector(Collector):
    """Yields the supervisor's families, then those that the server answers with."""

    def __init__(self, facts: Callable[[], Facts], server: PrivateClient) -> None:
        self._facts, self._server = facts, server

    def collect(self) -> Iterable[Metric]:
        own = list(_own(self._facts()))
        yield from own
        names = {family.name for family in own}
        for family in self._of_server():
            if family.name not in names:
                yield family

    def _of_server(self) -> list[Metric]:
        try:
            text = call(self._server.path, "GET", "/metrics", timeout=SCRAPE_TIMEOUT_S).decode()
            return list(text_string_to_metric_families(text))
        except (ShoalError, ValueError):
            return []  # shoal_agent_server_up says why they are missing


def _own(facts: Facts) -> Iterable[Metric]:
    info = {
        "fleet": facts.fleet,
        "device": facts.device,
        "version": facts.version,
        "profile_class": facts.profile_class,
    }
    yield InfoMetricFamily("shoal_agent", "Who this device is.", info)
    yield _gauge("shoal_agent_connected", "Whether the controller is connected.", facts.connected)
    yield _gauge("shoal_agent_generation", "Generation of the adopted desired state.", facts.generation)
    yield _gauge(
        "shoal_agent_spool_messages",
        "Messages that the controller has not acknowledged.",
        facts.spool_waiting,
    )
    yield _gauge("shoal_agent_spool_bytes", "Size of the spool on disk.", facts.spool_bytes)
    yield _gauge("shoal_agent_server_up", "Whether the server process answers.", facts.server_up)
    yield _gauge("shoal_agent_resident_memory_bytes", "Resident memory of the supervisor.", facts.rss_bytes)
    restarts = CounterMetricFamily("shoal_agent_server_restarts", "Times the server process ended by itself.")
    restarts.add_metric([], facts.server_restarts)
    yield restarts
    placements = GaugeMetricFamily(
        "shoal_agent_placement_info",
        "The step of each placement and the bundle that answers; always 1.",
        labels=["endpoint", "role", "step", "bundle"],
    )
    for labels in facts.placements:
        placements.add_metric(list(labels), 1)
    yield placements


def _gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, text, float(value))


class MetricsServer:
    """Serves `/metrics`.

    Raises:
        InvalidInput: the port is taken.
    """

    def __init__(self, host: str, port: int, collector: Collector) -> None:
        registry = CollectorRegistry()
        registry.register(collector)
        try:
            started = start_http_server(port, host, registry)
        except OSError as error:
            raise InvalidInput(
                f"The metrics port {port} on {host} cannot be opened: {error.strerror}.",
                "Choose another one with --metrics-port, 0 for any free one.",
            ) from error
        self._server: HTTPServer = started[0]
        self._thread: Thread = started[1]
        self.port = int(self._server.server_port)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(5)
