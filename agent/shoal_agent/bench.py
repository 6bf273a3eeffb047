"""Timing of bundles on this machine, with error bars and context; executes trials.

Both bundles are timed in the same interleaved rounds, in alternating order, so that a change of the
clock rate or of another job's load hits both. A difference inside the noise is "inconclusive".
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import gc
import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from shoal_agent import processor, runtimes
from shoal_agent.runtimes.base import Instance, Options
from shoal_agent.runtimes.golden import example_inputs, load_arrays, one_by_one
from shoal_agent.runtimes.tensors import Array, check_inputs
from shoal_protos.bundle import Bundle, blob_path, digest_of_file, open_bundle
from shoal_protos.errors import InvalidInput, ShoalError, Unsupported
from shoal_protos.v1.desired_pb2 import TRIAL_KIND_OUTPUTS, TRIAL_KIND_TIMING, Trial
from shoal_protos.v1.telemetry_pb2 import Series, TimingResult, TrialResult

# Two loads of the same file differ by this much through memory layout alone, which no number of
# rounds in one process averages out.
SAME_SHARE = 0.03
MIN_ROUNDS = 12
MAX_ROUNDS = 200
_BATCH = 32
_RESAMPLES = 400


@dataclass(frozen=True)
class Budget:
    """How long to measure. Rounds go on until `seconds` are used, within the bounds."""

    seconds: float = 3.0
    round_seconds: float = 0.02  # of one bundle inside one round
    warm_up_seconds: float = 0.3
    min_rounds: int = MIN_ROUNDS
    max_rounds: int = MAX_ROUNDS


class _Subject:
    """One loaded bundle and its readings."""

    def __init__(self, bundle: Bundle, options: Options) -> None:
        runtime = runtimes.find(bundle.config.runtime.name)
        runtime.version()  # importing the runtime is not the bundle's memory
        self.inputs = example_inputs(bundle)
        before = rss_bytes()
        self.instance: Instance = runtime.load(bundle, options)
        self._next = 0
        for _ in range(3):
            self.run()
        self.rss = max(0, rss_bytes() - before)
        self.rounds: list[list[float]] = []  # microseconds
        self.cpu_s = 0.0
        self.runs_a_round = 1

    def run(self) -> None:
        self.instance.run(self.inputs[self._next])
        self._next = (self._next + 1) % len(self.inputs)

    def warm_up(self, budget: Budget) -> None:
        start, runs = time.perf_counter(), 0
        while runs < 10 or time.perf_counter() - start < budget.warm_up_seconds:
            self.run()
            runs += 1
            if time.perf_counter() - start > 4 * budget.warm_up_seconds and runs >= 3:
                break  # slower than ten runs in the time allowed
        mean = (time.perf_counter() - start) / runs
        self.runs_a_round = max(1, min(400, int(budget.round_seconds / max(mean, 1e-7))))

    def round(self) -> None:
        readings = []
        cpu = time.process_time()
        for _ in range(self.runs_a_round):
            start = time.perf_counter_ns()
            self.run()
            readings.append((time.perf_counter_ns() - start) / 1e3)
        self.cpu_s += time.process_time() - cpu
        self.rounds.append(readings)


def time_bundles(
    candidate: Bundle,
    incumbent: Bundle | None = None,
    options: Options | None = None,
    *,
    budget: Budget | None = None,
    seed: int = 0,
) -> TimingResult:
    """Times `candidate`, and `incumbent` in the same rounds, at batch size 1 on golden inputs.

    Returns:
        Figures in milliseconds with 95 % intervals; `winner` is "unmeasured" without an incumbent,
        "inconclusive" when the difference lies inside the noise.

    Raises:
        Unsupported, InvalidInput: a bundle cannot be loaded or run here.
    """
    options, budget = options or Options(), budget or Budget()
    with contextlib.ExitStack() as stack:
        subjects = []
        for bundle in (candidate, incumbent):
            if bundle is not None:
                subject = _Subject(bundle, options)
                stack.callback(subject.instance.close)
                subjects.append(subject)
        for subject in subjects:
            subject.warm_up(budget)
        _measure(subjects, budget)
        random = np.random.default_rng(seed)
        result = TimingResult(
            candidate=_series(subjects[0], random),
            int8_share=subjects[0].instance.facts().int8_share,
            winner="unmeasured",
            ratio=math.nan,
            ratio_low=math.nan,
            ratio_high=math.nan,
        )
        if len(subjects) == 2:
            result.incumbent.CopyFrom(_series(subjects[1], random))
            ratios = [_median(a) / _median(b) for a, b in zip(*(s.rounds for s in subjects), strict=True)]
            result.ratio = _median(ratios)
            result.ratio_low, result.ratio_high = median_interval(ratios)
            result.winner = winner(result.ratio, result.ratio_low, result.ratio_high)
        return result


def untimed() -> TimingResult:
    """What is said of a bundle that cannot be timed here: nothing, as a value."""
    return TimingResult(
        winner="unmeasured", ratio=math.nan, ratio_low=math.nan, ratio_high=math.nan, int8_share=math.nan
    )


def _measure(subjects: Sequence[_Subject], budget: Budget) -> None:
    start = time.perf_counter()
    collecting = gc.isenabled()
    gc.disable()  # a collection inside one reading is not the model's time
    try:
        for number in range(budget.max_rounds):
            for subject in subjects if number % 2 == 0 else reversed(subjects):
                subject.round()
            if number + 1 >= budget.min_rounds and time.perf_counter() - start >= budget.seconds:
                break
    finally:
        if collecting:
            gc.enable()


def winner(ratio: float, low: float, high: float) -> str:
    """Who is faster, given candidate / incumbent with its 95 % interval."""
    if high < 1.0 and ratio < 1.0 - SAME_SHARE:
        return "candidate"
    if low > 1.0 and ratio > 1.0 + SAME_SHARE:
        return "incumbent"
    return "inconclusive"


def _median(values: Sequence[float]) -> float:
    return float(np.median(values))


def median_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """Distribution-free interval of the median, by order statistics of the binomial distribution.

    With fewer than 6 values no such interval has the confidence; the extremes are returned then.
    """
    ordered = sorted(values)
    count = len(ordered)
    tail, rank, total = 0.0, 0, 2.0**count
    # Largest rank whose lower tail P(X < rank) stays within half of what is left over.
    while rank < count // 2:
        term = math.comb(count, rank) / total
        if tail + term > (1 - confidence) / 2:
            break
        tail += term
        rank += 1
    rank = max(1, rank)
    return ordered[rank - 1], ordered[count - rank]


def _series(subject: _Subject, random: np.random.Generator) -> Series:
    runs = sum(len(readings) for readings in subject.rounds)
    (p50, p50_low, p50_high), (p95, p95_low, p95_high) = (
        quantile_interval(subject.rounds, q, random) for q in (0.5, 0.95)
    )
    return Series(
        rounds=len(subject.rounds),
        runs=runs,
        p50_ms=p50 / 1e3,
        p50_low_ms=p50_low / 1e3,
        p50_high_ms=p50_high / 1e3,
        p95_ms=p95 / 1e3,
        p95_low_ms=p95_low / 1e3,
        p95_high_ms=p95_high / 1e3,
        rss_bytes=subject.rss,
        cpu_ms=subject.cpu_s / runs * 1e3,
    )


def quantile_interval(
    rounds: Sequence[Sequence[float]], q: float, random: np.random.Generator
) -> tuple[float, float, float]:
    """(quantile, low, high) at 95 %, resampling whole rounds: readings inside a round are not independent."""
    size = min(len(readings) for readings in rounds)
    table: Array = np.asarray([readings[:size] for readings in rounds], np.float64)
    picks = random.integers(0, len(table), (_RESAMPLES, len(table)))
    resampled = np.quantile(table[picks].reshape(_RESAMPLES, -1), q, axis=1)
    low, high = np.quantile(resampled, (0.025, 0.975))
    value = float(np.quantile(table, q))
    return value, min(value, float(low)), max(value, float(high))


# ---------------------------------------------------------------------------- context


def rss_bytes() -> int:
    """Resident memory of this process."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


