from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from shoal_agent.client import Client
from shoal_agent.serving.asgi import App
from shoal_agent.serving.dataplane import DataPlane
from shoal_agent.serving.http import Listener, listen_tcp, listen_unix
from shoal_protos.errors import InvalidInput, NotFound, Unavailable
from tests.agent import bundles


class Server:
    """A data plane in a thread with an event loop of its own."""

    def __init__(self, folder: Path) -> None:
        self.loop = asyncio.new_event_loop()
        self.socket = folder / "app.sock"
        self.pool = ThreadPoolExecutor(2)
        self.listeners: list[Listener] = []
        self.thread = threading.Thread(target=self.loop.run_forever)
        self.thread.start()
        bundle = bundles.onnx_bundle(folder / "bundle")
        self.plane = DataPlane(self.loop, self.pool)
        self.plane.load("digits", bundle.path, bundle.digest)
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
