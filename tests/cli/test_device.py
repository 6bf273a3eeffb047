"""`shoal device`: what is asked of devices, what is done to them, and how it looks."""

from __future__ import annotations

import json
from typing import Any

import pytest

from shoal_controller.api import schemas
from shoal_controller.cli import device_answers
from tests.cli.conftest import NOW_MS, Api, Shoal, device

DIAGNOSIS = json.dumps(
    {
        "checks": [
            {"name": "disk", "state": "failed", "found": "210 MB free", "remedy": "Free 500 MB."},
            {"name": "clock", "state": "ok", "found": "0.2 s off", "remedy": ""},
        ],
        "facts": {"glibc": "2.36"},
        "transitions": [
            {"time_ms": NOW_MS, "endpoint": "digits", "from": "probe", "to": "rolled_back", "reason": "slow"}
        ],
    }
)


def detail(**changes: Any) -> schemas.DeviceDetail:
    values: dict[str, Any] = {
        **device().model_dump(),
        "profile": {"cpu_model": "Cortex-A76", "cores": 4, "memory_bytes": 8 << 30, "os": "linux debian 13"},
        "system": {},
        "generation": 7,
        "reported_generation": 6,
        "desired_ms": NOW_MS,
        "connected": True,
        "windows": [],
        "events": [],
    }
    return schemas.DeviceDetail(**{**values, **changes})


def request(kind: str, state: str = "open", body: str = "", id: str = "q-0001") -> schemas.DeviceRequest:
    answered = NOW_MS if state == "answered" else 0
    return schemas.DeviceRequest(
        id=id, device="d-kitchen", kind=kind, state=state, body=body, created_ms=NOW_MS, answered_ms=answered
    )


@pytest.fixture
def kitchen(api: Api, monkeypatch: pytest.MonkeyPatch) -> Api:
    monkeypatch.setattr(device_answers, "INTERVAL_S", 0.01)
    api.answer("GET", "/devices/kitchen", detail())
    api.answer("GET", "/devices/d-kitchen", detail())
    return api


def answers_after(api: Api, kind: str, body: str, polls: int = 2) -> None:
    """The device answers at the `polls`-th question whether it has."""
    asked: list[int] = []

    def poll(_call: Any) -> list[schemas.DeviceRequest]:
        asked.append(1)
        return [request(kind, "answered", body) if len(asked) >= polls else request(kind)]

    api.answer("POST", "/devices/d-kitchen/requests", (202, request(kind)))
    api.answer("GET", "/devices/d-kitchen/requests", poll)


def test_logs_wait_for_the_answer_and_go_to_stdout(kitchen: Api, shoal: Shoal) -> None:
    answers_after(kitchen, "logs", "one\ntwo\n")
    done = shoal("device", "logs", "kitchen")
    assert (done.code, done.out) == (0, "one\ntwo\n")
    assert "Asked kitchen for its logs" in done.err
    assert json.loads(next(c for c in kitchen.calls if c.method == "POST").body) == {"kind": "logs"}


def test_an_answer_as_json_is_the_apis_object(kitchen: Api, shoal: Shoal) -> None:
    answers_after(kitchen, "logs", "one")
    found = json.loads(shoal("device", "logs", "kitchen", "--json").out)
    assert schemas.DeviceRequest.model_validate(found).body == "one"


def test_an_offline_device_answers_later(kitchen: Api, shoal: Shoal) -> None:
    kitchen.answer("GET", "/devices/kitchen", detail(status="offline", connected=False))
    kitchen.answer("POST", "/devices/d-kitchen/requests", (202, request("logs")))
    done = shoal("device", "logs", "kitchen")
    assert done.code == 6 and done.out == ""
    assert "kitchen is offline" in done.err and "answers q-0001 when it comes back" in done.err
    assert "shoal device logs kitchen --last" in done.err
    script = shoal("device", "logs", "kitchen", "--json")
    assert script.code == 6 and schemas.DeviceRequest.model_validate_json(script.out).state == "open"


