from __future__ import annotations

import json
import os
import socket
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.http
import tritonclient.utils.shared_memory as shm
from hypothesis import given
from hypothesis import strategies as st
from tritonclient.utils import InferenceServerException

from shoal_agent.serving import peers
from shoal_agent.serving.shared_memory import IDLE_S, MAX_REGIONS, Regions, Span, span_of
from shoal_protos.errors import Conflict, Denied, InvalidInput, NotFound, Overloaded
from tests.agent import bundles
from tests.agent.serving.conftest import ServerProcess

USER = os.geteuid()
BYTES = np.dtype(np.uint8)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def regions(tmp_path: Path, clock: Clock) -> Iterator[Regions]:
    found = Regions(tmp_path, clock)
    (tmp_path / "r").write_bytes(bytes(range(100)))
    yield found
    found.close()


class TestRegions:
    def test_reading_and_writing(self, regions: Regions, tmp_path: Path) -> None:
        regions.register("a", "/r", 10, 80, USER)
        got = regions.read(Span("a", 5, 6), np.dtype(np.uint16), (3,), USER)
        assert got.tobytes() == bytes(range(15, 21))
        regions.write(Span("a", 78, 2), np.asarray([7, 8], np.uint8), USER)
        assert (tmp_path / "r").read_bytes()[88:90] == b"\x07\x08"
        assert regions.status("a") == [{"name": "a", "key": "/r", "offset": 10, "byte_size": 80}]
        regions.unregister("a", USER)
        assert regions.status() == []
        regions.unregister("a", USER)  # no error

    def test_booleans_are_clean(self, regions: Regions) -> None:
        regions.register("a", "/r", 0, 100, USER)
        got = regions.read(Span("a", 0, 3), np.dtype(np.bool_), (3,), USER)
        assert got.view(np.uint8).tolist() == [0, 1, 1]

    @given(st.integers(-(2**40), 2**40), st.integers(-(2**40), 2**40))
    def test_never_outside(self, offset: int, size: int) -> None:
        with_file = Path("/dev/shm") / f"shoal-test-{os.getpid()}"
        with_file.write_bytes(bytes(100))
        found = Regions()
        try:
            found.register("a", with_file.name, 20, 50, USER)
            if offset >= 0 and size >= 0 and offset + size <= 50:
                assert len(found.read(Span("a", offset, size), BYTES, (size,), USER)) == size
            else:
                with pytest.raises(InvalidInput):
                    found.read(Span("a", offset, size), BYTES, (max(0, min(size, 100)),), USER)
                with pytest.raises(InvalidInput):
                    found.write(Span("a", offset, size), np.zeros(1, np.uint8), USER)
        finally:
            found.close()
            with_file.unlink()

    @pytest.mark.parametrize(
        "key", ["../etc/passwd", "a/b", "", "..", ".", "/", "//r", "r\0", "r" * 300, "é"]
    )
    def test_keys_lead_nowhere_else(self, regions: Regions, key: str) -> None:
        with pytest.raises(InvalidInput):
            regions.register("a", key, 0, 1, USER)

    def test_links_folders_and_devices(self, regions: Regions, tmp_path: Path) -> None:
        (tmp_path / "link").symlink_to(tmp_path / "r")
        (tmp_path / "folder").mkdir()
        os.mkfifo(tmp_path / "pipe")
        for key in ("link", "folder", "pipe"):
            with pytest.raises(Denied):
                regions.register("a", key, 0, 1, USER)

    def test_sizes_and_names(self, regions: Regions) -> None:
        for offset, size in ((0, 101), (99, 2), (-1, 1), (0, 0), (0, 2**40)):
            with pytest.raises(InvalidInput):
                regions.register("a", "r", offset, size, USER)
        with pytest.raises(NotFound):
            regions.register("a", "none", 0, 1, USER)
        regions.register("a", "r", 0, 100, USER)
        with pytest.raises(Conflict):
            regions.register("a", "r", 0, 100, USER)
        with pytest.raises(InvalidInput):
            regions.register("x\n", "r", 0, 100, USER)
        with pytest.raises(NotFound):
            regions.read(Span("b", 0, 1), BYTES, (1,), USER)
        with pytest.raises(InvalidInput, match="10 bytes"):
            regions.write(Span("a", 0, 4), np.zeros(10, np.uint8), USER)

    def test_a_region_that_shrinks_is_an_error(self, regions: Regions, tmp_path: Path) -> None:
        regions.register("a", "r", 0, 100, USER)
        os.truncate(tmp_path / "r", 50)
        assert len(regions.read(Span("a", 0, 50), BYTES, (50,), USER)) == 50
        with pytest.raises(InvalidInput, match="shrunk"):
            regions.read(Span("a", 0, 51), BYTES, (51,), USER)
        with pytest.raises(InvalidInput, match="shrunk"):
            regions.write(Span("a", 60, 10), np.zeros(10, np.uint8), USER)
        assert (tmp_path / "r").stat().st_size == 50

    def test_another_users_memory_stays_theirs(self, regions: Regions, tmp_path: Path) -> None:
        other = USER + 1000
        with pytest.raises(Denied):  # the file is ours, `other` asks
            regions.register("a", "r", 0, 100, other)
        regions.register("a", "r", 0, 100, USER)
        for call in (
            lambda: regions.read(Span("a", 0, 1), BYTES, (1,), other),
            lambda: regions.write(Span("a", 0, 1), np.zeros(1, np.uint8), other),
            lambda: regions.unregister("a", other),
        ):
            with pytest.raises(Denied):
                call()
        regions.unregister("", other)  # only their own: none
        assert len(regions) == 1

    def test_the_number_is_bounded_and_idle_ones_make_room(self, regions: Regions, clock: Clock) -> None:
        before = len(os.listdir("/proc/self/fd"))
        for number in range(MAX_REGIONS):
            regions.register(str(number), "r", 0, 100, USER)
        with pytest.raises(Overloaded):
            regions.register("more", "r", 0, 100, USER)
        clock.now = IDLE_S + 1
        regions.read(Span("0", 0, 1), BYTES, (1,), USER)  # in use: stays
        regions.register("more", "r", 0, 100, USER)
        assert {row["name"] for row in regions.status()} == {
            "more",
            *(str(n) for n in range(MAX_REGIONS) if n != 1),
        }
        regions.close()
        assert len(os.listdir("/proc/self/fd")) == before

    @given(
        st.dictionaries(
            st.sampled_from(["region", "byte_size", "offset"]), st.none() | st.integers() | st.text()
        )
    )
    def test_parameters(self, values: dict[str, Any]) -> None:
        try:
            span = span_of({f"shared_memory_{key}": value for key, value in values.items()})
        except InvalidInput:
            return
        assert span is None or (span.size >= 0 and span.offset >= 0)


