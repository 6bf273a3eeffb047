from __future__ import annotations

from shoal_agent.telemetry.histograms import ExponentialHistogram
from shoal_agent.update.settle import Traffic, Verdict, judge, p95_us
from shoal_protos.v1 import desired_pb2, telemetry_pb2

RULE = desired_pb2.Settle(seconds=10, max_error_share=0.1, max_latency_ratio=1.5, min_requests=30)


def window(requests: int, errors: int = 0, us: float = 1000.0) -> telemetry_pb2.PlacementWindow:
    histogram = ExponentialHistogram()
    for _ in range(requests):
        histogram.record(us)
    return telemetry_pb2.PlacementWindow(requests=requests, errors=errors, latency=histogram.to_proto())


def verdict(traffic: Traffic, over: bool = True, baseline: float = 1000.0) -> tuple[Verdict, str]:
    found, reason, evidence = judge(RULE, baseline, traffic, over)
    assert bool(reason) == (found is Verdict.GO_BACK) and (not reason or evidence)
    return found, reason


def test_healthy_traffic_stays_only_at_the_end() -> None:
    traffic = Traffic().plus(window(20)).plus(window(20))
    assert verdict(traffic, over=False)[0] is Verdict.WATCH
    assert verdict(traffic)[0] is Verdict.STAY
    assert traffic.requests == 40 and traffic.latency.count == 40


def test_errors_end_it_early_once_there_are_enough() -> None:
    assert verdict(Traffic().plus(window(5, 5)), over=False)[0] is Verdict.WATCH
    assert verdict(Traffic().plus(window(40, 8)), over=False) == (Verdict.GO_BACK, "settle: error share")
    assert verdict(Traffic().plus(window(5, 5)))[0] is Verdict.GO_BACK


def test_latency_is_held_against_the_devices_own_baseline() -> None:
    slow = Traffic().plus(window(40, us=2000))
    assert verdict(slow) == (Verdict.GO_BACK, "settle: latency")
    assert verdict(slow, baseline=0)[0] is Verdict.STAY  # unknown: not judged
    assert verdict(Traffic().plus(window(10, us=2000)))[0] is Verdict.STAY  # too few to judge


def test_no_traffic_is_no_reason_to_go_back() -> None:
    assert verdict(Traffic())[0] is Verdict.STAY


def test_p95_of_nothing_is_unknown() -> None:
    assert p95_us([]) == 0
    assert 900 < p95_us([window(10).latency, telemetry_pb2.Histogram()]) < 1200
