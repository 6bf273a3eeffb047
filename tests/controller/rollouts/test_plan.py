"""Waves: everybody once, every class early, the same for the same seed, the budget kept."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal_controller.rollouts.plan import Budget, Candidate, admit, order, plan, target
from shoal_protos.errors import InvalidInput

fleets = st.lists(st.tuples(st.sampled_from("abcd"), st.booleans()), min_size=0, max_size=60).map(
    lambda rows: [Candidate(f"d{i:03}", name, online) for i, (name, online) in enumerate(rows)]
)
steps = st.sampled_from(
    [["1", "25%", "100%"], ["1"], ["3", "50%"], ["10%", "100%"], ["100%"], ["2", "2", "9"]]
)


@given(fleets, steps, st.integers(0, 5))
def test_everybody_goes_exactly_once(devices: list[Candidate], waves: list[str], seed: int) -> None:
    planned = plan(devices, waves, seed=seed)
    gone = [device for wave in planned for device in wave.devices]
    assert sorted(gone) == [d.device for d in devices]
    assert all(wave.devices for wave in planned)
    assert planned == plan(list(reversed(devices)), waves, seed=seed)


@given(fleets, st.integers(0, 5))
def test_the_second_wave_covers_every_class(devices: list[Candidate], seed: int) -> None:
    planned = plan(devices, ["1", "25%", "100%"], seed=seed)
    classes = {d.device: d.profile_class for d in devices}
    early = {classes[device] for wave in planned[:2] for device in wave.devices}
    assert early == set(classes.values())


def test_connected_devices_of_the_largest_class_go_first() -> None:
    devices = [Candidate("a1", "a", False), Candidate("a2", "a"), Candidate("a3", "a"), Candidate("b1", "b")]
    first = order(devices, 3)[0]
    assert first.profile_class == "a" and first.connected


def test_ten_thousand_devices() -> None:
    devices = [Candidate(f"d{i}", f"c{i % 7}") for i in range(10_000)]
    planned = plan(devices, ["1", "1%", "25%", "100%"], seed=1)
    assert [len(w.devices) for w in planned] == [1, 99, 2400, 7500]
    assert [w.name for w in planned] == ["1", "1%", "25%", "100%"]
    share = Counter(d[-1] for d in planned[2].devices)
    assert len(share) == 10
    assert plan(devices, ["1", "100%"], seed=2)[0] != planned[0]


@pytest.mark.parametrize(
    ("text", "total", "count"), [("1", 9, 1), ("20", 9, 9), ("25%", 9, 3), ("100 %", 7, 7), ("0.1%", 5000, 5)]
)
def test_targets(text: str, total: int, count: int) -> None:
    assert target(text, total) == count


@pytest.mark.parametrize("text", ["", "0", "-1", "1.5", "101%", "0%", "many", "nan", "inf", "nan%"])
def test_bad_steps_are_refused(text: str) -> None:
    with pytest.raises(InvalidInput, match="not a wave"):
        target(text, 10)


def test_bad_lists_are_refused() -> None:
    devices = [Candidate(f"d{i}", "a") for i in range(10)]
    with pytest.raises(InvalidInput, match="shrink"):
        plan(devices, ["50%", "20%"])
    with pytest.raises(InvalidInput, match="1 to 50"):
        plan(devices, [])
    with pytest.raises(InvalidInput, match="1 to 50"):
        plan(devices, ["1"] * 51)


@given(
    st.lists(st.sampled_from("xyz"), min_size=1, max_size=20),
    st.integers(0, 20),
    st.integers(1, 3),
)
def test_no_group_loses_more_than_its_budget(stores: list[str], busy: int, limit: int) -> None:
    labels = {f"d{i}": {"store": name} for i, name in enumerate(stores)}
    names = list(labels)
    working, waiting = names[:busy], names[busy:]
    started = admit(waiting, working, labels, Budget(("store",), limit))
    before = Counter(labels[d]["store"] for d in working)
    after = before + Counter(labels[d]["store"] for d in started)
    assert all(count <= max(limit, before[name]) for name, count in after.items())
    if not working:
        assert started  # nobody waits for nobody
    assert admit(waiting, working, labels, Budget()) == tuple(waiting)