class TestPeers:
    def test_this_users_loopback_connection(self) -> None:
        for family, host in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
            try:
                server = socket.create_server((host, 0), family=family)
            except OSError:
                continue
            with server, socket.create_connection(server.getsockname()[:2]) as client:
                accepted, name = server.accept()
                with accepted:
                    assert peers.of_address(name).user() == USER
                    form = "ipv4:{}:{}" if family == socket.AF_INET else "ipv6:%5B{}%5D:{}"
                    assert peers.of_grpc(form.format(*name[:2])).user() == USER
                    assert client.fileno() >= 0

    def test_a_unix_socket(self) -> None:
        one, other = socket.socketpair()
        with one, other:
            assert peers.Peer(unix=one).user() == USER

    @pytest.mark.parametrize("address", [("192.0.2.1", 5), ("::ffff:192.0.2.1", 5), ("name", 1), None])
    def test_others_are_refused(self, address: Any) -> None:
        with pytest.raises(Denied):
            peers.of_address(address).user()

    def test_a_connection_that_does_not_exist_has_no_owner(self) -> None:
        with pytest.raises(Denied):
            peers.of_address(("127.0.0.1", 1)).user()
        with pytest.raises(Denied):
            peers.of_grpc("unix:").user()


@pytest.fixture
def region() -> Iterator[Callable[[int], Any]]:
    """Makes regions with tritonclient, which remove themselves."""
    made: list[Any] = []

    def make(size: int) -> Any:
        name = f"shoal-test-{os.getpid()}-{len(made)}"
        made.append(shm.create_shared_memory_region(name, f"/{name}", size))
        return made[-1]

    yield make
    for handle in made:
        shm.destroy_shared_memory_region(handle)


@pytest.fixture(params=["http", "grpc"])
def triton(request: pytest.FixtureRequest, digits_server: ServerProcess) -> Iterator[tuple[Any, Any]]:
    """(module, client) of tritonclient."""
    module = tritonclient.http if request.param == "http" else tritonclient.grpc
    address = digits_server.http if request.param == "http" else digits_server.grpc
    client = module.InferenceServerClient(address)
    yield module, client
    client.unregister_system_shared_memory()
    client.close()


