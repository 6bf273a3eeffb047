"""A real controller's store with a life behind it: simulated devices went through a release, traffic, a
second release in waves, and a drift. Built on the controller tests' world; the pages are the product's."""

from __future__ import annotations

from pathlib import Path

from fastapi import FastAPI

from shoal_controller.api.app import create_api
from shoal_controller.rollouts import service
from shoal_controller.store.repositories import record
from tests.controller.world import World, images


def lived(path: Path, now_ms: int = 0) -> World:
    """Three devices of three classes serving `digits`, the second rollout under way, inputs drifting."""
    world = World(path)
    if now_ms:
        world.now = now_ms - 240_000
    names = {"kiln": ("onnxruntime",), "loom": ("openvino",), "mill": ("onnxruntime", "openvino")}
    devices = [world.add_device(name, *runtimes) for name, runtimes in names.items()]
    with world.store.write() as session:
        for device in devices:
            record(session, actor=f"device:{device}", verb="joined", kind="device", object=device)
    classes = [world.class_of(device) for device in devices]
    _variants(world, world.version(accuracy=0.978), classes, drift=True)
    world.endpoint(objective="accuracy>=0.96, latency_p95<=5ms; minimise latency_p95")
    for _ in range(40):
        world.look(2)
        for device in devices:
            world.traffic(device, ms=1.2, labelled=6, correct=6, inputs=images(60, world.now % 997))
    _variants(world, world.version(accuracy=0.981), classes, faster=0.8)
    with world.store.write() as session:
        request = service.Request("digits", "person:local", waves=["1", "100%"], reason="faster variants")
        service.create(session, world.blobs, world.clock, request, presence=world.services.connections)
    for _ in range(8):
        world.look(2)
        for device in devices:
            noisy = images(60, world.now % 991, contrast=0.3, noise=40)
            world.traffic(device, ms=1.0, labelled=6, correct=4, inputs=noisy)
    return world


def _variants(
    world: World, version: str, classes: list[str], *, faster: float = 1.0, drift: bool = False
) -> None:
    table = [("plain", 0.978, 2.4, 1_240_000), ("pruned30-int8", 0.976, 1.3, 214_000),
             ("pruned50-int8", 0.974, 0.9, 131_000), ("pruned70-int8", 0.962, 0.6, 72_000)]  # fmt: skip
    fronts: dict[str, list[str]] = {name: [] for name in classes}
    for name, accuracy, p95, size in table:
        for runtime in ("onnxruntime", "openvino"):
            fitting = [c for c in classes if runtime in c]
            figures: dict[str, tuple[float | None, float | None]] = dict.fromkeys(
                fitting, (accuracy, p95 * faster)
            )
            variant = world.variant(
                version, f"{name}-{runtime}", figures, runtime=runtime, size=size, drift=drift
            )
            for c in fitting:
                fronts[c].append(variant)
    world.release(version, {c: front[::-1][1:] for c, front in fronts.items()})


def application(world: World) -> FastAPI:
    return create_api(world.controller)
