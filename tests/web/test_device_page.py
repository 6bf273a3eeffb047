"""The device page in each state, what people do there, and the join page with its tokens."""

from __future__ import annotations

import json

import pytest

from shoal_controller.web import device as device_page
from shoal_controller.web import join as join_page
from shoal_protos.errors import InvalidInput
from tests.web import fleets
from tests.web.client import Client
from tests.web.conftest import application
from tests.web.html import Page

STATES = ["well", "never", "away", "failing", "lent", "qemu", "quiet", "kept", "behind"]
Troubled = tuple[fleets.Fleet, Client]


@pytest.fixture
def troubled() -> Troubled:
    fleet = fleets.troubled()
    return fleet, Client(application(fleet))


def page(client: Client, path: str) -> Page:
    answer = client.get(path)
    assert answer.status_code == 200, answer.text[:400]
    found = Page(answer.text)
    assert found.unbalanced == []
    return found


def words(found: Page) -> str:
    return " ".join(found.text("main").split())


@pytest.mark.parametrize("name", STATES)
def test_markup_of_every_state(troubled: Troubled, name: str) -> None:
    _, client = troubled
    found = page(client, f"/devices/{name}")
    ids = [e.attributes["id"] for e in found.elements if "id" in e.attributes]
    assert len(ids) == len(set(ids))
    assert not [e for e in found.elements if "style" in e.attributes]
    for link in sorted(found.links):
        if not link.startswith("#"):
            assert client.get(link).status_code == 200, link
    targets = {e.attributes["popovertarget"] for e in found.elements if "popovertarget" in e.attributes}
    assert targets <= set(ids)  # every button opens something, without a script
    assert len(client.get(f"/devices/{name}").content) < 60_000


def test_a_device_that_never_reported_names_the_likely_causes(troubled: Troubled) -> None:
    _, client = troubled
    found = page(client, "/devices/never")
    causes = [e.text for e in found.all("li") if "ol" in e.parents and "section" in e.parents][:3]
    assert "does not run" in causes[0] and "192.168.1.20:8443" in causes[1] and "clock" in causes[2]
    assert "never reported" in words(found) and "Its logs" not in words(found)


def test_a_failed_update_shows_why_the_logs_and_the_diagnosis(troubled: Troubled) -> None:
    _, client = troubled
    text = words(page(client, "/devices/failing"))
    assert "rolled back" in text and "p95 3.9 ms, at most 2.5 ms here" in text
    assert "16 golden cases agree" in text and "Next: Its logs are below." in text
    assert "2 of 6 checks need you: disk, temperature" in text
    assert "Free at least 500 MB" in text and "network.signal" in text and "probe → rolled back" in text
    assert "Logs waiting" in text


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("lent", ["fallback", "its class has no variant of its own yet"]),
        ("qemu", ["emulated", "unmeasured (emulated)"]),
        ("quiet", ["quarantined", "counts in no verdict", "Release quiet?"]),
        ("kept", ["pinned", "rollouts leave it out", "Unpin digits"]),
        ("behind", ["behind by 1", "not reported yet, published"]),
        ("away", ["not connected", "it answers when it comes back", "Check its power"]),
        ("well", ["heard, next within", "Inputs of digits are like the reference", "Temperature"]),
    ],
)
def test_what_is_special_is_said(troubled: Troubled, name: str, shown: list[str]) -> None:
    _, client = troubled
    text = words(page(client, f"/devices/{name}"))
    for part in shown:
        assert part in text
    assert name in ("lent",) or "fallback" not in text


def test_fleet_and_endpoint_show_the_marks(troubled: Troubled) -> None:
    _, client = troubled
    text = words(page(client, "/"))
    for mark in ("fallback", "quarantined", "pinned", "emulated", "unmeasured (emulated)"):
        assert mark in text
    endpoint = page(client, "/endpoints/digits")
    assert "/?filter=is%3Afallback%20endpoint%3Adigits" in endpoint.links
    assert "another class's variant" in words(endpoint) and "lent" in words(endpoint)


def test_an_older_agents_free_text_is_shown_as_it_is(troubled: Troubled) -> None:
    fleet, client = troubled
    well = fleets.named(fleet, "well")
    fleets.asked(fleet, well.id, "diagnose", "answered", "disk <b>full</b>, sorry")
    answer = client.get("/devices/well").text
    assert "disk &lt;b&gt;full&lt;/b&gt;, sorry" in answer


