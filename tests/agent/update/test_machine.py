from __future__ import annotations

import itertools
import json
from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from shoal_agent.update import machine
from shoal_agent.update.machine import (
    Allowed,
    BaseLost,
    Done,
    Drop,
    Failed,
    PlacementState,
    ServerDied,
    Started,
    Step,
    UnhandledEvent,
    Want,
    Wanted,
    Withheld,
    begin,
    step,
)
from shoal_protos.v1 import desired_pb2

SETTLE = desired_pb2.PlacementSettings(settle=desired_pb2.Settle(seconds=5)).SerializeToString()
OLD, NEW, THIRD = Wanted("old", 1, SETTLE), Wanted("new", 1, SETTLE), Wanted("third", 1, SETTLE)
COMMITTED = PlacementState("e", 1, Step.COMMIT, OLD, base=OLD)


def run(state: PlacementState, *events: machine.Event) -> PlacementState:
    for event in events:
        state = step(state, event)
    return state


def at(where: Step) -> PlacementState:
    """An update from OLD to NEW that has come as far as `where`."""
    state = step(COMMITTED, Want(NEW))
    while state.step is not where:
        state = step(state, Done())
    return state


def test_the_good_way() -> None:
    steps = [state.step for state in itertools.accumulate([Done()] * 5, step, initial=begin("e", 1, NEW))]
    assert steps == [Step.FETCH, Step.VERIFY, Step.PROBE, Step.SWITCH, Step.SETTLE, Step.COMMIT]
    done = run(begin("e", 1, NEW), *[Done()] * 5)
    assert done.base == NEW and not done.reason


def test_without_settle_the_switch_commits() -> None:
    assert run(begin("e", 1, Wanted("new")), *[Done()] * 4).step is Step.COMMIT


@pytest.mark.parametrize("where", [Step.FETCH, Step.VERIFY, Step.PROBE])
def test_failure_before_the_switch_leaves_the_base_alone(where: Step) -> None:
    failed = step(at(where), Failed("why", "because"))
    assert (failed.step, failed.base, failed.reason) == (Step.ROLLED_BACK, OLD, "why")


@pytest.mark.parametrize("where", [Step.SWITCH, Step.SETTLE])
@pytest.mark.parametrize("event", [Failed("why"), ServerDied()])
def test_failure_after_the_switch_puts_the_base_back(where: Step, event: machine.Event) -> None:
    back = step(at(where), event)
    assert back.step is Step.ROLL_BACK
    assert machine.answering(back) == OLD
    assert step(back, Done()).step is Step.ROLLED_BACK


def test_first_bundle_that_fails_leaves_nothing() -> None:
    state = run(begin("e", 1, NEW), Done(), Done(), Failed("probe: crashed"))
    assert state.step is Step.FAILED and machine.answering(state) is None


def test_failed_bundle_waits_for_a_higher_attempt() -> None:
    failed = step(at(Step.PROBE), Failed("probe: no"))
    there_and_back = run(failed, Want(OLD), Want(NEW))
    assert (there_and_back.step, there_and_back.reason) == (Step.ROLLED_BACK, "probe: no")
    assert step(failed, Want(replace(NEW, attempt=2))).step is Step.FETCH
    assert step(failed, Want(THIRD)).step is Step.FETCH
    assert step(failed, Want(OLD)).step is Step.COMMIT


@pytest.mark.parametrize("where", [Step.SWITCH, Step.SETTLE])
def test_one_ordinary_restart_is_allowed(where: Step) -> None:
    once = step(at(where), Started())
    assert once.step is Step.SWITCH
    settled = step(once, Done())
    assert settled.step is Step.SETTLE
    assert step(settled, Done()).step is Step.COMMIT
    assert step(settled, Started()).step is Step.ROLL_BACK


def test_a_probe_that_takes_the_device_down_is_given_up() -> None:
    state = at(Step.PROBE)
    for _ in range(machine.MAX_PROBE_RESUMES):
        state = step(state, Started())
        assert state.step is Step.PROBE
    assert step(state, Started()).step is Step.ROLLED_BACK


@pytest.mark.parametrize("where", [Step.SWITCH, Step.SETTLE])
def test_another_wish_in_mid_switch_goes_over_the_base(where: Step) -> None:
    back = step(at(where), Want(THIRD))
    assert back.step is Step.ROLL_BACK
    assert step(back, Done()).step is Step.FETCH
    assert step(step(at(where), Want(OLD)), Done()).step is Step.COMMIT


