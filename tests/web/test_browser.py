"""The dashboard in a real headless Chromium: accessibility, keyboard, live updates, restarts, origin."""

# ruff: noqa: E501  (lists of pages)

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.web import fleets
from tests.web.conftest import Served

LISTS = [
    "/",
    "/models",
    "/optimizations",
    "/rollouts",
    "/endpoints",
    "/findings",
    "/story",
    "/audit",
    "/join",
]
DETAILS = ["/devices/d00001", "/models/digits", "/optimizations/o-0003", "/rollouts/r-0002", "/rollouts/r-0003",
           "/endpoints/digits", "/findings/f-0002", "/?filter=status:nothing", "/nowhere"]  # fmt: skip
SHOTS = Path(__file__).parents[2] / "docs" / "screenshots"
LIVE = "shoal-live[state=live]"


@contextmanager
def opened(browser: Any, served: Served, **options: Any) -> Iterator[Any]:
    """A page in a fresh context; console errors, failing scripts and requests to elsewhere fail the test."""
    options.setdefault("viewport", {"width": 1440, "height": 900})
    context = browser.new_context(base_url=served.url, reduced_motion="reduce", **options)
    problems: list[str] = []

    def check(route: Any) -> None:
        if not route.request.url.startswith((served.url, "data:", "blob:")):
            problems.append(f"leaves the origin: {route.request.url}")
            route.abort()
        else:
            route.continue_()

    context.route("**/*", check)
    context.on("weberror", lambda error: problems.append(str(error.error)))
    context.on("console", lambda m: problems.append(m.text) if m.type == "error" else None)
    page = context.new_page()
    page.set_default_timeout(20_000)
    page.problems = problems
    try:
        yield page
        # Without scripts Chromium tells each page that goes that its view transition cannot be.
        allowed = (
            "ERR_CONNECTION_REFUSED", "ERR_INCOMPLETE_CHUNKED_ENCODING", "404 (Not Found)", "ViewTransition"
        )  # fmt: skip
        assert [p for p in problems if not any(text in p for text in allowed)] == []
    finally:
        context.close()


def axe(page: Any, *rules: str) -> list[str]:
    """Violations of all rules, or of the named ones."""
    from axe_playwright_python.sync_playwright import Axe

    options = {"runOnly": {"type": "rule", "values": list(rules)}} if rules else {}
    found = Axe().run(page, options={"resultTypes": ["violations"], **options})
    return [f"{v['id']}: {v['nodes'][0]['html'][:160]}" for v in found.response["violations"]]


def axe_both(page: Any) -> list[str]:
    """Both themes: all rules in the light one, contrast alone in the dark one, whose markup is the same."""
    page.emulate_media(color_scheme="light")
    light = axe(page)
    page.emulate_media(color_scheme="dark")
    return light + axe(page, "color-contrast", "link-in-text-block")


def settle(page: Any) -> None:
    page.wait_for_function("() => document.fonts.ready.then(() => true)")
    for element in ("shoal-map", "shoal-chart"):
        if page.locator(element).count():
            page.wait_for_selector(f"{element} > *", state="attached")


@pytest.fixture(scope="module")
def small_page(browser: Any, small_server: Served) -> Iterator[Any]:
    with opened(browser, small_server) as page:
        yield page


@pytest.mark.parametrize("path", [*LISTS, *DETAILS])
def test_no_accessibility_violations(small_page: Any, path: str) -> None:
    small_page.goto(path)
    settle(small_page)
    assert axe_both(small_page) == []


def test_no_accessibility_violations_when_empty(browser: Any, empty_server: Served) -> None:
    with opened(browser, empty_server) as page:
        for path in LISTS:
            page.goto(path)
            assert axe_both(page) == [], path


@pytest.mark.parametrize("path", [*LISTS, *DETAILS])
def test_small_screens(small_page: Any, path: str) -> None:
    small_page.set_viewport_size({"width": 390, "height": 844})
    small_page.goto(path)
    settle(small_page)
    assert small_page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    if path == "/":
        assert axe(small_page) == []
    small_page.set_viewport_size({"width": 1440, "height": 900})