ACTS = [
    ("ask", {"kind": "diagnose"}, "ask diagnose", ""),
    ("quarantine", {"reason": " too hot "}, '{"quarantined": true}', "too hot"),
    ("release", {}, '{"quarantined": false}', ""),
    ("pin", {"pin": "digits=k-7", "reason": "trial"}, '{"pins": {"digits": "k-7"}}', "trial"),
    (
        "describe",
        {"name": "oven", "labels": "site=lab\nfloor=2\n"},
        '{"labels": {"floor": "2", "room": "", "site": "lab"}, "name": "oven"}',
        "",
    ),
    ("remove", {"name": "well", "reason": "sold"}, "remove", "sold"),
]


@pytest.mark.parametrize(("act", "form", "verb", "reason"), ACTS, ids=[a[0] for a in ACTS])
def test_acts(troubled: Troubled, act: str, form: dict[str, str], verb: str, reason: str) -> None:
    fleet, client = troubled
    well = fleets.named(fleet, "well")
    answer = client.post(f"/devices/{well.id}/{act}", data=form, follow_redirects=False)
    assert answer.status_code == 303, answer.text[:400]
    assert fleet.done == [(well.id, verb, reason)]


def test_unpin_keeps_the_other_pins(troubled: Troubled) -> None:
    fleet, client = troubled
    kept = fleets.named(fleet, "kept")
    kept.pins = {"digits": "k-1", "signs": "k-2"}
    client.post(f"/devices/{kept.id}/unpin", data={"endpoint": "digits"})
    assert fleet.done == [(kept.id, json.dumps({"pins": {"signs": "k-2"}}), "")]


def test_refused_acts_change_nothing(troubled: Troubled) -> None:
    fleet, client = troubled
    well = fleets.named(fleet, "well")
    wrong = client.post(f"/devices/{well.id}/remove", data={"name": "wel"})
    assert wrong.status_code == 400 and "nothing was removed" in Page(wrong.text).text("h1")
    assert client.post(f"/devices/{well.id}/explode", data={}).status_code == 404
    foreign = client.post(f"/devices/{well.id}/quarantine", data={}, headers={"Origin": "http://else.test"})
    assert foreign.status_code == 403
    bad = client.post(f"/devices/{well.id}/describe", data={"name": "well", "labels": "no label here"})
    assert bad.status_code == 400 and "key=value" in Page(bad.text).text("p")
    assert fleet.done == []


def test_labels_are_read_a_line_each() -> None:
    assert device_page.read_labels("a = 1\n\nb:x y", {"old": "1"}) == {"a": "1", "b": "x y", "old": ""}
    with pytest.raises(InvalidInput):
        device_page.read_labels("=1", {})


# ---------------------------------------------------------------------------- join


def test_join_line_is_shown_once_with_its_code(troubled: Troubled) -> None:
    _, client = troubled
    made = client.post("/join", data={"uses": "3", "hours": "0.5"})
    found = Page(made.text)
    assert fleets.JOIN_LINE in [e.text for e in found.all("code")]
    assert "for 3 devices" in words(found)
    drawing = next(
        e for e in found.all("svg") if e.attributes.get("aria-label") == "QR code of the join line"
    )
    size = int(drawing.attributes["viewbox"].split()[2])
    assert (size - 8 - 17) % 4 == 0  # a QR code's side is 17 + 4 times its version
    again = client.get("/join").text
    assert "shj_" not in again and "3 of 3 uses left" in " ".join(Page(again).text("main").split())


def test_join_says_what_is_missing(troubled: Troubled) -> None:
    fleet, client = troubled
    fleet.lan = False
    found = Page(client.post("/join", data={"uses": "1", "hours": "1"}).text)
    assert "shoal up --lan" in words(found) and "shj_" in found.text("code")
    assert not [e for e in found.all("svg") if "QR" in e.attributes.get("aria-label", "")]


def test_join_lists_arrivals_tokens_and_wheels(troubled: Troubled) -> None:
    fleet, client = troubled
    text = words(page(client, "/join"))
    assert "7 of 10 uses left" in text and "1 used up, expired or revoked" in text and "site=lab" in text
    assert "aarch64 with Python 3.13" in text
    assert "aarch64 with 4 usable cores" in text  # why the newest is of its class
    client.post("/join/j-0001/revoke")
    assert fleet.done == [("j-0001", "revoke", "")]
    assert "nobody can join now" in words(page(client, "/join"))


def test_join_refuses_times_that_cannot_be(troubled: Troubled) -> None:
    _, client = troubled
    for hours in ("0", "-1", "99999", "nan"):
        assert client.post("/join", data={"uses": "1", "hours": hours}).status_code == 400


def test_qr_of_nothing_and_of_too_much() -> None:
    assert join_page.qr("") is None
    assert join_page.qr("x" * 4000) is None
    found = join_page.qr("hello")
    assert found is not None and found["size"] == 29 and found["path"].startswith("M4 4h7v1h-7z")