def test_new_settings_of_a_proven_bundle_only_reload_it() -> None:
    changed = Wanted("old", 1, desired_pb2.PlacementSettings(variant="v2").SerializeToString())
    state = step(COMMITTED, Want(changed))
    assert state.step is Step.SWITCH
    assert step(state, Done()).base == changed
    failed = run(state, Failed("switch: no"), Done())
    assert (failed.step, failed.base) == (Step.ROLLED_BACK, OLD)


def test_expired_state_installs_nothing_until_allowed() -> None:
    waiting = step(at(Step.FETCH), Withheld("expired"))
    assert waiting.step is Step.WAITING and machine.answering(waiting) == OLD
    assert step(waiting, Allowed()).step is Step.FETCH


def test_damaged_base_is_fetched_again() -> None:
    lost = step(COMMITTED, BaseLost("damaged"))
    assert lost.step is Step.FETCH and lost.base is None


def test_vanished_placement_is_unloaded_and_may_come_back() -> None:
    gone = step(COMMITTED, Drop())
    assert gone.step is Step.UNLOAD
    assert step(gone, Done()).step is Step.GONE
    assert step(gone, Want(OLD)).step is Step.FETCH


def test_every_cell_is_filled_and_bugs_are_loud() -> None:
    assert len(machine.TABLE) == len(Step) * 9
    with pytest.raises(UnhandledEvent):
        step(COMMITTED, Done())


def test_saved_states_read_back() -> None:
    for where in (Step.FETCH, Step.PROBE, Step.SETTLE):
        state = step(at(where), Started())
        assert machine.from_json(json.loads(json.dumps(machine.to_json(state)))) == state


BUNDLES = [Wanted(name, attempt, SETTLE) for name in ("a", "b", "c") for attempt in (1, 2)]
BUSY = {Step.FETCH, Step.VERIFY, Step.PROBE, Step.SWITCH, Step.SETTLE, Step.ROLL_BACK}


class DeviceLife(RuleBasedStateMachine):
    """Any order of wishes, results, crashes and restarts."""

    @initialize(first=st.sampled_from(BUNDLES))
    def join(self, first: Wanted) -> None:
        self.state = begin("e", 1, first)
        self.committed: Wanted | None = None

    def move(self, event: machine.Event) -> None:
        new = step(self.state, event)
        if new.step is Step.COMMIT:
            self.committed = new.wanted
        if isinstance(event, (Drop, BaseLost)) or self.state.step is Step.UNLOAD:
            self.committed = new.base
        self.state = machine.from_json(json.loads(json.dumps(machine.to_json(new))))

    @rule(wanted=st.sampled_from(BUNDLES))
    def wish(self, wanted: Wanted) -> None:
        self.move(Want(wanted))

    @precondition(lambda self: self.state.step in BUSY | {Step.UNLOAD})
    @rule()
    def succeed(self) -> None:
        self.move(Done())

    @precondition(lambda self: self.state.step in BUSY - {Step.ROLL_BACK})
    @rule()
    def fail(self) -> None:
        before = self.state
        self.move(Failed("test: failed"))
        assert self.state.step in (Step.ROLLED_BACK, Step.FAILED, Step.ROLL_BACK)
        assert any(item.bundle == before.wanted.bundle for item in self.state.failures)

    @rule()
    def crash_of_the_server(self) -> None:
        self.move(ServerDied())

    @rule()
    def restart(self) -> None:
        self.move(Started())
        assert self.state.step is not Step.SETTLE  # nothing is loaded in a new server

    @rule()
    def allow(self) -> None:
        self.move(Allowed())

    @precondition(lambda self: self.state.step in (Step.FETCH, Step.SWITCH))
    @rule()
    def expire(self) -> None:
        self.move(Withheld())

    @rule()
    def drop(self) -> None:
        self.move(Drop())

    @rule()
    def lose_base(self) -> None:
        self.move(BaseLost())

    @invariant()
    def only_a_committed_bundle_is_a_base(self) -> None:
        if hasattr(self, "state") and self.state.step not in (Step.UNLOAD, Step.GONE):
            assert self.state.base is None or self.state.base == self.committed
            assert self.state.step is not Step.COMMIT or self.state.base == self.state.wanted
            assert self.state.step is not Step.ROLLED_BACK or self.state.base is not None

    @invariant()
    def a_failed_attempt_is_never_under_way(self) -> None:
        if hasattr(self, "state") and self.state.step in BUSY - {Step.ROLL_BACK}:
            assert self.state.failure() is None


DeviceLife.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestDeviceLife = DeviceLife.TestCase
