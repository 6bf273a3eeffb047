"""Measuring on this machine, with the agent's own bench."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import MutableMapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from shoal_optimizer.jobspec import ProfileClass, RuntimeOptions
from shoal_optimizer.meter import (
    BundleRef,
    Measurement,
    Pending,
    TrialKind,
    check_request,
    from_result,
    request_key,
    unmeasured,
)
from shoal_protos.bundle import blob_path, open_bundle, write_index
from shoal_protos.errors import ShoalError
from shoal_protos.v1 import desired_pb2, telemetry_pb2

CHILD_SECONDS = 120  # a bench process that takes longer is stuck


class LocalMeter:
    """Measures on this machine with the agent's own bench.

    By default each measurement is one throwaway process, so that a model that crashes its runtime
    takes nothing down and memory is that of one loaded instance. In process it is quicker, and
    memory stays unmeasured: a process that has held other models says nothing about one.
    """

    def __init__(
        self,
        *,
        in_process: bool = False,
        seconds: float = 2.0,
        threads: int = 1,
        scratch: Path | None = None,
        known: MutableMapping[str, Any] | None = None,
    ) -> None:
        """
        Args:
            seconds: time of the timed rounds of one measurement.
            threads: for each timed instance where no options are named; 0 = the runtime's own choice.
            scratch: folder for merged stores; a temporary one when None.
            known: answers so far, by key; shared with a job's saved state to survive a restart.
        """
        self._in_process = in_process
        self._seconds = seconds
        self._threads = threads
        self._scratch = scratch
        self._known: MutableMapping[str, Any] = {} if known is None else known

    @property
    def measured(self) -> frozenset[str]:
        """Digests of the bundles that were measured."""
        return frozenset(key.partition("|")[0] for key in self._known)

    def measure(
        self,
        bundle: BundleRef,
        profile_class: ProfileClass,
        kind: TrialKind = "timing",
        *,
        incumbent: BundleRef | None = None,
        dataset: Path | None = None,
        options: RuntimeOptions | None = None,
    ) -> Measurement | Pending:
        """See `Meter.measure`; never pending."""
        check_request(kind, dataset)
        if not profile_class.local:
            return unmeasured(bundle, profile_class, kind, "This machine is not of the class.")
        # One answer for all local classes: they are all this machine.
        key = request_key(bundle, _ANY_LOCAL, kind, incumbent, dataset, options)
        chosen = options or RuntimeOptions(self._threads)
        if key not in self._known:
            open_bundle(bundle.layout, bundle.digest, verify=False)  # refuse a malformed one here, by name
            if self._in_process and kind == "timing":
                measured = self._time_here(bundle, incumbent, chosen)
            else:
                measured = self._bench(bundle, kind, incumbent, dataset, chosen)
            self._known[key] = measured.to_json()
        return replace(Measurement.from_json(self._known[key]), profile_class=profile_class.name)

    def _time_here(
        self, bundle: BundleRef, incumbent: BundleRef | None, chosen: RuntimeOptions
    ) -> Measurement:
        from shoal_agent import bench
        from shoal_agent.runtimes.base import Options

        options = Options(chosen.threads, dict(chosen.extra))
        opened = open_bundle(bundle.layout, bundle.digest, verify=False)
        rival = None if incumbent is None else open_bundle(incumbent.layout, incumbent.digest, verify=False)
        result = telemetry_pb2.TrialResult(context=bench.context(opened, options))
        budget = bench.Budget(seconds=self._seconds, warm_up_seconds=min(0.3, self._seconds / 4))
        try:
            result.timing.CopyFrom(bench.time_bundles(opened, rival, options, budget=budget))
            result.ok = True
        except ShoalError as error:
            result.error = str(error)
        result.timing.candidate.rss_bytes = 0
        return from_result(result, bundle=bundle.digest, profile_class="", kind="timing", source="local")

    def _bench(
        self,
        bundle: BundleRef,
        kind: TrialKind,
        incumbent: BundleRef | None,
        dataset: Path | None,
        chosen: RuntimeOptions,
    ) -> Measurement:
        with tempfile.TemporaryDirectory(dir=self._scratch, prefix="bench-") as folder:
            store, out = Path(folder) / "store", Path(folder) / "out"
            out.mkdir()
            refs = [bundle] if incumbent is None else [bundle, incumbent]
            link_store(store, refs)
            trial = desired_pb2.Trial(
                id=bundle.digest[7:19],
                bundle=bundle.digest,
                kind=desired_pb2.TRIAL_KIND_TIMING if kind == "timing" else desired_pb2.TRIAL_KIND_OUTPUTS,
                incumbent="" if incumbent is None else incumbent.digest,
                dataset="" if dataset is None else add_blob(store, dataset),
                max_bytes=1 << 30,
            )
            trial.options.threads = chosen.threads
            trial.options.extra.update(chosen.extra)
            result = _run_bench(trial, store, out, self._seconds)
            measurement = from_result(
                result, bundle=bundle.digest, profile_class="", kind=kind, source="local"
            )
            if kind == "outputs" and measurement.status == "measured":
                return _keep_outputs(measurement, out / "outputs.npz", self._scratch or bundle.layout.parent)
            return measurement


def _keep_outputs(measurement: Measurement, path: Path, folder: Path) -> Measurement:
    kept = folder / f"outputs-{measurement.bundle[7:19]}.npz"
    path.replace(kept)
    return replace(measurement, outputs=str(kept))


_ANY_LOCAL = ProfileClass("", local=True)


def _run_bench(trial: desired_pb2.Trial, store: Path, out: Path, seconds: float) -> telemetry_pb2.TrialResult:
    """Runs the bench process; whatever ends it early is a failed result, never an exception."""
    argument = base64.b64encode(trial.SerializeToString()).decode()
    command = [sys.executable, "-m", "shoal_agent", "bench", argument]
    command += ["--store", str(store), "--out", str(out), "--seconds", str(seconds)]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=CHILD_SECONDS,
            stdin=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    except subprocess.TimeoutExpired:
        return telemetry_pb2.TrialResult(trial=trial.id, error=f"The bench took more than {CHILD_SECONDS} s.")
    try:
        line = done.stdout.strip().splitlines()[-1]
        return telemetry_pb2.TrialResult.FromString(base64.b64decode(json.loads(line)["result"]))
    except (IndexError, KeyError, ValueError) as error:
        tail = done.stderr.strip().splitlines()[-1:] or [str(error)]
        return telemetry_pb2.TrialResult(
            trial=trial.id, error=f"The bench process ended with {done.returncode}: {tail[0][:300]}"
        )


def link_store(store: Path, refs: list[BundleRef]) -> None:
    """Makes one OCI layout at `store` that holds several bundles, by hard links where the disk allows."""
    entries = []
    for ref in refs:
        bundle = open_bundle(ref.layout, ref.digest, verify=False)
        manifest = blob_path(ref.layout, ref.digest)
        for digest in [
            ref.digest,
            bundle.manifest.config.digest,
            *(layer.digest for layer in bundle.manifest.layers),
        ]:
            _link(blob_path(ref.layout, digest), blob_path(store, digest))
        entries.append((ref.digest, manifest.stat().st_size))
    write_index(store, dict(entries).items())


def _link(source: Path, target: Path) -> None:
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:  # another file system
        target.write_bytes(source.read_bytes())


def add_blob(store: Path, path: Path) -> str:
    """Puts a file into a store by content and returns its digest."""
    digest = "sha256:" + hashlib.sha256(path.read_bytes()).hexdigest()
    _link(path, blob_path(store, digest))
    return digest
