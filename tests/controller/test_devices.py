"""Status rules, intake's bookkeeping, and what becomes of old windows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from sqlalchemy import func, select

from shoal_agent.telemetry import histograms
from shoal_agent.telemetry.intervals import wilson
from shoal_controller import windows
from shoal_controller.device_status import FindingFacts, PlacementFacts, StatusFacts, judge
from shoal_controller.intake import Intake
from shoal_controller.metrics import cumulative_buckets
from shoal_controller.store.repositories import Store
from shoal_controller.store.tables import Device, Optimization, Sample, Spool, Trial, Version, Window
from shoal_protos.errors import Denied, InvalidInput
from shoal_protos.v1 import agents_pb2, telemetry_pb2

from .conftest import START_MS, FakeClock

STEP = agents_pb2.Step
BUNDLE = "sha256:" + "a" * 64
GOOD = StatusFacts(
    revoked=False,
    connected=True,
    last_seen_ms=START_MS,
    now_ms=START_MS,
    offline_after_s=60,
    behind=False,
    clock_wrong=False,
    throttled=False,
    refusal="",
)


def placement(step: int, reason: str = "") -> PlacementFacts:
    return PlacementFacts("digits", BUNDLE, BUNDLE, step, reason)


@pytest.mark.parametrize(
    ("changes", "status", "reason"),
    [
        ({}, "healthy", ""),
        ({"revoked": True, "connected": False}, "revoked", "revoked"),
        ({"connected": False, "last_seen_ms": START_MS - 59_000}, "healthy", ""),
        ({"connected": False, "last_seen_ms": START_MS - 7_200_000}, "offline", "nothing heard for 2 h"),
        ({"connected": False, "last_seen_ms": 0}, "offline", "never connected"),
        (
            {"placements": [placement(STEP.STEP_ROLLED_BACK, "golden mismatch")]},
            "degraded",
            "golden mismatch",
        ),
        ({"placements": [placement(STEP.STEP_FAILED)]}, "degraded", "no reason given"),
        ({"placements": [placement(STEP.STEP_FETCH)]}, "updating", "digits: fetch"),
        ({"placements": [placement(STEP.STEP_COMMIT)]}, "healthy", ""),
        ({"behind": True}, "updating", "not adopted"),
        ({"refusal": "bad signature"}, "degraded", "bad signature"),
        ({"findings": [FindingFacts("input_drift", "inputs moved")]}, "drifting", "inputs moved"),
        ({"findings": [FindingFacts("latency", "too slow")]}, "degraded", "too slow"),
        ({"findings": [FindingFacts("new_class", "nothing made for it")]}, "healthy", ""),
        ({"clock_wrong": True}, "degraded", "clock"),
        ({"throttled": True, "behind": True}, "degraded", "throttled"),
    ],
)
def test_the_worst_that_applies_is_the_status(changes: dict[str, Any], status: str, reason: str) -> None:
    found, why = judge(replace(GOOD, **changes))
    assert found == status and reason in why


# ---------------------------------------------------------------------------- intake


@pytest.fixture
def intake(clock: FakeClock) -> Intake:
    return Intake(clock)


def window(start_s: int, end_s: int, boot: str = "boot", requests: int = 1) -> telemetry_pb2.TelemetryWindow:
    found = telemetry_pb2.TelemetryWindow(
        boot_id=boot, monotonic_start_ns=start_s * 10**9, monotonic_end_ns=end_s * 10**9
    )
    histogram = histograms.ExponentialHistogram()
    for _ in range(requests):
        histogram.record(1500)
    found.placements.add(
        endpoint="digits", bundle=BUNDLE, role=1, requests=requests, latency=histogram.to_proto()
    )
    return found


def send(store: Store, intake: Intake, device: str, sequence: int, first: bool = False, **item: Any) -> int:
    message = agents_pb2.Spooled(spool_id="s", sequence=sequence, **item)
    with store.write() as session:
        return intake.spooled(
            session, device, message, zero_ms=START_MS - 1_000_000, boot_id="boot", first=first
        )


def test_only_contiguous_items_are_taken(store: Store, intake: Intake, add_device: Any) -> None:
    device = add_device()
    assert send(store, intake, device, 1, first=True, telemetry=window(1, 2)) == 1
    assert send(store, intake, device, 3, telemetry=window(3, 4)) == 1  # 2 is still on its way
    assert send(store, intake, device, 2, telemetry=window(2, 3)) == 2
    assert send(store, intake, device, 2, telemetry=window(2, 3)) == 2
    assert intake.duplicates_total == 1
    # A new stream that begins later: what lies between is lost for good, and said so.
    assert send(store, intake, device, 7, first=True, telemetry=window(7, 8)) == 7
    with store.read() as session:
        assert session.get_one(Spool, "s").gaps == [{"from": 3, "to": 6, "reason": "never received"}]
        assert session.scalar(select(func.sum(Window.requests))) == 3


def test_a_gap_that_reaches_further_than_what_is_known_is_taken(
    store: Store, intake: Intake, add_device: Any
) -> None:
    device = add_device()
    assert send(store, intake, device, 1, first=True, telemetry=window(1, 2)) == 1
    gap = telemetry_pb2.Gap(from_sequence=1, to_sequence=9, reason="spool full")
    assert send(store, intake, device, 1, gap=gap) == 9
    with store.read() as session:
        assert session.get_one(Spool, "s").gaps == [{"from": 2, "to": 9, "reason": "spool full"}]


@pytest.mark.parametrize("sequence", [0, 1 << 63])
def test_sequences_out_of_range_are_refused(
    store: Store, intake: Intake, add_device: Any, sequence: int
) -> None:
    with pytest.raises(InvalidInput):
        send(store, intake, add_device(), sequence, telemetry=window(1, 2))


def test_unknown_devices_are_refused(store: Store, intake: Intake) -> None:
    with pytest.raises(Denied), store.write() as session:
        intake.hello(session, "d-nobody", agents_pb2.Hello())


def test_windows_lie_on_the_controllers_time(
    store: Store, intake: Intake, clock: FakeClock, add_device: Any
) -> None:
    device = add_device()
    with store.write() as session:
        intake.clock_of(session, device, "earlier", START_MS - 5_000_000)
    send(store, intake, device, 1, first=True, telemetry=window(10, 20))
    send(store, intake, device, 2, telemetry=window(10, 20, boot="earlier"))
    unknown = window(10, 20, boot="never met")
    unknown.wall_end_ms = START_MS + 10**12  # a clock far ahead: never in the controller's future
    send(store, intake, device, 3, telemetry=unknown)
    with store.read() as session:
        ends = session.scalars(select(Window.end_ms).where(Window.endpoint != "")).all()
    assert sorted(ends) == [START_MS - 5_000_000 + 20_000, START_MS - 1_000_000 + 20_000, START_MS]


def test_hooks_run_in_the_messages_transaction(
    store: Store, intake: Intake, clock: FakeClock, add_device: Any
) -> None:
    device = add_device()
    seen: list[str] = []
    intake.on_sample.append(lambda _s, d, sample: seen.append(f"{d.id} {sample.count}"))
    intake.on_trial_result(lambda _s, d, result: seen.append(f"{d.id} {result.trial}"))
    with store.write() as session:
        from shoal_controller.store.tables import Model

        session.add(Model(id="m-1", name="digits", created_ms=0))
        session.flush()
        session.add(Version(id="v-1", model="m-1", number=1, state="ready", source_blob="", created_ms=0))
        session.flush()
        session.add(Optimization(id="o-1", kind="optimize", version="v-1", state="waiting", created_ms=0))
        session.flush()
        for trial, owner in (("t-1", device), ("t-2", "d-other")):
            session.add(
                Trial(
                    id=trial,
                    optimization="o-1",
                    bundle=BUNDLE,
                    profile_class="c",
                    kind="timing",
                    device=owner,
                    state="published",
                    result=None,
                    created_ms=0,
                    not_after_ms=START_MS + 1,
                )
            )
    notice = telemetry_pb2.SampleNotice(endpoint="digits", bundle=BUNDLE, blob=BUNDLE, count=5)
    send(store, intake, device, 1, first=True, sample=notice)
    send(store, intake, device, 2, trial=telemetry_pb2.TrialResult(trial="t-1", ok=True))
    send(store, intake, device, 3, trial=telemetry_pb2.TrialResult(trial="t-2", ok=True))  # not its own
    assert seen == [f"{device} 5", f"{device} t-1"]
    with store.read() as session:
        assert session.get_one(Trial, "t-1").state == "done"
        assert session.get_one(Trial, "t-2").state == "published"
        assert len(session.scalars(select(Sample)).all()) == 1


# ---------------------------------------------------------------------------- retention


def test_old_windows_are_folded_without_losing_a_count(
    store: Store, intake: Intake, clock: FakeClock, add_device: Any
) -> None:
    device = add_device()
    for at in range(60):  # ten minutes of 10 s
        send(
            store, intake, device, at + 1, first=at == 0, telemetry=window(at * 10, at * 10 + 10, requests=3)
        )

    def total() -> tuple[int, int, set[str]]:
        with store.read() as session:
            rows = session.scalars(select(Window).where(Window.endpoint == "digits")).all()
            latency = windows.merged_latency(rows)
            assert latency.count == sum(row.requests for row in rows)
            return len(rows), sum(row.requests for row in rows), {row.resolution for row in rows}

    assert total() == (60, 180, {"raw"})
    for hours, most, resolution in ((3, 4, "5m"), (50, 2, "1h")):
        clock.now_ms = START_MS + hours * windows.HOUR_MS
        for _ in range(4):
            with store.write() as session:
                windows.compact(session, clock())
        count, requests, resolutions = total()
        assert requests == 180 and count <= most and resolutions == {resolution}
    clock.advance(31 * 86400)
    with store.write() as session:
        windows.compact(session, clock())
    assert total()[0] == 0
    with store.read() as session:
        assert session.get_one(Device, device).figures["requests"] == 3


def test_a_histogram_keeps_its_counts_in_prometheus_buckets() -> None:
    histogram = histograms.ExponentialHistogram()
    for us in (50, 700, 3000, 3000, 9e6):
        histogram.record(us)
    buckets = dict(cumulative_buckets(histogram.to_proto()))
    assert buckets["0.0001"] == 1 and buckets["0.001"] == 2 and buckets["0.005"] == 4
    assert buckets["2.5"] == 4 and buckets["+Inf"] == 5
    values = [count for _, count in cumulative_buckets(histogram.to_proto())]
    assert values == sorted(values)


def test_the_interval_of_a_share_holds_it() -> None:
    low, high = wilson(19, 20)
    assert 0.76 < low < 0.95 < high < 1.0
    assert wilson(0, 5)[0] == 0.0 and wilson(5, 5)[1] == 1.0
