"""Pushed sources, versions, variants, releases: what is refused, and what never changes."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import select

from shoal_controller import registry, releases, sources
from shoal_controller.store.tables import Measurement, Model, Optimization, Release, Variant, Version
from shoal_protos.errors import Conflict, InvalidInput, NotFound
from tests.controller.world import World, source_tar


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path)
    yield made
    made.close()


def tar(path: Path, *members: tuple[str, bytes | None, int]) -> Path:
    """A tar of (name, content, type)."""
    with tarfile.open(path, "w") as archive:
        for name, content, kind in members:
            info = tarfile.TarInfo(name)
            info.type = bytes([kind])
            info.size = len(content or b"")
            info.linkname = "/etc/passwd"
            archive.addfile(info, io.BytesIO(content or b""))
    return path


FILE, LINK, FIFO, FOLDER = (
    t[0] for t in (tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE)
)


def test_a_push_unpacks_to_what_it_holds(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(source_tar("x = 1\n", members={"data/signs.npz": b"123", "helpers.py": b""}))
    found = sources.unpack(path, tmp_path / "out")
    assert found.task == "digits.py" and found.size == 9
    assert (tmp_path / "out" / "data" / "signs.npz").read_bytes() == b"123"
    assert sources.unpack(path, tmp_path / "out") == found  # again, over what is there


@pytest.mark.parametrize(
    ("members", "said"),
    [
        ([("/etc/cron", b"x", FILE)], "unsafe path"),
        ([("../up.py", b"x", FILE)], "unsafe path"),
        ([("a/../../b.py", b"x", FILE)], "unsafe path"),
        ([("..\\b.py", b"x", FILE)], "unsafe path"),
        ([("link.py", None, LINK)], "no plain file"),
        ([("pipe", None, FIFO)], "no plain file"),
        ([("a.py", b"x", FILE), ("a.py", b"y", FILE)], "twice"),
        ([("../folder", None, FOLDER), ("a.py", b"x", FILE)], "unsafe path"),
        ([("readme.md", b"x", FILE)], "no task"),
        ([("deep/a.py", b"x", FILE)], "no task"),
        ([], "no task"),
    ],
)
def test_hostile_pushes_are_refused(
    tmp_path: Path, members: list[tuple[str, bytes | None, int]], said: str
) -> None:
    path = tar(tmp_path / "a.tar", *members)
    with pytest.raises(InvalidInput, match=said):
        sources.unpack(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_too_large_pushes_are_refused(tmp_path: Path) -> None:
    path = tar(tmp_path / "a.tar", *[(f"{i}.py", b"x" * 10, FILE) for i in range(5)])
    with pytest.raises(InvalidInput, match="too large"):
        sources.inspect(path, max_files=4)
    with pytest.raises(InvalidInput, match="too large"):
        sources.inspect(path, max_bytes=49)


@given(st.binary(max_size=2000))
def test_bytes_that_are_no_tar(data: bytes) -> None:
    import tempfile

    with tempfile.NamedTemporaryFile() as file:
        file.write(data)
        file.flush()
        with pytest.raises(InvalidInput):
            sources.inspect(Path(file.name))


def test_versions_count_up_and_queue_their_ingest(world: World) -> None:
    first, second = world.version(), world.version()
    rows = [world.row(Version, v) for v in (first, second)]
    assert [r.number for r in rows] == [1, 2] and len(world.models()) == 1
    with world.store.read() as session:
        jobs = session.scalars(select(Optimization).where(Optimization.kind == "ingest")).all()
        model = session.scalars(select(Model)).one()
        assert [j.version for j in jobs] == [first, second]
        assert registry.version_by_number(session, model, None).id == second
        with pytest.raises(NotFound, match="no version 9"):
            registry.version_by_number(session, model, 9)
    path = world.path / "x.tar"
    path.write_bytes(source_tar())
    for name in ("Digits", "", "a b", "../x", "x" * 64):
        with pytest.raises(InvalidInput, match="not a model's name"), world.store.write() as session:
            registry.push_version(
                session,
                world.blobs,
                world.clock,
                model=name,
                source=sources.inspect(path),
                digest="sha256:" + "0" * 64,
                size=1,
                actor="t",
            )


def test_the_newest_measurement_of_a_kind_counts(world: World) -> None:
    device = world.add_device("cam")
    name = world.class_of(device)
    version = world.version()
    key = world.variant(version, "plain", {name: (0.98, 2.0)})
    with world.store.write() as session:
        row = session.get(Variant, key)
        assert row is not None
        for p95 in (1.5, 1.4, 1.4):  # the same again adds nothing
            world.now += 1
            registry.add_measurement(
                session,
                row,
                name,
                "latency",
                {"p95_ms": p95, "n": 50},
                world.clock,
                source="trial",
                device=device,
            )
        registry.add_measurement(
            session, row, name, "accuracy", {"value": None}, world.clock, source="unmeasured"
        )
    with world.store.read() as session:
        found = registry.newest_measurements(session, [key])[key, name]
        assert found["latency"].figures["p95_ms"] == 1.4 and found["latency"].device == device
        assert found["accuracy"].figures["value"] == 0.98
        assert len(session.scalars(select(Measurement).where(Measurement.kind == "latency")).all()) == 3


def test_releases_order_fronts_and_never_change(world: World) -> None:
    name = world.class_of(world.add_device("cam"))
    version = world.version()
    slow = world.variant(version, "plain", {name: (0.99, 4.0)}, size=9000)
    quick = world.variant(version, "pruned", {name: (0.95, 1.0)}, size=2000)
    worse = world.variant(version, "worse", {name: (0.90, 9.0)}, size=9900)
    with world.store.write() as session:
        row = session.get(Version, version)
        assert row is not None
        made = releases.create_release(
            session, row, world.clock, actor="t", objective="accuracy>=0.97; minimise latency_p95"
        )
        first = made.id
        assert made.fronts == {name: [slow, quick]}  # the feasible one first, the dominated one not at all
        by_size = releases.create_release(session, row, world.clock, actor="t", objective="minimise size")
        assert by_size.fronts == {name: [quick, slow]}
        assert (made.number, by_size.number) == (1, 2)
    assert worse not in world.row(Release, first).fronts[name]
    other = world.version()
    with world.store.write() as session:
        row = session.get(Version, other)
        assert row is not None
        with pytest.raises(InvalidInput, match="no variant of version 2"):
            releases.create_release(session, row, world.clock, actor="t", fronts={name: [slow]})
        with pytest.raises(Conflict, match="no variants"):
            releases.create_release(session, row, world.clock, actor="t")


def test_an_emulated_classes_figures_say_what_they_are(world: World) -> None:
    version = world.version()
    key = world.variant(version, "plain", {"x": (0.99, 1.0)})
    with world.store.write() as session:
        row = session.get_one(Variant, key)
        nothing = {"accuracy": None, "latency": None, "source": "unmeasured (emulated)"}
        registry.add_figures(session, row, "pi", nothing, world.clock, source="unmeasured (emulated)")
        before = registry.newest_measurements(session, [key])[key, "pi"]
        world.now += 1
        answered = {**nothing, "accuracy": {"value": 0.97}, "sources": {"accuracy": "emulated"}}
        registry.add_figures(session, row, "pi", answered, world.clock, source="unmeasured (emulated)")
        after = registry.newest_measurements(session, [key])[key, "pi"]
    assert before["accuracy"].figures == {"value": None} and before["accuracy"].source == "unmeasured"
    assert after["accuracy"].figures == {"value": 0.97} and after["accuracy"].source == "emulated"
    for found in (before, after):
        assert found["latency"].source == "unmeasured (emulated)"
        assert found["latency"].figures == {"value": None}
    with world.store.read() as session:
        (point,) = registry.points(session, version, "pi")
        assert point.metrics["latency_p95"] is None and point.metrics["accuracy"] == 0.97
        assert "pi" in releases.best_fronts(
            session, session.get_one(Version, version), "minimise latency_p95"
        )


def test_what_nobody_has_judged_keeps_no_plain_variant_out(world: World) -> None:
    version = world.version()
    plain = world.variant(version, "plain", {"pi": (None, None)})
    small = world.variant(version, "plain-int8", {"pi": (None, None)}, size=100)
    with world.store.write() as session:
        row = session.get_one(Version, version)
        assert releases.best_fronts(session, row, "minimise size") == {"pi": [plain, small]}
        variant = session.get_one(Variant, small)
        registry.add_measurement(
            session, variant, "pi", "accuracy", {"value": 1.0}, world.clock, source="trial"
        )
        assert releases.best_fronts(session, row, "minimise size")["pi"][0] == small
