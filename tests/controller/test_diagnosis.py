"""Reading what a device says about itself: the agreed form, older agents' text, and anything else."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from shoal_controller import diagnosis

ANSWER = {
    "checks": [
        {"name": "clock", "state": "warning", "found": "3 s ahead", "remedy": "Set up NTP."},
        {"name": "disk", "state": "failed", "found": "full", "remedy": "Free some."},
        {"name": "dns", "state": "ok", "found": "fine", "remedy": ""},
        {"name": "new", "state": "purple", "found": None},
    ],
    "facts": {"glibc": "2.36", "net": {"wlan0": ["10.0.0.2"], "up": True}},
    "transitions": [
        {"time_ms": 1, "endpoint": "digits", "from": "fetch", "to": "verify", "reason": ""},
        {"time_ms": 2, "endpoint": "digits", "from": "verify", "to": "failed", "reason": "digest"},
    ],
}


def test_the_agreed_form() -> None:
    found = diagnosis.read(json.dumps(ANSWER))
    assert found is not None
    assert [check.name for check in found.wrong] == ["disk", "clock"]
    assert found.sentence == "2 of 4 checks need you: disk, clock."
    assert found.checks[3].state == "unmeasured"  # a state of a newer agent claims nothing
    assert dict(found.facts) == {"glibc": "2.36", "net.wlan0": '["10.0.0.2"]', "net.up": "yes"}
    assert [step.after for step in found.transitions] == ["failed", "verify"]  # newest first


def test_all_is_fine() -> None:
    found = diagnosis.read('{"checks": [{"name": "dns", "state": "ok", "found": ""}]}')
    assert found is not None and found.sentence == "1 check is fine." and found.wrong == ()
    found = diagnosis.read('{"checks": [{"state": "ok"}, {"state": "ok"}, {}], "facts": {"a": [], "b": ""}}')
    assert found is not None and found.sentence == "2 checks are fine, 1 unmeasured." and found.facts == ()


def test_other_texts_are_not_it() -> None:
    for text in ("", "disk is full", "[]", "{}", '{"checks": 3}', "[" * 9000, '"x"', "NaN"):
        assert diagnosis.read(text) is None


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=12,
)


@given(st.fixed_dictionaries({"checks": JSON}, optional={"facts": JSON, "transitions": JSON}) | JSON)
def test_hostile_answers_are_read_or_left(value: object) -> None:
    found = diagnosis.read(json.dumps(value))
    if found is not None:
        assert isinstance(found.sentence, str)
        assert all(check.state in diagnosis.STATES for check in found.checks)
        assert all(0 <= step.time_ms < 1 << 53 for step in found.transitions)
