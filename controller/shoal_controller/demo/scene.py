"""What the story's chapters stand on: the cast, the client, and how they look at the fleet."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shoal_controller.api import schemas
from shoal_controller.client import Client
from shoal_controller.demo import cast, evidence, timing, traffic, worsening
from shoal_controller.demo.applications import Applications
from shoal_controller.demo.narrator import Narrator
from shoal_controller.demo.relay import Relay
from shoal_controller.demo.stage import BrokenPromise, Stage

ENDED = ("done", "failed", "cancelled")
IDLE_S = 2.0 * cast.HEARTBEAT_S  # always two heartbeats
DEADLINES: Mapping[str, float] = {
    "train": 120.0,
    "push": 90.0,
    "plain": 90.0,
    "optimize": 180.0,
    "rollout": 150.0,
    "finding": 60.0,
    "adapt": 180.0,
}


@dataclass(frozen=True)
class Plan:
    """What was asked for on the command line."""

    task: Path
    root: Path
    json: Path | None = None
    keep: bool = False
    minutes: float = 1.0  # of the search


@dataclass
class Scene:
    """The fleet as the story sees it. `figures` fills as it goes."""

    plan: Plan
    stage: Stage
    narrator: Narrator
    figures: dict[str, dict[str, Any]] = field(default_factory=dict)
    agents: list[cast.Agent] = field(default_factory=list)
    relay: Relay | None = None
    applications: Applications | None = None

    client: Client = field(init=False)
    task: Any = field(init=False)
    name: str = field(init=False)
    field_data: Any = field(init=False)  # held-out items that are sent as traffic
    test: Any = field(init=False)  # held-out items that accuracy is measured on
    tensor: Any = field(init=False)  # the signature's input
    output: str = field(init=False)

    def placements(self) -> list[tuple[schemas.Device, schemas.PlacementView]]:
        """Each agent's device with its placement of the endpoint."""
        found: list[tuple[schemas.Device, schemas.PlacementView]] = []
        for agent in self.agents:
            device = self.client.device(agent.device)
            found += [
                (device, placement) for placement in device.placements if placement.endpoint == self.name
            ]
        return found

    def all_serve(self) -> bool | None:
        version = self.client.version(self.name, 1)
        if version.state == "failed":
            raise BrokenPromise("the push is imported", version.error)
        serving = [p for _, p in self.placements() if p.serving]
        return True if len(serving) == len(self.agents) else None

    def where(self) -> str:
        return "; ".join(f"{d.name}: {p.step} {p.reason} {p.detail}".strip() for d, p in self.placements())

    def follow(self, optimization: str, promise: str, deadline_s: float) -> schemas.Optimization:
        """Waits for an optimization, telling its steps as they come."""
        told: list[str] = []

        def look() -> schemas.Optimization | None:
            found = self.client.optimization(optimization)
            step = str((found.progress or {}).get("step") or "")
            if step and (not told or told[-1] != step):
                told.append(step)
            return found if found.state in ENDED else None

        ended = self.stage.wait(promise, look, deadline_s, 0.5)
        self.narrator.note(f"steps      {' > '.join(told)}", "dim")
        if ended.state != "done":
            raise BrokenPromise(promise, f"{ended.id} {ended.state}: {ended.error}")
        return ended

    def show_front(self, ended: schemas.Optimization) -> None:
        """The chosen variant of each class beside the alternatives, fp32 included."""
        for profile_class, choice in sorted(ended.result.get("choice", {}).items()):
            self.narrator.note(profile_class, "bold")
            for variant in self.client.variants(self.name, ended.version, profile_class):
                chosen = variant.bundle == choice.get("bundle")
                for found in variant.classes:
                    known = found.latency_p95_ms is not None and found.profile_class == profile_class
                    if known and (chosen or found.on_front or variant.precision == "fp32"):
                        self.narrator.note(f"  {'→' if chosen else ' '} {describe(variant, found)}")
            self.narrator.note(f"  {choice.get('sentence', '')}", "dim")

    def start_rollout(self, promise: str, release: str, waves: str) -> str:
        """`shoal rollout create`; returns its id."""
        return self.stage.shoal(
            promise, "rollout", "create", self.name, "--release", release, "--waves", waves, "--yes"
        ).strip()

    def watch_rollout(self, rollout: str, promise: str) -> None:
        """`shoal rollout get -w`: a line a change."""
        said = self.stage.shoal(
            promise, "rollout", "get", rollout, "-w", timeout_s=DEADLINES["rollout"]
        ).strip()
        self.narrator.note(f"{self.client.url}/rollouts/{rollout}")
        for line in said.splitlines()[-4:]:
            self.narrator.note(line)

    def ask_all(self, inputs: Any, prefix: str) -> evidence.Rights:
        answers = traffic.send_to_all(
            [agent.address for agent in self.agents], self.name, self.tensor, self.output, inputs, prefix
        )
        return evidence.rights([found.outputs for found in answers], self.test.targets)

    def local_fall(self, low: float, high: float) -> Callable[[worsening.Severity], float]:
        """How many points a severity costs the deployed variant on the field items, found out here."""
        _, placement = self.placements()[0]
        store = self.agents[0].directory / "store"
        instance = timing.load(store, placement.serving)

        def right(inputs: Any) -> float:
            outputs = instance.run({self.tensor.name: inputs})[self.output]
            return float((outputs.argmax(axis=-1) == self.field_data.targets).mean())

        clean = right(self.field_data.inputs)
        return lambda severity: (
            100 * (clean - right(worsening.worsen(self.field_data.inputs, severity, low, high)))
        )

    def drift(self) -> schemas.Finding | None:
        """The first drift finding: the loop acts on it, the other classes' join in."""
        found = [finding for finding in self.client.findings() if finding.kind == "input_drift"]
        return min(found, key=lambda finding: finding.id, default=None)

    def acting(self, finding: str) -> schemas.Finding | None:
        found = self.client.finding(finding)
        return found if found.action.get("optimization") else None

    def rollout_of(self, finding: str) -> str | None:
        return str(self.client.finding(finding).action.get("rollout") or "") or None


def describe(variant: schemas.Variant, found: schemas.VariantFigures) -> str:
    accuracy = (
        f"{100 * found.accuracy.value:.1f} %" if found.accuracy and found.accuracy.value else "unmeasured"
    )
    latency = found.latency_p95_ms
    speed = f"p95 {latency.value:.3f} ms" if latency and latency.value else "latency unmeasured"
    return f"{variant.name:<34} {accuracy:>8}  {speed}  {variant.wire_bytes / 1000:6.1f} kB"
