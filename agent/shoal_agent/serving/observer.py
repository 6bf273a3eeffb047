"""What is counted of one bundle under one endpoint: the window that the supervisor pulls, and totals.

Called by the event loop and by gRPC threads, so each method takes the lock once and does little. The
sketches are made in batches, after the answers, and only for a share of the requests under load.
"""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass

import numpy as np

from shoal_agent.runtimes.tensors import Array
from shoal_agent.telemetry.histograms import ExponentialHistogram
from shoal_agent.telemetry.sketches import Sketcher
from shoal_protos.bundle import BoxRule, Signature
from shoal_protos.errors import ShoalError
from shoal_protos.v1.telemetry_pb2 import PlacementWindow

log = logging.getLogger("shoal.serving")

SKETCH_BATCH = 32  # items a sketch update
SKETCH_BYTES = 1 << 20  # pending inputs hold their request bodies alive
SKETCH_NS_PER_REQUEST = 15_000  # the time that sketching may take, averaged over all requests
ALWAYS_SKETCHED = 256  # items a window that are sketched whatever it costs


@dataclass
class Totals:
    """Since the bundle was loaded; what statistics and metrics show."""

    success: int = 0
    success_ns: int = 0
    failed: int = 0
    failed_ns: int = 0
    rejected: int = 0
    invalid: int = 0
    items: int = 0
    executions: float = 0.0  # a request in a batch counts its share of it
    queue_ns: int = 0
    compute_ns: int = 0
    last_inference_ms: int = 0
    labelled: int = 0
    correct: int = 0
    unmatched: int = 0
    compared: int = 0
    agreed: int = 0


class Observer:
    """Counts for one placement. `endpoint`, `bundle` and `role` name it in telemetry."""

    def __init__(self, endpoint: str, bundle: str, role: int, signature: Signature) -> None:
        self.endpoint, self.bundle, self.role = endpoint, bundle, role
        self.totals = Totals()
        self.latency_total = ExponentialHistogram()
        self._lock = threading.Lock()
        self._window = PlacementWindow(endpoint=endpoint, bundle=bundle, role=role)
        self._latency = ExponentialHistogram()
        self._inference = ExponentialHistogram()
        first_in, first_out = signature.inputs[0], signature.outputs[0]
        self._input_name, self._output_name = first_in.name, first_out.name
        self._input_sketcher: Sketcher | None = Sketcher(signature.input_kind, first_in.low, first_in.high)
        kind = signature.output_kind
        rule = signature.boxes or BoxRule()
        self._output_sketcher: Sketcher | None = Sketcher(
            kind, first_out.low, first_out.high, threshold=rule.score_threshold
        )
        self._pending: list[tuple[Array, Array]] = []
        self._pending_items = self._pending_bytes = 0
        self._sketched = self._sketch_ns = self._requests = 0

    def success(
        self,
        items: int,
        latency_ns: int,
        queue_ns: int,
        compute_ns: int,
        executions: float,
        inputs: dict[str, Array],
        outputs: dict[str, Array],
    ) -> bool:
        """Counts one answered request; True when sketches are due (call `sketch` after answering)."""
        with self._lock:
            totals = self.totals
            totals.success += 1
            totals.success_ns += latency_ns
            totals.items += items
            totals.queue_ns += queue_ns
            totals.compute_ns += compute_ns
            totals.executions += executions
            totals.last_inference_ms = time.time_ns() // 1_000_000
            self._requests += 1
            self._latency.record(latency_ns / 1e3)
            self._inference.record(compute_ns / 1e3)
            if (
                self._sketched + self._pending_items < ALWAYS_SKETCHED
                or self._sketch_ns < SKETCH_NS_PER_REQUEST * self._requests
            ):
                values = inputs[self._input_name]
                self._pending.append((values, outputs[self._output_name]))
                self._pending_items += items
                self._pending_bytes += values.nbytes
                return self._pending_items >= SKETCH_BATCH or self._pending_bytes >= SKETCH_BYTES
            return False

    def failure(self, error: ShoalError, latency_ns: int) -> None:
        """Counts a request that fitted the signature and got no answer."""
        reason = error.code
        with self._lock:
            self.totals.failed += 1
            self.totals.failed_ns += latency_ns
            if reason == "overloaded":
                self.totals.rejected += 1
            self._window.requests += 1
            self._window.errors += 1
            self._window.errors_by_reason[reason] += 1

    def invalid(self) -> None:
        """Counts a request that did not fit the signature: the client's fault, so no error of the bundle."""
        with self._lock:
            self.totals.invalid += 1

    def labels(self, count: int, correct: int) -> None:
        with self._lock:
            self.totals.labelled += count
            self.totals.correct += correct
            self._window.labelled += count
            self._window.correct += correct

    def unmatched(self) -> None:
        with self._lock:
            self.totals.unmatched += 1
            self._window.label_unmatched += 1

    def compared(self, count: int, agreed: int) -> None:
        with self._lock:
            self.totals.compared += count
            self.totals.agreed += agreed
            self._window.compared += count
            self._window.agreed += agreed

    def sketch(self) -> None:
        """Summarises what is pending. A shape that the kind cannot have ends sketching for this bundle."""
        with self._lock:
            self._sketch_pending()

    def _sketch_pending(self) -> None:
        pending, items = self._pending, self._pending_items
        self._pending, self._pending_items, self._pending_bytes = [], 0, 0
        if not pending:
            return
        start = time.perf_counter_ns()
        self._input_sketcher = _update(self._input_sketcher, [pair[0] for pair in pending])
        self._output_sketcher = _update(self._output_sketcher, [pair[1] for pair in pending])
        self._sketched += items
        self._sketch_ns += time.perf_counter_ns() - start

    def take(self) -> PlacementWindow:
        """The window since the last call; counting starts anew."""
        with self._lock:
            self._sketch_pending()
            window = self._window
            window.requests += self._latency.count
            if self._latency.count:
                window.latency.CopyFrom(self._latency.to_proto())
                window.inference.CopyFrom(self._inference.to_proto())
                self.latency_total.add(window.latency)
            for sketcher, target in (
                (self._input_sketcher, window.inputs),
                (self._output_sketcher, window.outputs),
            ):
                if sketcher is not None and sketcher.count:
                    target.CopyFrom(sketcher.to_proto())
                    sketcher.reset()
            self._latency.clear()
            self._inference.clear()
            self._sketched = self._sketch_ns = self._requests = 0
            self._window = PlacementWindow(endpoint=self.endpoint, bundle=self.bundle, role=self.role)
            return window

    def latency_so_far(self) -> ExponentialHistogram:
        """Latency since the load, for metrics; a copy."""
        with self._lock:
            result = ExponentialHistogram()
            result.add(self.latency_total.to_proto())
            result.add(self._latency.to_proto())
            return result


def is_empty(window: PlacementWindow) -> bool:
    """True when nothing happened in a window."""
    return not (window.requests or window.labelled or window.label_unmatched or window.compared)


def _update(sketcher: Sketcher | None, arrays: list[Array]) -> Sketcher | None:
    if sketcher is None:
        return None
    by_shape: dict[tuple[int, ...], list[Array]] = {}
    for array in arrays:
        by_shape.setdefault(array.shape[1:], []).append(array)
    try:
        for group in by_shape.values():
            sketcher.update(np.concatenate(group))
    except (ShoalError, ValueError, IndexError) as error:
        log.warning("No more sketches of kind %s for this bundle: %s", sketcher.kind, error)
        return None
    return sketcher
