"""The benchmarks import what lies beside them."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"

if str(BENCHMARKS) not in sys.path:
    sys.path.insert(0, str(BENCHMARKS))


@pytest.fixture
def data_pack() -> Path:
    """The folder of the data pack; tests that need it are skipped where there is none."""
    named = os.environ.get("SHOAL_DATA", "")
    if not named or not (Path(named) / "models").is_dir():
        pytest.skip("SHOAL_DATA names no folder with the data pack")
    return Path(named)
