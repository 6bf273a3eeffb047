"""Measuring: how fast and how large a bundle is on a machine of a class.

A meter answers at once with a `Measurement`, or with `Pending` when a device will answer later; a
search waits by saving itself. `LocalMeter` measures on this machine and claims nothing for classes
that it isn't of; `TrialMeter` is how a job reaches the fleet: it asks by an event and reads the
answer that the next start of the job carries.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

from shoal_optimizer.jobspec import ProfileClass
from shoal_optimizer.search.frontier import Estimate
from shoal_protos.bundle import blob_path, open_bundle, write_index
from shoal_protos.errors import InvalidInput, ShoalError
from shoal_protos.v1 import desired_pb2, telemetry_pb2

TrialKind = Literal["timing", "outputs"]
Status = Literal["measured", "unmeasured", "no data"]

# What an emulated device (qemu-user) says: its answers are right, its times are no device's.
EMULATED = "emulated"
UNMEASURED_EMULATED = "unmeasured (emulated)"

CHILD_SECONDS = 120  # a bench process that takes longer is stuck


@dataclass(frozen=True)
class Figure:
    """A measured value with its 95 % interval and the number of observations behind it."""

    value: float
    low: float
    high: float
    n: int = 1

    @property
    def estimate(self) -> Estimate:
        return Estimate.from_interval(self.value, self.low, self.high)

    def to_json(self) -> dict[str, float | int]:
        return {"value": self.value, "low": self.low, "high": self.high, "n": self.n}

    @classmethod
    def from_json(cls, raw: Mapping[str, Any] | None) -> Figure | None:
        if raw is None or raw.get("value") is None:
            return None
        value = float(raw["value"])
        low, high = raw.get("low"), raw.get("high")
        return cls(
            value,
            value if low is None else float(low),
            value if high is None else float(high),
            int(raw.get("n") or 1),
        )


@dataclass(frozen=True)
class BundleRef:
    """A bundle on this disk: its digest and the OCI layout that holds it."""

    digest: str
    layout: Path


@dataclass(frozen=True)
class Pending:
    """A trial that a device will answer."""

    trial: str


@dataclass(frozen=True)
class Measurement:
    """Figures of one bundle on one class, with what they were measured under.

    Latencies are milliseconds, memory bytes. `ratio` is candidate over incumbent in the same
    interleaved rounds; `winner` is "candidate", "incumbent", "inconclusive" or "unmeasured".
    `outputs` names the raw outputs of an `outputs` trial, by blob digest or by path.
    """

    bundle: str
    profile_class: str
    kind: TrialKind
    status: Status
    source: str  # "local", "trial", "emulated" (outputs only), "unmeasured", "unmeasured (emulated)"
    latency_p50: Figure | None = None
    latency_p95: Figure | None = None
    memory: Figure | None = None
    int8_share: float | None = None
    ratio: Figure | None = None
    winner: str = "unmeasured"
    outputs: str = ""
    context: Mapping[str, str] = field(default_factory=dict)
    reason: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Measurement:
        values = dict(raw)
        for name in ("latency_p50", "latency_p95", "memory", "ratio"):
            values[name] = Figure.from_json(values.get(name))
        return cls(**values)


class Meter(Protocol):
    """Measures bundles. Asking twice for the same thing costs nothing and gives the same answer."""

    def measure(
        self,
        bundle: BundleRef,
        profile_class: ProfileClass,
        kind: TrialKind = "timing",
        *,
        incumbent: BundleRef | None = None,
        dataset: Path | None = None,
    ) -> Measurement | Pending:
        """Measures `bundle` for `profile_class`, interleaved with `incumbent` when there is one.

        Args:
            dataset: `.npz` of inputs by tensor name; `outputs` only.

        Raises:
            InvalidInput: the bundle is malformed, or `outputs` without a data set.
        """
        ...


def unmeasured(bundle: BundleRef, profile_class: ProfileClass, kind: TrialKind, reason: str) -> Measurement:
    return Measurement(
        bundle.digest, profile_class.name, kind, status="unmeasured", source="unmeasured", reason=reason
    )


def from_result(
    result: telemetry_pb2.TrialResult,
    *,
    bundle: str,
    profile_class: str,
    kind: TrialKind,
    source: str,
) -> Measurement:
    """A `Measurement` from what the agent's bench reports; a failed trial is `no data` with its reason,
    an emulated device's timing is `unmeasured` and its outputs count, marked by their source."""
    context = dict(result.context)
    if not result.ok:
        return Measurement(
            bundle, profile_class, kind, "no data", source, context=context, reason=result.error or "failed"
        )
    if context.get(EMULATED) == "yes":
        if kind == "timing":
            reason = "Only an emulated device answered; its times are no device's."
            return Measurement(
                bundle, profile_class, kind, "unmeasured", UNMEASURED_EMULATED, context=context, reason=reason
            )
        source = EMULATED
    series = result.timing.candidate
    timed = kind == "timing" and series.runs > 0
    runs = int(series.runs)
    share = result.timing.int8_share
    return Measurement(
        bundle,
        profile_class,
        kind,
        "measured",
        source,
        latency_p50=Figure(series.p50_ms, series.p50_low_ms, series.p50_high_ms, runs) if timed else None,
        latency_p95=Figure(series.p95_ms, series.p95_low_ms, series.p95_high_ms, runs) if timed else None,
        memory=_exact(float(series.rss_bytes)) if timed and series.rss_bytes else None,
        int8_share=None if math.isnan(share) or kind != "timing" else share,
        ratio=_ratio(result.timing),
        winner=result.timing.winner or "unmeasured",
        outputs=result.outputs_blob,
        context=context,
    )


def _exact(value: float) -> Figure:
    return Figure(value, value, value)


