"""Trials: measuring a candidate on this device without disturbing what answers.

One at a time, in a bench process at low priority, between updates, idle in between so that trials take
only their share of the time. A trial is done once, by its id, also over restarts: its result is in the
spool (synced) before it is noted as done, and its start is noted before it is started.
"""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from google.protobuf.message import DecodeError

from shoal_agent import logs
from shoal_agent.clock import Clock
from shoal_agent.config import Config
from shoal_agent.files import FileContent
from shoal_agent.fs import Fs, durable_write
from shoal_agent.link.base import Content, Source
from shoal_agent.processes import describe, python, throwaway
from shoal_agent.processor import patience
from shoal_agent.telemetry.spool import Spool
from shoal_agent.trust import TRIAL, Trust
from shoal_agent.update.store import BundleStore
from shoal_protos.errors import Denied, ShoalError, Unavailable
from shoal_protos.v1 import desired_pb2, telemetry_pb2

log = logging.getLogger(__name__)

NICE = 10
CPU_LIMIT_S = 1800  # CPU seconds of one bench process
TIMEOUT_S = 900.0
MAX_STARTS = 3  # a trial that took the agent down this often is given up
MAX_DATASET = 1 << 30  # bytes
MAX_REST_S = 30.0
RETRY_S = 2.0


class Carrier(Source, Protocol):
    """The part of a link that trials need."""

    async def push(self, content: Content, purpose: str) -> None: ...