class TestTritonclient:
    def test_inputs_and_outputs_in_shared_memory(self, triton: tuple[Any, Any], region: Any) -> None:
        module, client = triton
        batch = bundles.images(3)
        into, out = region(batch.nbytes + 32), region(1024)
        shm.set_shared_memory_region(into, [batch], offset=32)
        client.register_system_shared_memory("in", into._shm_key, batch.nbytes + 32)
        client.register_system_shared_memory("out", out._shm_key, 1000, offset=24)
        for _ in range(2):
            tensor = module.InferInput("image", list(batch.shape), "UINT8")
            tensor.set_shared_memory("in", batch.nbytes, offset=32)
            wanted = module.InferRequestedOutput("logits")
            wanted.set_shared_memory("out", 3 * 40, offset=8)
            answer = client.infer("digits", [tensor], outputs=[wanted], request_id="r")
            got = shm.get_contents_as_numpy(out, np.float32, [3, 10], offset=32)
            np.testing.assert_allclose(got, bundles.expected(batch), atol=1e-4)
            assert answer.get_output("logits") is not None
        # Inputs there, outputs in the answer.
        answer = client.infer("digits", [tensor])
        np.testing.assert_allclose(answer.as_numpy("logits"), bundles.expected(batch), atol=1e-4)

    def test_status_and_unregistering(self, triton: tuple[Any, Any], region: Any) -> None:
        module, client = triton
        handle = region(64)
        client.register_system_shared_memory("one", handle._shm_key, 64)
        client.register_system_shared_memory("two", handle._shm_key, 32, offset=32)
        status = client.get_system_shared_memory_status()
        rows = status if module is tritonclient.http else status.regions.values()
        names = [row["name"] if isinstance(row, dict) else row.name for row in rows]
        assert sorted(names) == ["one", "two"]
        client.unregister_system_shared_memory("one")
        with pytest.raises(InferenceServerException, match="no shared memory region"):
            client.get_system_shared_memory_status("one")
        with pytest.raises(InferenceServerException, match="already"):
            client.register_system_shared_memory("two", handle._shm_key, 32)
        client.unregister_system_shared_memory()
        status = client.get_system_shared_memory_status()
        assert not (status if module is tritonclient.http else status.regions)

    def test_refusals(self, triton: tuple[Any, Any], region: Any) -> None:
        module, client = triton
        batch = bundles.images(1)
        handle = region(64)
        client.register_system_shared_memory("in", handle._shm_key, 64)

        def ask(name: str, size: int, offset: int = 0) -> None:
            tensor = module.InferInput("image", list(batch.shape), "UINT8")
            tensor.set_shared_memory(name, size, offset=offset)
            client.infer("digits", [tensor])

        ask("in", 64)
        for arguments, words in (
            (("none", 64), "no shared memory region"),
            (("in", 63), "bytes"),
            (("in", 64, 1), "outside"),
        ):
            with pytest.raises(InferenceServerException, match=words):
                ask(*arguments)
        with pytest.raises(InferenceServerException, match="no key"):
            client.register_system_shared_memory("bad", "/../../etc/passwd", 4)
        with pytest.raises(InferenceServerException, match="smaller"):
            client.register_system_shared_memory("bad", handle._shm_key, 1 << 20)

    def test_a_client_that_cuts_its_region_does_not_kill_the_server(
        self, triton: tuple[Any, Any], region: Any
    ) -> None:
        module, client = triton
        batch = bundles.images(64)
        handle = region(1 << 16)
        client.register_system_shared_memory("in", handle._shm_key, 1 << 16)
        os.truncate(f"/dev/shm{handle._shm_key}", 100)
        tensor = module.InferInput("image", list(batch.shape), "UINT8")
        tensor.set_shared_memory("in", batch.nbytes)
        with pytest.raises(InferenceServerException, match="shrunk"):
            client.infer("digits", [tensor])
        assert client.is_server_ready()

    def test_it_is_listed(self, triton: tuple[Any, Any]) -> None:
        module, client = triton
        found = client.get_server_metadata()
        assert "system_shared_memory" in (
            found["extensions"] if module is tritonclient.http else found.extensions
        )

    def test_the_model_says_what_applications_need(self, triton: tuple[Any, Any]) -> None:
        module, client = triton
        config = client.get_model_config("digits")
        if module is tritonclient.http:
            more = json.loads(config["parameters"]["shoal"]["string_value"])
            assert client.get_model_metadata("digits")["shoal"] == more
        else:
            more = json.loads(config.config.parameters["shoal"].string_value)
        assert more["labels"][3] == "digit-3" and more["color"] == "gray" and more["boxes"] is None


@pytest.mark.parametrize(
    "body", [b"[]", b"{}", b'{"key": 1, "byte_size": 1}', b'{"key": "/r", "byte_size": true}']
)
def test_malformed_registrations(digits_server: ServerProcess, body: bytes) -> None:
    url = f"http://{digits_server.http}/v2/systemsharedmemory/region/x/register"
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(urllib.request.Request(url, body, method="POST"), timeout=10)
    with caught.value:
        assert caught.value.code == 400