def context(bundle: Bundle | None = None, options: Options | None = None) -> dict[str, str]:
    """What a figure depends on besides the bundle: runtime, governor, load, threads, temperature."""
    facts = {
        "cores": str(os.cpu_count() or 0),
        "load": f"{os.getloadavg()[0]:.2f}",
        "governor": _read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor") or "unknown",
        "temperature_celsius": _temperature(),
        "threads": str((options or Options()).threads),
    }
    if bundle is not None:
        need = bundle.config.runtime
        facts["runtime"] = need.name
        facts["precision"] = need.precision
        with contextlib.suppress(ShoalError):
            facts["runtime_version"] = runtimes.find(need.name).version()
    return facts


def _read(path: str) -> str:
    with contextlib.suppress(OSError):
        return Path(path).read_text(errors="replace").strip()
    return ""


def _temperature() -> str:
    readings = []
    for zone in Path("/sys/class/thermal").glob("thermal_zone*/temp"):
        with contextlib.suppress(ValueError):
            readings.append(int(_read(str(zone))) / 1000)
    return f"{max(readings):.1f}" if readings else "unmeasured"


# ---------------------------------------------------------------------------- trials


def run_outputs(
    bundle: Bundle, inputs: Mapping[str, Array], options: Options, max_bytes: int = 0
) -> dict[str, Array]:
    """Raw outputs of every item of `inputs` (batch first), in order.

    Raises:
        InvalidInput: inputs that don't fit the signature, or outputs beyond `max_bytes` (0 = no limit).
    """
    signature = bundle.config.signature
    single = any(spec.shape[:1] == (1,) for spec in signature.inputs)
    step = 1 if single else _BATCH
    count = check_inputs(one_by_one(signature) if single else signature, inputs)
    parts: list[dict[str, Array]] = []
    size = 0
    with runtimes.find(bundle.config.runtime.name).load(bundle, options) as instance:
        for start in range(0, count, step):
            stop = start + step
            answer = instance.run(
                {name: np.ascontiguousarray(value[start:stop]) for name, value in inputs.items()}
            )
            parts.append(answer)
            size += sum(value.nbytes for value in answer.values())
            if max_bytes and size > max_bytes:
                raise InvalidInput(
                    f"The outputs of {min(stop, count)} of {count} items already exceed {max_bytes} bytes.",
                    "Ask for fewer items or a larger byte budget.",
                )
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def execute(
    trial: Trial, store: Path, out: Path, budget: Budget | None = None, *, emulated: bool | None = None
) -> TrialResult:
    """Runs one trial on the bundles and data in `store`; outputs land in `out/outputs.npz`.

    A trial that cannot run is a result with `ok` false and the reason, not an exception.

    Args:
        emulated: an emulator's times are no figures, so a timing trial answers "unmeasured" at once, and
            the context says `emulated`; None = as this process finds itself.
    """
    emulated = processor.emulated_here() if emulated is None else emulated
    options = Options.from_proto(trial.options)
    result = TrialResult(trial=trial.id)
    try:
        bundle = open_bundle(store, trial.bundle)
        result.context.update(context(bundle, options))
        if emulated:
            result.context["emulated"] = "yes"
        if trial.kind == TRIAL_KIND_TIMING and emulated:
            result.timing.CopyFrom(untimed())
        elif trial.kind == TRIAL_KIND_TIMING:
            incumbent = open_bundle(store, trial.incumbent) if trial.incumbent else None
            result.timing.CopyFrom(time_bundles(bundle, incumbent, options, budget=budget))
        elif trial.kind == TRIAL_KIND_OUTPUTS:
            inputs = load_arrays(str(blob_path(store, trial.dataset)), "The trial's data set")
            result.outputs_blob = _write_outputs(out, run_outputs(bundle, inputs, options, trial.max_bytes))
        else:
            raise Unsupported(f"This agent has no trial of kind {trial.kind}.", "Update Shoal on it.")
        result.ok = True
    except ShoalError as error:
        result.error = str(error)[:1000]
    return result