class TrialRunner:
    """Carries out the trials that the desired state names.

    Args:
        path: `state/trials.json`.
        quiet: whether no update is under way.
        measuring: held while something is timed.
        now_ms: trusted time, for expiry.
    """

    def __init__(
        self,
        config: Config,
        path: Path,
        *,
        trust: Trust,
        store: BundleStore,
        carrier: Carrier,
        spool: Spool,
        quiet: Callable[[], bool],
        measuring: asyncio.Lock,
        now_ms: Callable[[], int],
        clock: Clock,
        fs: Fs,
    ) -> None:
        self._config, self._path = config, path
        self._trust, self._store, self._carrier, self._spool = trust, store, carrier, spool
        self._quiet, self._measuring, self._now_ms = quiet, measuring, now_ms
        self._clock, self._fs = clock, fs
        self._trials: dict[str, desired_pb2.Trial] = {}
        self._starts = self._load()  # id -> starts so far; DONE = finished
        self._news = asyncio.Event()

    _DONE = -1

    def apply(self, desired: desired_pb2.DesiredState) -> None:
        """Takes over the trials that an adopted state names. Idempotent."""
        self._trials = {trial.id: trial for trial in desired.trials}
        gone = set(self._starts) - set(self._trials)
        if gone:
            self._starts = {key: value for key, value in self._starts.items() if key not in gone}
            self._save()
        self._news.set()

    async def run(self) -> None:
        """Runs until cancelled."""
        while True:
            trial = self._next()
            if trial is None:
                self._news.clear()
                await self._news.wait()
            elif not self._quiet():
                await self._clock.sleep(0.5)
            else:
                await self._one(trial)

    def _next(self) -> desired_pb2.Trial | None:
        for trial in self._trials.values():
            expired = trial.not_after_ms and self._now_ms() > trial.not_after_ms
            if self._starts.get(trial.id) != self._DONE and not expired:
                return trial
        return None

    async def _one(self, trial: desired_pb2.Trial) -> None:
        start = self._clock.monotonic_ns()
        try:
            result = await self._measure(trial)
        except Unavailable:
            await self._clock.sleep(RETRY_S)  # offline, or not allowed now: it waits until it expires
            return
        except ShoalError as error:
            result = telemetry_pb2.TrialResult(trial=trial.id, error=str(error))
        except OSError as error:
            result = telemetry_pb2.TrialResult(trial=trial.id, error=f"input/output error: {error}")
        self._spool.add(result, sync=True)
        self._note(trial.id, self._DONE)
        log.info("trial %s: %s", trial.id, "measured" if result.ok else result.error)
        shutil.rmtree(self._out(trial), ignore_errors=True)
        spent = (self._clock.monotonic_ns() - start) / 1e9
        await self._clock.sleep(min(MAX_REST_S, spent * (1 / self._config.trial_share - 1)))

    async def _measure(self, trial: desired_pb2.Trial) -> telemetry_pb2.TrialResult:
        starts = self._starts.get(trial.id, 0)
        if starts >= MAX_STARTS:
            error = f"given up: the agent was restarted {starts} times while measuring"
            return telemetry_pb2.TrialResult(trial=trial.id, error=error)
        for bundle in (trial.bundle, trial.incumbent):
            if bundle:
                self._admit(bundle)
                await self._store.fetch(bundle, self._carrier)
        if trial.dataset:
            await self._store.fetch_blob(trial.dataset, self._carrier, MAX_DATASET)
        self._note(trial.id, starts + 1)
        async with self._measuring:
            result = await self._bench(trial)
        if result.ok and trial.kind == desired_pb2.TRIAL_KIND_OUTPUTS:
            await self._send_outputs(trial, result)
        return result

    def _admit(self, bundle: str) -> None:
        try:
            self._trust.admit_bundle(bundle, TRIAL)
        except Denied as error:
            raise Unavailable(error.message, error.remedy) from error

    async def _bench(self, trial: desired_pb2.Trial) -> telemetry_pb2.TrialResult:
        out = self._out(trial)
        self._fs.mkdir(out)
        text = base64.b64encode(trial.SerializeToString()).decode()
        outcome = await throwaway(
            python(
                "bench",
                text,
                "--store",
                str(self._store.root),
                "--out",
                str(out),
                prefix=self._config.child_prefix,
            ),
            logs.path(self._config.paths.logs, "probe"),
            self._config,
            timeout_s=patience(TIMEOUT_S),
            nice=NICE,
            cpu_s=int(patience(CPU_LIMIT_S)),
        )
        result = telemetry_pb2.TrialResult()
        try:
            result.ParseFromString(base64.b64decode((outcome.last_json() or {})["result"], validate=True))
        except (KeyError, TypeError, ValueError, DecodeError):
            reason = "took too long" if outcome.code is None else describe(outcome.code)
            return telemetry_pb2.TrialResult(trial=trial.id, error=f"bench: {reason}")
        result.trial = trial.id
        return result

    async def _send_outputs(self, trial: desired_pb2.Trial, result: telemetry_pb2.TrialResult) -> None:
        path = self._out(trial) / "outputs.npz"
        size = path.stat().st_size
        if trial.max_bytes and size > trial.max_bytes:
            result.ok = False
            result.error = f"the outputs take {size} bytes, {trial.max_bytes} are allowed"
            return
        content = await asyncio.to_thread(FileContent, path)
        while True:
            try:
                await self._carrier.push(content, "outputs")
                break
            except Unavailable:
                if trial.not_after_ms and self._now_ms() > trial.not_after_ms:
                    raise
                await self._clock.sleep(RETRY_S)
        result.outputs_blob = content.digest

    def _out(self, trial: desired_pb2.Trial) -> Path:
        return self._config.paths.spool / "trials" / trial.id.encode().hex()[:120]

    # ------------------------------------------------------------------ on disk

    def _note(self, trial: str, starts: int) -> None:
        self._starts[trial] = starts
        self._save()

    def _save(self) -> None:
        try:
            durable_write(self._fs, self._path, json.dumps(self._starts).encode())
        except OSError as error:  # worst case a trial is measured twice; results are idempotent
            log.warning("%s cannot be written: %s", self._path, error)

    def _load(self) -> dict[str, int]:
        try:
            value = json.loads(self._fs.read(self._path))
            return {str(key): int(count) for key, count in value.items()}
        except (OSError, ValueError, TypeError, AttributeError):
            return {}