def test_waiting_ends_with_the_timeout(kitchen: Api, shoal: Shoal) -> None:
    answers_after(kitchen, "diagnose", "", polls=10**6)
    done = shoal("device", "diagnose", "kitchen", "--timeout", "50ms")
    assert done.code == 6 and "has not answered q-0001 within 50ms" in done.err
    script = shoal("device", "diagnose", "kitchen", "--timeout", "50ms", "--json")
    assert script.code == 6 and schemas.DeviceRequest.model_validate_json(script.out).id == "q-0001"


def test_an_expired_request_fails(kitchen: Api, shoal: Shoal) -> None:
    kitchen.answer("POST", "/devices/d-kitchen/requests", (202, request("logs")))
    kitchen.answer("GET", "/devices/d-kitchen/requests", [request("logs", "expired")])
    assert shoal("device", "logs", "kitchen").code == 1


def test_last_reads_the_newest_answer_and_asks_nothing(kitchen: Api, shoal: Shoal) -> None:
    old = [request("diagnose", "answered", "x", "q-9"), request("logs", id="q-8"),
           request("logs", "answered", "newest", "q-7")]  # fmt: skip
    kitchen.answer("GET", "/devices/d-kitchen/requests", old)
    done = shoal("device", "logs", "kitchen", "--last")
    assert (done.code, done.out) == (0, "newest\n")
    kitchen.answer("GET", "/devices/d-kitchen/requests", [request("logs")])
    assert shoal("device", "logs", "kitchen", "--last").code == 6  # asked, not answered yet
    kitchen.answer("GET", "/devices/d-kitchen/requests", [])
    never = shoal("device", "logs", "kitchen", "--last")
    assert never.code == 2 and "Ask: shoal device logs kitchen" in never.err
    assert not [c for c in kitchen.calls if c.method == "POST"]


def test_a_diagnosis_is_a_table_and_a_failed_check_is_code_1(kitchen: Api, shoal: Shoal) -> None:
    answers_after(kitchen, "diagnose", DIAGNOSIS)
    done = shoal("device", "diagnose", "kitchen")
    assert done.code == 1
    for part in ("disk", "failed", "210 MB free", "-> Free 500 MB.", "glibc", "probe -> rolled_back", "slow"):
        assert part in done.out
    assert "1 of 2 checks needs you: disk." in done.err


def test_an_older_agents_words_are_shown(kitchen: Api, shoal: Shoal) -> None:
    answers_after(kitchen, "diagnose", "disk [bold]full[/bold]")
    done = shoal("device", "diagnose", "kitchen")
    assert (done.code, done.out) == (0, "disk [bold]full[/bold]\n")


def test_a_new_profile_names_the_class(kitchen: Api, shoal: Shoal) -> None:
    answers_after(kitchen, "profile", "measured")
    kitchen.answer("GET", "/devices/d-kitchen", detail(profile_class="aarch64.neon.4c", class_reason="why"))
    done = shoal("device", "profile", "kitchen")
    assert done.out == "kitchen is of class aarch64.neon.4c (it was x86_64.avx2.2c+onnxruntime)\nwhy\n"


def test_unknown_devices_are_usage_errors(api: Api, shoal: Shoal) -> None:
    for verb in ("get", "logs", "diagnose", "profile"):
        assert shoal("device", verb, "nobody").code == 2
    assert shoal("device", "logs", "nobody", "--timeout", "soon").code == 2


# ---------------------------------------------------------------------------- acts

ACTS = [
    (("quarantine", "kitchen"), {"quarantined": True}),
    (("release", "kitchen"), {"quarantined": False}),
    (("pin", "kitchen", "digits", "k-2"), {"pins": {"signs": "k-1", "digits": "k-2"}}),
    (("unpin", "kitchen", "signs"), {"pins": {}}),
]


