from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shoal_agent import detection, imaging, sounds
from shoal_agent.client import Box, Class, Client
from shoal_agent.client.transport import parse_address
from shoal_agent.serving.asgi import App
from shoal_agent.serving.dataplane import DataPlane
from shoal_agent.serving.http import Listener, listen_tcp, listen_unix
from shoal_protos.bundle import Bundle, Signature, TensorSpec
from shoal_protos.errors import InvalidInput, NotFound, Unavailable, Unsupported
from tests.agent import bundles, detectors
from tests.agent.test_sounds import tone, wav


class Server:
    """A data plane in a thread with an event loop of its own."""

    def __init__(self, folder: Path, make: Callable[[Path], Bundle] = bundles.onnx_bundle) -> None:
        self.loop = asyncio.new_event_loop()
        self.socket = folder / "app.sock"
        self.pool = ThreadPoolExecutor(2)
        self.listeners: list[Listener] = []
        self.thread = threading.Thread(target=self.loop.run_forever)
        self.thread.start()
        bundle = make(folder / "bundle")
        self.plane = DataPlane(self.loop, self.pool)
        self.plane.load(bundle.config.lineage.model, bundle.path, bundle.digest)
        asyncio.run_coroutine_threadsafe(self.start(), self.loop).result()

    async def start(self) -> None:
        app = App(self.plane)
        self.listeners = [await listen_tcp(app, "127.0.0.1", 0), await listen_unix(app, self.socket, 0o600)]

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.listeners[0].port}"

    async def close(self) -> None:
        for listener in self.listeners:
            await listener.close(0.5)

    def stop(self) -> None:
        asyncio.run_coroutine_threadsafe(self.close(), self.loop).result()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()
        self.pool.shutdown()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    found = Server(tmp_path_factory.mktemp("c"))
    yield found
    found.stop()


@pytest.fixture(params=["tcp", "unix"])
def client(server: Server, request: pytest.FixtureRequest) -> Iterator[Client]:
    address = server.address if request.param == "tcp" else str(server.socket)
    with Client(address) as found:
        yield found


def test_it_infers_classifies_and_posts_labels(client: Client, server: Server) -> None:
    batch = bundles.images(3)
    truth = bundles.expected(batch)
    answer = client.infer(batch)
    np.testing.assert_allclose(answer.outputs["logits"], truth, atol=1e-4)
    assert answer.request_id
    classes = client.classify({"image": batch.astype(np.int64)})
    assert [found.index for found in classes] == truth.argmax(1).tolist()
    assert [found.label for found in classes] == [f"digit-{i}" for i in truth.argmax(1)]
    assert all(0.1 <= found.probability <= 1 for found in classes)
    before = server.plane.find("digits").observer.totals.correct
    assert client.feedback(answer.request_id, truth.argmax(1).tolist())
    assert not client.feedback(answer.request_id, truth.argmax(1).tolist())
    assert server.plane.find("digits").observer.totals.correct - before == 3


def test_one_item_needs_no_batch_dimension(client: Client) -> None:
    image = bundles.images(1)[0]
    np.testing.assert_allclose(
        client.infer(image).outputs["logits"], bundles.expected(image[None]), atol=1e-4
    )


def test_errors_are_typed(client: Client, server: Server) -> None:
    with pytest.raises(InvalidInput, match="no input 'picture'"):
        client.infer({"picture": bundles.images(1)})
    with pytest.raises(InvalidInput, match="cannot hold exactly"):
        client.infer(bundles.images(1) + 0.5)
    with pytest.raises(InvalidInput, match="shape"):
        client.infer(bundles.images(1)[:, :5])
    with pytest.raises(InvalidInput, match="no class"):
        client.feedback("x", "digit-99")
    assert client.ready()
    with Client(server.address, model="nobody") as other, pytest.raises(NotFound, match="nobody"):
        other.infer(bundles.images(1))


def test_nobody_there() -> None:
    with Client("127.0.0.1:1") as client:
        assert not client.ready()
        with pytest.raises(Unavailable, match="does not answer"):
            client.infer(bundles.images(1))


def test_a_connection_that_the_server_closed_is_opened_again(server: Server) -> None:
    with Client(server.address) as client:
        client.infer(bundles.images(1))
        assert client._transport.connection is not None
        assert client._transport.connection.sock is not None
        client._transport.connection.sock.shutdown(2)
        client.infer(bundles.images(1))


