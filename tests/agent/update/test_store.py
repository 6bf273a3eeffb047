from __future__ import annotations

import asyncio
import errno
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal_agent.update.store import Bandwidth, BundleStore, DiskFull
from shoal_protos.bundle import digest_of, open_bundle
from shoal_protos.errors import InvalidInput, NotFound, TamperedData, Unavailable
from tests.agent.fakes import FakeClock, FullFs, MemorySource, make_bundle

BIG = bytes(range(256)) * 100  # 25 chunks


@pytest.fixture
def layout(tmp_path: Path) -> Path:
    return tmp_path / "made"


@pytest.fixture
def fs() -> FullFs:
    return FullFs()


@pytest.fixture
def store(tmp_path: Path, fs: FullFs) -> BundleStore:
    return BundleStore(tmp_path / "store", fs=fs)


def source_of(layout: Path) -> MemorySource:
    source = MemorySource()
    source.add(layout)
    return source


async def test_fetches_a_bundle_that_other_tools_can_read(store: BundleStore, layout: Path) -> None:
    digest = make_bundle(layout, BIG)
    seen: list[tuple[int, int]] = []
    bundle = await store.fetch(digest, source_of(layout), progress=lambda *figures: seen.append(figures))
    assert bundle.file("model.bin").read_bytes() == BIG
    assert open_bundle(store.root).digest == digest  # by index.json, as an OCI layout
    assert store.verify(digest).digest == digest
    assert seen == sorted(seen) and seen[-1][0] == seen[-1][1] == bundle.manifest.size
    assert not list((store.root / "partial").iterdir())


async def test_resumes_at_the_byte(store: BundleStore, layout: Path) -> None:
    digest = make_bundle(layout, BIG)
    source = source_of(layout)
    source.cut_after = 8  # manifest, config, then six chunks of the model
    with pytest.raises(Unavailable):
        await store.fetch(digest, source)
    again = BundleStore(store.root, fs=FullFs())  # restarted meanwhile
    await again.fetch(digest, source)
    assert sum(offset for _, offset in source.fetches) > 0
    assert again.verify(digest)


async def test_shares_what_is_on_disk(store: BundleStore, layout: Path, tmp_path: Path) -> None:
    first = make_bundle(layout, BIG, "one")
    second = make_bundle(tmp_path / "two", BIG, "two")
    source = source_of(layout)
    source.add(tmp_path / "two")
    await store.fetch(first, source)
    source.fetches.clear()
    await store.fetch(second, source)
    assert digest_of(BIG) not in [name for name, _ in source.fetches]
    await store.fetch(second, source)
    assert store.bundles() == sorted([first, second])


@pytest.mark.parametrize("damage", ["flip", "cut", "long"])
async def test_tampered_blobs_are_refused(store: BundleStore, layout: Path, damage: str) -> None:
    digest = make_bundle(layout, BIG)
    source = source_of(layout)
    name = digest_of(BIG)
    data = bytearray(BIG)
    data[5] ^= 1
    source.blobs[name] = {"flip": bytes(data), "cut": BIG[:-1], "long": BIG + b"x"}[damage]
    with pytest.raises(TamperedData):
        await store.fetch(digest, source)
    assert not store.has(name) and not store.has_bundle(digest)
    source.blobs[name] = BIG
    assert await store.fetch(digest, source)


async def test_a_damaged_partial_costs_one_more_download(store: BundleStore, layout: Path) -> None:
    digest = make_bundle(layout, BIG)
    partial = store.root / "partial" / digest_of(BIG).removeprefix("sha256:")
    partial.write_bytes(b"\0" * 5000)
    assert await store.fetch(digest, source_of(layout))


async def test_not_a_bundle(store: BundleStore) -> None:
    data = b'{"hello": 1}'
    with pytest.raises(InvalidInput):
        await store.fetch(digest_of(data), MemorySource({digest_of(data): data}))
    with pytest.raises(NotFound):
        await store.fetch(digest_of(b"none"), MemorySource())


