"""Networks side by side: a worker that dies costs one more try, a failure ends nothing else."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from shoal_optimizer import executors
from shoal_optimizer.jobspec import JobSpec
from shoal_optimizer.search import together
from shoal_optimizer.search.failures import reason_of
from shoal_optimizer.search.space import network
from shoal_optimizer.search.together import Order, Trained
from shoal_optimizer.task import load_task
from shoal_protos.errors import InvalidInput

TASK = """
import os, pathlib, signal
from tests.optimizer.quadrants import Quadrants as Base
class Mortal(Base):
    def augment(self, inputs):
        mark = pathlib.Path({mark!r})
        if not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return inputs
"""


def order(path: Path, tmp_path: Path, ratio: float = 0.5) -> Order:
    stored = load_task(path).save(tmp_path / "files")
    recipe = network({"ratio": ratio, "teacher": True, "epochs": 1})
    spec = JobSpec("optimize", "o", path.parent, path.name, weights=stored.weights, data=stored.data)
    return together.order_of(spec, recipe)


def test_a_killed_worker_is_tried_again(tmp_path: Path) -> None:
    path = tmp_path / "mortal.py"
    path.write_text(TASK.format(mark=str(tmp_path / "mark")))
    said: list[str] = []
    wanted = order(path, tmp_path)
    ((_, found),) = together.results([wanted], executors.LocalProcesses, 1, say=said.append)
    assert isinstance(found, Trained) and found.module
    assert said == ["the worker of pruned50-e1 died; it is tried again"]


def test_one_failure_leaves_the_others(quadrants_path: Path, tmp_path: Path) -> None:
    good = order(quadrants_path, tmp_path)
    bad = Order("bad", ({"technique": "nothing", "params": {}},), *(
        good.source, good.task, good.weights, good.data
    ))  # fmt: skip
    outcomes = {
        wanted.name: found
        for wanted, found in together.results([bad, good], lambda n: executors.InlineExecutor(), 2)
    }
    assert "no technique 'nothing'" in str(outcomes["bad"])
    assert isinstance(outcomes[good.name], Trained)


def test_an_order_can_carry_its_files(quadrants_path: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "quadrants.py").write_text(quadrants_path.read_text())
    whole = order(source / "quadrants.py", tmp_path).packed()
    for path in (source / "quadrants.py", Path(whole.weights), Path(whole.data)):
        path.unlink()
    assert together.train(whole).module  # nothing of this disk is needed


@pytest.mark.parametrize(
    ("error", "word"),
    [
        (MemoryError(), "Memory did not suffice"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "Memory did not suffice"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "The disk is full"),
        (RuntimeError("[enforce fail] PytorchStreamWriter: No space left on device"), "The disk is full"),
        (InvalidInput("The model is odd."), "The model is odd."),
        (ValueError("first\nsecond"), "ValueError: first"),
    ],
)
def test_reasons_are_in_words(error: BaseException, word: str) -> None:
    assert reason_of(error).startswith(word)


@pytest.mark.slow
def test_a_ray_cluster_trains_and_survives_a_killed_worker(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    path = tmp_path / "mortal.py"
    path.write_text(TASK.format(mark=str(tmp_path / "mark")))
    wanted = order(path, tmp_path)
    ((_, found),) = together.results([wanted], lambda n: executors.make("ray://local"), 1)
    assert isinstance(found, Trained) and found.module, found
    assert (tmp_path / "mark").exists()  # its first worker was killed; Ray tried again