# ---------------------------------------------------------------------------- pictures


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A detector of red and blue squares."""
    found = Server(tmp_path_factory.mktemp("s"), detectors.detector_bundle)
    yield found
    found.stop()


@pytest.fixture(params=["tcp", "unix", "bytes"])
def detector(shapes: Server, request: pytest.FixtureRequest) -> Iterator[Client]:
    address = str(shapes.socket) if request.param == "unix" else shapes.address
    with Client(address, shared_memory=request.param != "bytes") as found:
        yield found


SQUARES = [("red", 80.0, 80.0, 160.0, 160.0), ("blue", 400.0, 240.0, 480.0, 320.0)]


def corners(found: list[Box]) -> list[tuple[str, float, float, float, float]]:
    return [(b.label, round(b.x1, 3), round(b.y1, 3), round(b.x2, 3), round(b.y2, 3)) for b in found]


class TestPictures:
    def test_boxes_in_the_pictures_pixels(self, detector: Client, tmp_path: Path) -> None:
        scene = detectors.scene()
        frame = np.asarray(scene)
        path = tmp_path / "scene.png"
        scene.save(path)
        for source, color in ((scene, ""), (path, ""), (path.read_bytes(), ""), (frame, "")):
            found = detector.detect(source, color=color)
            assert corners(found) == SQUARES
        assert corners(detector.detect(frame[..., ::-1], color="bgr")) == SQUARES
        assert all(0.9 < box.score <= 1 and box.request_id for box in found)
        assert repr(found[0]).startswith("Box(label='red', score=0.9")

    def test_several_pictures_travel_together(self, detector: Client) -> None:
        blank = Image.new("RGB", (64, 64), (128, 128, 128))
        found = detector.detect_all([detectors.scene(), blank, np.asarray(detectors.scene(320, 240))])
        assert [[box.label for box in boxes] for boxes in found] == [["red", "blue"], [], ["red", "blue"]]
        assert found[2][0].x1 == pytest.approx(40)
        assert found[0][0].request_id == found[2][0].request_id

    def test_the_evaluation_sees_the_same_bits(self, detector: Client) -> None:
        """What the client sends is what `imaging.decode` gives, and its boxes are what `suppress` keeps."""
        data = detectors.encoded(detectors.scene(), "JPEG", quality=80)
        tensor = imaging.decode(data, detectors.SIGNATURE)
        assert detector.signature() == detectors.SIGNATURE
        raw = detector.infer(data).outputs["boxes"]
        np.testing.assert_array_equal(raw, detector.infer(tensor).outputs["boxes"])
        assert detectors.SIGNATURE.boxes is not None
        kept = detection.suppress(raw[0], detectors.SIGNATURE.boxes)
        assert [box.score for box in detector.detect(data)] == kept.scores.tolist()

    def test_classes_are_not_boxes(self, detector: Client, client: Client) -> None:
        with pytest.raises(Unsupported, match=r"Call detect\(\)"):
            detector.classify(detectors.scene())
        with pytest.raises(Unsupported, match=r"Call classify\(\)"):
            client.detect(bundles.images(1)[0])

    def test_names_of_pictures(self, client: Client) -> None:
        batch = bundles.images(2)
        truth = bundles.expected(batch)
        pictures = [
            detectors.encoded(Image.fromarray(np.rint(item[..., 0] * (255 / 16)).astype(np.uint8)))
            for item in batch
        ]
        assert [found.index for found in client.classify(pictures)] == truth.argmax(1).tolist()
        best = client.classify(pictures[0], top=3)
        assert [found.index for found in best] == np.argsort(-truth[0])[:3].tolist()
        assert best[0].probability > best[1].probability > best[2].probability
        assert repr(best[0]).startswith("Class(label='digit-")
        assert [len(found) for found in client.classify_all(pictures, top=20)] == [10, 10]
        with pytest.raises(InvalidInput, match="classify_all"):
            client.classify(pictures, top=2)
        assert client.feedback(best[0], int(truth[0].argmax()))

    def test_refusals(self, client: Client, detector: Client, tmp_path: Path) -> None:
        (tmp_path / "a.jpg").write_text("text")
        for bad in (tmp_path / "a.jpg", b"\xff\xd8\xff", 5, np.zeros((5, 5, 2), np.uint8)):
            with pytest.raises(InvalidInput):
                detector.detect(bad)
        with pytest.raises(NotFound):
            detector.detect("none.jpg")
        with pytest.raises(InvalidInput, match="empty"):
            detector.detect_all([])
        with pytest.raises(InvalidInput, match="declares no resize rule"):
            client.classify(Image.new("L", (20, 20)))

    def test_threads_share_a_client(self, detector: Client) -> None:
        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(lambda _: corners(detector.detect(detectors.scene())), range(24)))
        assert answers == [SQUARES] * 24


class TestSharedMemory:
    def batch(self) -> list[Image.Image]:
        return [detectors.scene()] * 4  # 147 kB

    def test_large_inputs_use_it_and_leave_nothing(self, shapes: Server) -> None:
        before = set(Path("/dev/shm").glob("shoal-*"))
        with Client(shapes.address) as client:
            client.detect(detectors.scene())
            assert len(shapes.plane.regions) == 0  # 37 kB: as quick through the socket
            client.detect_all(self.batch())
            assert len(shapes.plane.regions) == 1
            assert set(Path("/dev/shm").glob("shoal-*")) <= before
        assert len(shapes.plane.regions) == 0

    def test_it_grows_and_survives_a_server_that_forgot(self, shapes: Server) -> None:
        with Client(shapes.address) as client:
            assert len(client.detect_all(self.batch())) == 4
            assert len(client.detect_all(self.batch() * 10)) == 40
            shapes.plane.regions.close()  # as after a restart
            assert corners(client.detect_all(self.batch())[3]) == SQUARES
            assert len(shapes.plane.regions) == 1

    def test_a_server_that_refuses_gets_bytes(self, shapes: Server, monkeypatch: pytest.MonkeyPatch) -> None:
        from shoal_agent.serving import shared_memory

        monkeypatch.setattr(shared_memory, "MAX_REGIONS", 0)
        monkeypatch.setattr(shared_memory.Regions, "_make_room", _full)
        with Client(shapes.address) as client:
            assert corners(client.detect_all(self.batch())[0]) == SQUARES
            assert client._area.refused

    def test_no_room_for_shared_memory(self, shapes: Server, tmp_path: Path) -> None:
        with Client(shapes.address) as client:
            client._area._root = tmp_path / "none"
            assert corners(client.detect_all(self.batch())[0]) == SQUARES

    def test_a_missing_model_is_said_at_once(self, shapes: Server) -> None:
        with Client(shapes.address) as client:
            client.detect_all(self.batch())
            client._model = "nobody"
            client._described["nobody"] = client._described["shapes"]
            with pytest.raises(NotFound, match="nobody"):
                client.detect_all(self.batch())
            assert not client._area.refused


def _full(self: object) -> None:
    from shoal_protos.errors import Overloaded

    raise Overloaded("full")


# ---------------------------------------------------------------------------- sounds


SOUND = Signature(
    inputs=(TensorSpec("x", "FP32", (-1, 64)),),
    outputs=(TensorSpec("y", "FP32", (-1, 10)),),
    input_kind="audio",
    output_kind="logits",
    sample_rate=8000,
)


def test_sounds(tmp_path: Path) -> None:
    server = Server(
        tmp_path,
        lambda folder: bundles.write(
            folder, {"model.onnx": bundles.vector_graph().SerializeToString()}, signature=SOUND, name="words"
        ),
    )
    try:
        data = wav(tone(16000), 16000)
        (tmp_path / "seven.wav").write_bytes(data)
        with Client(server.address) as client:
            best = client.classify(tmp_path / "seven.wav")[0]
            raw = client.infer(sounds.decode(data, SOUND)).outputs["y"]
            assert isinstance(best, Class) and best.index == raw.argmax()
            assert [found.index for found in client.classify([data, data])] == [best.index] * 2
            with pytest.raises(InvalidInput, match="not a WAV"):
                client.classify(b"no sound")
    finally:
        server.stop()


# ---------------------------------------------------------------------------- the rest


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("localhost", ("", "localhost", 8000)),
        ("camera-3:9000", ("", "camera-3", 9000)),
        ("http://camera-3:9000/", ("", "camera-3", 9000)),
        ("[::1]:9000", ("", "::1", 9000)),
        ("[::1]", ("", "::1", 8000)),
        ("::1", ("", "::1", 8000)),
        ("/run/app.sock", ("/run/app.sock", "", 0)),
        ("unix:/run/app.sock", ("/run/app.sock", "", 0)),
        ("unix:///run/app.sock", ("/run/app.sock", "", 0)),
        ("run/app.sock", ("run/app.sock", "", 0)),
    ],
)
def test_addresses(text: str, wanted: tuple[str, str, int]) -> None:
    assert tuple(parse_address(text)) == wanted


@pytest.mark.parametrize("text", ["", "host:port", "host:99999", "https://host", ":80"])
def test_no_addresses(text: str) -> None:
    with pytest.raises(InvalidInput):
        parse_address(text)


def test_it_needs_numpy_only() -> None:
    """Not the agent's libraries; Pillow only for pictures."""
    code = (
        "import sys\n"
        "for name in ('PIL','grpc','google','uvicorn','httptools','uvloop','psutil','prometheus_client',"
        "'onnxruntime','torch','cryptography'): sys.modules[name] = None\n"
        "import shoal_agent.client\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
