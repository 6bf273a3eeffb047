"""The data plane: one core behind HTTP and gRPC.

A name maps to one `Served` value (a primary and, maybe, a shadow). Loading builds and warms up a new
one beside it and then rebinds the name; requests that run keep the old one alive, and the last of them
lets it go. Nothing on the hot path takes a lock that a load holds.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shoal_agent.runtimes.base import Instance
from shoal_agent.runtimes.tensors import Array
from shoal_agent.serving import samples
from shoal_agent.serving.batching import Done, Lane, Outputs, Speed, run_guarded
from shoal_agent.serving.feedback import KEEP_S, Feedback, class_indices
from shoal_agent.serving.loading import ROLES, Loaded, Source, build
from shoal_agent.serving.observer import Observer, is_empty
from shoal_agent.serving.samples import Recorder
from shoal_agent.serving.shadow import Shadow
from shoal_agent.serving.shared_memory import Regions
from shoal_agent.serving.workers import Pool
from shoal_agent.telemetry.sampling import Policy
from shoal_protos.errors import InvalidInput, NotFound, ShoalError
from shoal_protos.v1.desired_pb2 import PlacementSettings
from shoal_protos.v1.telemetry_pb2 import TelemetryWindow

log = logging.getLogger("shoal.serving")

_NAME_LIMIT = 128
MAX_RETIRED = 16  # replaced bundles whose labels and samples may still come


@dataclass(frozen=True)
class Served:
    """What answers under a name; replaced as a whole."""

    name: str
    primary: Loaded | None = None
    shadow: Shadow | None = None


class DataPlane:
    """The registry of endpoints and everything that happens to a request besides its transport.

    Args:
        loop: the event loop that HTTP runs on; gRPC threads hand deferred work to it.
        executor: threads for models too slow to run inline.
        wait_s: how long a sampled input waits for its label where the policy does not say.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        executor: Pool,
        *,
        workers: int = 1,
        max_queue: int = 256,
        wait_s: float = 3600.0,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.loop, self.executor = loop, executor
        self.feedback = Feedback()
        self.regions = Regions()  # tensors of local applications in shared memory
        self._workers, self._max_queue, self._wait_s = workers, max_queue, wait_s
        self._monotonic = monotonic
        self._served: dict[str, Served] = {}
        self._failed: dict[str, tuple[str, str, str]] = {}  # name -> version, bundle, reason
        self._retired: list[tuple[float, Observer, Recorder]] = []
        self._registry = threading.Lock()
        self._loading = threading.Lock()
        self._window_start_ns = time.monotonic_ns()

    # ------------------------------------------------------------------------ registry

    def find(self, name: str, version: str = "") -> Loaded:
        """The primary that answers under `name`. Raises NotFound for an unknown name or version."""
        served = self._served.get(name)
        if served is None or served.primary is None:
            known = ", ".join(sorted(self._served)) or "none"
            raise NotFound(f"There is no model '{name[:_NAME_LIMIT]}'.", f"Loaded are: {known}.")
        if version and version != served.primary.version:
            raise NotFound(
                f"Model '{name}' has no version '{version[:40]}'.", f"It serves {served.primary.version}."
            )
        return served.primary

    def loaded(self) -> list[Loaded]:
        """Every primary and shadow, by name."""
        found: list[Loaded] = []
        for name in sorted(self._served):
            served = self._served[name]
            found.extend(part for part in (served.primary, served.shadow and served.shadow.loaded) if part)
        return found

    def ready(self) -> bool:
        return not self._failed

    def index(self) -> list[dict[str, str]]:
        """Name, version, state, reason and bundle of everything that is or should be loaded."""
        rows = [
            {
                "name": part.endpoint,
                "version": part.version,
                "state": "READY",
                "reason": "" if part.role == "primary" else part.role,
                "bundle": part.bundle.digest,
            }
            for part in self.loaded()
        ]
        rows.extend(
            {"name": name, "version": version, "state": "UNAVAILABLE", "reason": reason, "bundle": bundle}
            for name, (version, bundle, reason) in sorted(self._failed.items())
        )
        return rows

    def load(
        self,
        name: str,
        store: Path,
        digest: str = "",
        *,
        version: str = "1",
        role: str = "primary",
        settings: PlacementSettings | None = None,
        verify: bool = True,
    ) -> Loaded:
        """Loads a bundle, warms it up and rebinds `name` to it. Blocking: call it on a thread.

        Loading what is loaded already changes its settings only.

        Raises:
            ShoalError: the bundle cannot be opened, loaded or run; what served before still serves.
        """
        _check_name(name, role)
        settings = settings or PlacementSettings()
        with self._loading:
            current = self._current(name, role)
            if (
                current is not None
                and current.bundle.digest == digest
                and current.settings.options == settings.options
                and current.version == version
            ):
                fresh = self._resettle(current, settings)
            else:
                try:
                    source = Source(name, store, digest, version, role, settings, verify)
                    fresh = build(source, self._policy(settings), self._lane)
                except ShoalError as error:
                    if current is None and role == "primary":
                        self._failed[name] = (version, digest, error.message)
                    raise
            self._bind(fresh)
            return fresh

    def _lane(self, instance: Instance, speed: Speed) -> Lane:
        return Lane(instance, speed, self.loop, self.executor, self._workers, self._max_queue)

    def _resettle(self, current: Loaded, settings: PlacementSettings) -> Loaded:
        current.recorder.set_policy(self._policy(settings))
        return dataclasses.replace(current, settings=settings)

    def _policy(self, settings: PlacementSettings) -> Policy:
        sampling = settings.sampling
        return Policy(
            sampling.share,
            sampling.max_samples_per_window,
            sampling.max_bytes_per_day,
            float(sampling.label_wait_seconds or self._wait_s),
        )

    def _bind(self, fresh: Loaded) -> None:
        name = fresh.endpoint
        with self._registry:
            before = self._served.get(name, Served(name))
            if fresh.role == "primary":
                old, after = before.primary, dataclasses.replace(before, primary=fresh)
                self._failed.pop(name, None)
            else:
                old = before.shadow.loaded if before.shadow else None
                shadow = Shadow(fresh, self.executor, self.feedback, self._monotonic)
                after = dataclasses.replace(before, shadow=shadow)
            self._served[name] = after
            if old is not None and old.observer is not fresh.observer:
                self._retire(old)

    def unload(self, name: str, role: str = "primary") -> None:
        """Forgets a role of an endpoint; running requests end on it. Unloading nothing is no error."""
        _check_name(name, role)
        with self._registry:
            served = self._served.get(name)
            if role == "primary":
                self._failed.pop(name, None)
            if served is None:
                return
            if role == "primary":
                old, after = served.primary, dataclasses.replace(served, primary=None)
            else:
                old = served.shadow.loaded if served.shadow else None
                after = dataclasses.replace(served, shadow=None)
            if after.primary is None and after.shadow is None:
                del self._served[name]
            else:
                self._served[name] = after
            if old is not None:
                self._retire(old)

    def _retire(self, old: Loaded) -> None:
        """The instance goes with its last request; what it counted and sampled waits for late labels."""
        self._retired.append((self._monotonic(), old.observer, old.recorder))
        del self._retired[:-MAX_RETIRED]

    def _current(self, name: str, role: str) -> Loaded | None:
        served = self._served.get(name)
        if served is None:
            return None
        if role == "primary":
            return served.primary
        return served.shadow.loaded if served.shadow else None

    # ------------------------------------------------------------------------ requests

    def submit(
        self,
        loaded: Loaded,
        inputs: dict[str, Array],
        items: int,
        request_id: str,
        started_ns: int,
        answer: Callable[[Outputs | ShoalError], None],
    ) -> None:
        """Runs a checked request in the event loop; `answer` gets outputs or the error, exactly once."""

        def done(outcome: Outputs | ShoalError, queue_ns: int, compute_ns: int, share: float) -> None:
            try:  # a defect here must not lose the answers of the others in the batch
                answer(outcome)
                self._after(
                    loaded, inputs, items, request_id, started_ns, outcome, queue_ns, compute_ns, share
                )
            except Exception:
                log.exception("An answer could not be written or counted.")

        self._start(loaded, inputs, items, started_ns, answer, done)

    def _start(
        self,
        loaded: Loaded,
        inputs: dict[str, Array],
        items: int,
        started_ns: int,
        answer: Callable[[Outputs | ShoalError], None],
        done: Done,
    ) -> None:
        try:
            loaded.lane.submit(inputs, items, done)
        except ShoalError as error:
            loaded.observer.failure(error, time.perf_counter_ns() - started_ns)
            answer(error)

    def infer(
        self, loaded: Loaded, inputs: dict[str, Array], items: int, request_id: str, started_ns: int
    ) -> Outputs:
        """Runs a checked request on the calling thread (gRPC). Raises the model's error."""
        begun = time.perf_counter_ns()
        outcome = run_guarded(loaded.instance, inputs)
        spent = time.perf_counter_ns() - begun
        self._after(loaded, inputs, items, request_id, started_ns, outcome, begun - started_ns, spent, 1.0)
        if isinstance(outcome, ShoalError):
            raise outcome
        return outcome

    def _after(
        self,
        loaded: Loaded,
        inputs: dict[str, Array],
        items: int,
        request_id: str,
        started_ns: int,
        outcome: Outputs | ShoalError,
        queue_ns: int,
        compute_ns: int,
        share: float,
    ) -> None:
        """Counts, remembers, samples and mirrors an answered request."""
        spent = time.perf_counter_ns() - started_ns
        observer = loaded.observer
        if isinstance(outcome, ShoalError):
            observer.failure(outcome, spent)
            return
        if observer.success(items, spent, queue_ns, compute_ns, share, inputs, outcome):
            # Later than the answer's way to the socket.
            self.loop.call_soon_threadsafe(self.loop.call_later, 0.002, observer.sketch)
        served = self._served.get(loaded.endpoint)
        shadow = served.shadow if served is not None else None
        wanted = loaded.recorder.wants()
        if not (request_id or shadow or wanted):
            return
        predicted: Array | None = None
        if loaded.predicts_classes:
            scores = outcome[loaded.bundle.config.signature.outputs[0].name]
            predicted = scores.reshape(len(scores), -1).argmax(axis=1)
            if request_id:
                self.feedback.remember(loaded.endpoint, request_id, observer, predicted, self._monotonic())
        if wanted:
            loaded.recorder.offer(inputs, outcome, request_id, self._monotonic())
        if shadow is not None:
            shadow.mirror(inputs, items, request_id, predicted)

    def label(self, name: str, request_id: str, value: object) -> str:
        """Matches one posted label; returns "matched", "duplicate" or "unmatched".

        Raises:
            NotFound, Unsupported, InvalidInput: no such endpoint, no classifier, no such class.
        """
        loaded = self.find(name)
        if not request_id:
            raise InvalidInput("The label has no 'id'.", "Post the id that the request carried.")
        labels = class_indices(loaded.bundle.config.signature, value)
        outcome = self.feedback.label(name, request_id, labels, self._monotonic())
        if outcome == "unmatched":
            loaded.observer.unmatched()
        elif outcome == "matched":
            for recorder in self._recorders():
                if recorder.endpoint == name:
                    recorder.label(request_id, labels)
        return outcome

    # ------------------------------------------------------------------------ telemetry

    def telemetry(self) -> TelemetryWindow:
        """Everything counted since the last call; counters start anew."""
        end = time.monotonic_ns()
        window = TelemetryWindow(
            boot_id=_boot_id(),
            monotonic_start_ns=self._window_start_ns,
            monotonic_end_ns=end,
            wall_end_ms=time.time_ns() // 1_000_000,
        )
        self._window_start_ns = end
        with self._registry:
            observers = [part.observer for part in self.loaded()]
            late = [observer.take() for _, observer, _ in self._retired]
            self._forget_retired()
        window.placements.extend(part for part in late if not is_empty(part))
        window.placements.extend(observer.take() for observer in observers)
        return window

    def write_samples(self, directory: Path) -> list[dict[str, Any]]:
        """Writes what the sampling policies let go as new `.npz` files; what each file is."""
        now = self._monotonic()
        batches = [recorder.collect(now) for recorder in self._recorders()]
        return [samples.write(batch, directory) for batch in batches if batch is not None]

    def _recorders(self) -> list[Recorder]:
        retired = [recorder for _, _, recorder in list(self._retired)]
        return [*retired, *(part.recorder for part in self.loaded())]

    def _forget_retired(self) -> None:
        """Once no label can come any more."""
        now = self._monotonic()
        self._retired = [entry for entry in self._retired if now - entry[0] < KEEP_S or len(entry[2])]


def _check_name(name: str, role: str) -> None:
    if not name or len(name) > _NAME_LIMIT or "/" in name or not name.isprintable():
        raise InvalidInput(f"'{name[:_NAME_LIMIT]}' is not a model name.", "Use printable text without '/'.")
    if role not in ROLES:
        raise InvalidInput(f"'{role[:40]}' is not a role.", "Roles are primary and shadow.")


def _boot_id() -> str:
    from shoal_agent.profile import boot_id

    return boot_id()
