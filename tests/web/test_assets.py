"""Vendored files are as published, elements are small, and nothing leaves the API or the origin."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from shoal_controller.web import refresh_vendor, routes

STATIC = routes.HERE / "static"
OWN = sorted(p for p in STATIC.rglob("*") if p.suffix in (".js", ".css") and "vendor" not in p.parts)
TEMPLATES = sorted((routes.HERE / "templates").rglob("*.html"))


def test_vendored_files_are_as_published() -> None:
    known = set()
    for package in refresh_vendor.packages():
        assert package["license"] in ("0BSD", "MIT", "OFL-1.1")
        assert "LICENSE" in package["files"]
        for path, digest in package["files"].items():
            file = refresh_vendor.vendored(package, path)
            assert refresh_vendor.sha256(file.read_bytes()) == digest, file.name
            known.add(file)
    assert known == {p for p in refresh_vendor.VENDOR.rglob("*") if p.is_file()}


@pytest.mark.parametrize("path", OWN, ids=lambda p: p.name)
def test_own_files_ask_only_the_api(path: Path) -> None:
    text = path.read_text()
    assert "//cdn" not in text and "http://" not in text and "https://" not in text
    for address in re.findall(r"""["'`](/[a-z][^"'`\s]*)""", text):
        assert address.startswith(("/api/v1/", "/devices/", "/?")), address
    for call in re.findall(r"fetch\(([^)]*)", text):
        assert call.startswith(("this.getAttribute", "`/api/v1/")), call


@pytest.mark.parametrize("path", sorted((STATIC / "elements").glob("*.js")), ids=lambda p: p.name)
def test_an_element_is_one_short_file(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 120
    assert text.count("customElements.define") == 1


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda p: p.name)
def test_templates_have_no_inline_style_or_script(path: Path) -> None:
    text = path.read_text()
    assert not re.search(r"\sstyle=|\son[a-z]+=|<style|<script(?![^>]*src)", text)
    assert "http://" not in text and "https://" not in text


def test_colours_are_named_in_one_place() -> None:
    text = (STATIC / "shoal.css").read_text()
    allowed = {"#d5dee6", "#10181f", "#0a0f14", "#fff", "#2a0705"}  # logs and the danger button
    assert set(re.findall(r"#[0-9a-fA-F]{3,8}\b", text)) - {"#page"} <= allowed