def _write_outputs(out: Path, arrays: Mapping[str, Array]) -> str:
    out.mkdir(parents=True, exist_ok=True)
    target = out / "outputs.npz"
    temporary = out / f".outputs.{os.getpid()}.npz"
    with temporary.open("wb") as stream:
        np.savez_compressed(stream, allow_pickle=False, **arrays)
    temporary.replace(target)
    return digest_of_file(target)


def main(argv: Sequence[str], write: Callable[[str], object] = sys.stdout.write) -> int:
    """`bench TRIAL --store DIR --out DIR [--seconds S]`: prints `{"result": BASE64(TrialResult)}`."""
    parser = argparse.ArgumentParser(prog="shoal-agent bench", description="Executes one trial.")
    parser.add_argument("trial", help="a serialized shoal.v1.Trial, base64")
    parser.add_argument("--store", type=Path, required=True, help="OCI layout with bundles and data set")
    parser.add_argument("--out", type=Path, required=True, help="directory for outputs.npz")
    parser.add_argument("--seconds", type=float, default=Budget.seconds, help="time of the timed rounds")
    arguments = parser.parse_args(list(argv))
    try:
        trial = Trial.FromString(base64.b64decode(arguments.trial, validate=True))
    except Exception:  # protobuf's DecodeError and binascii's Error share no base
        sys.stderr.write("The argument is not a serialized trial in base64.\n")
        return 2
    result = execute(trial, arguments.store, arguments.out, Budget(seconds=arguments.seconds))
    write(json.dumps({"result": base64.b64encode(result.SerializeToString()).decode()}) + "\n")
    return 0
