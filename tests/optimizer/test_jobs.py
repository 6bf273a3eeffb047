"""The job process: its lines, its errors, its saving of itself."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shoal_agent.telemetry.sketches import sketch
from shoal_optimizer.task import load_task
from shoal_protos.bundle import open_bundle
from tests.optimizer import jobbing
from tests.optimizer.jobbing import Event, local_class, of, only

BOTH = local_class()
ELSEWHERE = {
    "name": "aarch64.neon.4c+onnxruntime",
    "isa": ["neon"],
    "runtimes": {"onnxruntime": "1"},
    "local": False,
}


def base(path: Path, kind: str, **more: Any) -> dict[str, Any]:
    return {
        "kind": kind,
        "id": f"o-{kind}",
        "seed": 0,
        "threads": 1,
        "source": str(path.parent),
        "task": path.name,
        "version": {"model": "quadrants", "number": 1},
        "budget": {"minutes": 1, "trials": 0, "networks": 1},
        **more,
    }


@pytest.fixture(scope="module")
def ingest(tmp_path_factory: pytest.TempPathFactory, quadrants_path: Path) -> tuple[Path, list[Event]]:
    """One ingest that all tests look at: its folder and its lines."""
    folder = tmp_path_factory.mktemp("ingest")
    spec = base(quadrants_path, "ingest", classes=[BOTH, ELSEWHERE])
    code, events = jobbing.run(folder, spec, GITHUB_TOKEN="secret")
    assert code == 0, (folder / "log.txt").read_text()
    return folder, events


def optimize_spec(quadrants_path: Path, ingest: tuple[Path, list[Event]], **more: Any) -> dict[str, Any]:
    files = only(ingest[1], "ingested")["files"]
    settings = {"classes": [BOTH], "objective": "accuracy>=0.5; minimise size", **more}
    return base(quadrants_path, "optimize", **files, **settings)


class TestIngest:
    def test_it_says_what_it_found_before_it_converts(self, ingest: tuple[Path, list[Event]]) -> None:
        kinds = [e["event"] for e in ingest[1] if e["event"] != "progress"]
        assert kinds == ["ingested", *["variant"] * (len(kinds) - 2), "done"]
        found = only(ingest[1], "ingested")
        assert found["signature"]["inputs"] and found["metric"] == "accuracy"
        assert found["baseline"]["low"] <= found["baseline"]["value"] <= found["baseline"]["high"]
        assert found["analysis"]["parameters"] > 0
        assert all(Path(path).is_file() for path in found["files"].values())

    def test_every_class_gets_plain_variants_of_each_runtime(self, ingest: tuple[Path, list[Event]]) -> None:
        variants = of(ingest[1], "variant")
        assert {v["target"] for v in variants if BOTH["name"] in v["classes"]} == {"onnxruntime", "openvino"}
        assert any(ELSEWHERE["name"] in v["classes"] for v in variants)
        for variant in variants:
            assert variant["plain"] and variant["precision"] == "fp32"
            assert open_bundle(Path(variant["layout"])).digest == variant["bundle"]

    def test_nothing_is_claimed_for_another_class(self, ingest: tuple[Path, list[Event]]) -> None:
        for variant in of(ingest[1], "variant"):
            for name, figures in variant["classes"].items():
                if name == ELSEWHERE["name"]:
                    assert figures["source"] == "unmeasured"
                    assert figures["accuracy"] is None and figures["latency"] is None
                else:
                    assert figures["source"] == "local" and figures["latency"]["p95_ms"] > 0
                    assert figures["accuracy"]["n"] > 0

    def test_started_again_it_neither_trains_nor_converts(
        self, ingest: tuple[Path, list[Event]], quadrants_path: Path, tmp_path: Path
    ) -> None:
        again = tmp_path / "again"
        shutil.copytree(ingest[0], again)
        # The copy's state names the first folder's files, which are still there.
        code, events = jobbing.run(again, base(quadrants_path, "ingest", classes=[BOTH, ELSEWHERE]))
        assert code == 0
        assert only(events, "ingested")["files"] == only(ingest[1], "ingested")["files"]
        assert "baseline" not in {e["step"] for e in of(events, "progress")}
        assert not of(events, "variant")  # said before, and saved that it was
        assert only(events, "done")["fronts"] == only(ingest[1], "done")["fronts"]


TASK = """
from shoal_optimizer import Task, TensorSpec
import numpy as np, os, sys, torch
from torch import nn
{top}
class Tiny(Task):
    input = TensorSpec("x", "FP32", (-1, 4))
    output_kind = "logits"
    def model(self):
        {model}
        return nn.Linear(4, 2)
    def evaluation(self):
        {evaluation}
        return np.ones((20, 4), np.float32), np.zeros(20, np.int64)
    {more}