async def test_disk_full_before_the_download(store: BundleStore, fs: FullFs, layout: Path) -> None:
    digest = make_bundle(layout, BIG)
    fs.free = 1000
    calls: list[int] = []

    def make_room() -> int:
        calls.append(1)
        return 0

    with pytest.raises(DiskFull, match=r"needs \d+ bytes more"):
        await store.fetch(digest, source_of(layout), make_room=make_room)
    assert calls


async def test_disk_full_in_mid_download_leaves_nothing_behind(
    store: BundleStore, fs: FullFs, layout: Path
) -> None:
    digest = make_bundle(layout, BIG)
    source = source_of(layout)

    def break_it(have: int, total: int) -> None:
        if have > 10_000:
            fs.broken = OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(DiskFull):
        await store.fetch(digest, source, progress=break_it)
    assert not list((store.root / "partial").iterdir())
    fs.broken = None
    assert await store.fetch(digest, source)


async def test_verify_finds_and_removes_damage(store: BundleStore, layout: Path) -> None:
    digest = make_bundle(layout, BIG)
    source = source_of(layout)
    await store.fetch(digest, source)
    path = store.path(digest_of(BIG))
    path.write_bytes(BIG[:-1] + b"!")
    with pytest.raises(TamperedData):
        store.verify(digest)
    await store.fetch(digest, source)
    assert store.verify(digest)


async def test_collects_only_what_nobody_names(store: BundleStore, layout: Path, tmp_path: Path) -> None:
    kept = make_bundle(layout, BIG, "kept")
    gone = make_bundle(tmp_path / "two", b"other model", "gone")
    source = source_of(layout)
    source.add(tmp_path / "two")
    for digest in (kept, gone):
        await store.fetch(digest, source)
    data = await store.fetch_blob(_add(source, b"data set"), source, 1000)
    assert store.collect([kept, digest_of(b"data set")]) > 0
    assert store.bundles() == [kept] and store.verify(kept) and data.exists()
    store.collect([kept])
    assert not data.exists()


def _add(source: MemorySource, data: bytes) -> str:
    source.blobs[digest_of(data)] = data
    return digest_of(data)


async def test_never_collects_what_is_being_fetched(store: BundleStore, layout: Path) -> None:
    digest = make_bundle(layout, BIG)

    def collect(have: int, total: int) -> None:
        store.collect([])

    assert await store.fetch(digest, source_of(layout), progress=collect)


async def test_single_blob_has_a_limit(store: BundleStore) -> None:
    source = MemorySource()
    with pytest.raises(TamperedData, match="longer"):
        await store.fetch_blob(_add(source, b"x" * 2000), source, 1999)


async def test_two_fetches_of_one_bundle_download_once(store: BundleStore, layout: Path) -> None:
    digest = make_bundle(layout, BIG)
    source = source_of(layout)
    await asyncio.gather(store.fetch(digest, source), store.fetch(digest, source))
    assert len(source.fetches) == len({name for name, _ in source.fetches})


async def test_bandwidth_cap_spreads_bytes_over_time() -> None:
    clock = FakeClock()
    cap = Bandwidth(clock)
    cap.set_rate(1000)
    start = clock.monotonic_ns()
    for _ in range(11):
        await cap.spend(500)
    assert (clock.monotonic_ns() - start) / 1e9 == pytest.approx(5.0)


@settings(max_examples=40, deadline=None)
@given(cuts=st.lists(st.integers(0, 30), max_size=6), seed=st.integers(0, 255))
def test_any_series_of_cuts_ends_whole(
    tmp_path_factory: pytest.TempPathFactory, cuts: list[int], seed: int
) -> None:
    folder = tmp_path_factory.mktemp("cuts")
    digest = make_bundle(folder / "made", bytes([seed]) + BIG)
    source = source_of(folder / "made")

    async def body() -> None:
        for cut in cuts:
            source.cut_after = cut
            try:
                await BundleStore(folder / "store", fs=FullFs()).fetch(digest, source)
            except Unavailable:
                continue
        source.cut_after = None
        store = BundleStore(folder / "store", fs=FullFs())
        await store.fetch(digest, source)
        assert store.verify(digest)

    asyncio.run(body())
    shutil.rmtree(folder)
