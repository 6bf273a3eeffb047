"""The demo's figures in the form that every benchmark writes (one figure: value, unit, interval, n)."""

from __future__ import annotations

import importlib.metadata
import math
import os
import platform
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shoal_agent.telemetry.intervals import Z95

PACKAGES = ("shoal", "torch", "onnxruntime", "openvino", "numpy", "tritonclient", "grpcio")


def figure(
    value: float, unit: str, interval: tuple[float, float] | None = None, n: int | None = None
) -> dict[str, Any]:
    """One figure; the 95 % interval and n are left out where there are none."""
    found: dict[str, Any] = {"value": value, "unit": unit}
    if interval is not None:
        found["low"], found["high"] = interval
    if n is not None:
        found["n"] = n
    return found


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of a median by order statistics (binomial, normal approximation)."""
    ordered = sorted(values)
    n = len(ordered)
    reach = Z95 * math.sqrt(n) / 2
    low = max(0, math.floor(n / 2 - reach))
    high = min(n - 1, math.ceil(n / 2 + reach))
    return ordered[low], ordered[high]


def document(figures: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {"benchmark": "demo", "figures": figures, "context": context()}


def context() -> dict[str, Any]:
    """The machine and the versions that the figures were taken with."""
    from shoal_agent.profile import measure

    profile = measure(None)
    versions = {"python": platform.python_version()}
    versions |= {package: found for package in PACKAGES if (found := version_of(package))}
    return {
        "cpu": profile.cpu_model,
        "isa": list(profile.isa_features),
        "cores": profile.cores,
        "load": list(os.getloadavg()),
        "versions": versions,
        "commit": commit(),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def version_of(package: str) -> str:
    """The installed version, "" if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def commit() -> str:
    """The checkout's commit, "" outside one."""
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=5,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()
