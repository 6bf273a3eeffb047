"""A whole search as a job: killed at any point it goes on, and a failed trial ends nothing."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.optimizer import jobbing
from tests.optimizer.jobbing import local_class, of, only


def spec(path: Path, **more: Any) -> dict[str, Any]:
    return {
        "kind": "optimize",
        "id": "o-1",
        "seed": 0,
        "threads": 1,
        "source": str(path.parent),
        "task": path.name,
        "objective": "accuracy>=0.5; minimise size",
        "classes": [local_class("onnxruntime")],
        "budget": {"minutes": 1, "trials": 0, "networks": 1},
        **more,
    }


def made(folder: Path) -> dict[str, str]:
    """Candidate -> digest of its bundle."""
    candidates = json.loads((folder / "state.json").read_text())["candidates"]
    return {c["name"]: c["bundle"] for c in candidates.values()}


NO_MEMORY = """
import torch
from tests.optimizer.quadrants import Quadrants as Base
class Greedy(Base):
    def loss(self, outputs, targets):
        return torch.empty(1 << 50).sum()
"""


def test_a_network_without_memory_is_left_out_and_the_search_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "greedy.py"
    path.write_text(NO_MEMORY)
    code, events = jobbing.run(tmp_path / "job", spec(path))
    assert code == 0, (tmp_path / "job" / "log.txt").read_text()
    left = json.loads((tmp_path / "job" / "state.json").read_text())["facts"]["left_out"]
    (failed,) = [entry for entry in left if entry["name"] == "pruned50"]
    assert failed["outcome"] == "failed" and "emory" in failed["reason"]
    assert {front["name"] for front in only(events, "done")["fronts"][local_class("onnxruntime")["name"]]}


def test_a_full_disk_leaves_a_network_out(quadrants_path: Path, tmp_path: Path) -> None:
    from shoal_optimizer.search.candidate import Network
    from shoal_optimizer.search.space import network

    recipe = network({"ratio": 0.5, "teacher": True, "epochs": 10}).training
    work = tmp_path / "job" / "work"
    work.mkdir(parents=True)
    (work / f"network-{Network(recipe, None).key}.partial").symlink_to("/dev/full")
    code, events = jobbing.run(tmp_path / "job", spec(quadrants_path))
    assert code == 0, (tmp_path / "job" / "log.txt").read_text()
    left = json.loads((tmp_path / "job" / "state.json").read_text())["facts"]["left_out"]
    assert any("disk is full" in entry["reason"] for entry in left), left
    assert only(events, "done")["choice"]


@pytest.mark.slow
def test_killed_at_several_points_it_ends_the_same(quadrants_path: Path, tmp_path: Path) -> None:
    wanted = spec(quadrants_path)
    code, events = jobbing.run(tmp_path / "whole", wanted)
    assert code == 0
    expected = made(tmp_path / "whole")  # what is kept of it depends on timings, what is made does not
    points = [("analyse", ""), ("distil", ""), ("quantize", "pruned50"), ("measure", "pruned50")]
    folder, trained = tmp_path / "killed", 0
    for step, start in points:
        child = jobbing.start(folder, wanted)
        assert child.stdout is not None
        with child.stdout as stream:
            for line in stream:
                event = json.loads(line)
                message = str(event.get("message"))
                trained += event.get("step") == "distil" and "epoch 10 of" in message
                if event.get("step") == step and message.startswith(start):
                    child.send_signal(signal.SIGKILL)
                    break
        child.wait()
    code, events = jobbing.run(folder, wanted)
    assert code == 0, (folder / "log.txt").read_text()
    trained += any("epoch 10 of" in str(e.get("message")) for e in of(events, "progress"))
    assert trained <= 1  # the network was finished once
    assert made(folder) == expected
    state = json.loads((folder / "state.json").read_text())
    assert len(state["networks"]) == 1
    assert only(events, "done")["choice"]
