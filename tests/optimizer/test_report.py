"""The report: one page that asks nothing of the network, escapes what users named, and says what changed."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal_optimizer import report
from shoal_optimizer.reporting import charts, facts, text
from shoal_optimizer.reporting.charts import Dot


def figure(value: float, spread: float = 0.1) -> dict[str, Any]:
    return {"value": value, "low": value - spread, "high": value + spread, "n": 100}


def candidate(name: str, **more: Any) -> dict[str, Any]:
    return {
        "name": name,
        "bundle": "sha256:1",
        "target": "onnxruntime",
        "precision": "int8",
        "recipe": [],
        "plain": False,
        "size_bytes": 70_000,
        "wire_bytes": 60_000,
        "source": "local",
        "accuracy": figure(0.9, 0.02),
        "per_class": {},
        "predicted": None,
        "context": {"runtime": "onnxruntime", "runtime_version": "1.32.0", "threads": "1", "load": "0.5"},
        "latency_p50": figure(0.9),
        "latency_p95": figure(1.0),
        "memory": None,
        "int8_share": 1.0,
        "ratio": {"value": 0.5, "low": 0.4, "high": 0.6},
        "winner": "candidate",
        "on_front": True,
        **more,
    }


def recall(value: float, spread: float, n: int = 50) -> dict[str, Any]:
    return {"value": value, "low": value - spread, "high": value + spread, "n": n}


def rows() -> list[dict[str, Any]]:
    return [
        candidate(
            "fast-int8",
            recipe=[{"technique": "channel_pruning", "params": {"ratio": 0.5}}],
            per_class={"stop": recall(0.7, 0.1), "yield": recall(0.99, 0.01)},
            predicted={"ms": 1.0, "relative_error": 0.2},
        ),
        candidate(
            "plain-fp32",
            plain=True,
            precision="fp32",
            size_bytes=280_000,
            latency_p50=figure(3.6),
            latency_p95=figure(4.0),
            per_class={"stop": recall(0.95, 0.05), "yield": recall(0.98, 0.02)},
            on_front=False,
            ratio=None,
        ),
        candidate(
            "elsewhere",
            accuracy=None,
            latency_p50=None,
            latency_p95=None,
            int8_share=None,
            source="unmeasured",
            context=None,
            ratio=None,
            on_front=False,
        ),
    ]


LAYER = {"output": [8, 4, 4], "activation_bytes": 512}
OPERATION = {"precision": ""}
GRAPH = {
    "original": {
        "parameters": 1200,
        "weight_bytes": 4800,
        "macs": 5000,
        "activation_peak_bytes": 900,
        "conv_share": 1.0,
        "layers": [
            {"name": "0", "kind": "Conv2d", "parameters": 1200, "macs": 5000, **LAYER},
            {"name": "1", "kind": "ReLU", "parameters": 0, "macs": 0, **LAYER},
        ],
    },
    "operations": [
        {"name": "relu_nchwc", "kind": "Conv", "us": 3.0, "share": 0.75, "layers": ["0", "1"], **OPERATION},
        {"name": "reorder", "kind": "ReorderOutput", "us": 1.0, "share": 0.25, "layers": [], **OPERATION},
    ],
    "reason": "",
    "chosen": {"fast-int8": {"operations": [], "reason": "No times: none"}},
}  # fmt: skip


def data(**more: Any) -> dict[str, Any]:
    entry = {
        "name": "x86_64.avx2.2c+onnxruntime",
        "sentence": "fast-int8 is best.",
        "feasible": True,
        "chosen": "fast-int8",
        "front": [{"name": "fast-int8"}],
        "candidates": rows(),
    }
    network = {
        "name": "pruned50",
        "seconds": 3.2,
        "notes": ["a -> b"],
        "recipe": [{"technique": "t", "params": {"r": 1}}],
    }
    return {
        "schema": 2,
        "model": "digits <v1>",
        "metric": "map50",
        "objective": "accuracy>=0.89, latency_p95<=2ms; minimise size",
        "sentence": "Done & well.",
        "time_ms": 0,
        "used_s": 12.0,
        "seed": 0,
        "classes": [entry],
        "networks": [network],
        "left_out": [
            {"name": "pruned99", "outcome": "failed", "reason": "NaN <loss>"},
            {"name": "dynamic", "outcome": "skipped", "reason": "8x slower here"},
        ],
        "adaptation": None,
        "graph": GRAPH,
        "sensitivity": {"layers": {"0": {"0.5": 0.01}, "2": {"0.25": 0.2, "0.5": 0.4}}},
        "lineage": {
            "task": "digits.py",
            "data": "sha256:d",
            "weights_content": "sha256:w",
            "machine": {"cpu": "a CPU", "isa": ["avx2"], "cores": 2},
            "tools": {"torch": "2.13.0"},
        },
        "context": {"load": "0.5"},
        **more,
    }


class TestPage:
    def test_it_stands_alone(self) -> None:
        page = report.render(data())
        assert not re.search(r"(src|href)\s*=\s*[\"'](?!#)|@import|url\(|https?://(?!www\.w3\.org)", page)
        assert "<svg" in page and "prefers-color-scheme: dark" in page and "@media print" in page

    def test_a_server_may_allow_exactly_its_script(self) -> None:
        (script,) = re.findall(r"<script>(.*?)</script>", report.render(data()), re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert f"script-src 'sha256-{digest}'" in report.policy()

    def test_names_are_escaped_and_gaps_are_said(self) -> None:
        page = report.render(data())
        assert "digits &lt;v1&gt;" in page and "Done &amp; well." in page and "NaN &lt;loss&gt;" in page
        assert "unmeasured" in page and "0.88 to 0.92, n 100" in page
        assert "0.5 x the incumbent: candidate" in page

    def test_what_to_use_comes_before_everything_else(self) -> None:
        page = report.render(data())
        first = page.index("Use fast-int8")
        assert first < page.index("fast-int8 is best.") < page.index("<svg")
        assert page.index("4x smaller") < page.index("<svg") and "4x faster" in page

    def test_columns_are_called_after_the_metric(self) -> None:
        page = report.render(data())
        assert "mAP at IoU 0.5" in page and ">Accuracy<" not in page
        assert ">Accuracy<" in report.render(data(metric="accuracy"))

    def test_failed_and_skipped_and_predicted_are_shown(self) -> None:
        page = report.render(data())
        assert "pruned99" in page and "8x slower here" in page and "skipped" in page
        assert "1 ms ± 20 %, was 11 % off" in page

    def test_every_axis_can_be_chosen_without_a_script(self) -> None:
        page = report.render(data())
        assert page.count('type="radio"') == page.count('class="pane ') >= 2
        for key in re.findall(r'class="pane ([\w-]+)"', page):
            assert f":has(#{key}-1:checked) .{key}" in page

    def test_an_adaptation_is_told(self) -> None:
        evidence = {
            "method": "matched augmentation",
            "before": figure(0.5),
            "after": figure(0.9),
            "clean_before": figure(0.99),
            "clean_after": figure(0.98),
            "labels": 12,
            "matched": ["contrast 0.7"],
        }
        page = report.render(
            data(adaptation={"sentence": "Kept: it rose.", "evidence": evidence}, networks=[], graph=None)
        )
        assert "Kept: it rose." in page and "contrast 0.7" in page and "None was trained" in page

    def test_a_class_without_anything_to_run(self) -> None:
        entry = {**data()["classes"][0], "chosen": "", "front": [], "candidates": [], "feasible": False}
        assert "Nothing can run here" in report.render(data(classes=[entry]))

    def test_both_forms_are_written(self, tmp_path: Path) -> None:
        paths = report.write(data(), tmp_path / "out")
        assert json.loads(Path(paths["json"]).read_text()) == data()
        assert Path(paths["html"]).read_text().startswith("<!doctype html>")


class TestFindings:
    def test_whom_it_hits_most_comes_first(self) -> None:
        mine, base = rows()[0], rows()[1]
        first, second = facts.per_class(mine, base)
        assert first.label == "stop" and first.certain and first.change == pytest.approx(-0.25)
        assert second.change == pytest.approx(0.01) and not second.certain
        assert "1 of 2 classes lose recall, 1 of them beyond the noise. stop loses most" in facts.who(
            [first, second]
        )

    def test_the_worst_class_is_a_tile(self) -> None:
        tile = facts.tiles(data()["classes"][0], "accuracy")[-1]
        assert tile.figure == "stop" and tile.tone == "bad" and tile.change == "−25 points"

    def test_techniques_are_told_apart(self) -> None:
        found = {t.name: t for t in facts.techniques(data()["classes"][0])}
        assert next(iter(found)) == facts.ALONE
        pruned = found["channel pruning + int8"]
        assert pruned.smaller == 4.0 and pruned.faster == pytest.approx(4.0)
        assert pruned.change == pytest.approx(0.0)

    def test_time_stands_at_the_layer_with_weights(self) -> None:
        first, second = facts.layers(GRAPH)
        assert first.us == 3.0 and second.us is None and second.note == "computed with 0"
        assert facts.own_share(GRAPH) == 0.25


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
            {
                "latency_p95": (latency, latency, latency + more),
                "accuracy": (accuracy, accuracy - spread, accuracy + spread),
            },
            "chosen" if i == 0 else "front" if kept else "other",
            f"<{i}>",
        )
        for i, (latency, more, accuracy, spread, kept) in enumerate(values)
    ]
    (pane,) = charts.panes(dots, "accuracy")
    places = [float(v) for v in re.findall(r'(?:cx|x1|x2)="(-?[\d.]+)"', pane.svg)]
    assert all(-1 <= place <= charts.WIDTH + 1 for place in places)
    assert pane.svg.count('class="dot ') == len(dots) and "<0>" not in pane.svg


@pytest.mark.parametrize(("seconds", "said"), [(5.0, "5.0 s"), (600.0, "10.0 min")])
def test_times(seconds: float, said: str) -> None:
    assert text.seconds(seconds) == said


@pytest.mark.parametrize(
    ("ratio", "said"), [(4.2, "4.2x faster"), (0.5, "2x slower"), (1.001, "the same"), (None, "")]
)
def test_ratios_in_words(ratio: float | None, said: str) -> None:
    assert text.times(ratio, "faster", "slower") == said
