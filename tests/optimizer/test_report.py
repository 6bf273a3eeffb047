"""The report: one page that asks nothing of the network and escapes what users named."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal_optimizer import report
from shoal_optimizer.report import Dot


def figure(value: float, spread: float = 0.1) -> dict[str, Any]:
    return {"value": value, "low": value - spread, "high": value + spread, "n": 100}


def candidate(name: str, **more: Any) -> dict[str, Any]:
    return {
        "name": name,
        "bundle": "sha256:1",
        "size_bytes": 70_000,
        "wire_bytes": 60_000,
        "source": "local",
        "accuracy": figure(0.9, 0.02),
        "latency_p95": figure(1.0),
        "memory": None,
        "int8_share": 1.0,
        "ratio": {"value": 0.5, "low": 0.4, "high": 0.6},
        "winner": "candidate",
        "on_front": True,
        **more,
    }


def data(**more: Any) -> dict[str, Any]:
    rows = [
        candidate("fast-int8"),
        candidate("slow", latency_p95=figure(3.0), on_front=False, ratio=None),
        candidate(
            "elsewhere", accuracy=None, latency_p95=None, int8_share=None, source="unmeasured", ratio=None
        ),
    ]
    entry = {
        "name": "x86_64.avx2.2c+onnxruntime",
        "sentence": "fast-int8 is best.",
        "chosen": "fast-int8",
        "front": [{"name": "fast-int8"}],
        "candidates": rows,
    }
    network = {
        "name": "pruned50",
        "seconds": 3.2,
        "notes": ["a -> b"],
        "recipe": [{"technique": "t", "params": {"r": 1}}],
    }
    return {
        "schema": 1,
        "model": "digits <v1>",
        "objective": "accuracy>=0.9; minimise size",
        "sentence": "Done & well.",
        "time_ms": 0,
        "used_s": 12.0,
        "seed": 0,
        "classes": [entry],
        "networks": [network],
        "adaptation": None,
        "lineage": {"task": "digits.py"},
        "context": {"load": "0.5"},
        **more,
    }


def test_the_page_stands_alone() -> None:
    page = report.render(data())
    assert not re.search(r"(src|href)\s*=|@import|url\(|https?://(?!www\.w3\.org)", page)
    assert "<script" not in page and "<svg" in page
    assert "prefers-color-scheme: dark" in page and "@media print" in page


def test_names_are_escaped_and_gaps_are_said() -> None:
    page = report.render(data())
    assert "digits &lt;v1&gt;" in page and "Done &amp; well." in page
    assert "unmeasured" in page and "0.9 (0.88 to 0.92, n 100)" in page
    assert "0.5 x the incumbent: candidate" in page


def test_an_adaptation_is_told() -> None:
    evidence = {
        "method": "matched augmentation",
        "before": figure(0.5),
        "after": figure(0.9),
        "clean_before": figure(0.99),
        "clean_after": figure(0.98),
        "labels": 12,
        "matched": ["contrast 0.7"],
    }
    page = report.render(data(adaptation={"sentence": "Kept: it rose.", "evidence": evidence}, networks=[]))
    assert "Kept: it rose." in page and "contrast 0.7" in page and "None was trained" in page


def test_both_forms_are_written(tmp_path: Path) -> None:
    paths = report.write(data(), tmp_path / "out")
    assert json.loads(Path(paths["json"]).read_text()) == data()
    assert Path(paths["html"]).read_text().startswith("<!doctype html>")


spans = st.floats(1e-4, 1e4)


@given(
    st.lists(
        st.tuples(spans, spans, st.floats(0, 1), st.floats(0, 0.3), st.booleans()), min_size=2, max_size=12
    )
)
def test_any_points_can_be_plotted(values: list[tuple[float, float, float, float, bool]]) -> None:
    dots = [
        Dot(
            f"<{i}>",
            latency,
            latency,
            latency + more,
            accuracy,
            accuracy - spread,
            accuracy + spread,
            kept,
            i == 0,
        )
        for i, (latency, more, accuracy, spread, kept) in enumerate(values)
    ]
    svg = report.plot(dots)
    places = [float(v) for v in re.findall(r'(?:cx|x1|x2)="(-?[\d.]+)"', svg)]
    assert all(-1 <= place <= report.WIDTH + 1 for place in places)
    assert svg.count("<circle") == len(dots) and "<0>" not in svg


@pytest.mark.parametrize(("seconds", "text"), [(5.0, "5.0 s"), (600.0, "10.0 min")])
def test_times(seconds: float, text: str) -> None:
    assert report.seconds(seconds) == text