@pytest.mark.parametrize(("line", "patch"), ACTS, ids=[line[0] for line, _ in ACTS])
def test_acts_say_what_happens_ask_and_carry_the_reason(
    kitchen: Api, shoal: Shoal, line: tuple[str, ...], patch: dict[str, Any]
) -> None:
    kitchen.answer("GET", "/devices/kitchen", detail(pins={"signs": "k-1"}))
    kitchen.answer("PATCH", "/devices/d-kitchen", device())
    silent = shoal("device", *line)
    assert silent.code == 2 and "1 device: kitchen" in silent.err and "--yes" in silent.err
    assert shoal("device", *line, "--dry-run").code == 0
    assert not [c for c in kitchen.calls if c.method == "PATCH"]
    assert shoal("device", *line, "--yes", "--reason", "too hot").code == 0
    assert json.loads(kitchen.calls[-1].body) == {**patch, "reason": "too hot"}
    assert json.loads(shoal("device", *line, "--yes", "--json").out)["id"] == "d-kitchen"
    assert json.loads(kitchen.calls[-1].body) == patch


def test_unpinning_what_is_not_pinned(kitchen: Api, shoal: Shoal) -> None:
    done = shoal("device", "unpin", "kitchen", "digits", "--yes")
    assert done.code == 2 and "It is pinned at nothing." in done.err


def test_rename(kitchen: Api, shoal: Shoal) -> None:
    kitchen.answer("PATCH", "/devices/d-kitchen", device("oven"))
    assert shoal("device", "rename", "kitchen", "oven").code == 0
    assert json.loads(kitchen.calls[-1].body) == {"name": "oven"}


def test_remove(kitchen: Api, shoal: Shoal) -> None:
    kitchen.answer("DELETE", "/devices/d-kitchen", device(status="revoked"))
    assert shoal("device", "remove", "kitchen").code == 2
    done = shoal("device", "remove", "kitchen", "--yes", "--reason", "sold")
    assert done.code == 0 and "is removed" in done.err
    assert kitchen.calls[-1].query == {"reason": "sold"}
    assert "revoke" not in shoal("device", "--help").out  # the old word still works, unlisted
    assert shoal("device", "revoke", "kitchen", "--yes").code == 0


# ---------------------------------------------------------------------------- get and list


def test_get_tells_what_is_wrong_and_what_to_do(kitchen: Api, shoal: Shoal) -> None:
    view = schemas.PlacementView(
        endpoint="digits", wanted="pruned50", serving="sha256:aa", variant="plain", step="rolled_back",
        reason="probe: too slow", fallback=True, pinned=True,
    )  # fmt: skip
    kitchen.answer(
        "GET",
        "/devices/kitchen",
        detail(placements=[view], emulated=True, quarantined=True, next_step="Read its logs."),
    )
    rows = dict(line.split("\t", 1) for line in shoal("device", "get", "kitchen").out.splitlines())
    assert rows["generation"].startswith("6 of 7, published ")
    assert rows["placements"] == (
        "digits: plain (should have pruned50, rolled_back, fallback, pinned, probe: too slow)"
    )
    assert rows["hardware"] == "Cortex-A76, 4 cores, 8.6 GB, linux debian 13"
    assert "unmeasured (emulated)" in rows["emulated"] and rows["quarantined"].startswith("yes")
    assert rows["next_step"] == "Read its logs."
    table = shoal("device", "get", "kitchen", "-o", "table").out
    for part in ("kitchen", "quarantined", "fallback", "emulated", "Next:", "should have", "rolled_back"):
        assert part in table


def test_get_of_a_device_that_never_reported(kitchen: Api, shoal: Shoal) -> None:
    causes = ["The agent does not run.", "It cannot reach 10.0.0.1:8443.", "Its clock is off."]
    kitchen.answer(
        "GET", "/devices/kitchen", detail(status="offline", last_seen_ms=0, connected=False, causes=causes)
    )
    table = shoal("device", "get", "kitchen", "-o", "table").out
    assert "It never reported" in table and "2. It cannot reach 10.0.0.1:8443." in table


def test_list_has_the_marks(api: Api, shoal: Shoal) -> None:
    found = [device(quarantined=True, pins={"digits": "k-1"}), device("plain")]
    api.answer("GET", "/devices", schemas.Page[schemas.Device](items=found, total=2))
    lines = shoal("device", "list", "--columns", "name,marks").out.splitlines()
    assert lines == ["name\tmarks", "kitchen\tquarantined, pinned", "plain\t"]
