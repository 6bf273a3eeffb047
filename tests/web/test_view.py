"""How values look."""

# ruff: noqa: E501  (tables of cases)

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal_controller.api import schemas as s
from shoal_controller.rollouts.gates import Gates
from shoal_controller.web import view


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (float("nan"), "–"), (0, "0"), (1234567, "1,234,567"), (0.9174, "0.917"), (12.34, "12.3"), (238.2, "238"), (0.00042, "0.00042"), (41.0, "41")],
)  # fmt: skip
def test_num(value: float | None, text: str) -> None:
    assert view.num(value) == text


@given(st.floats() | st.none())
def test_formats_never_fail(value: float | None) -> None:
    if value is not None and value in (float("inf"), float("-inf")):
        return
    for shown in (view.num(value), view.score(value), view.share(value), view.signed(value, "%")):
        assert shown and "e+" not in shown


def test_spans_and_ages() -> None:
    assert view.ago(0, 10) == "never"
    assert view.ago(1000, 5000) == "4 s ago"
    assert [view.span(ms) for ms in (5e3, 12 * 6e4, 5 * 36e5, 4 * 864e5)] == ["5 s", "12 min", "5 h", "4 d"]


def test_sizes_signs_and_shares() -> None:
    assert [view.size(n) for n in (12, 1500, 2_500_000, 166e6)] == ["12 B", "1.5 kB", "2.5 MB", "166 MB"]
    assert view.signed(-11.8, "%") == "−11.8 %"
    assert view.signed(0.02, "points") == "+0.02 pt"
    assert view.share(0.0004) == "0.04 %"
    assert view.score(0.974) == "97.4 %" and view.score(31.25) == "31.25"
    assert view.interval(s.Figure(value=0.9, low=0.88, high=0.92), "score") == "88.0 to 92.0 %"


def test_recipes_read_as_steps() -> None:
    recipe: list[dict[str, Any]] = [
        {"technique": "channel_pruning", "parameters": {"share": 0.5}},
        {"technique": "quantization"},
    ]
    assert view.recipe(recipe) == "channel pruning 50 % → quantization"
    assert view.recipe([]) == "converted only"


def test_steps_follow_the_current_one() -> None:
    rows = view.steps(
        {"step": "distil", "share": 0.4, "message": "epoch 5", "steps": ["prune", "distil"]}, "running"
    )
    assert [r["state"] for r in rows] == ["done", "running"]
    assert rows[1]["message"] == "epoch 5" and rows[1]["share"] == 0.4
    assert [r["state"] for r in view.steps({"step": "b", "steps": ["a", "b"]}, "failed")] == [
        "done",
        "failed",
    ]
    assert view.steps({}, "queued") == []


def test_objective_limits() -> None:
    text = "accuracy>=0.97, latency_p95<=5ms, memory<=64MB; minimise size"
    assert view.limit(text, "latency_p95") == ("<=", 5.0)
    assert view.limit(text, "accuracy") == (">=", 0.97)
    small = view.limit("latency_p95 <= 800us", "latency_p95")
    assert small is not None and small[1] == pytest.approx(0.8)
    assert view.limit("minimise latency_p95", "latency_p95") is None


def test_gates_read_as_sentences() -> None:
    shown = dict(view.gates(Gates().to_json()))
    assert shown["p95 latency"] == "at most 50 % slower on the same devices"
    assert dict(view.gates({"new_gate_s": 4}))["new gate"] == "4 s"


@given(
    st.recursive(
        st.none() | st.booleans() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
        lambda c: st.lists(c, max_size=3) | st.dictionaries(st.text(max_size=5), c, max_size=3),
        max_leaves=12,
    )
)
def test_flatten_takes_any_json(value: object) -> None:
    assert all(isinstance(part, str) for pair in view.flatten({"x": value}) for part in pair)


def test_failures_are_grouped_by_reason() -> None:
    def one(name: str, state: str, reason: str = "") -> s.RolloutDevice:
        return s.RolloutDevice(device=name, name=name, profile_class="c", wave=0, state=state, reason=reason)

    devices = [one("a", "switched"), one("b", "failed", "probe"), one("c", "silent"), one("d", "failed", "probe"), one("e", "rolled_back")]  # fmt: skip
    assert [(reason, len(group)) for reason, group in view.by_reason(devices)] == [
        ("probe", 2),
        ("silent", 1),
    ]


def test_commands_in_a_note() -> None:
    note = "Run first: shoal controller wheels add --python 3.13 (the wheels); shoal up --lan. Then again."
    found = [text for text, command in view.commands(note) if command]
    assert found == ["shoal controller wheels add --python 3.13", "shoal up --lan"]
    assert "".join(text for text, _ in view.commands(note)) == note
    assert view.commands("shoal is a word here") == [("shoal is a word here", False)]