"""


def write(folder: Path, **parts: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "tiny.py"
    filled = {name: parts.get(name, "pass") for name in ("model", "evaluation")}
    path.write_text(TASK.format(top=parts.get("top", ""), more=parts.get("more", ""), **filled))
    return path


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"top": "raise RuntimeError('no luck')"}, "no luck"),
        ({"model": "raise ValueError('weights are gone')"}, "weights are gone"),
        ({"evaluation": "return []"}, "no data"),
        ({"more": "def metric(self, outputs, targets): return float('nan')"}, "metric()"),
        ({"model": "return nn.LSTM(4, 2)"}, ""),
    ],
)
def test_a_bad_task_is_an_error_that_says_what_to_do(
    parts: dict[str, str], message: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "source", **parts)
    code, events = jobbing.run(tmp_path / "job", base(path, "ingest", classes=[BOTH]))
    assert code == 1
    error = only(events, "error")
    assert message in error["message"] and error["remedy"]
    assert events[-1] == error and not of(events, "variant")


def test_the_users_code_sees_no_credentials_and_cannot_spoil_stdout(tmp_path: Path) -> None:
    look = (
        "print('hello'); os.write(1, b'raw'); os.system('echo child');"
        "seen = dict(os.environ); proc = open('/proc/self/environ').read();"
        "open('seen.txt', 'w').write(repr(seen) + proc)"
    )
    path = write(tmp_path / "source", top="os.chdir(os.path.dirname(__file__)); " + look)
    folder = tmp_path / "job"
    code, events = jobbing.run(
        folder,
        base(path, "ingest", classes=[local_class("onnxruntime")]),
        AWS_SECRET="hush",
        HTTP_PROXY="http://u:hush@x",
    )
    assert code == 0 and only(events, "done")
    assert "hush" not in (tmp_path / "source" / "seen.txt").read_text()
    log = (folder / "log.txt").read_text()
    assert "hello" in log and "raw" in log and "child" in log


def test_a_directory_without_a_job_is_an_error(tmp_path: Path) -> None:
    folder = tmp_path / "job"
    code, events = jobbing.run(folder, {"kind": "dance"})
    assert code == 1 and "dance" in only(events, "error")["message"]


# ---------------------------------------------------------------------------- optimize


def test_a_search_asks_waits_and_finishes(
    ingest: tuple[Path, list[Event]], quadrants_path: Path, tmp_path: Path
) -> None:
    layouts = {v["bundle"]: v["layout"] for v in of(ingest[1], "variant")}
    plain = next(v for v in of(ingest[1], "variant") if v["target"] == "onnxruntime")
    spec = optimize_spec(
        quadrants_path,
        ingest,
        classes=[local_class("onnxruntime"), BOTH],
        budget={"minutes": 1, "trials": 2, "networks": 1},
        incumbents={BOTH["name"]: {"bundle": plain["bundle"], "layout": plain["layout"]}},
    )
    folder = tmp_path / "job"
    code, first = jobbing.run(folder, spec)
    assert code == 0, (folder / "log.txt").read_text()
    asked = of(first, "trial")
    assert only(first, "waiting")["trials"] == [t["id"] for t in asked]
    said = {v["bundle"] for v in of(first, "variant")}
    assert {t["bundle"] for t in asked} <= said  # a device can be sent there
    assert all(sum(t["class"] == c for t in asked) <= 2 for c in {t["class"] for t in asked})
    assert {t["incumbent"] for t in asked} >= {plain["bundle"]}

    results = jobbing.answer(first, layouts, folder)
    code, second = jobbing.run(folder, {**spec, "trial_results": results})
    assert code == 0
    assert not {"prune", "distil", "quantize", "pack"} & {e["step"] for e in of(second, "progress")}
    done = only(second, "done")
    for name, front in done["fronts"].items():
        assert front[0]["bundle"] == done["choice"][name]["bundle"]
        assert front[0]["source"] == "trial" and front[0]["latency_p95_ms"] > 0
    report = json.loads(Path(done["report"]["json"]).read_text())
    assert {c["name"] for c in report["classes"]} == set(done["fronts"])
    assert "<svg" in Path(done["report"]["html"]).read_text() or len(report["classes"][0]["candidates"]) < 2

    # Expired trials end the wait too; what is of this machine keeps its local figures.
    expired: dict[str, Any] = dict.fromkeys(results)
    code, third = jobbing.run(folder, {**spec, "trial_results": expired})
    assert code == 0
    assert {e["source"] for front in only(third, "done")["fronts"].values() for e in front} == {"local"}


@pytest.mark.slow
def test_a_class_that_is_not_here_is_judged_by_its_device(
    ingest: tuple[Path, list[Event]], quadrants_path: Path, tmp_path: Path
) -> None:
    remote = local_class("onnxruntime", local=False)
    spec = optimize_spec(
        quadrants_path, ingest, classes=[remote], budget={"minutes": 1, "trials": 2, "networks": 1}
    )
    folder = tmp_path / "job"
    _, first = jobbing.run(folder, spec)
    for variant in of(first, "variant"):
        assert variant["classes"][remote["name"]]["source"] == "unmeasured"
    assert {t["kind"] for t in of(first, "trial")} == {"timing", "outputs"}
    results = jobbing.answer(first, {}, folder)
    code, second = jobbing.run(folder, {**spec, "trial_results": results})
    assert code == 0
    best = only(second, "done")["fronts"][remote["name"]][0]
    assert best["source"] == "trial" and best["accuracy"] > 0.5
    assert only(second, "done")["choice"][remote["name"]]["feasible"]


def test_a_class_of_emulated_devices_only_is_searched_without_times(
    ingest: tuple[Path, list[Event]], quadrants_path: Path, tmp_path: Path
) -> None:
    pi = local_class("onnxruntime", local=False, emulated=True)
    spec = optimize_spec(
        quadrants_path,
        ingest,
        classes=[pi],
        objective="accuracy>=0.5, latency_p95<=5ms; minimise size",
        budget={"minutes": 0.02, "trials": 2, "networks": 0},
    )
    folder = tmp_path / "job"
    _, first = jobbing.run(folder, spec)
    for variant in of(first, "variant"):
        assert variant["classes"][pi["name"]]["source"] == "unmeasured (emulated)"
    assert any(variant["plain"] for variant in of(first, "variant"))  # never kept out by the unjudged
    assert {t["kind"] for t in of(first, "trial")} == {"outputs"}  # nobody is asked for times
    results = jobbing.answer(first, {}, folder, emulated=True)
    code, second = jobbing.run(folder, {**spec, "trial_results": results})
    assert code == 0
    done = only(second, "done")
    for point in done["fronts"][pi["name"]]:
        assert point["source"] == "unmeasured (emulated)" and point["latency_p95_ms"] is None
        assert point["accuracy_source"] == "emulated" and point["accuracy"] > 0.5
    assert not done["choice"][pi["name"]]["feasible"]  # a limit of time is not known to be met ...
    assert "latency_p95 is unmeasured" in done["choice"][pi["name"]]["sentence"]  # ... and it says so
    shown = Path(done["report"]["html"]).read_text()
    assert "unmeasured (emulated)" in shown and ">emulated<" in shown


def test_killed_in_the_middle_it_goes_on(
    ingest: tuple[Path, list[Event]], quadrants_path: Path, tmp_path: Path
) -> None:
    spec = optimize_spec(quadrants_path, ingest, classes=[local_class("onnxruntime")])
    folder = tmp_path / "job"
    child = jobbing.start(folder, spec)
    assert child.stdout is not None
    with child.stdout as stream:
        for line in stream:  # until a network was trained and its first export began
            event = json.loads(line)
            if event["event"] == "progress" and event["message"].startswith("pruned50-fp32"):
                child.send_signal(signal.SIGKILL)
                break
    assert child.wait() == -signal.SIGKILL
    before = json.loads((folder / "state.json").read_text())
    assert len(before["networks"]) == 1 and before["candidates"]
    code, events = jobbing.run(folder, spec)
    assert code == 0, (folder / "log.txt").read_text()
    steps = [(e["step"], e["message"]) for e in of(events, "progress")]
    assert not any(step == "distil" for step, _ in steps)
    finished = {c["name"] for c in before["candidates"].values()}
    assert not any(step == "pack" and message in finished for step, message in steps)
    after = json.loads((folder / "state.json").read_text())
    assert after["used_s"] > before["used_s"] and len(after["networks"]) == 1
    assert only(events, "done")["fronts"]


# ---------------------------------------------------------------------------- adapt


def field_of(path: Path, folder: Path, *, changed: bool) -> dict[str, Any]:
    """Sketch and labelled samples of evaluation inputs; flatter, brighter and noisier if `changed`."""
    task = load_task(path)
    data, random = task.required("evaluation"), np.random.default_rng(0)
    spec = task.input
    inputs = data.inputs
    if changed:
        assert spec.low is not None and spec.high is not None
        middle, width = (spec.low + spec.high) / 2, spec.high - spec.low
        moved = (inputs.astype(np.float64) - middle) * 0.5 + middle + 0.2 * width
        moved = np.clip(moved + random.normal(0, 0.03 * width, moved.shape), spec.low, spec.high)
        inputs = (
            moved.round().astype(inputs.dtype) if inputs.dtype.kind in "iu" else moved.astype(inputs.dtype)
        )
    folder.mkdir(parents=True, exist_ok=True)
    found = sketch(task.input_kind, inputs, spec.low, spec.high)
    (folder / "field.bin").write_bytes(found.SerializeToString())
    labels = np.where(np.arange(len(inputs)) % 2, data.targets, -1)
    np.savez(folder / "s.npz", **{spec.name: inputs, "label": labels, "predicted": labels})  # type: ignore[arg-type]
    (folder / "damaged.npz").write_bytes(b"PK damaged")
    samples = [str(folder / "s.npz"), str(folder / "damaged.npz"), str(folder / "missing.npz")]
    return {"inputs": str(folder / "field.bin"), "samples": samples}


def adapt_spec(
    quadrants_path: Path, ingest: tuple[Path, list[Event]], field: dict[str, Any]
) -> dict[str, Any]:
    plain = of(ingest[1], "variant")[0]
    runtime = local_class("onnxruntime")
    spec = optimize_spec(quadrants_path, ingest, classes=[runtime], field=field)
    incumbents = {runtime["name"]: {"bundle": plain["bundle"], "layout": plain["layout"]}}
    recipes = [{"steps": [], "target": "onnxruntime", "precision": "fp32", "class": runtime["name"]}]
    return {**spec, "kind": "adapt", "recipes": recipes, "incumbents": incumbents}


def test_an_unchanged_field_keeps_what_serves(
    ingest: tuple[Path, list[Event]], quadrants_path: Path, tmp_path: Path
) -> None:
    field = field_of(quadrants_path, tmp_path / "field", changed=False)
    code, events = jobbing.run(tmp_path / "job", adapt_spec(quadrants_path, ingest, field))
    assert code == 0, (tmp_path / "job" / "log.txt").read_text()
    adapted = only(events, "adapted")
    assert adapted["kept"] is False and "Not kept" in adapted["sentence"]
    assert not of(events, "variant") and only(events, "done")["choice"] == {}


@pytest.mark.slow
def test_a_changed_field_adapts_and_the_serving_recipe_is_made_again(
    ingest: tuple[Path, list[Event]], quadrants_path: Path, tmp_path: Path
) -> None:
    field = field_of(quadrants_path, tmp_path / "field", changed=True)
    code, events = jobbing.run(tmp_path / "job", adapt_spec(quadrants_path, ingest, field))
    assert code == 0, (tmp_path / "job" / "log.txt").read_text()
    adapted = only(events, "adapted")
    evidence = adapted["evidence"]
    assert adapted["kept"] is True, adapted["sentence"]
    assert evidence["after"]["value"] > evidence["before"]["value"] and evidence["interval"]["low"] > 0
    assert evidence["labels"] > 0
    done = only(events, "done")
    chosen = done["choice"][local_class("onnxruntime")["name"]]["bundle"]
    variant = next(v for v in of(events, "variant") if v["bundle"] == chosen)
    config = open_bundle(Path(variant["layout"])).config
    assert config.lineage.parent == "quadrants v1" and config.reference.thresholds
    # The new data carries the field, so that a later job does not forget it.
    stored = np.load(adapted["files"]["data"])
    first = np.load(only(ingest[1], "ingested")["files"]["data"])
    assert len(stored["training:inputs"]) > len(first["training:inputs"])
    assert np.array_equal(stored["evaluation:inputs"], first["evaluation:inputs"])


@pytest.mark.parametrize("broken", [b"", b"\xff\xff nonsense"])
def test_a_broken_field_is_an_error(
    broken: bytes, ingest: tuple[Path, list[Event]], quadrants_path: Path, tmp_path: Path
) -> None:
    (tmp_path / "field.bin").write_bytes(broken)
    spec = adapt_spec(quadrants_path, ingest, {"inputs": str(tmp_path / "field.bin"), "samples": []})
    code, events = jobbing.run(tmp_path / "job", spec)
    assert code == 1 and only(events, "error")["remedy"]
