"""The filter language."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal_controller import query
from shoal_controller.store.repositories import Store
from shoal_protos.errors import InvalidInput

FACTS: dict[str, Any] = {
    "status": "degraded",
    "class": "x86_64.avx2.2c+onnxruntime",
    "name": "cam-1",
    "id": "d-abc",
    "labels": {"site": "lab", "owner": "Ada L"},
    "runtime": ["onnxruntime", "openvino"],
    "arch": "x86_64",
    "cores": 4,
    "memory": 4_000_000_000,
    "p95": 60.0,
    "temperature": None,
    "version": ["digits v1"],
}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", True),
        ("   ", True),
        ("status:degraded", True),
        ("status:offline", False),
        ("status:offline,degraded", True),
        ("status!=offline", True),
        ("class:x86*", True),
        ("class:*openvino", False),
        ("runtime:openvino", True),
        ("runtime!=litert", True),
        ("p95>50", True),
        ("p95>0.05s", True),
        ("p95<=60ms", True),
        ("temperature>10", False),
        ("-temperature>10", True),
        ("memory>=2GB cores=4", True),
        ("cores=2,4", True),
        ("cores!=4", False),
        ("label.site:lab", True),
        ('label.owner:"ada l"', True),
        ("label.none:x", False),
        ("-label.none:*x", True),
        ("cam", True),
        ("CAM-1", True),
        ('"cam 1"', False),
        ("-cam", False),
        ("not cam", False),
        ("cam lab digits", True),
        ("cam and status:offline", False),
        ("status:offline or cam", True),
        ("status:offline or p95>100 or cam", True),
        ("(status:offline or cam) p95>100", False),
        ("-(status:offline or nothing)", True),
        ("name:cam-?", False),
        ("order", False),
        ("android", False),
    ],
)
def test_what_a_filter_fits(text: str, expected: bool) -> None:
    assert query.parse(text).matches(FACTS) is expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("p95>", "character 4"),
        ("(cam", "character 5, near 'the end'"),
        ("a) b", "character 2"),
        ("cam colour:red", r"no field 'colour' \(at character 5\).*Fields: status"),
        ("p95>fast", r"not a number for 'p95' \(at character 1\)"),
        ("status>3", "'status' is text"),
        ("label.site<3", "Labels are text"),
        ("x" * 3000, "longer than"),
    ],
)
def test_what_is_wrong_is_pointed_at(text: str, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        query.parse(text)


@given(st.text(max_size=60))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        found = query.parse(text)
    except InvalidInput:
        return
    assert found.matches(FACTS) in (True, False)


@given(st.sampled_from(sorted(query.FIELDS)), st.sampled_from([":", "!=", ">", "<="]), st.text(max_size=12))
def test_any_comparison_is_read_or_refused(name: str, operator: str, value: str) -> None:
    try:
        found = query.parse(f"{name}{operator}{value}")
    except InvalidInput:
        return
    assert found.matches(FACTS) in (True, False)


def test_what_changes_by_itself_may_not_place_an_endpoint() -> None:
    assert query.parse_stable("class:x86* label.site:lab").fields == {"class", "label"}
    with pytest.raises(InvalidInput, match="'status', which changes by itself"):
        query.parse_stable("status:healthy")


def test_devices_of_a_filter_are_read_from_the_store(store: Store, add_device: Any) -> None:
    from shoal_controller.store.tables import Device

    first, second = add_device("one", site="lab"), add_device("two")
    with store.write() as session:
        session.get_one(Device, second).revoked = True
    with store.read() as session:
        assert [device.id for device in query.devices(session, "")] == [first]
        assert [device.id for device in query.devices(session, "label.site:lab runtime:onnx*")] == [first]
        assert query.devices(session, "", project="other") == []
