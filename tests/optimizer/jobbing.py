"""Running jobs in tests as a worker does: a directory, a child process, lines on a pipe."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from shoal_agent import bench
from shoal_agent.runtimes.base import machine_isa
from shoal_optimizer import jobspec
from shoal_optimizer.local_meter import add_blob, link_store
from shoal_optimizer.meter import BundleRef
from shoal_protos.v1 import desired_pb2

Event = dict[str, Any]


def local_class(*runtimes: str, local: bool = True, emulated: bool = False) -> dict[str, Any]:
    """This machine's class with some of its runtimes, as `job.json` has it."""
    names = runtimes or ("onnxruntime", "openvino")
    return {
        "name": "+".join(["x86_64.test.2c", *names]),
        "isa": sorted(machine_isa()),
        "runtimes": dict.fromkeys(names, "1.0"),
        "local": local,
        "emulated": emulated,
    }


def start(folder: Path, spec: Mapping[str, Any], **environment: str) -> subprocess.Popen[str]:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "job.json").write_text(json.dumps(spec))
    with (folder / "log.txt").open("a") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "shoal_optimizer.jobs", str(folder)],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        )


def run(folder: Path, spec: Mapping[str, Any], **environment: str) -> tuple[int, list[Event]]:
    """Runs a job to its end: exit code and every line, each of which must be an event."""
    child = start(folder, spec, **environment)
    assert child.stdout is not None
    with child.stdout as stream:
        events = [jobspec.parse_event(line) for line in stream]
    return child.wait(), events


def of(events: Iterable[Event], name: str) -> list[Event]:
    return [event for event in events if event["event"] == name]


def only(events: Iterable[Event], name: str) -> Event:
    (found,) = of(events, name)
    return found


def answer(
    events: Iterable[Event], layouts: dict[str, str], folder: Path, *, emulated: bool = False
) -> dict[str, str]:
    """Answers every trial asked for, as an agent would; outputs land where the worker lays them."""
    events = list(events)
    layouts.update({event["bundle"]: event["layout"] for event in of(events, "variant")})
    results = {}
    for event in of(events, "trial"):
        store, out = folder / "store", folder / "outputs"
        link_store(
            store, [BundleRef(b, Path(layouts[b])) for b in {event["bundle"], event["incumbent"]} if b]
        )
        outputs = event["kind"] == "outputs"
        trial = desired_pb2.Trial(
            id=event["id"],
            bundle=event["bundle"],
            incumbent=event["incumbent"],
            kind=desired_pb2.TRIAL_KIND_OUTPUTS if outputs else desired_pb2.TRIAL_KIND_TIMING,
            dataset=add_blob(store, Path(event["dataset"])) if outputs else "",
        )
        budget = bench.Budget(seconds=0.1, warm_up_seconds=0.05)
        result = bench.execute(trial, store, out, budget, emulated=emulated)
        assert result.ok, result.error
        if outputs:
            kept = folder / "in" / "outputs" / f"{result.outputs_blob[7:]}.npz"
            kept.parent.mkdir(parents=True, exist_ok=True)
            (out / "outputs.npz").replace(kept)
        results[event["id"]] = base64.b64encode(result.SerializeToString()).decode()
    return results