def _ratio(timing: telemetry_pb2.TimingResult) -> Figure | None:
    if not timing.HasField("incumbent") or timing.winner in ("", "unmeasured"):
        return None
    return Figure(timing.ratio, timing.ratio_low, timing.ratio_high, int(timing.candidate.rounds))


# ---------------------------------------------------------------------------- on this machine


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
            threads: for each timed instance; 0 = the runtime's own choice.
            scratch: folder for merged stores; a temporary one when None.
            known: answers so far, by key; shared with a job's saved state to survive a restart.
        """
        self._in_process = in_process
        self._seconds = seconds
        self._threads = threads
        self._scratch = scratch
        self._known: MutableMapping[str, Any] = {} if known is None else known

    def measure(
        self,
        bundle: BundleRef,
        profile_class: ProfileClass,
        kind: TrialKind = "timing",
        *,
        incumbent: BundleRef | None = None,
        dataset: Path | None = None,
    ) -> Measurement | Pending:
        """See `Meter.measure`; never pending."""
        check_request(kind, dataset)
        if not profile_class.local:
            return unmeasured(bundle, profile_class, kind, "This machine is not of the class.")
        # One answer for all local classes: they are all this machine.
        key = request_key(bundle, _ANY_LOCAL, kind, incumbent, dataset)
        if key not in self._known:
            open_bundle(bundle.layout, bundle.digest, verify=False)  # refuse a malformed one here, by name
            if self._in_process and kind == "timing":
                measured = self._time_here(bundle, incumbent)
            else:
                measured = self._bench(bundle, kind, incumbent, dataset)
            self._known[key] = measured.to_json()
        return replace(Measurement.from_json(self._known[key]), profile_class=profile_class.name)

    def _time_here(self, bundle: BundleRef, incumbent: BundleRef | None) -> Measurement:
        from shoal_agent import bench
        from shoal_agent.runtimes.base import Options

        options = Options(threads=self._threads)
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
        self, bundle: BundleRef, kind: TrialKind, incumbent: BundleRef | None, dataset: Path | None
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
            trial.options.threads = self._threads
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


# ---------------------------------------------------------------------------- by the fleet


class TrialMeter:
    """Asks the fleet. The answer is in `results` at the job's next start, else `Pending`.

    A trial's id depends only on what is asked, so asking again after a crash asks the same trial.
    """

    def __init__(
        self,
        job: str,
        ask: Callable[[Mapping[str, Any]], None],
        results: Mapping[str, bytes | None],
        *,
        outputs: Path | None = None,
    ) -> None:
        """
        Args:
            ask: sends one `trial` event's fields: id, bundle, class, kind, incumbent, dataset.
            results: trial id -> serialized `TrialResult`, None = expired without an answer.
            outputs: folder that holds the raw outputs of answered `outputs` trials, as HEX-DIGEST.npz.
        """
        self._job = job
        self._ask = ask
        self._results = results
        self._outputs = outputs
        self._asked: set[str] = set()

    def measure(
        self,
        bundle: BundleRef,
        profile_class: ProfileClass,
        kind: TrialKind = "timing",
        *,
        incumbent: BundleRef | None = None,
        dataset: Path | None = None,
    ) -> Measurement | Pending:
        """See `Meter.measure`."""
        check_request(kind, dataset)
        trial = trial_id(self._job, request_key(bundle, profile_class, kind, incumbent, dataset))
        if trial in self._results:
            return self._answer(trial, bundle, profile_class, kind)
        if trial not in self._asked:
            self._asked.add(trial)
            self._ask(
                {
                    "id": trial,
                    "bundle": bundle.digest,
                    "class": profile_class.name,
                    "kind": kind,
                    "incumbent": "" if incumbent is None else incumbent.digest,
                    "dataset": None if dataset is None else str(dataset),
                }
            )
        return Pending(trial)

    def _answer(
        self, trial: str, bundle: BundleRef, profile_class: ProfileClass, kind: TrialKind
    ) -> Measurement:
        data = self._results[trial]
        if data is None:
            return Measurement(
                bundle.digest,
                profile_class.name,
                kind,
                "no data",
                "trial",
                reason="No device answered in time.",
            )
        result = telemetry_pb2.TrialResult.FromString(data)
        measurement = from_result(
            result, bundle=bundle.digest, profile_class=profile_class.name, kind=kind, source="trial"
        )
        if kind == "outputs" and measurement.status == "measured":
            path = self._outputs / f"{measurement.outputs[7:]}.npz" if self._outputs else None
            if path is None or not path.is_file():
                return replace(measurement, status="no data", reason="The outputs are gone.")
            return replace(measurement, outputs=str(path))
        return measurement


def check_request(kind: TrialKind, dataset: Path | None) -> None:
    """Raises InvalidInput for an unknown kind or an `outputs` trial without a data set."""
    if kind not in ("timing", "outputs"):
        raise InvalidInput(f"Unknown kind of trial '{kind}'.", "Use timing or outputs.")
    if kind == "outputs" and dataset is None:
        raise InvalidInput("An outputs trial needs a data set.", "Name an .npz of inputs.")


def request_key(
    bundle: BundleRef,
    profile_class: ProfileClass,
    kind: TrialKind,
    incumbent: BundleRef | None,
    dataset: Path | None,
) -> str:
    """What identifies a measurement: equal requests are answered once."""
    parts = [bundle.digest, profile_class.name, kind, "" if incumbent is None else incumbent.digest]
    return "|".join([*parts, "" if dataset is None else dataset.name])


def trial_id(job: str, key: str) -> str:
    """A stable, short id for a request of a job."""
    return f"{job}-{hashlib.sha256(key.encode()).hexdigest()[:10]}"
