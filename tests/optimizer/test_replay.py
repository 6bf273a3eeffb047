"""Replay: a variant is made again to the very byte, and what differs is named where it is not."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from shoal_optimizer import cli, lineage, replay
from shoal_optimizer.candidates import Workshop
from shoal_optimizer.cli_classes import machine_classes
from shoal_optimizer.jobspec import JobSpec
from shoal_optimizer.jobstate import State, Voice
from shoal_optimizer.recipe import Recipe, Step
from shoal_optimizer.search.space import Export
from shoal_optimizer.task import load_task
from shoal_protos.errors import Conflict, InvalidInput, NotFound

NAME = "small-int8-onnxruntime"
STEPS = (
    Step("channel_pruning", {"ratio": 0.5}),
    Step("distillation", {"epochs": 1, "alpha": 0.7}),
    Step("quantization"),
)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory, quadrants_path: Path) -> dict[str, Any]:
    """What a report says of a pruned, distilled, int8 variant, made as a search makes it."""
    folder = tmp_path_factory.mktemp("search")
    profile_class = replace(machine_classes([])[0], local=True)
    stored = load_task(quadrants_path, seed=3).save(folder / "files")
    spec = JobSpec(
        kind="optimize", id="o", source=quadrants_path.parent, task=quadrants_path.name, seed=3,
        weights=stored.weights, data=stored.data, classes=(profile_class,),
    )  # fmt: skip
    task = load_task(quadrants_path, seed=3, weights=stored.weights, data=stored.data)
    workshop = Workshop(task, spec, folder, State(folder / "state.json"), Voice(io.StringIO()))
    export = Export("onnxruntime", "int8", tuple(sorted(profile_class.isa)), (profile_class,))
    made = workshop.again(Recipe(STEPS, "small"), export, NAME)
    row = {
        **replay.describe(made),
        "target": made.target,
        "precision": made.precision,
        "recipe": [dict(step) for step in made.recipe],
        "network": made.network,
        "classes": list(made.classes),
    }
    entry = {
        "name": profile_class.name,
        "isa": list(profile_class.isa),
        "runtimes": dict(profile_class.runtimes),
        "local": True,
        "chosen": NAME,
        "candidates": [row],
    }
    networks = [{"key": key, **value} for key, value in workshop.state.networks.items()]
    shared = lineage.of_job(task, spec, workshop.weights_digest)
    whole = {"classes": [entry], "networks": networks, "lineage": shared, "adaptation": None}
    found: dict[str, Any] = json.loads(json.dumps(whole))  # as it is read from a file
    return found


def perform(report: dict[str, Any], task: Path, folder: Path) -> dict[str, Any]:
    """The job, in this process; its last line."""
    order = replay.order(report)
    spec = JobSpec(
        kind="replay",
        id="r",
        source=task.parent,
        task=task.name,
        replay=json.loads(json.dumps(order.to_json())),
    )
    lines = io.StringIO()
    replay.perform(spec, folder, State(folder / "state.json"), Voice(lines))
    found: dict[str, Any] = json.loads(lines.getvalue().splitlines()[-1])
    return found


def changed(report: dict[str, Any], **lineage_: Any) -> dict[str, Any]:
    return {**report, "lineage": {**report["lineage"], **lineage_}}


class TestReplay:
    def test_equal_bit_for_bit(self, report: dict[str, Any], quadrants_path: Path, tmp_path: Path) -> None:
        found = perform(report, quadrants_path, tmp_path)
        assert found["equal"] and found["files"] == [] and found["causes"] == []
        assert "equal bit for bit" in found["sentence"] and Path(found["layout"]).is_dir()

    def test_a_copy_of_the_task_elsewhere_gives_the_same(
        self, report: dict[str, Any], quadrants_path: Path, tmp_path: Path
    ) -> None:
        elsewhere = tmp_path / "elsewhere" / quadrants_path.name
        elsewhere.parent.mkdir()
        elsewhere.write_bytes(quadrants_path.read_bytes())
        assert perform(report, elsewhere, tmp_path / "job")["equal"]

    def test_other_data_are_refused(
        self, report: dict[str, Any], quadrants_path: Path, tmp_path: Path
    ) -> None:
        with pytest.raises(Conflict, match=r"data of quadrants\.py are not those"):
            perform(changed(report, data="sha256:" + "0" * 64), quadrants_path, tmp_path)

    def test_another_recipe_is_told_by_its_files(
        self, report: dict[str, Any], quadrants_path: Path, tmp_path: Path
    ) -> None:
        entry = report["classes"][0]
        row = {**entry["candidates"][0], "recipe": entry["candidates"][0]["recipe"][:1]}
        row["recipe"] = [*row["recipe"], {"technique": "quantization", "params": {}}]
        other = {**report, "classes": [{**entry, "candidates": [row]}]}
        found = perform(other, quadrants_path, tmp_path)
        assert not found["equal"] and not found["model_equal"]
        assert "model.onnx" in [f["name"] for f in found["files"]]


class TestVerdict:
    def test_a_changed_tool_is_named(self, report: dict[str, Any]) -> None:
        now = json.loads(json.dumps(report["lineage"]))
        now["tools"] = {**now["tools"], "torch": "9.9.9"}
        now["machine"] = {**now["machine"], "cpu": "another"}
        found = replay.causes(report["lineage"], now)
        assert {d.name for d in found} == {"torch", "cpu"}
        row = report["classes"][0]["candidates"][0]
        made = {**row, "bundle": "sha256:other", "files": {**row["files"], "model.onnx": "sha256:other"}}
        verdict = replay.compare(row, made, found)
        assert not verdict.equal and not verdict.model_equal
        assert "came out different in model.onnx" in verdict.sentence
        assert f"torch {report['lineage']['tools']['torch']} -> 9.9.9" in verdict.sentence

    def test_equal_models_with_another_description(self, report: dict[str, Any]) -> None:
        row = report["classes"][0]["candidates"][0]
        made = {**row, "bundle": "sha256:o", "files": {**row["files"], "bundle.json": "sha256:o"}}
        verdict = replay.compare(row, made)
        assert verdict.model_equal and not verdict.equal and "model files are equal" in verdict.sentence


class TestOrder:
    def test_by_name_or_digest(self, report: dict[str, Any]) -> None:
        row = report["classes"][0]["candidates"][0]
        digest = row["bundle"].removeprefix("sha256:")[:12]
        assert replay.order(report, digest).variant == row == replay.order(report, NAME).variant

    @pytest.mark.parametrize(
        ("edit", "error", "said"),
        [
            (lambda r: {**r, "lineage": {"task": "x"}}, InvalidInput, "older version"),
            (lambda r: {**r, "adaptation": {"kept": True}}, InvalidInput, "adapted to the field"),
        ],
    )
    def test_refusals(
        self, report: dict[str, Any], edit: Callable[[dict[str, Any]], dict[str, Any]], error: Any, said: str
    ) -> None:
        with pytest.raises(error) as caught:
            replay.order(edit(report))
        assert said in f"{caught.value} {caught.value.remedy}"

    def test_an_unknown_variant(self, report: dict[str, Any]) -> None:
        with pytest.raises(NotFound) as caught:
            replay.order(report, "nothing")
        assert NAME in f"{caught.value} {caught.value.remedy}"

    @pytest.mark.parametrize("content", [None, b"{", b"[]", b'{"a": 1}'])
    def test_what_is_no_report(self, content: bytes | None, tmp_path: Path) -> None:
        path = tmp_path / "report.json"
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(InvalidInput):
            replay.read(path)


@pytest.mark.slow
def test_from_the_command_line(quadrants_path: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    cli.optimize(quadrants_path, out=out, minutes=0.01, objective_text="minimise size")
    found = cli.replay_variant(out / "report.json")
    assert found["equal"], found
    assert json.loads((Path(found["out"]) / "replay.json").read_text())["equal"]
