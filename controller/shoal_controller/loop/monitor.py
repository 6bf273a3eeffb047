"""From windows of telemetry to findings. Pure: no IO, no clock.

One finding is open at a time per subject and kind. A check answers `over` (a finding opens),
`under` (an open one closes) or nothing (not enough data: nothing changes). Every figure carries
its interval, and a drift alarm says that it is not an accuracy alarm.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from shoal_controller.loop import drift
from shoal_controller.rollouts import statistics
from shoal_protos.v1 import telemetry_pb2 as pb

KINDS = ("latency", "error_rate", "input_drift", "accuracy_drop", "new_class", "device_failed", "clock_wrong")


@dataclass(frozen=True)
class MonitorSettings:
    """When a check has enough to say something, and when it says it."""

    drift_items: int = 50  # of one block; detection needs 10 to 20
    drift_cap: int = 200  # thresholds of larger windows find harmless shifts
    drift_blocks: int = 2  # so many in a row over, and it is a finding
    drift_margin: float = 1.1  # over what held-out clean windows reached
    drift_clear_blocks: int = 3  # so many in a row within, and it is over
    latency_requests: int = 100
    error_requests: int = 50
    error_share: float = 0.02
    labels: int = 20
    label_window: int = 200  # newest labels that accuracy is judged on
    recent_s: float = 1800.0  # older windows say nothing about now


@dataclass(frozen=True)
class Span:
    """One window, of one device. Times in Unix milliseconds, latency in microseconds."""

    end_ms: int
    requests: int = 0
    errors: int = 0
    labelled: int = 0
    correct: int = 0
    latency: pb.Histogram | None = None
    inputs: pb.SketchSet | None = None


@dataclass(frozen=True)
class Served:
    """What one class of one endpoint serves now, with its windows, oldest first."""

    endpoint: str  # id
    endpoint_name: str
    profile_class: str
    bundle: str
    spans: tuple[Span, ...] = ()
    reference: pb.SketchSet | None = None
    thresholds: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    accuracy: Mapping[str, Any] | None = None  # the release's: {"value","low","high","n"}
    latency_limit_ms: float | None = None
    latency_metric: str = "latency_p95"

    @property
    def subject(self) -> str:
        return f"endpoint:{self.endpoint}/{self.profile_class}"


@dataclass(frozen=True)
class Signal:
    """What one check found about one subject."""

    kind: str
    subject: str
    over: bool
    sentence: str = ""
    evidence: Mapping[str, Any] = field(default_factory=dict)
    severity: str = "warning"
    endpoint: str = ""
    profile_class: str = ""


@dataclass(frozen=True)
class OpenFinding:
    id: str
    kind: str
    subject: str
    state: str  # open, acting


@dataclass(frozen=True)
class Changes:
    opened: tuple[Signal, ...]
    closed: tuple[tuple[str, str], ...]  # finding id, why
    refreshed: tuple[tuple[str, Signal], ...]  # still over: newer sentence and evidence


def evaluate(served: Served, settings: MonitorSettings, now_ms: int) -> list[Signal]:
    """Runs every check over one class of one endpoint."""
    cutoff = now_ms - settings.recent_s * 1000
    spans = sorted((s for s in served.spans if s.end_ms >= cutoff), key=lambda s: s.end_ms)
    checks = (_latency, _errors, _drift, _accuracy)
    return [signal for check in checks if (signal := check(served, spans, settings)) is not None]


def reconcile(signals: Iterable[Signal], findings: Sequence[OpenFinding]) -> Changes:
    """What changes: at most one open finding per subject and kind, closed when it is over.

    A finding that somebody acts on is not closed here: it ends with its action.
    """
    known = {(f.subject, f.kind): f for f in findings}
    newest: dict[tuple[str, str], Signal] = {}
    for signal in signals:  # of two about one subject, the alarm counts
        key = (signal.subject, signal.kind)
        if key not in newest or signal.over:
            newest[key] = signal
    opened, closed, refreshed = [], [], []
    for key, signal in newest.items():
        finding = known.get(key)
        if finding is None:
            if signal.over:
                opened.append(signal)
        elif finding.state == "open":
            if signal.over:
                refreshed.append((finding.id, signal))
            else:
                closed.append((finding.id, signal.sentence))
    return Changes(tuple(opened), tuple(closed), tuple(refreshed))


# ------------------------------------------------------------------ checks


def _signal(served: Served, kind: str, over: bool, sentence: str, **evidence: Any) -> Signal:
    return Signal(
        kind,
        served.subject,
        over,
        sentence,
        {"bundle": served.bundle, **evidence},
        endpoint=served.endpoint,
        profile_class=served.profile_class,
    )


def _newest(spans: Sequence[Span], count: str, enough: int) -> list[Span]:
    """The newest spans that together have `enough` of a count, or all of them."""
    taken: list[Span] = []
    total = 0
    for span in reversed(spans):
        taken.append(span)
        total += getattr(span, count)
        if total >= enough:
            break
    return taken[::-1]


def _latency(served: Served, spans: Sequence[Span], settings: MonitorSettings) -> Signal | None:
    if served.latency_limit_ms is None:
        return None
    used = _newest(spans, "requests", settings.latency_requests)
    merged = statistics.merge_histograms(s.latency for s in used if s.latency is not None)
    if merged is None or merged.count < settings.latency_requests:
        return None
    q = 0.5 if served.latency_metric == "latency_p50" else 0.95
    found = statistics.quantile(merged, q)
    assert found is not None
    name = "p50" if q == 0.5 else "p95"
    limit = served.latency_limit_ms
    figures: dict[str, Any] = {"value_ms": found.value, "low_ms": found.low, "high_ms": found.high}
    figures["n"] = found.n
    figures |= {"limit_ms": limit, "metric": served.latency_metric}
    where = f"'{served.endpoint_name}' on {served.profile_class}"
    text = (
        f"{name} latency of {where} is {found.value:.2f} ms "
        f"(95 % interval {found.low:.2f} to {found.high:.2f}, {found.n} requests)"
    )
    if found.low > limit:
        return _signal(served, "latency", True, f"{text}, above the objective's {limit:g} ms.", **figures)
    if found.value <= limit:
        return _signal(served, "latency", False, f"{text}, within the objective's {limit:g} ms.", **figures)
    return None


def _errors(served: Served, spans: Sequence[Span], settings: MonitorSettings) -> Signal | None:
    used = _newest(spans, "requests", settings.error_requests)
    requests = sum(s.requests for s in used)
    if requests < settings.error_requests:
        return None
    found = statistics.share(sum(s.errors for s in used), requests)
    assert found is not None
    figures = {"value": found.value, "low": found.low, "high": found.high, "n": found.n}
    figures["limit"] = settings.error_share
    text = (
        f"{100 * found.value:.1f} % of the last {found.n} requests to '{served.endpoint_name}' on "
        f"{served.profile_class} failed (95 % interval {100 * found.low:.1f} to {100 * found.high:.1f} %)"
    )
    if found.low > settings.error_share:
        return _signal(
            served, "error_rate", True, f"{text}, allowed {100 * settings.error_share:g} %.", **figures
        )
    return (
        _signal(served, "error_rate", False, f"{text}.", **figures)
        if found.value <= settings.error_share
        else None
    )


def _accuracy(served: Served, spans: Sequence[Span], settings: MonitorSettings) -> Signal | None:
    expected = served.accuracy
    if not expected or expected.get("value") is None:
        return None
    used = _newest(spans, "labelled", settings.label_window)
    labelled = sum(s.labelled for s in used)
    if labelled < settings.labels:
        return None
    found = statistics.share(sum(s.correct for s in used), labelled)
    assert found is not None
    promised = expected["low"] if expected.get("low") is not None else expected["value"]
    figures = {"value": found.value, "low": found.low, "high": found.high, "n": found.n}
    figures |= {"expected": expected["value"], "expected_low": promised}
    text = (
        f"Accuracy of '{served.endpoint_name}' on {served.profile_class} is {100 * found.value:.1f} % on the "
        f"last {found.n} posted labels (95 % interval {100 * found.low:.1f} to {100 * found.high:.1f} %); "
        f"its release promised {100 * expected['value']:.1f} %"
    )
    if found.high < promised:
        return _signal(served, "accuracy_drop", True, f"{text}.", **figures)
    if found.value >= promised or found.low <= promised <= found.high:
        return _signal(served, "accuracy_drop", False, f"{text}: no longer below it.", **figures)
    return None


# ------------------------------------------------------------------ drift


def _drift(served: Served, spans: Sequence[Span], settings: MonitorSettings) -> Signal | None:
    if served.reference is None:
        return None
    count = max(settings.drift_blocks, settings.drift_clear_blocks)
    told = []
    for block in drift.blocks(
        [s.inputs for s in spans], [s.end_ms for s in spans], settings.drift_items, count
    ):
        scored = drift.score(served.reference, block, served.thresholds, settings.drift_cap)
        if scored is None:
            return None
        told.append(scored)
    newest_blocks = told[: settings.drift_blocks]
    if len(newest_blocks) == settings.drift_blocks and all(
        s > settings.drift_margin for s, _ in newest_blocks
    ):
        evidence = newest_blocks[0][1]
        since = min(e["end_ms"] for _, e in newest_blocks)
        return _signal(
            served,
            "input_drift",
            True,
            _drift_sentence(served, evidence, settings),
            since_ms=since,
            **evidence,
        )
    clear = told[: settings.drift_clear_blocks]
    if len(clear) == settings.drift_clear_blocks and all(score <= 1.0 for score, _ in clear):
        where = f"'{served.endpoint_name}' on {served.profile_class}"
        return _signal(
            served, "input_drift", False, f"Inputs of {where} are within the reference again.", **clear[0][1]
        )
    return None


def _drift_sentence(served: Served, evidence: Mapping[str, Any], settings: MonitorSettings) -> str:
    name = "psi" if "psi" in evidence else "ks"
    return (
        f"Inputs of '{served.endpoint_name}' on {served.profile_class} have drifted: "
        f"{evidence[f'{name}_statistic']} differs most, {name.upper()} {evidence[name]:.2f} over "
        f"{evidence['n']} inputs, where clean windows of {evidence['threshold_n']} stayed below "
        f"{evidence[f'{name}_threshold']:.2f}, {settings.drift_blocks} times in a row. "
        "This is no accuracy alarm: accuracy is known only from labels."
    )


# ------------------------------------------------------------------ classes and devices


@dataclass(frozen=True)
class ClassCoverage:
    """One class of an endpoint's devices, and whether the release has a variant of its own for it."""

    endpoint: str
    endpoint_name: str
    profile_class: str
    devices: int
    covered: bool
    fallback: str = ""  # name of the nearest compatible variant, "" = none


