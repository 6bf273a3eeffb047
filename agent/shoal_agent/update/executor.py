"""Carries out what the update machine decides: one action per step, saved before it is started.

Every change of state goes `machine.step` -> save (synced) -> cancel the old action -> start the new
step's action. An action ends in exactly one event. At start each saved state gets `Started` and its
step's action again, so a crash anywhere resumes or rolls back.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections import defaultdict, deque
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from shoal_agent.clock import Clock
from shoal_agent.fs import Fs, durable_write
from shoal_agent.link.base import Backoff, Source
from shoal_agent.trust import SERVE, Trust
from shoal_agent.update import machine, needs, settle
from shoal_agent.update.machine import PlacementState, Step, Wanted
from shoal_agent.update.store import BundleStore
from shoal_protos.errors import Denied, NotFound, ShoalError, TamperedData, Unavailable
from shoal_protos.v1 import agents_pb2, desired_pb2, profile_pb2, telemetry_pb2

log = logging.getLogger(__name__)

Key = tuple[str, int]  # endpoint, role
SCHEMA = 1
NOT_FOUND_TRIES = 5
RESTORE_TRIES = 3
SAVE_RETRY_S = 5.0
BASELINE_WINDOWS = 30
LOG_BYTES = 64 * 1024
_ACTIVE = frozenset(
    {Step.FETCH, Step.VERIFY, Step.PROBE, Step.SWITCH, Step.SETTLE, Step.ROLL_BACK, Step.UNLOAD}
)


class Server(Protocol):
    """The process that answers. Calls wait until it is up."""

    async def load(self, endpoint: str, role: int, wanted: Wanted) -> None:
        """Loads, warms up and rebinds the name; the old instance lives until its last request.

        Raises:
            Unavailable: the server went away meanwhile.
            ShoalError: it refused the bundle.
        """
        ...

    async def unload(self, endpoint: str, role: int) -> None: ...


class Prober(Protocol):
    """Tries a bundle in a throwaway process."""

    async def probe(self, wanted: Wanted) -> tuple[agents_pb2.ProbeReport, str]:
        """Returns the figures and the reason of a refusal, "" when it passed."""
        ...


def _log_bug(error: BaseException) -> None:
    log.error("the update machine failed", exc_info=error)


class _NotNow(Exception):
    """Trust lets nothing be installed now."""


class Updates:
    """All placements of this device.

    Args:
        path: `state/placements.json`.
        pull: pulls telemetry from the server now, which ends in `observe`.
        failure_logs: the last logs of supervisor, server and probe.
        on_change: told after every change of any state.
        on_transition: told endpoint, step before ("" = just named), step after and reason.
        memory_available: bytes that a new instance may take.
        on_bug: told of an exception that no rule of the machine foresees.
    """

    def __init__(
        self,
        path: Path,
        *,
        trust: Trust,
        store: BundleStore,
        source: Source,
        server: Server,
        prober: Prober,
        profile: Callable[[], profile_pb2.Profile],
        pull: Callable[[], Awaitable[None]],
        clock: Clock,
        fs: Fs,
        failure_logs: Callable[[], bytes] = bytes,
        on_change: Callable[[], None] = lambda: None,
        on_transition: Callable[[str, str, str, str], None] = lambda *facts: None,
        memory_available: Callable[[], int] = lambda: 1 << 62,
        on_bug: Callable[[BaseException], None] = _log_bug,
    ) -> None:
        self._path, self._trust, self._store, self._source = path, trust, store, source
        self._server, self._prober, self._profile, self._pull = server, prober, profile, pull
        self._clock, self._fs = clock, fs
        self._failure_logs, self._on_change = failure_logs, on_change
        self._on_transition = on_transition
        self._memory_available = memory_available
        self._states: dict[Key, PlacementState] = {}
        self._tasks: dict[Key, asyncio.Task[None]] = {}
        self._restores: dict[Key, asyncio.Task[None]] = {}
        self._live: dict[Key, str] = {}  # bundle that the server really has loaded
        self._locks: defaultdict[Key, asyncio.Lock] = defaultdict(asyncio.Lock)  # the server's side
        self._progress: dict[Key, float] = {}
        self._traffic: dict[Key, settle.Traffic] = {}
        self._baselines: dict[Key, tuple[str, deque[telemetry_pb2.Histogram]]] = {}
        self._keep: frozenset[str] = frozenset()
        self._stopped = False
        self._on_bug = on_bug
        self.measuring = asyncio.Lock()  # a probe and a trial must not disturb each other
        self._actions: Mapping[Step, Callable[[PlacementState], Awaitable[machine.Event]]] = {
            Step.FETCH: self._fetch,
            Step.VERIFY: self._verify,
            Step.PROBE: self._probe,
            Step.SWITCH: self._switch,
            Step.SETTLE: self._settle,
            Step.ROLL_BACK: self._roll_back,
            Step.UNLOAD: self._unload,
        }

    # ------------------------------------------------------------------ what others call

    def start(self) -> None:
        """Takes up every saved state where it stood."""
        self._states = {(state.endpoint, state.role): state for state in self._load()}
        resumed = {key: machine.step(state, machine.Started()) for key, state in self._states.items()}
        changed = resumed != self._states
        for key, state in resumed.items():
            self._tell_transition(self._states[key], state, "the agent restarted")
        self._states = resumed
        if changed:
            self._save()
        for key in list(self._states):
            self._act(key)
        self._on_change()

    def apply(self, desired: desired_pb2.DesiredState) -> None:
        """Heads for what an adopted desired state names. Idempotent."""
        wanted = {
            (item.endpoint, item.role or desired_pb2.ROLE_PRIMARY): Wanted(
                item.bundle, item.attempt, item.settings.SerializeToString(deterministic=True)
            )
            for item in desired.placements
        }
        trials = {digest for item in desired.trials for digest in (item.bundle, item.incumbent, item.dataset)}
        self._keep = frozenset([*desired.keep, *trials]) - {""}
        for key in sorted(set(self._states) - set(wanted)):
            self._handle(key, machine.Drop())
        for key, target in wanted.items():
            if key in self._states:
                self._handle(key, machine.Want(target))
                self._handle(key, machine.Allowed())
            else:
                self._enter(key, machine.begin(*key, target))
        self.collect()

    def server_up(self) -> None:
        """A fresh server answers; it has nothing loaded yet."""
        self._live.clear()
        for key in list(self._states):
            self._restores[key] = self._spawn(self._restore(key))
        self._on_change()

    def server_died(self) -> None:
        """The server process ended by itself."""
        self._live.clear()
        for task in self._restores.values():
            task.cancel()
        for key in list(self._states):
            self._handle(key, machine.ServerDied())
        self._on_change()

    def observe(self, windows: Iterable[telemetry_pb2.PlacementWindow]) -> None:
        """Takes in what the server counted since the last pull."""
        for window in windows:
            key = (window.endpoint, window.role or desired_pb2.ROLE_PRIMARY)
            state = self._states.get(key)
            if state is None:
                continue
            if state.step is Step.SETTLE and window.bundle == state.wanted.bundle:
                self._traffic[key] = self._traffic.get(key, settle.Traffic()).plus(window)
            elif state.base is not None and window.bundle == state.base.bundle and window.latency.count:
                bundle, recent = self._baselines.get(key, ("", deque()))
                if bundle != window.bundle:
                    recent = deque(maxlen=BASELINE_WINDOWS)
                recent.append(window.latency)
                self._baselines[key] = (window.bundle, recent)

    @property
    def busy(self) -> bool:
        """Whether any placement is on its way somewhere."""
        return any(state.step in _ACTIVE for state in self._states.values())

    def statuses(self) -> list[agents_pb2.PlacementStatus]:
        """What is true now, for the report."""
        return [
            self._status(key, state)
            for key, state in sorted(self._states.items())
            if state.step is not Step.GONE
        ]

    def collect(self) -> int:
        """Removes what nothing names any more; returns bytes freed."""
        keep = set(self._keep) | set(self._live.values())
        for state in self._states.values():
            keep.add(state.wanted.bundle)
            if state.base is not None:
                keep.add(state.base.bundle)
        return self._store.collect(keep)

    async def stop(self) -> None:
        """Ends every action; the saved states are taken up at the next start."""
        self._stopped = True
        tasks = [*self._tasks.values(), *self._restores.values()]
        for task in tasks:
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.gather(*tasks, return_exceptions=True)

    # ------------------------------------------------------------------ the engine

    def _handle(self, key: Key, event: machine.Event) -> None:
        old = self._states[key]
        new = machine.step(old, event)
        if new is old:
            return
        if isinstance(event, (machine.Failed, machine.ServerDied)) and new.failures != old.failures:
            self._keep_logs(key)
        self._enter(key, new)

    def _enter(self, key: Key, state: PlacementState) -> None:
        """Saves, then acts: never the other way round."""
        log.info("%s: %s %s %s", state.endpoint, state.step.value, state.wanted.bundle[7:19], state.reason)
        before = self._states.get(key)
        self._states[key] = state
        if state.step is Step.GONE:
            del self._states[key]
        try:
            self._save()
        except OSError as error:
            log.error("%s cannot be written (%s); trying again", self._path, error)
            self._set(key, before)
            asyncio.get_running_loop().call_later(SAVE_RETRY_S, self._enter_later, key, before, state)
            return
        self._tell_transition(before, state)
        if state.step is Step.GONE:
            self._baselines.pop(key, None)
            self._logs_path(key).unlink(missing_ok=True)
        self._act(key)
        self._on_change()
        if state.step in (Step.COMMIT, Step.GONE):
            self.collect()

    def _tell_transition(self, before: PlacementState | None, state: PlacementState, why: str = "") -> None:
        step = before.step.value if before is not None else ""
        if step != state.step.value:
            self._on_transition(state.endpoint, step, state.step.value, state.reason or state.detail or why)

    def _set(self, key: Key, state: PlacementState | None) -> None:
        if state is None:
            self._states.pop(key, None)
        else:
            self._states[key] = state

    def _enter_later(self, key: Key, before: PlacementState | None, state: PlacementState) -> None:
        if not self._stopped and self._states.get(key) is before:
            self._enter(key, state)

    def _act(self, key: Key) -> None:
        task = self._tasks.pop(key, None)
        if task is not None and task is not asyncio.current_task():
            task.cancel()
        state = self._states.get(key)
        if state is not None and state.step in self._actions:
            self._tasks[key] = self._spawn(self._run_action(key, state))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.ensure_future(work)
        task.add_done_callback(self._look_at)
        return task

    def _look_at(self, task: asyncio.Task[None]) -> None:
        error = None if task.cancelled() else task.exception()
        if error is not None:
            self._on_bug(error)

    async def _run_action(self, key: Key, state: PlacementState) -> None:
        try:
            event = await self._actions[state.step](state)
        except _NotNow as reason:
            event = machine.Withheld(str(reason))
        except ShoalError as error:
            word = error.code.replace("_", " ")
            event = machine.Failed(f"{state.step.value}: {word}", str(error))
        except OSError as error:
            event = machine.Failed(
                f"{state.step.value}: {error.strerror or 'input/output error'}", str(error)
            )
        if self._states.get(key) is state:
            self._handle(key, event)

    def _admit(self, bundle: str) -> None:
        try:
            self._trust.admit_bundle(bundle, SERVE)
        except Denied as error:
            raise _NotNow(str(error)) from error

    # ------------------------------------------------------------------ one action per step

    async def _fetch(self, state: PlacementState) -> machine.Event:
        self._admit(state.wanted.bundle)
        key = (state.endpoint, state.role)
        backoff, missing = Backoff(), 0

        def progress(have: int, total: int) -> None:
            self._progress[key] = have / total if total else 1.0

        while True:
            try:
                await self._store.fetch(
                    state.wanted.bundle, self._source, progress=progress, make_room=self.collect
                )
                return machine.Done()
            except Unavailable as error:  # offline is no failure: the update waits for the link
                log.debug("%s: %s", state.endpoint, error)
            except NotFound:
                missing += 1
                if missing >= NOT_FOUND_TRIES:
                    raise
            await self._clock.sleep(0.2 + backoff.next())

    async def _verify(self, state: PlacementState) -> machine.Event:
        bundle = await asyncio.to_thread(self._store.verify, state.wanted.bundle)
        needs.check(bundle.config, self._profile())
        return machine.Done()

    async def _probe(self, state: PlacementState) -> machine.Event:
        async with self.measuring:
            report, refusal = await self._prober.probe(state.wanted)
        figures = report.SerializeToString()
        if refusal:
            return machine.Failed(f"probe: {refusal}", refusal, figures)
        key = (state.endpoint, state.role)
        bundle, recent = self._baselines.get(key, ("", deque()))
        known = state.base is not None and bundle == state.base.bundle
        return machine.Done(figures, settle.p95_us(recent) if known else 0.0)

    async def _switch(self, state: PlacementState) -> machine.Event:
        self._admit(state.wanted.bundle)
        detail = await self._make_memory(state)
        await self._put(state, state.wanted)
        return machine.Done(detail=detail)

    async def _settle(self, state: PlacementState) -> machine.Event:
        key = (state.endpoint, state.role)
        self._traffic[key] = settle.Traffic()
        rule = state.wanted.parsed.settle
        # An emulator's times say nothing about the device it stands for, so they send nothing back.
        baseline_us = 0.0 if self._profile().emulated else state.baseline_p95_us
        start = self._clock.monotonic_ns()
        while True:
            left = rule.seconds - (self._clock.monotonic_ns() - start) / 1e9
            await self._clock.sleep(max(0.05, min(left, max(1.0, rule.seconds / 10))))
            await self._pull()
            over = (self._clock.monotonic_ns() - start) / 1e9 >= rule.seconds
            verdict, reason, evidence = settle.judge(rule, baseline_us, self._traffic[key], over)
            if verdict is settle.Verdict.GO_BACK:
                return machine.Failed(reason, evidence)
            if verdict is settle.Verdict.STAY:
                return machine.Done()

    async def _roll_back(self, state: PlacementState) -> machine.Event:
        if state.base is None:
            await self._remove(state)
        else:
            await self._put(state, state.base)
        return machine.Done()

    async def _unload(self, state: PlacementState) -> machine.Event:
        await self._remove(state)
        return machine.Done()

    # ------------------------------------------------------------------ the server's side

    async def _put(self, state: PlacementState, wanted: Wanted) -> None:
        """Makes the server answer with a bundle, however often it restarts meanwhile."""
        key = (state.endpoint, state.role)
        async with self._locks[key]:
            while True:
                try:
                    await _to_its_end(self._server.load(state.endpoint, state.role, wanted))
                    break
                except Unavailable:
                    await self._clock.sleep(0.2)
            self._live[key] = wanted.bundle
        self._on_change()

    async def _remove(self, state: PlacementState) -> None:
        key = (state.endpoint, state.role)
        async with self._locks[key]:
            with contextlib.suppress(Unavailable, NotFound):  # no server: nothing is loaded
                await _to_its_end(self._server.unload(state.endpoint, state.role))
            self._live.pop(key, None)
        self._on_change()

    async def _make_memory(self, state: PlacementState) -> str:
        """On a device too small for two instances the old one stops first; returns what is said of it."""
        needed = (
            state.wanted.parsed.envelope.memory_bytes or 2 * self._store.manifest(state.wanted.bundle).size
        )
        if self._memory_available() >= needed or (state.endpoint, state.role) not in self._live:
            return ""
        log.warning("%s: too little memory for two instances, stopping the old one first", state.endpoint)
        await self._remove(state)
        return "The old bundle was stopped first: too little memory for two."

    async def _restore(self, key: Key) -> None:
        """Loads into a fresh server what should answer."""
        for attempt in range(RESTORE_TRIES):
            problem = await self._try_restore(key)
            if not problem:
                return
            log.warning("%s: restoring: %s", key[0], problem)
            if attempt + 1 == RESTORE_TRIES and key in self._states:
                self._handle(key, machine.BaseLost(problem))
                return
            await self._clock.sleep(0.5)

    async def _try_restore(self, key: Key) -> str:
        """The problem, "" if the server answers as it should."""
        async with self._locks[key]:
            state = self._states.get(key)
            if state is None or state.step in (Step.SWITCH, Step.ROLL_BACK) or key in self._live:
                return ""  # their own actions load
            wanted = machine.answering(state)
            if wanted is None:
                return ""
            try:
                await asyncio.to_thread(self._store.verify, wanted.bundle)
                await _to_its_end(self._server.load(state.endpoint, state.role, wanted))
            except Unavailable:
                return ""  # the next fresh server restores
            except TamperedData as error:
                self._handle(key, machine.BaseLost(str(error)))
                return ""
            except ShoalError as error:
                return str(error)
            self._live[key] = wanted.bundle
        self._on_change()
        return ""

    # ------------------------------------------------------------------ reports and files

    def _status(self, key: Key, state: PlacementState) -> agents_pb2.PlacementStatus:
        status = agents_pb2.PlacementStatus(
            endpoint=state.endpoint,
            role=state.role,
            wanted="" if state.step is Step.UNLOAD else state.wanted.bundle,
            serving=self._live.get(key, ""),
            step=_REPORTED[state.step],
            attempt=state.wanted.attempt,
            reason=state.reason,
            detail=state.detail,
            progress=self._progress.get(key, 0.0) if state.step is Step.FETCH else 1.0,
        )
        if state.probe:
            status.probe.MergeFromString(state.probe)
        if state.reason:
            with contextlib.suppress(OSError):
                status.logs = self._fs.read(self._logs_path(key))[-LOG_BYTES:]
        return status

    def _logs_path(self, key: Key) -> Path:
        name = f"{key[0]}-{key[1]}".encode().hex()[:120]
        return self._path.parent / f"failure-{name}.log"

    def _keep_logs(self, key: Key) -> None:
        with contextlib.suppress(OSError):  # a full disk must not hide the failure itself
            self._fs.write(self._logs_path(key), self._failure_logs()[-LOG_BYTES:])

    def _save(self) -> None:
        value = {"schema": SCHEMA, "placements": [machine.to_json(state) for state in self._states.values()]}
        durable_write(self._fs, self._path, json.dumps(value, indent=1).encode())

    def _load(self) -> list[PlacementState]:
        """Saved states; damaged ones count as none (the desired state leads there again)."""
        try:
            value = json.loads(self._fs.read(self._path))
            return [machine.from_json(item) for item in value["placements"]]
        except FileNotFoundError:
            return []
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.error("%s cannot be read (%s); starting from the desired state", self._path, error)
            return []


async def _to_its_end(call: Coroutine[Any, Any, None]) -> None:
    """Awaits a call to the server also when cancelled: while the server may still carry it out, the
    placement's lock must be held, or an older load could overtake a newer one."""
    task = asyncio.ensure_future(call)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        if not task.cancelled():
            task.exception()  # seen; the caller's cancellation counts
        raise


_REPORTED: Mapping[Step, agents_pb2.Step] = {
    Step.WAITING: agents_pb2.STEP_WAITING,
    Step.FETCH: agents_pb2.STEP_FETCH,
    Step.VERIFY: agents_pb2.STEP_VERIFY,
    Step.PROBE: agents_pb2.STEP_PROBE,
    Step.SWITCH: agents_pb2.STEP_SWITCH,
    Step.SETTLE: agents_pb2.STEP_SETTLE,
    Step.COMMIT: agents_pb2.STEP_COMMIT,
    Step.ROLL_BACK: agents_pb2.STEP_SWITCH,  # on its way back; the reason says why
    Step.ROLLED_BACK: agents_pb2.STEP_ROLLED_BACK,
    Step.FAILED: agents_pb2.STEP_FAILED,
    Step.UNLOAD: agents_pb2.STEP_SWITCH,
    Step.GONE: agents_pb2.STEP_UNSPECIFIED,
}