def test_keyboard(browser: Any, small_server: Served) -> None:
    with opened(browser, small_server) as page:
        page.goto("/")
        page.wait_for_selector(LIVE)
        page.keyboard.press("/")
        assert page.evaluate("document.activeElement.id") == "filter"
        page.keyboard.type("i")
        page.keyboard.press("Escape")
        page.keyboard.press("j")
        page.keyboard.press("j")
        assert page.evaluate("document.activeElement.textContent") == "loom"
        page.keyboard.press("k")
        assert page.evaluate("document.activeElement.textContent") == "kiln"
        page.keyboard.press("Enter")
        page.wait_for_url("**/devices/d00000")
        page.keyboard.press("g")
        page.keyboard.press("r")
        page.wait_for_url("**/rollouts")
        page.keyboard.press("?")
        assert page.locator("dialog#help").is_visible()
        page.keyboard.press("Escape")
        assert not page.locator("dialog#help").is_visible()
        page.goto("/")
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.className") == "skip"
        page.keyboard.press("Enter")
        assert page.evaluate("document.activeElement.id") == "main"


def test_deep_links_and_back(browser: Any, small_server: Served) -> None:
    with opened(browser, small_server) as page:
        page.goto("/?filter=status:drifting&sort=-p95")
        assert page.locator("tbody tr").count() == 1
        assert page.input_value("#filter") == "status:drifting"
        page.click("tbody a.strong")
        page.wait_for_url("**/devices/d00002")
        page.go_back()
        assert page.input_value("#filter") == "status:drifting"
        page.fill("#filter", "loom")
        page.press("#filter", "Enter")
        page.wait_for_url("**/?filter=loom**")
        page.go_back()
        page.wait_for_url("**status:drifting**")


def test_theme_is_kept(browser: Any, small_server: Served) -> None:
    with opened(browser, small_server, color_scheme="light") as page:
        page.goto("/")
        page.wait_for_selector(LIVE)
        page.click("[data-theme-toggle]")
        page.goto("/models")
        assert page.evaluate("document.documentElement.dataset.theme") == "dark"
        assert page.evaluate("getComputedStyle(document.body).colorScheme") == "dark"


@pytest.fixture
def changing() -> Iterator[Served]:
    fleets.shift()
    served = Served(fleets.small())
    yield served
    served.stop()


def arrive(fleet: fleets.Fleet, name: str) -> None:
    import random

    fleet.devices.append(fleets.device(len(fleet.devices), name, fleets.ORT, "healthy", random.Random(1)))
    fleet.change("device", fleet.devices[-1].id)


def test_pages_live_without_reload(browser: Any, changing: Served) -> None:
    with opened(browser, changing) as page:
        page.goto("/rollouts/r-0002")
        page.wait_for_selector(LIVE)
        page.evaluate("window.same = true")
        rollout = changing.fleet.rollouts[0]
        rollout.sentence = "Wave 1 passed."
        rollout.waves[1].state = "passed"
        changing.fleet.change("rollout", "r-0002")
        page.wait_for_selector("text=Wave 1 passed.")
        assert page.evaluate("window.same")
        other = page.context.new_page()  # a second tab shares the stream
        other.goto("/")
        other.wait_for_selector(LIVE)
        other.focus("#d-d00001 a")
        arrive(changing.fleet, "newcomer")
        other.wait_for_selector("table >> text=newcomer")
        other.wait_for_selector("shoal-map >> text=newcomer")
        assert other.evaluate("document.activeElement.textContent") == "loom"
        assert len(changing.fleet.listeners) == 1


def test_a_restarted_server_reconnects(browser: Any, changing: Served) -> None:
    with opened(browser, changing) as page:
        page.goto("/?filter=m")
        page.wait_for_selector(LIVE)
        page.evaluate("window.same = true")
        changing.stop()
        page.wait_for_selector("shoal-live[state=lost]")
        assert "reconnecting" in page.inner_text("shoal-live")
        arrive(changing.fleet, "summer")  # nobody could tell the page
        changing.start()
        page.wait_for_selector(LIVE)
        page.wait_for_selector("table >> text=summer")
        assert page.evaluate("window.same") and page.input_value("#filter") == "m"


def test_an_action_with_its_confirmation(browser: Any, changing: Served) -> None:
    with opened(browser, changing) as page:
        page.goto("/rollouts/r-0002")
        page.wait_for_selector(LIVE)
        page.click("text=Roll back")
        assert "2 devices go back to v1" in page.inner_text("#act-abort")
        changing.fleet.change("rollout", "r-0002")  # a refresh keeps the open dialog
        page.wait_for_timeout(600)
        page.click("#act-abort .danger")  # the reason is required
        assert changing.fleet.done == []
        assert axe(page) == []
        page.fill("#act-abort [name=reason]", "smoke in the lab")
        page.click("#act-abort .danger")
        page.wait_for_selector(".pill:has-text('aborted')")
        assert changing.fleet.done == [("r-0002", "abort", "smoke in the lab")]


