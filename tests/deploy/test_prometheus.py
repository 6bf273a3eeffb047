"""The Prometheus configuration that we ship is one that Prometheus accepts."""

from __future__ import annotations

import subprocess
from pathlib import Path

CONFIG = Path(__file__).parents[2] / "deploy" / "prometheus" / "prometheus.yml"


def test_promtool_accepts_the_configuration() -> None:
    done = subprocess.run(["promtool", "check", "config", CONFIG], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "SUCCESS" in done.stdout
