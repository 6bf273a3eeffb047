"""The units as systemd itself judges them, offline."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from shoal_agent import service

pytestmark = pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="no systemd-analyze")

ROOT = Path(__file__).parents[2]
STATE = Path("/var/lib/shoal-agent")
EXPOSURE = 3.0  # of 10, where 0 is closed


def analyze(*arguments: str, runtime: Path) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, "XDG_RUNTIME_DIR": str(runtime), "SYSTEMD_COLORS": "0"}
    return subprocess.run(
        ["systemd-analyze", *arguments], capture_output=True, text=True, env=environ, check=False
    )


def words(state: Path, python: str = sys.executable) -> list[str]:
    return [python, "-m", "shoal_agent", "run", "--state-dir", str(state)]


@pytest.mark.parametrize("kind", ["system", "user"])
@pytest.mark.parametrize("state", [STATE, Path('/home/ann/a 50% $HOME "x\\y"/agent'), Path("/srv/agent")])
def test_units_are_valid(kind: str, state: Path, tmp_path: Path) -> None:
    unit = tmp_path / "shoal-agent.service"
    unit.write_text(service.render(kind, words(state), state, "/opt/shoal-agent"))
    found = analyze(
        *(["--user"] if kind == "user" else []), "verify", "--man=no", str(unit), runtime=tmp_path
    )
    assert found.returncode == 0, found.stderr
    assert "@" not in unit.read_text().replace("@system-service", "")
    # What systemd says of our own unit; other units of this machine may be wanting.
    assert not [line for line in found.stderr.splitlines() if "shoal-agent" in line], found.stderr


def test_the_system_unit_is_closed(tmp_path: Path) -> None:
    unit = tmp_path / "shoal-agent.service"
    unit.write_text(service.render("system", words(STATE), STATE, "/opt/shoal-agent"))
    found = analyze(
        "security", "--offline=true", f"--threshold={EXPOSURE * 10:.0f}", str(unit), runtime=tmp_path
    )
    level = re.search(r"exposure level for shoal-agent.service: ([\d.]+)", found.stdout)
    assert found.returncode == 0 and level and float(level.group(1)) <= EXPOSURE, found.stdout + found.stderr


def test_where_files_lie_decides_what_is_open() -> None:
    own = service.render("system", words(STATE), STATE)
    assert "StateDirectory=shoal-agent\n" in own and "ProtectHome=yes" in own and "PrivateTmp=yes" in own
    home = service.render("system", words(Path("/home/ann/agent")), Path("/home/ann/agent"))
    assert "ReadWritePaths=/home/ann/agent\n" in home and "ProtectHome=read-only" in home
    installed = service.render("system", words(STATE), STATE, "/home/ann/.local/lib/shoal-agent")
    assert "ProtectHome=read-only" in installed
    assert "PrivateTmp=no" in service.render("system", words(Path("/tmp/x")), Path("/tmp/x"))


def test_the_packagers_unit_is_the_same() -> None:
    """deploy/systemd holds the rendering for an installation under /opt. To renew it:
    `shoal_agent.service.render` as below."""
    python = "/opt/shoal-agent/agent/current/bin/python"
    expected = service.render("system", words(STATE, python), STATE, "/opt/shoal-agent")
    assert (ROOT / "deploy/systemd/shoal-agent.service").read_text() == expected
