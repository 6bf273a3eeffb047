"""One conformance class for every executor."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from concurrent.futures import Executor, as_completed

import pytest

from shoal_optimizer import executors
from shoal_protos.errors import InvalidInput, MissingExtra

HAS_RAY = importlib.util.find_spec("ray") is not None


@pytest.fixture(
    params=[
        "inline",
        "processes",
        pytest.param("ray", marks=pytest.mark.skipif(not HAS_RAY, reason="no ray")),
    ]
)
def executor(request: pytest.FixtureRequest) -> Iterator[Executor]:
    if request.param == "processes":
        made: Executor = executors.LocalProcesses(2, preload=[])
    else:
        made = executors.make(request.param)
    with made:
        yield made


class TestExecutor:
    def test_results_come_back(self, executor: Executor) -> None:
        assert executor.submit(divmod, 7, 3).result(60) == (2, 1)

    def test_map_keeps_the_order(self, executor: Executor) -> None:
        assert list(executor.map(abs, range(-20, 0))) == list(range(20, 0, -1))

    def test_an_exception_comes_back_and_others_go_on(self, executor: Executor) -> None:
        failing, fine = executor.submit(int, "x"), executor.submit(int, "1")
        with pytest.raises(ValueError, match="invalid literal"):
            failing.result(60)
        assert fine.result(60) == 1

    def test_keywords_and_large_arguments(self, executor: Executor) -> None:
        assert executor.submit(sorted, list(range(50_000)), reverse=True).result(60)[0] == 49_999

    def test_futures_complete(self, executor: Executor) -> None:
        futures = [executor.submit(abs, -i) for i in range(5)]
        assert sorted(f.result() for f in as_completed(futures, 60)) == [0, 1, 2, 3, 4]

    def test_after_shutdown_it_refuses(self, executor: Executor) -> None:
        executor.shutdown()
        with pytest.raises(RuntimeError):
            executor.submit(abs, 1)


def test_processes_are_other_processes() -> None:
    with executors.LocalProcesses(1, preload=[]) as pool:
        assert pool.submit(os.getpid).result(60) != os.getpid()


@pytest.mark.skipif(HAS_RAY, reason="ray is installed")
def test_ray_missing_says_what_to_install() -> None:
    with pytest.raises(MissingExtra, match=r"shoal\[ray\]"):
        executors.make("ray")


def test_unknown_names_are_refused() -> None:
    with pytest.raises(InvalidInput, match="Unknown executor"):
        executors.make("cloud")
    assert isinstance(executors.make("processes", workers=1), executors.InlineExecutor)
