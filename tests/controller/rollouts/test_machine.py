"""The rollout as a pure machine: its promises hold whatever devices do, and a year passes in seconds."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from shoal_controller.rollouts import machine, plan, verdict
from shoal_controller.rollouts.gates import Gates
from shoal_controller.rollouts.machine import DeviceRecord, RolloutState, WaveRecord
from shoal_controller.rollouts.plan import Candidate
from shoal_controller.rollouts.statistics import Period
from shoal_controller.rollouts.verdict import DeviceObservation, WaveState
from shoal_protos.errors import InvalidInput

GATES = Gates(settle_s=10, observe_s=60, silent_s=120, update_s=600)
DAY = 86_400


def started(
    devices: list[str], classes: int = 2, steps: tuple[str, ...] = ("1", "25%", "100%")
) -> RolloutState:
    waves = plan.plan([Candidate(d, f"c{i % classes}") for i, d in enumerate(devices)], list(steps))
    records = {d: DeviceRecord(d, n) for n, wave in enumerate(waves) for d in wave.devices}
    return RolloutState("running", 0, tuple(WaveRecord(w.name, w.devices) for w in waves), records)


@dataclasses.dataclass
class Sim:
    """One simulated device: what it serves, and how far it is."""

    connected: bool = True
    bad: bool = False
    stuck: bool = False
    serves: str = "old"
    step: str = ""
    seen_ms: int = 0


def observe(sim: Sim, name: str, told_new: bool, now: int, **kwargs: object) -> DeviceObservation:
    if sim.connected:
        sim.seen_ms = now
        if told_new and sim.serves == "old" and not sim.stuck:
            sim.step = "rolled_back" if sim.bad else "commit"
            sim.serves = "old" if sim.bad else "new"
        elif told_new and sim.stuck:
            sim.step = "fetch"
        elif not told_new:
            sim.serves, sim.step = "old", ""
    return DeviceObservation(
        device=name,
        name=name,
        profile_class="c",
        state="",
        started_ms=0,
        last_seen_ms=sim.seen_ms,
        connected=sim.connected,
        wanted=bool(sim.step),
        step=sim.step,
        serving=sim.serves == "new",
        reason="probe: too slow" if sim.step == "rolled_back" else "",
        back=sim.serves == "old" and not sim.step,
        **kwargs,  # type: ignore[arg-type]
    )


class RolloutMachine(RuleBasedStateMachine):
    """Devices fail, vanish, return and hang at will; people pause and abort."""

    @initialize(
        count=st.integers(1, 12),
        limit=st.integers(0, 2),
        fails=st.sampled_from([0.0, 0.2, 1.0]),
        seed=st.integers(0, 99),
    )
    def begin(self, count: int, limit: int, fails: float, seed: int) -> None:
        names = [f"d{i}" for i in range(count)]
        self.now = 1_000_000_000
        self.sims = {n: Sim(seen_ms=self.now) for n in names}
        self.rollout = started(names)
        self.gates = dataclasses.replace(GATES, max_unavailable=limit, max_failed_share=fails)
        self.random = random.Random(seed)
        self.endpoint = "old"
        self.promotions = 0

    def told_new(self, name: str) -> bool:
        record = self.rollout.devices.get(name)
        if self.rollout.ended:
            return self.endpoint == "new"
        moved = ("updating", "settling", "switched", "no_traffic")
        return self.rollout.state != "stopping" and record is not None and record.state in moved

    def advance(self, seconds: int) -> None:
        self.now += seconds * 1000
        seen = {n: observe(s, n, self.told_new(n), self.now) for n, s in self.sims.items()}
        newcomers = [n for n in self.sims if n not in self.rollout.devices]
        step = machine.advance(self.rollout, seen, self.gates, self.now, newcomers=newcomers)
        if step.state.state == "promoted" and not self.rollout.ended:
            self.endpoint = "new"
            self.promotions += 1
        self.rollout = step.state

    @rule(seconds=st.sampled_from([1, 5, 30, 300]))
    def time_passes(self, seconds: int) -> None:
        self.advance(seconds)

    @rule(data=st.data(), what=st.sampled_from(["bad", "stuck", "connected"]))
    def device_changes(self, data: st.DataObject, what: str) -> None:
        sim = self.sims[data.draw(st.sampled_from(sorted(self.sims)))]
        setattr(sim, what, not getattr(sim, what))

    @rule()
    def device_joins(self) -> None:
        self.sims[f"n{len(self.sims)}"] = Sim(seen_ms=self.now)

    @precondition(lambda self: self.rollout.state in ("running", "paused"))
    @rule()
    def person_pauses_or_resumes(self) -> None:
        other = "paused" if self.rollout.state == "running" else "running"
        self.rollout = dataclasses.replace(self.rollout, state=other)

    @precondition(lambda self: self.rollout.state in ("running", "paused"))
    @rule()
    def person_aborts(self) -> None:
        self.rollout = machine.stop(self.rollout, "enough", self.now, aborted=True).state

    @invariant()
    def one_promotion_at_most(self) -> None:
        if hasattr(self, "rollout"):
            assert self.promotions <= 1
            assert (self.endpoint == "new") == (self.rollout.state == "promoted")

    @invariant()
    def waves_pass_in_order(self) -> None:
        if hasattr(self, "rollout"):
            for number, wave in enumerate(self.rollout.waves):
                assert wave.state in ("passed", "carried") or number >= self.rollout.wave
                assert wave.state == "waiting" or number <= self.rollout.wave
            for record in self.rollout.devices.values():
                assert record.state == "waiting" or record.wave <= self.rollout.wave

    def teardown(self) -> None:
        """Whatever happened: resumed, it ends, in bounded time, with every reachable device on one side."""
        if not hasattr(self, "rollout"):
            return
        if self.rollout.state == "paused":
            self.rollout = dataclasses.replace(self.rollout, state="running")
        bound = (len(self.rollout.waves) + 2) * (len(self.sims) + 1) * 1000
        for _ in range(0, bound, 20):
            if self.rollout.ended:
                break
            self.advance(20)
        assert self.rollout.ended, self.rollout
        for sim in self.sims.values():
            sim.connected, sim.bad, sim.stuck = True, False, False
        self.advance(1)
        for name, sim in self.sims.items():
            observe(sim, name, self.told_new(name), self.now)
            assert sim.serves == self.endpoint, (name, sim, self.rollout.state)


TestRolloutMachine = RolloutMachine.TestCase
TestRolloutMachine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_a_year_of_ten_thousand_devices() -> None:
    """A rollout a month; devices come and go, one release in four is bad."""
    rng = random.Random(7)
    names = [f"d{i}" for i in range(10_000)]
    now = 1_700_000_000_000
    endpoint = 0
    promoted = stopped = 0
    serves = dict.fromkeys(names, 0)
    for month in range(1, 13):
        bad = month % 4 == 0
        offline = set(rng.sample(names, 300))
        rollout = started(names, classes=5, steps=("1", "1%", "25%", "100%"))
        start = now
        while not rollout.ended:
            now += 120_000
            seen = {}
            moved = ("updating", "settling", "switched", "no_traffic")
            current = rollout.waves[rollout.wave].devices if rollout.state != "stopping" else names
            for name in {*current, *(d for d, r in rollout.devices.items() if r.state == "silent")}:
                record = rollout.devices[name]
                told = rollout.state == "running" and record.state in moved
                online = name not in offline
                step = ""
                if told and online:
                    broken = bad and int(name[1:]) % 10 == 3
                    serves[name] = serves[name] if broken else month
                    step = "rolled_back" if broken else "commit"
                elif online and rollout.state == "stopping":
                    serves[name] = endpoint
                seen[name] = DeviceObservation(
                    name, name, "c", "", 0,
                    last_seen_ms=now if online else start - 1000,
                    connected=online,
                    wanted=bool(step),
                    step=step,
                    serving=serves[name] == month,
                    reason="probe: golden mismatch" if step == "rolled_back" else "",
                    back=serves[name] == endpoint,
                )  # fmt: skip
            rollout = machine.advance(rollout, seen, GATES, now).state
        assert now - start < DAY * 1000
        if bad:
            assert rollout.state == "rolled_back" and rollout.wave <= 2
            stopped += 1
        else:
            assert rollout.state == "promoted"
            endpoint = month
            promoted += 1
        for name in names:
            serves[name] = endpoint  # who was away catches up with what the endpoint has
        now += 29 * DAY * 1000
    assert (promoted, stopped) == (9, 3)


# ------------------------------------------------------------------ the verdict by itself


def look(now_s: float, *devices: DeviceObservation, gates: Gates = GATES) -> verdict.Verdict:
    return verdict.decide(WaveState(0, "1", 2, 0), devices, gates, int(now_s * 1000))


def device(name: str = "d", **kwargs: Any) -> DeviceObservation:
    values: dict[str, Any] = {
        "state": "updating",
        "started_ms": 0,
        "connected": True,
        "last_seen_ms": 10**9,
    }
    return DeviceObservation(name, name, "c", **(values | kwargs))


DONE: dict[str, Any] = {
    "wanted": True,
    "step": "commit",
    "serving": True,
    "state": "switched",
    "switched_ms": 1000,
}


def test_missing_data_is_typed_and_has_deadlines() -> None:
    away: dict[str, Any] = {"connected": False, "last_seen_ms": 0}
    assert look(100, device(**away)).decision == "collecting"
    silent = look(121, device(**away))
    assert (
        silent.decision == "go" and silent.outcomes[0].state == "silent" and "carried over" in silent.sentence
    )
    planned = look(1, device(**away, planned_offline=True))
    assert planned.decision == "go" and planned.outcomes[0].reason == "planned offline"
    assert look(599, device()).decision == "collecting"
    late = look(600, device(wanted=True, step="fetch"))
    assert late.decision == "stop" and "not done after" in late.sentence
    gone = look(300, device(connected=False, last_seen_ms=100_000, wanted=True, step="switch"))
    assert gone.decision == "stop" and "silent for" in gone.sentence


def test_no_traffic_passes_on_probes_alone_and_says_so() -> None:
    assert look(5, device(**DONE)).decision == "collecting"
    found = look(12, device(**DONE))
    assert found.decision == "go" and found.outcomes[0].state == "no_traffic"
    assert "probes alone" in found.sentence
    busy_before = device(**DONE, before=Period(500))
    assert look(12, busy_before).decision == "collecting"  # it had traffic: its first requests are waited for
    assert look(62, busy_before).decision == "go"


def test_too_few_requests_are_waited_for_until_the_deadline() -> None:
    few = device(**DONE, before=Period(500), after=Period(10))
    assert look(30, few).decision == "collecting"
    found = look(62, few)
    assert found.decision == "go" and "too few requests" in found.sentence


def test_errors_stop_a_wave_also_without_a_before() -> None:
    found = look(15, device(**DONE, before=Period(500, 0), after=Period(500, 60)))
    assert found.decision == "stop" and "share of errors rose" in found.sentence
    first = look(15, device(**DONE, after=Period(100, 30)))
    assert first.decision == "stop" and "requests failed" in first.sentence
    one = look(15, device(**DONE, before=Period(500, 1), after=Period(500, 2)))
    assert one.decision == "go"


def test_accuracy_stops_a_wave() -> None:
    worse = device(
        **DONE, before=Period(500, labelled=200, correct=190), after=Period(500, labelled=200, correct=120)
    )
    assert "accuracy fell" in look(15, worse).sentence
    unsure = device(
        **DONE, before=Period(500, labelled=9, correct=9), after=Period(500, labelled=9, correct=5)
    )
    assert look(15, unsure).decision == "go"


def test_looking_often_needs_stronger_evidence_than_the_last_look() -> None:
    slightly = device(**DONE, before=Period(300, 3), after=Period(300, 15))
    assert look(20, slightly).decision != "stop"
    assert look(61.5, slightly).decision == "stop"


def test_a_few_failures_of_many_are_allowed() -> None:
    fine = [device(f"d{i}", **DONE) for i in range(99)]
    bad = device("bad", wanted=True, step="rolled_back", reason="fetch: disk full")
    assert look(15, *fine, bad).decision == "go"
    assert look(15, *fine[:20], bad).decision == "stop"
    gates = dataclasses.replace(GATES, max_failed_share=0.0)
    assert look(15, *fine, bad, gates=gates).decision == "stop"


def test_a_sticky_failure_stays_one() -> None:
    again = device(state="failed", reason="probe: too slow", wanted=False, connected=True)
    assert look(15, again).outcomes[0].state == "failed"


def test_gates_are_checked() -> None:
    assert Gates.from_json(GATES.to_json()) == GATES
    for wrong in (
        {"speed": 1},
        {"settle_s": "soon"},
        {"settle_s": -1},
        {"observe_s": float("nan")},
        {"group_by": "site"},
    ):
        with pytest.raises(InvalidInput):
            Gates.from_json(wrong)


def test_an_emulated_device_gives_no_timing_evidence() -> None:
    few = Period(requests=5)
    plain = device(**DONE, before=Period(requests=100), after=few)
    assert look(30, plain).decision == "collecting"  # waits for enough requests to judge latency
    found = look(30, dataclasses.replace(plain, emulated=True))
    assert found.decision == "go" and "Latency of 1 device is unmeasured (emulated)." in found.sentence
    latency = next(effect for effect in found.effects if effect.name == "latency_p95")
    assert latency.value is None and "unmeasured (emulated)" in latency.sentence
    failing = device(
        **DONE, emulated=True, before=Period(requests=100), after=Period(requests=100, errors=90)
    )
    assert look(30, failing).decision == "stop"  # wrong answers are evidence from anybody
