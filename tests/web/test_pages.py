"""Every page over an empty, a small and a huge fleet: markup, headings, links, headers, refusals, actions."""

from __future__ import annotations

import gzip
import re

import pytest

from shoal_controller.web.routes import HERE, STATIC
from tests.web import fleets
from tests.web.client import Client
from tests.web.html import Page

LISTS = [
    "/", "/models", "/optimizations", "/rollouts", "/endpoints", "/findings", "/story", "/audit", "/join",
]  # fmt: skip
DETAILS = [
    "/devices/d00001", "/models/digits", "/models/digits?version=1", "/optimizations/o-0001",
    "/optimizations/o-0002", "/optimizations/o-0003", "/rollouts/r-0001", "/rollouts/r-0002",
    "/rollouts/r-0003", "/endpoints/digits", "/findings/f-0001", "/findings/f-0002", "/findings/f-0003",
]  # fmt: skip

AnyFleet = tuple[str, fleets.Fleet, Client]
Small = tuple[fleets.Fleet, Client]


def page(client: Client, path: str, status: int = 200) -> Page:
    answer = client.get(path)
    assert answer.status_code == status, answer.text[:400]
    return Page(answer.text)


@pytest.mark.parametrize("path", LISTS + DETAILS)
def test_markup(any_fleet: AnyFleet, path: str) -> None:
    name, _, client = any_fleet
    missing = name == "empty" and path in DETAILS
    found = page(client, path, 404 if missing else 200)
    assert found.unbalanced == []
    assert len(found.all("h1")) == 1
    assert found.all("html")[0].attributes["lang"] == "en"
    ids = [e.attributes["id"] for e in found.elements if "id" in e.attributes]
    assert len(ids) == len(set(ids))
    assert not [e for e in found.elements if "style" in e.attributes]
    assert not [e for e in found.all("script") if "src" not in e.attributes]
    assert not [e for e in found.elements if any(key.startswith("on") for key in e.attributes)]
    assert "undefined" not in found.text("main").lower()
    assert "none" not in found.text("h1").lower()


@pytest.mark.parametrize("path", LISTS)
def test_links_lead_somewhere(any_fleet: AnyFleet, path: str) -> None:
    _, _, client = any_fleet
    for link in sorted(page(client, path).links):
        if link.startswith(("#", "/devices/")):
            continue
        assert client.get(link).status_code == 200, f"{path} links to {link}"


def test_links_of_details_lead_somewhere(small: Small) -> None:
    _, client = small
    for path in DETAILS:
        for link in sorted(page(client, path).links):
            if not link.startswith(("#", "/api/")):
                assert client.get(link).status_code == 200, f"{path} links to {link}"


@pytest.mark.parametrize("path", LISTS + DETAILS)
def test_weight(any_fleet: AnyFleet, path: str) -> None:
    """The page with everything that it loads, compressed, is at most 150 kB."""
    _, _, client = any_fleet
    answer = client.get(path)
    found = Page(answer.text)
    loaded = {e.attributes["src"] for e in found.all("script")}
    loaded |= {e.attributes["href"] for e in found.all("link")}
    own = (HERE / "static").rglob("*.js")
    modules = [p.relative_to(HERE / "static").as_posix() for p in own if "vendor" not in p.parts]
    loaded |= {f"{STATIC}/{module}" for module in modules}
    total = len(gzip.compress(answer.content))
    for address in loaded:
        content = client.get(address)
        assert content.status_code == 200, address
        woff = address.endswith(".woff2")
        total += len(content.content) if woff else len(gzip.compress(content.content))
    assert total <= 150_000


def test_headers(small: Small) -> None:
    _, client = small
    for path in ("/", "/rollouts/r-0002", "/nowhere", "/devices/nobody"):
        headers = client.get(path).headers
        assert headers["content-security-policy"].startswith("default-src 'self';")
        assert "unsafe" not in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
    assert "immutable" in client.get(f"{STATIC}/shoal.css").headers["cache-control"]


def test_a_refresh_is_only_the_content(small: Small) -> None:
    _, client = small
    answer = client.get("/rollouts/r-0002", headers={"HX-Request": "true", "HX-Request-Type": "partial"})
    assert "<html" not in answer.text
    assert "Rollout r-0002" in answer.text
    assert 'id="badge-findings" hx-swap-oob="true"' in answer.text


def test_fleet_says_first_what_matters(small: Small) -> None:
    _, client = small
    found = page(client, "/")
    assert "mill is drifting" in found.text("main")
    assert "/?filter=status:drifting" in found.links
    assert "/rollouts/r-0002" in found.links
    assert "/findings/f-0002" in found.links
    assert "/findings/f-0001" not in found.links  # closed


def test_empty_fleet_shows_how_to_join() -> None:
    from tests.web.conftest import application

    client = Client(application(fleets.empty()))
    found = page(client, "/")
    assert "No devices yet" in found.text("h2")
    assert "/join" in found.links
    assert [e for e in found.all("form") if e.attributes.get("action") == "/"]
    made = client.post("/", data={"uses": "1", "hours": "1"})
    assert fleets.JOIN_LINE.split("$(")[0] in made.text and "listening" in made.text


def test_huge_fleet_is_a_window(any_fleet: AnyFleet) -> None:
    name, _, client = any_fleet
    if name != "huge":
        pytest.skip("the huge fleet only")
    found = page(client, "/?offset=36")
    assert len([e for e in found.all("tr") if "tbody" in e.parents]) == 36
    assert "37–72 of 10,000" in found.text("nav")
    assert {"/?", "/?offset=72"} <= found.links
    assert len(client.get("/").content) < 60_000


