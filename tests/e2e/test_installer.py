"""The join line as it is printed, in a bare environment, with the real wheels. Needs a package registry."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from shoal_controller.demo.stage import end

SHOAL = [sys.executable, "-m", "shoal_controller.cli.main"]
FREE = [word for name in ("http", "installer", "enrolment", "agents") for word in (f"--{name}-port", "0")]
OTHERS = {
    version: found[0]
    for version in ("3.10", "3.13")
    if (found := sorted((Path.home() / ".pyenv/versions").glob(f"{version}.*/bin/python3")))
}
MAX_INSTALL_MB = 190
# With systemd, `--service auto` would install a unit on the machine that runs the tests.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(Path("/run/systemd/system").exists(), reason="would install a system service"),
]


@dataclass
class World:
    home: Path

    def shoal(self, *arguments: str) -> str:
        environment = {key: value for key, value in os.environ.items() if not key.startswith("SHOAL_")}
        done = subprocess.run(
            [*SHOAL, *arguments],
            capture_output=True,
            text=True,
            timeout=400,
            env={**environment, "SHOAL_HOME": str(self.home)},
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def devices(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = json.loads(self.shoal("device", "list", "--json"))
        return found if isinstance(found, list) else found["items"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    made = World(tmp_path_factory.mktemp("lan") / "home")
    made.shoal("controller", "wheels", "add", "--this-machine")
    if OTHERS:
        pythons = [word for version in OTHERS for word in ("--python", version)]
        made.shoal("controller", "wheels", "add", "--platform", platform.machine(), *pythons)
    process = subprocess.Popen(
        [*SHOAL, "up", "--lan", "--home", str(made.home), *FREE, "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    try:
        assert json.loads(process.stdout.readline())["ports"]["installer"]
        yield made
    finally:
        end(process, 20)  # type: ignore[arg-type]
        process.stdout.close()


def bare(root: Path, python: Path) -> dict[str, str]:
    """What a fresh login on a board has, and places that are ours."""
    names = ("HTTP_PORT", "GRPC_PORT", "METRICS_PORT")
    return {
        "PATH": f"{python.parent}:/usr/bin:/bin",
        "HOME": str(root),
        "SHOAL_PREFIX": str(root / "prefix"),
        "SHOAL_AGENT_DIR": str(root / "state"),
        **{f"SHOAL_AGENT_{name}": "0" for name in names},
    }


@pytest.mark.parametrize(
    "python", [Path(sys.executable).resolve(), *OTHERS.values()], ids=["this", *OTHERS.keys()]
)
def test_the_printed_line_makes_a_device_of_a_bare_machine(
    world: World, tmp_path: Path, python: Path
) -> None:
    line = world.shoal("token", "create", "--join")
    assert line.count("\n") == 1
    environment = bare(tmp_path, python)
    before = {device["id"] for device in world.devices()}
    started = time.monotonic()
    done = subprocess.run(
        ["sh", "-c", line], env=environment, capture_output=True, text=True, timeout=300, cwd=tmp_path
    )
    prefix = tmp_path / "prefix"
    agent = str(prefix / "agent/current/bin/shoal-agent")
    leave = [agent, "leave", "--purge", "--yes", "--prefix", str(prefix)]
    try:
        assert done.returncode == 0, done.stderr + done.stdout
        print(f"joined in {time.monotonic() - started:.1f} s")
        (device,) = [item for item in world.devices() if item["id"] not in before]
        assert device["status"] == "healthy" and "onnxruntime" in device["profile_class"]
        assert size_mb(prefix) <= MAX_INSTALL_MB
        inside = "import numpy, onnxruntime, PIL, shoal_agent.client; print(onnxruntime.__version__)"
        shown = subprocess.run(
            [str(prefix / "agent/current/bin/python"), "-c", inside],
            env=environment,
            capture_output=True,
            text=True,
        )
        assert shown.returncode == 0, shown.stderr
        again = subprocess.run(
            ["sh", "-c", line], env=environment, capture_output=True, text=True, timeout=120, cwd=tmp_path
        )
        assert again.returncode == 0 and "Fetching" not in again.stderr, again.stderr
        assert len(world.devices()) == len(before) + 1  # the same key is the same device
    finally:
        if Path(agent).exists():
            left = subprocess.run(leave, env=environment, capture_output=True, text=True, timeout=60)
            assert left.returncode == 0, left.stderr
    assert not prefix.exists() and not (tmp_path / "state").exists()


def size_mb(folder: Path) -> float:
    """What `du` counts."""
    return sum(path.lstat().st_blocks * 512 for path in folder.rglob("*")) / 1e6


def test_every_runtime_resolves_for_boards_or_names_what_fits(tmp_path: Path) -> None:
    """aarch64, as the issue asks: nothing is installed, everything resolves from wheels only."""
    from shoal_controller import wheels
    from shoal_protos.errors import Unsupported

    for python, glibc in (("3.10", "2.35"), ("3.11", "2.36"), ("3.13", "2.36")):
        made = wheels.add(
            tmp_path / "wheels",
            wheels.target("aarch64", python, glibc),
            extras=("onnxruntime", "openvino", "litert"),
        )
        assert {"onnxruntime", "openvino", "litert"} == set(made.extras)
        names = " ".join(file.name for file in made.files)
        assert "ai_edge_litert" in names and "openvino-" in names and "sympy" not in names
        if python == "3.10":
            assert "onnxruntime-1.23.2" in names
    with pytest.raises(Unsupported, match="install a 64-bit system"):
        wheels.add(tmp_path / "wheels", wheels.target("armv7l", "3.13"))
