"""Agents on other Pythons than the tests' own: joined and run on this machine, where these are installed."""

from __future__ import annotations

import glob
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from shoal_controller.client import Client
from shoal_controller.demo import cast
from shoal_controller.demo.stage import Stage
from tests.deploy import resolving
from tests.emulation import fixtures

pytestmark = [pytest.mark.slow, pytest.mark.timeout(420)]

OTHERS = [python for python in resolving.PYTHONS if python != f"3.{sys.version_info[1]}"]


def interpreter(python: str) -> str:
    """A Python of this minor version: on the path, or one of pyenv's. Skips the test without one."""
    found = shutil.which(f"python{python}")
    candidates = [found] if found else []
    candidates += sorted(glob.glob(os.path.expanduser(f"~/.pyenv/versions/{python}.*/bin/python")))
    for candidate in candidates:
        said = subprocess.run(
            [candidate, "-c", "import ssl, sqlite3, sys; print('%d.%d' % sys.version_info[:2])"],
            capture_output=True, text=True, check=False, timeout=30,
        )  # fmt: skip
        if said.stdout.strip() == python:
            return candidate
    pytest.skip(f"no Python {python} on this machine")


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Stage, Client]]:
    with Stage(tmp_path_factory.mktemp("pythons"), keep=False) as made:
        client = cast.start_controller(made)
        try:
            yield made, client
        finally:
            client.close()


@pytest.fixture(scope="module")
def shoal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fixtures.shoal_site(tmp_path_factory.mktemp("shoal"))


@pytest.mark.parametrize("python", OTHERS)
def test_an_agent_joins_and_is_heard(
    python: str, stage: tuple[Stage, Client], shoal: Path, tmp_path: Path
) -> None:
    made, client = stage
    program, site = interpreter(python), tmp_path / "site"
    wanted = sorted({line for extra in ("agent", "onnxruntime") for line in resolving.of_extra(extra)})
    installed = subprocess.run(
        [program, "-m", "pip", "install", "--quiet", "--only-binary=:all:", "--target", str(site), *wanted],
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    if installed.returncode:
        if not resolving.reachable():
            pytest.skip("the package registry does not answer")
        pytest.fail(installed.stderr[-800:])
    token, name = tmp_path / "token", f"python{python}"
    made.shoal("a token", "token", "create", "--join", "--out", str(token))
    settings = {
        "PYTHONPATH": os.pathsep.join([str(shoal), str(site)]),
        "SHOAL_AGENT_DIR": str(tmp_path / "agent"),
        "SHOAL_AGENT_HTTP_PORT": "0",
        "SHOAL_AGENT_GRPC_PORT": "0",
        "SHOAL_AGENT_METRICS_PORT": "0",
    }
    join = [program, "-m", "shoal_agent", "join", "--token-file", str(token), "--name", name]
    made.run(f"{name} joins", [*join, "--service", "none"], 90, settings)
    process = made.start(name, [program, "-m", "shoal_agent", "run"], settings, ends=True)

    def answering() -> bool | None:
        device = client.device(name)
        return True if device.status != "offline" and device.profile.get("ports", {}).get("http") else None

    made.wait(f"{name} is heard and answers", answering, 90, explain=process.tail)
    profile = client.device(name).profile
    assert str(profile["python_version"]).startswith(python + ".")
    assert [runtime["name"] for runtime in profile["runtimes"]] == ["onnxruntime"]