def test_ten_thousand_devices(browser: Any, huge_server: Served) -> None:
    with opened(browser, huge_server) as page:
        page.goto("/")
        page.wait_for_selector("shoal-map canvas")
        assert page.locator("shoal-map canvas").count() == 6
        assert page.locator("tbody tr").count() == 36
        assert page.evaluate("document.querySelectorAll('*').length") < 1500
        assert axe(page) == []
        page.click("a[rel=next]")
        page.wait_for_url("**offset=36**")
        page.click("shoal-map .map-label a >> nth=0")
        page.wait_for_url("**filter=class**")
        page.wait_for_selector("shoal-map canvas")
        assert page.locator("shoal-map canvas").count() == 1


def test_without_scripts_everything_is_readable(browser: Any, small_server: Served) -> None:
    with opened(browser, small_server, java_script_enabled=False) as page:
        page.goto("/rollouts/r-0002")
        assert "Wave 2 of 3 is running." in page.inner_text("main")
        page.goto("/")
        assert page.locator("tbody tr").count() == 3


def few_colours(image: Image.Image) -> Image.Image:
    """With a palette: the commonest colours exactly, and rare ones too, as exceptions are rare.

    Pillow's own mapping to a palette is coarse: it tints white cards.
    """
    pixels = np.asarray(image).reshape(-1, 3)
    colours, where, counts = np.unique(pixels, axis=0, return_inverse=True, return_counts=True)
    spread = np.array(image.quantize(96, Image.Quantize.MAXCOVERAGE).getpalette()).reshape(-1, 3)
    palette = np.concatenate([colours[np.argsort(-counts)[:160]], spread])[:256].astype(int)
    nearest = ((colours[:, None].astype(int) - palette) ** 2).sum(2).argmin(1)
    small = Image.fromarray(nearest[where.ravel()].reshape(image.height, image.width).astype(np.uint8), "P")
    small.putpalette(palette.astype(np.uint8).tobytes())
    return small


@pytest.mark.skipif(not os.environ.get("SHOAL_SCREENSHOTS"), reason="set SHOAL_SCREENSHOTS=1 to write docs/")
def test_screenshots(browser: Any, small_server: Served, huge_server: Served, empty_server: Served) -> None:
    SHOTS.mkdir(exist_ok=True)
    troubled = Served(fleets.troubled())
    for name, shown in (("well", "gate-cam"), ("failing", "dock-cam"), ("never", "shed-cam")):
        fleets.named(troubled.fleet, name).name = shown
    fleets.named(troubled.fleet, "shed-cam").joined_ms = fleets.NOW
    views = [("fleet", small_server, "/"), ("fleet-10000", huge_server, "/"), ("models", small_server, "/models/digits"),
             ("rollout", small_server, "/rollouts/r-0002"), ("findings", small_server, "/findings"), ("story", small_server, "/story"),
             ("fleet-empty", empty_server, "/"), ("join", troubled, "/join"), ("device", troubled, "/devices/gate-cam"),
             ("device-failing", troubled, "/devices/dock-cam"), ("device-never", troubled, "/devices/shed-cam")]  # fmt: skip
    wanted = os.environ["SHOAL_SCREENSHOTS"].split(",")
    for name, served, path in views:
        for scheme in ("light", "dark"):
            if wanted != ["1"] and name not in wanted:
                continue
            heard = int(time.time() * 1000) - 4000
            for device in troubled.fleet.devices:
                if device.connected:
                    device.last_seen_ms, device.expected_ms = heard, heard + 20_000
            with opened(browser, served, color_scheme=scheme) as page:
                page.goto(path)
                settle(page)
                page.wait_for_selector(LIVE)
                if name in ("join", "fleet-empty"):
                    page.click("text=Make the join line")
                    page.wait_for_selector("text=Run this on the device")
                    page.wait_for_selector(LIVE)
                page.wait_for_timeout(300)
                image = Image.open(BytesIO(page.screenshot())).convert("RGB")
                few_colours(image).save(SHOTS / f"{name}-{scheme}.png", optimize=True)
    troubled.stop()