def coverage_signal(coverage: ClassCoverage) -> Signal:
    """New class: over while the endpoint's release has no variant made for it."""
    count = "1 device" if coverage.devices == 1 else f"{coverage.devices} devices"
    if coverage.covered:
        text = f"'{coverage.endpoint_name}' has a variant for {coverage.profile_class}."
    elif coverage.fallback:
        text = (
            f"'{coverage.endpoint_name}' has no variant made for {coverage.profile_class} ({count}); "
            f"'{coverage.fallback}' of the nearest compatible class is used after its own probe."
        )
    else:
        text = (
            f"'{coverage.endpoint_name}' has no variant for {coverage.profile_class} ({count}), "
            "and none of another class fits: these devices serve nothing."
        )
    return Signal(
        "new_class",
        f"endpoint:{coverage.endpoint}/{coverage.profile_class}",
        not coverage.covered,
        text,
        {"devices": coverage.devices, "fallback": coverage.fallback},
        severity="info" if coverage.fallback else "warning",
        endpoint=coverage.endpoint,
        profile_class=coverage.profile_class,
    )


@dataclass(frozen=True)
class DeviceHealth:
    """What one device reports of its placements, outside any rollout."""

    device: str
    name: str
    profile_class: str
    failures: tuple[tuple[str, str, str], ...] = ()  # endpoint name, reason, detail
    clock_wrong: bool = False


def device_signals(health: DeviceHealth) -> list[Signal]:
    """Device failing, and a clock far off: each over or under."""
    failures = "; ".join(
        f"'{endpoint}': {reason or 'unknown reason'}" for endpoint, reason, _ in health.failures
    )
    failed = (
        f"{health.name} could not install what it should have ({failures}); it serves what it had before."
    )
    clock = f"The clock of {health.name} is far off; it uses the controller's time for expiry."
    subject = f"device:{health.device}"
    details = [detail for _, _, detail in health.failures]
    return [
        Signal(
            "device_failed",
            subject,
            bool(health.failures),
            failed if health.failures else f"{health.name} has what it should have.",
            {"details": details},
            profile_class=health.profile_class,
        ),
        Signal(
            "clock_wrong",
            subject,
            health.clock_wrong,
            clock if health.clock_wrong else f"The clock of {health.name} is right again.",
            severity="info",
            profile_class=health.profile_class,
        ),
    ]
