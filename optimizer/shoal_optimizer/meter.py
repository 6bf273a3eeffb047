"""Measuring: how fast and how large a bundle is on a machine of a class.

A meter answers at once with a `Measurement`, or with `Pending` when a device will answer later; a
search waits by saving itself. `local_meter.LocalMeter` measures on this machine and claims nothing for
classes that it isn't of; `TrialMeter` is how a job reaches the fleet: it asks by an event and reads the
answer that the next start of the job carries.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

from google.protobuf.message import DecodeError

from shoal_optimizer.jobspec import ProfileClass, RuntimeOptions
from shoal_optimizer.search.frontier import Estimate
from shoal_protos.errors import InvalidInput
from shoal_protos.v1 import telemetry_pb2

TrialKind = Literal["timing", "outputs"]
Status = Literal["measured", "unmeasured", "no data"]

# What an emulated device (qemu-user) says: its answers are right, its times are no device's.
EMULATED = "emulated"
UNMEASURED_EMULATED = "unmeasured (emulated)"


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
        options: RuntimeOptions | None = None,
    ) -> Measurement | Pending:
        """Measures `bundle` for `profile_class`, interleaved with `incumbent` when there is one.

        Args:
            options: how both are loaded; None = as the meter is set up, one thread.
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
            ask: sends one `trial` event's fields: id, bundle, class, kind, incumbent, dataset, options.
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
        options: RuntimeOptions | None = None,
    ) -> Measurement | Pending:
        """See `Meter.measure`."""
        check_request(kind, dataset)
        key = request_key(bundle, profile_class, kind, incumbent, dataset, options)
        trial = trial_id(self._job, key)
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
                    "options": (options or RuntimeOptions()).to_json(),
                }
            )
        return Pending(trial)

    def _answer(
        self, trial: str, bundle: BundleRef, profile_class: ProfileClass, kind: TrialKind
    ) -> Measurement:
        data = self._results[trial]
        nothing = Measurement(bundle.digest, profile_class.name, kind, "no data", "trial")
        if data is None:
            return replace(nothing, reason="No device answered in time.")
        try:
            result = telemetry_pb2.TrialResult.FromString(data)
        except DecodeError as error:
            return replace(nothing, reason=f"The answer cannot be read: {error}.")
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
    options: RuntimeOptions | None = None,
) -> str:
    """What identifies a measurement: equal requests are answered once."""
    parts = [bundle.digest, profile_class.name, kind, "" if incumbent is None else incumbent.digest]
    parts.append("" if dataset is None else dataset.name)
    return "|".join([*parts, *([options.key] if options is not None and options.key else [])])


def trial_id(job: str, key: str) -> str:
    """A stable, short id for a request of a job."""
    return f"{job}-{hashlib.sha256(key.encode()).hexdigest()[:10]}"
