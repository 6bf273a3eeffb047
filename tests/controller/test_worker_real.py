"""The worker with the real optimizer: the digits are taken in, converted and released."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest
from sqlalchemy import select

from shoal_agent import profile
from shoal_controller import registry, sources
from shoal_controller.store.tables import Device, Optimization, Release, Variant, Version
from shoal_controller.worker import Worker
from tests.controller.world import World

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.slow
def test_digits_are_taken_in_by_the_real_optimizer(tmp_path: Path) -> None:
    world = World(tmp_path)
    found = profile.measure(["onnxruntime", "openvino"])
    with world.store.write() as session:
        session.add(
            Device(
                id="d-1",
                name="cam",
                profile_class=profile.class_of(found),
                profile=found.SerializeToString(),
                labels={},
                public_key_hash="1",
                certificate_serial="1",
                certificate_not_after_ms=0,
                joined_ms=world.now,
                reported=None,
            )
        )
    path = tmp_path / "push.tar"
    with tarfile.open(path, "w") as archive:
        archive.add(EXAMPLES / "digits.py", "digits.py")  # the weights are trained by the job
    digest, size = world.blobs.store(path)
    with world.store.write() as session:
        version, job = registry.push_version(
            session,
            world.blobs,
            world.clock,
            model="digits",
            source=sources.inspect(path),
            digest=digest,
            size=size,
            actor="t",
        )
        keys = version.id, job.id
    worker = Worker(world.store, world.blobs, world.services.settings.jobs_dir, clock=world.clock, threads=1)
    assert worker.work_once()
    row = world.row(Optimization, keys[1])
    assert row.state == "done", row.error
    assert world.row(Version, keys[0]).baseline["value"] > 0.9
    with world.store.read() as session:
        # A second one where unhurried figures order the front otherwise than the first glance.
        releases = list(session.scalars(select(Release).order_by(Release.number)))
        variants = {v.id: v for v in session.scalars(select(Variant))}
    assert {release.note for release in releases} == {"plain"}
    for front in releases[-1].fronts.values():
        for key in front:
            bundle = world.blobs.bundle(variants[key].bundle)
            assert bundle.config.reference.thresholds and bundle.config.golden is not None
    world.close()
