"""Device and Join in a real Chromium: arrivals and answers pop in, actions, axe, keys, no scripts."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest

from tests.web import fleets
from tests.web.conftest import Served
from tests.web.test_browser import LIVE, axe, axe_both, opened

PATHS = ["/devices/well", "/devices/never", "/devices/failing", "/devices/kept", "/devices/qemu", "/join"]


@pytest.fixture(scope="module")
def troubled_server() -> Iterator[Served]:
    fleets.shift()
    served = Served(fleets.troubled())
    yield served
    served.stop()


@pytest.fixture
def fresh() -> Iterator[Served]:
    fleets.shift()
    served = Served(fleets.empty())
    yield served
    served.stop()


@pytest.fixture
def changing() -> Iterator[Served]:
    fleets.shift()
    served = Served(fleets.troubled())
    yield served
    served.stop()


def arrive(fleet: fleets.Fleet, name: str) -> None:
    import time

    found = fleets.device(len(fleet.devices) + 70, name, fleets.PI5, "healthy", random.Random(1))
    found.joined_ms = int(time.time() * 1000)
    fleet.devices.append(found)
    if fleet.tokens:
        fleet.tokens[0].uses_left -= 1
    fleet.change("device", found.id)


@pytest.mark.parametrize("path", PATHS)
def test_no_accessibility_violations(browser: Any, troubled_server: Served, path: str) -> None:
    with opened(browser, troubled_server) as page:
        page.goto(path)
        page.wait_for_selector(LIVE)
        assert axe_both(page) == []
        page.set_viewport_size({"width": 390, "height": 844})
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_panels_and_the_join_line_have_no_violation(browser: Any, troubled_server: Served) -> None:
    with opened(browser, troubled_server) as page:
        page.goto("/devices/well")
        for panel in ("describe", "pin", "quarantine", "remove"):
            page.click(f"[popovertarget=act-{panel}]")
            assert page.locator(f"#act-{panel}").is_visible()
            assert axe_both(page) == [], panel
            page.keyboard.press("Escape")
            assert not page.locator(f"#act-{panel}").is_visible()
        page.goto("/join")
        page.click("text=Make the join line")
        page.wait_for_selector(".qr svg")
        assert axe_both(page) == []


def test_arrivals_pop_in_and_the_line_stays(browser: Any, fresh: Served) -> None:
    with opened(browser, fresh) as page:
        page.goto("/join")
        page.click("text=Make the join line")
        page.wait_for_selector(".qr svg")
        page.wait_for_selector(LIVE)
        page.evaluate("window.same = true")
        arrive(fresh.fleet, "kitchen")
        page.wait_for_selector(".arrivals >> text=kitchen", timeout=5_000)
        assert "4 usable cores" in page.inner_text(".arrivals")
        assert page.evaluate("window.same")
        assert fleets.JOIN_LINE in page.inner_text(
            "#join-line code >> nth=0"
        )  # shown once, but not taken away
        assert "None: nobody can join now." in page.inner_text("main")  # its only use is used


def test_the_first_device_turns_the_empty_fleet_into_a_fleet(browser: Any, fresh: Served) -> None:
    with opened(browser, fresh) as page:
        page.goto("/")
        page.wait_for_selector(LIVE)
        page.click("text=Make the join line")
        page.wait_for_selector("text=Run this on the device")
        page.wait_for_selector(LIVE)
        assert "listening" in page.inner_text("main")
        fresh.fleet.change("token", "j-0001")  # a refresh keeps the line
        page.wait_for_timeout(700)
        assert fleets.JOIN_LINE in page.inner_text("#join-line code >> nth=0")
        arrive(fresh.fleet, "kitchen")
        page.wait_for_selector("table >> text=kitchen", timeout=8_000)
        assert page.locator("#join-line").count() == 0


def test_answers_appear_by_themselves(browser: Any, changing: Served) -> None:
    with opened(browser, changing) as page:
        page.goto("/devices/well")
        page.wait_for_selector(LIVE)
        page.click("button:has-text('Diagnose')")
        page.wait_for_selector("#asked .pill:has-text('waiting')")
        page.wait_for_selector(LIVE)
        request = changing.fleet.requests[-1]
        request.state, request.body, request.answered_ms = "answered", fleets.DIAGNOSIS, fleets.NOW
        changing.fleet.change("request", request.id)
        page.wait_for_selector("#asked >> text=2 of 6 checks need you", timeout=6_000)
        page.wait_for_selector("#asked >> text=Give the board a heat sink")


def test_removing_needs_the_name(browser: Any, changing: Served) -> None:
    with opened(browser, changing) as page:
        page.goto("/devices/well")
        page.wait_for_selector(LIVE)
        page.click("[popovertarget=act-remove]")
        page.fill("#act-remove [name=name]", "we")
        page.click("#act-remove .danger")  # the browser holds it back
        assert page.locator("#act-remove").is_visible() and changing.fleet.done == []
        changing.fleet.change("device", "well")  # a refresh keeps the panel and what was typed
        page.wait_for_timeout(1_300)
        assert page.input_value("#act-remove [name=name]") == "we"
        page.fill("#act-remove [name=name]", "well")
        page.click("#act-remove .danger")
        page.wait_for_url("**/")
        assert [verb for _, verb, _ in changing.fleet.done] == ["remove"]


def test_everything_works_without_scripts(browser: Any, changing: Served) -> None:
    with opened(browser, changing, java_script_enabled=False) as page:
        page.goto("/devices/well")
        page.click("[popovertarget=act-quarantine]")
        page.fill("#act-quarantine [name=reason]", "too hot")
        page.click("#act-quarantine button.primary")
        assert "Quarantined: it serves on" in page.inner_text("main")
        page.click("[popovertarget=act-release]")
        page.click("#act-release button.primary")
        page.click("[popovertarget=act-pin]")
        page.select_option("#act-pin select", index=1)
        page.click("#act-pin button.primary")
        page.click("text=Unpin digits")
        page.click("text=Get logs")
        assert "waiting" in page.inner_text("#asked")
        page.goto("/join")
        page.click("text=Make the join line")
        assert fleets.JOIN_LINE in page.inner_text("#join-line code >> nth=0")
        assert len(changing.fleet.done) == 5


def test_keys(browser: Any, troubled_server: Served) -> None:
    with opened(browser, troubled_server) as page:
        page.goto("/devices/well")
        page.wait_for_selector(LIVE)
        page.keyboard.press("g")
        page.keyboard.press("j")
        page.wait_for_url("**/join")
        page.wait_for_selector(LIVE)
        page.focus("[name=uses]")
        page.keyboard.press("Enter")  # the form answers the key
        page.wait_for_selector(".qr svg")
        page.goto("/devices/well")
        page.focus("[popovertarget=act-quarantine]")
        page.keyboard.press("Enter")
        assert page.locator("#act-quarantine").is_visible()
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.name") == "reason"
        assert axe(page, "focus-order-semantics") == []
