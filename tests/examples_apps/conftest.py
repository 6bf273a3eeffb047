"""One real agent server for each kind of model, as `shoal-agent serve BUNDLE`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.agent import bundles
from tests.agent.detectors import detector_bundle

APPS = Path(__file__).resolve().parents[2] / "examples" / "apps"


def _serve(folder: Path) -> Iterator[str]:
    command = [sys.executable, "-m", "shoal_agent", "serve", str(folder)]
    command += ["--http-port", "0", "--grpc-port", "0", "--metrics-port", "0"]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        assert process.stdout is not None
        ports = next(json.loads(line) for line in process.stdout if line.startswith("{"))
        yield f"127.0.0.1:{ports['http']}"
    finally:
        process.terminate()
        process.communicate(timeout=20)


@pytest.fixture(scope="module")
def shapes_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("shapes")
    detector_bundle(folder)
    yield from _serve(folder)


@pytest.fixture(scope="module")
def digits_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("digits")
    bundles.onnx_bundle(folder)
    yield from _serve(folder)
