"""A controller without doors, with simulated devices: they read their signed desired state and
report through intake, as agents do, on a clock that the test owns."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import tarfile
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from shoal_agent.profile import class_of
from shoal_agent.telemetry import sketches
from shoal_agent.telemetry.histograms import ExponentialHistogram
from shoal_controller import endpoints, registry, releases, sources
from shoal_controller.app import Controller
from shoal_controller.endpoints import EndpointSettings
from shoal_controller.gateway.connections import Connection
from shoal_controller.loop.monitor import MonitorSettings
from shoal_controller.loop.policy import PolicySettings
from shoal_controller.loop.runner import LoopRunner
from shoal_controller.rollouts.runner import RolloutRunner
from shoal_controller.settings import Settings
from shoal_controller.store.tables import Desired, Device, Endpoint, Model, Release, Version, Window
from shoal_controller.trials import TrialRunner
from shoal_protos.bundle import (
    BundleConfig,
    Reference,
    RuntimeNeed,
    Signature,
    TensorSpec,
    canonical_json,
    write_bundle,
)
from shoal_protos.v1 import agents_pb2, desired_pb2, profile_pb2

SIGNATURE = Signature(
    (TensorSpec("image", "UINT8", (-1, 8, 8, 1)),), (TensorSpec("digit", "FP32", (-1, 10)),), "image"
)
RUNTIMES = {"onnxruntime": "1.32.0", "openvino": "2026.4.1"}


def profile(
    *runtimes: str,
    isa: tuple[str, ...] = ("avx2",),
    architecture: str = "x86_64",
    emulated: bool = False,
) -> profile_pb2.Profile:
    return profile_pb2.Profile(
        architecture=architecture,
        emulated=emulated,
        isa_features=isa,
        cores=2,
        memory_bytes=8 << 30,
        runtimes=[profile_pb2.Runtime(name=r, version=RUNTIMES[r]) for r in runtimes],
    )


def images(count: int, seed: int, *, contrast: float = 1.0, noise: float = 0.0) -> np.ndarray[Any, Any]:
    """(count, 8, 8, 1) uint8 with a bright square somewhere."""
    rng = np.random.default_rng(seed)
    batch = rng.normal(60, 10, (count, 8, 8, 1))
    for i in range(count):
        x, y = rng.integers(0, 5, 2)
        batch[i, x : x + 3, y : y + 3] += 120
    batch = (batch - 90) * contrast + 90 + rng.normal(0, max(noise, 1e-9), batch.shape)
    return np.clip(batch, 0, 255).astype(np.uint8)


def reference() -> tuple[bytes, dict[str, dict[str, float]]]:
    """A reference sketch set and thresholds from held-out clean windows."""
    from shoal_agent.telemetry import distances

    whole = sketches.sketch("image", images(1000, 1))
    found = {"psi": 0.0, "ks": 0.0}
    for seed in range(30):
        values = distances.largest(whole, sketches.sketch("image", images(50, 100 + seed)))
        found = {name: max(found[name], values[name][0]) for name in found}
    return whole.SerializeToString(deterministic=True), {"50": found}


def make_bundle(
    layout: Path, name: str, runtime: str, *, drift: bool = False, isa: tuple[str, ...] = ()
) -> str:
    files: dict[str, bytes | Path] = {"model.bin": f"weights of {name}".encode()}
    ref = Reference()
    if drift:
        data, thresholds = reference()
        files["inputs.sketch"] = data
        ref = Reference("inputs.sketch", "", thresholds)
    need = RuntimeNeed(runtime, "model.bin", isa=isa)
    return write_bundle(layout, BundleConfig(SIGNATURE, need, name=name, reference=ref), files)


def signature_json() -> dict[str, Any]:
    """The signature as a job reports it and a version stores it."""
    found: dict[str, Any] = json.loads(canonical_json(dataclasses.asdict(SIGNATURE)))
    return found


def source_tar(
    text: str = "task = 1\n", name: str = "digits.py", members: dict[str, bytes] | None = None
) -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as archive:
        for key, content in {name: text.encode(), **(members or {})}.items():
            info = tarfile.TarInfo(key)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return data.getvalue()


@dataclass
class Behaviour:
    """How a simulated device takes a bundle. `fails` maps bundle (or "*") to the reason."""

    online: bool = True
    fails: dict[str, str] = field(default_factory=dict)
    silent_after: str = ""  # falls silent when it gets this bundle
    slow_steps: int = 0  # looks before it is done


class World:
    """Everything of a controller but its doors."""

    def __init__(self, path: Path, **settings: Any) -> None:
        self.now = 1_700_000_000_000
        self.path = path
        values = {"telemetry_seconds": 2, "heartbeat_seconds": 5} | settings
        # Durable commits are slow on a disk that others use too; nothing here tests the disk.
        memory = Path("/dev/shm")
        self.room = tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else path)
        home = Path(self.room.name) / "home"
        settings_ = Settings(home=home, fleet="test", **values)
        self.controller = Controller(settings_, clock=lambda: self.now)
        self.services = self.controller.open()
        self.store, self.blobs = self.services.store, self.services.blobs
        self.behaviours: dict[str, Behaviour] = {}
        self.serving: dict[tuple[str, str], str] = {}
        self.progress: dict[tuple[str, str], int] = {}
        self.names: dict[str, str] = {}
        self.start_runners()

    def start_runners(self) -> None:
        """New runners on the same store: what a restarted controller has."""
        self.rollouts = RolloutRunner(self.services)
        self.trials = TrialRunner(self.services)
        self.loop = LoopRunner(
            self.services, MonitorSettings(), PolicySettings(label_wait_s=4, cooldown_s=10, search_minutes=1)
        )

    def close(self) -> None:
        self.controller.close()
        self.room.cleanup()

    def clock(self) -> int:
        return self.now

    # ------------------------------------------------------------------ devices

    def add_device(
        self, name: str, *runtimes: str, labels: dict[str, str] | None = None, **kwargs: Any
    ) -> str:
        found = profile(*(runtimes or ("onnxruntime",)), **kwargs)
        with self.store.write() as session:
            session.add(
                Device(
                    id=f"d-{name}",
                    name=name,
                    profile_class=class_of(found),
                    profile=found.SerializeToString(),
                    labels=labels or {},
                    public_key_hash=name,
                    certificate_serial=name,
                    certificate_not_after_ms=0,
                    joined_ms=self.now,
                    reported=None,
                )
            )
        self.behaviours[f"d-{name}"] = Behaviour()
        self.names[f"d-{name}"] = name
        self.set_online(f"d-{name}", True)
        return f"d-{name}"

    def set_online(self, device: str, online: bool) -> None:
        self.behaviours[device].online = online
        connections = self.services.connections
        if online and not connections.is_connected(device):
            connections.add(Connection(device, device, self.now, lambda _: None, last_heard_ms=self.now))
        if not online:
            connections._by_device.pop(device, None)

    def class_of(self, device: str) -> str:
        with self.store.read() as session:
            row = session.get(Device, device)
            assert row is not None
            return row.profile_class

    def desired(self, device: str) -> desired_pb2.DesiredState:
        with self.store.read() as session:
            row = session.get(Desired, device)
            if row is None:
                return desired_pb2.DesiredState()
            return desired_pb2.DesiredState.FromString(desired_pb2.Signed.FromString(row.signed).payload)

    def agents(self) -> None:
        """Every connected device takes one look at its desired state and reports."""
        self.services.publish()
        for device, behaviour in self.behaviours.items():
            if behaviour.online:
                self._agent(device, behaviour)

    def _agent(self, device: str, behaviour: Behaviour) -> None:
        desired = self.desired(device)
        report = agents_pb2.Reported(epoch=desired.epoch, generation=desired.generation)
        wanted = {placement.endpoint: placement for placement in desired.placements}
        for key in [k for k in self.serving if k[0] == device and k[1] not in wanted]:
            del self.serving[key]
        for endpoint, placement in wanted.items():
            if placement.bundle == behaviour.silent_after:
                status = report.placements.add(
                    endpoint=endpoint, wanted=placement.bundle, attempt=placement.attempt
                )
                status.step = agents_pb2.STEP_SWITCH
                self._report(device, report)
                self.set_online(device, False)
                return
            self._take(device, behaviour, placement, report.placements.add())
        self._report(device, report)

    def _take(
        self,
        device: str,
        behaviour: Behaviour,
        placement: desired_pb2.Placement,
        status: agents_pb2.PlacementStatus,
    ) -> None:
        key = (device, placement.endpoint)
        status.endpoint, status.wanted, status.attempt = (
            placement.endpoint,
            placement.bundle,
            placement.attempt,
        )
        reason = behaviour.fails.get(placement.bundle) or behaviour.fails.get("*")
        if reason and self.serving.get(key) != placement.bundle:
            status.step, status.reason, status.logs = agents_pb2.STEP_ROLLED_BACK, reason, b"last words"
        elif self.serving.get(key) != placement.bundle and self._busy(key, placement.bundle, behaviour):
            status.step = agents_pb2.STEP_FETCH
        else:
            self.serving[key] = placement.bundle
            status.step = agents_pb2.STEP_COMMIT
            status.probe.ok, status.probe.latency_p95_ms = True, 1.5
        status.serving = self.serving.get(key, "")

    def _busy(self, key: tuple[str, str], bundle: str, behaviour: Behaviour) -> bool:
        looks = (key[0], bundle)
        self.progress[looks] = self.progress.get(looks, 0) + 1
        return self.progress[looks] <= behaviour.slow_steps

    def _report(self, device: str, report: agents_pb2.Reported) -> None:
        with self.store.write() as session:
            self.services.intake.reported(session, device, report)

    def traffic(
        self,
        device: str,
        endpoint: str = "digits",
        *,
        requests: int = 60,
        errors: int = 0,
        ms: float = 1.0,
        labelled: int = 0,
        correct: int = 0,
        inputs: np.ndarray[Any, Any] | None = None,
    ) -> None:
        """One window of what the device serves now, ending now."""
        bundle = self.serving.get((device, endpoint), "")
        if not bundle:
            return
        histogram = ExponentialHistogram()
        rng = np.random.default_rng(len(bundle) + requests + self.now % 1000)
        for value in rng.gamma(20, ms / 20, requests):
            histogram.record(float(value) * 1000)
        with self.store.write() as session:
            session.add(
                Window(
                    device=device,
                    endpoint=endpoint,
                    bundle=bundle,
                    start_ms=self.now - 1000,
                    end_ms=self.now,
                    requests=requests,
                    errors=errors,
                    labelled=labelled,
                    correct=correct,
                    latency=histogram.to_proto().SerializeToString(),
                    inputs=None if inputs is None else sketches.sketch("image", inputs).SerializeToString(),
                    outputs=None,
                    system=None,
                )
            )

    # ------------------------------------------------------------------ models

    def version(
        self, *, accuracy: float = 0.99, state: str = "ready", signature: Signature = SIGNATURE
    ) -> str:
        """The next version of the model `digits`, as an ingest leaves it."""
        with self.store.write() as session:
            path = self.path / f"push-{self.now}.tar"
            path.write_bytes(source_tar(f"task = {self.now}\n"))
            digest, size = self.blobs.store(path)
            version, job = registry.push_version(
                session,
                self.blobs,
                self.clock,
                model="digits",
                source=sources.inspect(path),
                digest=digest,
                size=size,
                actor="test",
            )
            version.state, job.state = state, "done"
            version.signature = json.loads(canonical_json(dataclasses.asdict(signature)))
            version.baseline = {
                "value": accuracy,
                "low": accuracy - 0.01,
                "high": min(1.0, accuracy + 0.01),
                "n": 400,
            }
            return version.id

    def variant(
        self,
        version: str,
        name: str,
        classes: dict[str, tuple[float | None, float | None]],
        *,
        runtime: str = "onnxruntime",
        size: int = 1000,
        drift: bool = False,
        isa: tuple[str, ...] = (),
    ) -> str:
        """A variant with class -> (accuracy, p95 in ms)."""
        layout = self.path / "layouts" / f"{name}-{version}"
        digest = make_bundle(layout, f"{name} {version}", runtime, drift=drift, isa=isa)
        event = {
            "bundle": digest,
            "name": name,
            "target": runtime,
            "precision": "fp32",
            "recipe": [],
            "size_bytes": size,
            "wire_bytes": size,
            "plain": name == "plain",
            "classes": {
                key: {
                    "accuracy": None
                    if a is None
                    else {"value": a, "low": a - 0.01, "high": a + 0.01, "n": 400},
                    "latency": None
                    if p is None
                    else {"p50_ms": p * 0.8, "p95_ms": p, "p95_low_ms": p, "p95_high_ms": p, "n": 100},
                    "source": "local",
                }
                for key, (a, p) in classes.items()
            },
        }
        with self.store.write() as session:
            self.blobs.put_bundle(session, layout, digest)
            row = session.get(Version, version)
            assert row is not None
            return registry.add_variant(session, row, self.clock, event, actor="test").id

    def release(self, version: str, fronts: dict[str, list[str]] | None = None) -> str:
        with self.store.write() as session:
            row = session.get(Version, version)
            assert row is not None
            return releases.create_release(session, row, self.clock, actor="test", fronts=fronts).id

    def endpoint(
        self, name: str = "digits", *, automatic: bool = True, settle_s: int = 2, **kwargs: Any
    ) -> str:
        with self.store.write() as session:
            row = endpoints.create(
                session,
                self.clock,
                name=name,
                model="digits",
                actor="test",
                settings=EndpointSettings(0.0, settle_s, automatic),
                **kwargs,
            )
            return row.id

    def row(self, table: Any, key: str) -> Any:
        with self.store.read() as session:
            found = session.get(table, key)
            assert found is not None
            return found

    def models(self) -> list[Model]:
        with self.store.read() as session:
            return list(session.query(Model))

    def releases(self) -> list[Release]:
        with self.store.read() as session:
            return list(session.query(Release))

    def current(self, endpoint: str) -> str:
        row: Endpoint = self.row(Endpoint, endpoint)
        return row.assignment

    # ------------------------------------------------------------------ time

    def look(self, seconds: float = 1.0) -> None:
        """Time passes, devices look and report, every runner takes a look."""
        self.now += int(seconds * 1000)
        for connection in self.services.connections._by_device.values():
            connection.last_heard_ms = self.now
        self.agents()
        self.rollouts.tick()
        self.trials.tick()
        self.loop.tick()