def test_filter_and_sort_live_in_the_address(small: Small) -> None:
    _, client = small
    found = page(client, "/?filter=status:drifting&sort=-p95")
    rows = [e for e in found.all("tr") if "tbody" in e.parents]
    assert len(rows) == 1 and "mill" in rows[0].text
    assert [e for e in found.all("input") if e.attributes.get("value") == "status:drifting"]
    assert [e for e in found.all("th") if e.attributes.get("aria-sort") == "descending"]


def test_a_wrong_filter_is_explained(small: Small) -> None:
    _, client = small
    found = page(client, "/?filter=colour:red")
    assert "There is no field" in found.text("p")
    assert [e for e in found.all("input") if "aria-invalid" in e.attributes]


def test_text_is_escaped(small: Small) -> None:
    fleet, client = small
    fleet.rollouts[0].sentence = "<script>alert(1)</script>"
    fleet.devices[0].name = '"><img src=x onerror=alert(1)>'
    for path in ("/", "/rollouts/r-0002", "/devices/d00000"):
        text = client.get(path).text
        assert "<script>alert" not in text
        assert "<img" not in text
    assert "<img" not in client.get("/?filter=<img src=x>").text


def test_unknown_pages_and_objects(small: Small) -> None:
    _, client = small
    assert "There is no such page." in page(client, "/nowhere", 404).text("h1")
    assert "There is no rollout 'r-9'." in page(client, "/rollouts/r-9", 404).text("h1")
    answer = client.get("/api/v1/nowhere")
    assert answer.status_code == 404 and "html" not in answer.headers["content-type"]


def test_rollout_page(small: Small) -> None:
    _, client = small
    found = page(client, "/rollouts/r-0002")
    text = found.text("main")
    assert "Wave 2 of 3 is running." in text
    assert "−11.8 %" in text and "−14.9 to −8.7" in text
    assert "starts when wave 2 passes" in text
    drawings = [e for e in found.all("svg") if e.attributes.get("class", "").startswith("forest")]
    assert len(drawings) == 6
    assert "gate +5.0 %" in drawings[0].attributes["aria-label"]


def test_a_stopped_rollout_shows_the_evidence(small: Small) -> None:
    _, client = small
    text = client.get("/rollouts/r-0003").text
    assert 'class="forest beyond"' in text
    assert "p95 is at least 9.1 % higher; the gate is 5 %." in text
    assert "data-dialog" not in text.split("<main")[1].split("</main")[0]  # nothing left to do


def test_confirmations_say_how_many_devices(any_fleet: AnyFleet) -> None:
    name, fleet, client = any_fleet
    if name == "empty":
        pytest.skip("no rollout")
    found = page(client, "/rollouts/r-0002")
    begun = sum(w.devices for w in fleet.rollouts[0].waves[:2])
    dialog = next(e for e in found.all("dialog") if e.attributes["id"] == "act-abort")
    assert f"{begun:,} devices go back to v1" in " ".join(dialog.text.split())


@pytest.mark.parametrize("verb", ["pause", "abort", "promote"])
def test_rollout_actions(small: Small, verb: str) -> None:
    fleet, client = small
    answer = client.post(f"/rollouts/r-0002/{verb}", data={"reason": "because"}, follow_redirects=False)
    assert answer.status_code == 303 and answer.headers["location"] == "/rollouts/r-0002"
    assert fleet.done == [("r-0002", verb, "because")]


def test_refused_actions_are_pages(small: Small) -> None:
    fleet, client = small
    answer = client.post("/rollouts/r-0001/pause", data={})
    assert answer.status_code == 409 and "has ended" in Page(answer.text).text("h1")
    assert client.post("/rollouts/r-0002/explode", data={}).status_code == 404
    foreign = client.post("/rollouts/r-0002/abort", data={}, headers={"Origin": "http://elsewhere.test"})
    assert foreign.status_code == 403
    assert fleet.done == []


def test_dismiss_cancel_and_token(small: Small) -> None:
    fleet, client = small
    client.post("/findings/f-0002/dismiss", data={"reason": "known"})
    client.post("/optimizations/o-0003/cancel")
    assert fleet.done == [("f-0002", "dismiss", "known"), ("o-0003", "cancel", "")]
    answer = client.post("/join", data={"uses": "3", "hours": "2"})
    assert "shj_" in answer.text and "3 devices" in answer.text
    assert "shj_" not in client.get("/join").text  # shown once


def test_model_page_has_one_class_at_a_time(small: Small) -> None:
    _, client = small
    found = page(client, f"/models/digits?class={fleets.OV.replace('+', '%2B')}")
    assert len([e for e in found.all("tr") if "tbody" in e.parents]) == 2
    plot = next(e for e in found.all("svg") if e.attributes.get("class") == "pareto wide")
    assert fleets.OV in plot.attributes["aria-label"]


def test_unmeasured_is_said(any_fleet: AnyFleet) -> None:
    name, _, client = any_fleet
    if name != "huge":
        pytest.skip("the huge fleet has a class that no device measured")
    found = page(client, f"/models/digits?class={fleets.ORIN.replace('+', '%2B')}")
    assert "unmeasured" in found.text("td")


def test_sample_call_has_the_endpoints_signature(small: Small) -> None:
    _, client = small
    code = page(client, "/endpoints/digits").text("code")
    assert "triton.InferInput('image', [1, 8, 8, 1], 'UINT8')" in code
    assert re.search(r'"datatype": "UINT8", "shape": \[1, 8, 8, 1\]', code)


def test_every_unknown_key_of_evidence_is_shown(small: Small) -> None:
    fleet, client = small
    fleet.findings[0].evidence = {"odd": {"nested_ms": 3.5, "many": list(range(99))}, "yes": True}
    text = page(client, "/findings/f-0002").text("dl")
    assert "odd · nested" in text and "3.50 ms" in text and "99 values" in text
