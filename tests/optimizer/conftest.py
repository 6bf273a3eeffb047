"""Fixtures of the optimizer's tests: a task that trains in a second, and this machine's class."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from shoal_agent.runtimes.base import machine_isa
from shoal_optimizer.targets import ClassSpec
from shoal_optimizer.task import Task, load_task

HERE = Path(__file__).parent


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What tests learn stays out of this machine's knowledge."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def quadrants_path() -> Path:
    """A task file that loads in an instant and trains in about a second."""
    return HERE / "quadrants.py"


@pytest.fixture(scope="session")
def quadrants(quadrants_path: Path) -> Task:
    """The loaded task, shared by all tests: never change its `original`."""
    return load_task(quadrants_path)


@pytest.fixture(scope="session")
def local_class() -> ClassSpec:
    """What this machine is, with the runtimes that the tests use."""
    import onnxruntime
    import openvino

    runtimes = {"onnxruntime": onnxruntime.__version__, "openvino": openvino.__version__.split("-")[0]}
    return ClassSpec.of("x86_64.test", machine_isa(), runtimes, local=True)


@pytest.fixture
def write_task(tmp_path: Path) -> Callable[[str], Path]:
    """Writes a task file with the given text and returns its path."""

    def write(text: str, name: str = "written.py") -> Path:
        path = tmp_path / name
        path.write_text(text)
        return path

    return write
