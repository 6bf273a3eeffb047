"""Content-addressed storage, and the blob calls of the agents' door."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import grpc
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shoal_controller.app import Controller
from shoal_controller.blobs import BlobStore
from shoal_controller.store.repositories import Store
from shoal_controller.store.tables import Blob, DeviceRequest, Sample
from shoal_protos.bundle import (
    BundleConfig,
    RuntimeNeed,
    Signature,
    TensorSpec,
    digest_of,
    open_bundle,
    write_bundle,
)
from shoal_protos.errors import InvalidInput, NotFound, Overloaded, TamperedData
from shoal_protos.v1 import blobs_pb2

from .conftest import FakeClock


@pytest.fixture
def blobs(home: Path, clock: FakeClock) -> BlobStore:
    return BlobStore(home / "blobs", clock=clock, lease_seconds=100)


def bundle_in(path: Path) -> str:
    tensor = TensorSpec("x", "FP32", (-1, 2))
    config = BundleConfig(Signature((tensor,), (tensor,)), RuntimeNeed("onnxruntime", "model.onnx"))
    return str(write_bundle(path, config, {"model.onnx": b"model" * 100}))


def test_bytes_files_and_streams_are_one(blobs: BlobStore, store: Store, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"hello")
    with store.write() as session:
        digests = {
            blobs.put(session, source, purpose="data")
            for source in (b"hello", tmp_path / "file", io.BytesIO(b"hello"))
        }
    assert digests == {digest_of(b"hello")}
    assert blobs.read(digest_of(b"hello")) == b"hello"
    assert list((blobs.root / "partial").iterdir()) == []


def test_what_is_not_there_says_so(blobs: BlobStore) -> None:
    with pytest.raises(NotFound):
        blobs.open(digest_of(b"nothing"))
    with pytest.raises(InvalidInput, match="not a digest"):
        blobs.open("sha256:../../etc/passwd")


def test_a_bundle_is_opened_where_it_lies(blobs: BlobStore, store: Store, tmp_path: Path) -> None:
    digest = bundle_in(tmp_path / "layout")
    with store.write() as session:
        blobs.put_bundle(session, tmp_path / "layout", digest)
    assert open_bundle(blobs.root, digest).config.runtime.name == "onnxruntime"
    assert len(blobs.bundle_blobs(digest)) == 3


def test_a_damaged_bundle_is_not_taken(blobs: BlobStore, store: Store, tmp_path: Path) -> None:
    digest = bundle_in(tmp_path / "layout")
    model = open_bundle(tmp_path / "layout", digest).model_file
    model.write_bytes(b"wrong" * 100)
    with pytest.raises(TamperedData), store.write() as session:
        blobs.put_bundle(session, tmp_path / "layout", digest)
    assert not blobs.exists(digest)


def test_the_sweep_spares_what_is_referred_to_or_leased(
    blobs: BlobStore, store: Store, clock: FakeClock, add_device: Any
) -> None:
    device = add_device()
    with store.write() as session:
        kept = blobs.put(session, b"sample", purpose="samples")
        leased = blobs.put(session, b"leased", purpose="data", lease_seconds=10_000)
        gone = blobs.put(session, b"gone", purpose="data")
        session.add(
            Sample(
                id="s-1",
                device=device,
                endpoint="digits",
                bundle=kept,
                blob=kept,
                size=6,
                count=1,
                labelled=0,
                received_ms=0,
            )
        )
    clock.advance(101)
    with store.write() as session:
        assert blobs.sweep(session) == [gone]
    assert blobs.exists(kept) and blobs.exists(leased) and not blobs.exists(gone)
    with store.read() as session:
        assert session.get(Blob, gone) is None


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
@given(data=st.binary(min_size=1, max_size=300), cuts=st.lists(st.integers(0, 300), max_size=5))
def test_a_push_in_any_pieces_is_whole_or_refused(
    data: bytes, cuts: list[int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    blobs = BlobStore(tmp_path_factory.mktemp("pieces"))
    digest, at = digest_of(data), 0
    for cut in [*sorted(min(cut, len(data)) for cut in cuts), len(data)]:
        at = blobs.append("d-1", digest, at, data[at:cut], len(data))
        assert blobs.received("d-1", digest) == (at, False)
    with pytest.raises(InvalidInput):
        blobs.append("d-1", digest, at + 1, b"x", len(data) + 10)
    with pytest.raises(InvalidInput):
        blobs.append("d-1", digest, at, b"x", len(data))
    blobs.finish("d-1", digest, len(data))
    assert blobs.read(digest) == data


def test_a_quota_holds(blobs: BlobStore, store: Store) -> None:
    with store.write() as session:
        blobs.put(session, b"x" * 60, purpose="samples", owner="d-1")
    blobs.append("d-1", digest_of(b"other"), 0, b"y" * 30, 30)
    with store.read() as session:
        blobs.check_quota(session, "d-1", 10, 100)
        with pytest.raises(Overloaded, match="quota of 100"):
            blobs.check_quota(session, "d-1", 11, 100)


# ---------------------------------------------------------------------------- through the door


async def push(agent: Any, data: bytes, digest: str = "", **header: Any) -> blobs_pb2.StatReply:
    digest = digest or digest_of(data)
    values = {"digest": digest, "size": len(data), "offset": 0, "purpose": "samples", **header}

    async def parts() -> Any:
        yield blobs_pb2.PushRequest(header=blobs_pb2.PushHeader(**values))
        for at in range(values["offset"], len(data), 1000):
            yield blobs_pb2.PushRequest(data=data[at : at + 1000])

    reply: blobs_pb2.StatReply = await agent.blobs().Push(parts())
    return reply


async def fetch(agent: Any, digest: str, offset: int = 0, length: int = 0) -> bytes:
    call = agent.blobs().Fetch(blobs_pb2.FetchRequest(digest=digest, offset=offset, length=length))
    return b"".join([chunk.data async for chunk in call])


async def test_a_push_arrives_whole_and_resumes(agents: Any, controller: Controller) -> None:
    agent = await agents()
    data = bytes(range(256)) * 40
    assert (await push(agent, data)).complete
    assert controller.blobs.read(digest_of(data)) == data
    half = data + b"more"
    controller.blobs.append(agent.joined.device, digest_of(half), 0, half[:5000], len(half))
    stat = await agent.blobs().Stat(blobs_pb2.StatRequest(digest=digest_of(half)))
    assert (stat.received, stat.complete) == (5000, False)
    assert (await push(agent, half, offset=5000)).complete


async def test_a_tampered_push_is_dropped(agents: Any, controller: Controller) -> None:
    agent = await agents()
    wanted = digest_of(b"what was announced")
    with pytest.raises(grpc.aio.AioRpcError, match="do not match") as refused:
        await push(agent, b"something else", digest=wanted)
    assert refused.value.code() is grpc.StatusCode.DATA_LOSS
    assert not controller.blobs.exists(wanted)
    assert controller.blobs.received(agent.joined.device, wanted) == (0, False)


@pytest.mark.parametrize(
    ("header", "code"),
    [
        ({"size": 1 << 40}, grpc.StatusCode.INVALID_ARGUMENT),
        ({"size": 0}, grpc.StatusCode.INVALID_ARGUMENT),
        ({"purpose": "bundle"}, grpc.StatusCode.INVALID_ARGUMENT),
        ({"digest": "../../x"}, grpc.StatusCode.INVALID_ARGUMENT),
        ({"offset": 7}, grpc.StatusCode.INVALID_ARGUMENT),
        ({"size": 3}, grpc.StatusCode.INVALID_ARGUMENT),
    ],
)
async def test_a_bad_push_is_refused_at_the_door(
    agents: Any, header: dict[str, Any], code: grpc.StatusCode
) -> None:
    agent = await agents()
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await push(agent, b"some data that is long enough", **header)
    assert refused.value.code() is code


async def test_a_device_reads_only_what_its_state_names(
    agents: Any, controller: Controller, tmp_path: Path, eventually: Any
) -> None:
    agent = await agents()
    await eventually(lambda: agent.desired)
    digest = bundle_in(tmp_path / "layout")
    with controller.store.write() as session:
        controller.blobs.put_bundle(session, tmp_path / "layout", digest)
    with pytest.raises(grpc.aio.AioRpcError, match="not part of this device's desired state"):
        await fetch(agent, digest)
    _place(controller, digest)
    await eventually(lambda: agent.desired[-1].placements)
    manifest = await fetch(agent, digest)
    assert digest_of(manifest) == digest
    model = controller.blobs.bundle(digest).manifest.layer("model.onnx")
    assert await fetch(agent, model.digest) == b"model" * 100
    assert await fetch(agent, model.digest, 495, 3) == b"mod"
    with pytest.raises(grpc.aio.AioRpcError, match="nothing begins at"):
        await fetch(agent, model.digest, 501)


def _place(controller: Controller, digest: str) -> None:
    """An endpoint whose assignment gives the bundle to every device."""
    from shoal_controller.store.repositories import record
    from shoal_controller.store.tables import Assignment, Endpoint, Model, Release, Variant, Version

    name = "x86_64.avx2.2c+onnxruntime"
    variant = {"name": "v", "target": "onnxruntime", "precision": "fp32", "recipe": [], "wire_bytes": 1}
    with controller.store.write() as session:
        for row in (
            Model(id="m-1", name="digits", created_ms=0),
            Version(id="v-1", model="m-1", number=1, state="ready", source_blob="", created_ms=0),
            Variant(id="k-1", version="v-1", bundle=digest, size_bytes=1, created_ms=0, **variant),
            Release(id="l-1", version="v-1", number=1, fronts={name: ["k-1"]}, created_ms=0),
            Endpoint(id="e-1", name="digits", model="m-1", objective="", assignment="a-1", created_ms=0),
            Assignment(id="a-1", endpoint="e-1", release="l-1", choice={name: "k-1"}, created_ms=0),
        ):
            session.add(row)
            session.flush()
        record(session, actor="person:test", verb="created", kind="endpoint", object="e-1")


async def test_asking_for_logs_reaches_the_device_and_its_answer_the_store(
    agents: Any, controller: Controller, eventually: Any
) -> None:
    from shoal_controller.store.repositories import record
    from shoal_protos.v1 import agents_pb2

    agent = await agents()
    row = DeviceRequest(
        id="q-1",
        device=agent.joined.device,
        kind="logs",
        state="open",
        body=None,
        created_ms=0,
        not_after_ms=controller.clock() + 60_000,
    )
    with controller.store.write() as session:
        session.add(row)
        record(session, actor="person:test", verb="asked", kind="request", object="q-1")
    await eventually(lambda: agent.desired and agent.desired[-1].requests)
    answer = agents_pb2.RequestResult(id="q-1", body=b"all is well")
    await agent.send(reported=agents_pb2.Reported(requests=[answer]))
    await eventually(lambda: not agent.desired[-1].requests)
    with controller.store.read() as session:
        assert session.get_one(DeviceRequest, "q-1").body == b"all is well"
