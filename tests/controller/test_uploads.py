"""Resumable pushes: the file on disk, the API, and everything that can happen to a line."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import uvicorn
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal_controller import sending
from shoal_controller.api import schemas
from shoal_controller.api.app import create_api
from shoal_controller.app import Controller
from shoal_controller.blobs import BlobStore
from shoal_controller.client import Client
from shoal_controller.sending import Sender, Sent
from shoal_controller.settings import Settings
from shoal_controller.store.tables import Blob, Version
from shoal_controller.uploads import ABANDONED_SECONDS, MAX_UNFINISHED, Uploads
from shoal_protos.errors import Conflict, InvalidInput, Overloaded, TamperedData, Unavailable
from tests.controller.cutting import proxy
from tests.controller.world import source_tar


def digest_of(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


@pytest.fixture
def uploads(tmp_path: Path) -> Uploads:
    return Uploads(BlobStore(tmp_path / "blobs"), 1 << 20, reserve=0)


def send(uploads: Uploads, data: bytes, pieces: list[int], digest: str = "") -> str:
    """Appends `data` in pieces that end at these offsets, then finishes."""
    digest = digest or digest_of(data)
    for start, end in zip([0, *pieces], [*pieces, len(data)], strict=True):
        uploads.begin(digest, start, len(data))
        uploads.append(digest, start, data[start:end], len(data))
    uploads.finish(digest, len(data))
    return digest


class TestOnDisk:
    @given(st.binary(max_size=300), st.lists(st.integers(0, 300), max_size=5))
    @settings(max_examples=40, deadline=None)
    def test_any_pieces_make_the_whole(self, data: bytes, cuts: list[int]) -> None:
        import tempfile

        with tempfile.TemporaryDirectory() as room:
            uploads = Uploads(BlobStore(Path(room)), 1 << 20, reserve=0)
            digest = send(uploads, data, sorted(min(cut, len(data)) for cut in cuts))
            assert (Path(room) / "blobs" / "sha256" / digest[7:]).read_bytes() == data
            assert uploads.progress(digest).complete and not list(uploads.room.iterdir())

    def test_another_process_goes_on(self, uploads: Uploads, tmp_path: Path) -> None:
        data = b"a" * 100
        digest = digest_of(data)
        uploads.begin(digest, 0, 100)
        uploads.append(digest, 0, data[:60], 100)
        again = Uploads(BlobStore(tmp_path / "blobs"), 1 << 20, reserve=0)
        assert again.progress(digest).received == 60
        with pytest.raises(Conflict, match="byte 60, not 0"):
            again.begin(digest, 0, 100)
        again.append(digest, 60, data[60:], 100)
        again.finish(digest, 100)
        assert again.progress(digest).complete

    def test_wrong_bytes_are_dropped(self, uploads: Uploads) -> None:
        digest = digest_of(b"right")
        with pytest.raises(TamperedData, match="do not match"):
            send(uploads, b"wrong", [2], digest)
        assert uploads.progress(digest).received == 0 and not list(uploads.room.iterdir())
        send(uploads, b"right", [2])
        assert uploads.progress(digest).complete

    def test_two_writers_of_one_digest(self, uploads: Uploads) -> None:
        data = random.Random(0).randbytes(200_000)
        digest = digest_of(data)
        uploads.begin(digest, 0, len(data))
        failures: list[BaseException] = []

        def write(seed: int) -> None:
            steps = random.Random(seed)
            try:
                while not (at := uploads.progress(digest)).complete:
                    end = min(len(data), at.received + steps.randrange(1, 5000))
                    with contextlib.suppress(Conflict):
                        got = uploads.append(digest, at.received, data[at.received : end], len(data))
                        if got == len(data):
                            uploads.finish(digest, len(data))
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=write, args=(seed,)) for seed in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not failures and uploads.progress(digest).complete

    def test_limits(self, uploads: Uploads, tmp_path: Path) -> None:
        digest = digest_of(b"")
        with pytest.raises(InvalidInput, match="larger than 1048576 bytes"):
            uploads.begin(digest, 0, (1 << 20) + 1)
        with pytest.raises(InvalidInput, match="not inside"):
            uploads.begin(digest, 5, 4)
        with pytest.raises(InvalidInput):
            uploads.begin("sha256:../../etc", 0, 4)
        with pytest.raises(InvalidInput, match="longer than the 3 bytes"):
            uploads.append(digest, 0, b"abcd", 3)
        full = Uploads(BlobStore(tmp_path / "blobs"), 1 << 20, reserve=1 << 60)
        with pytest.raises(Overloaded, match="MiB left") as refused:
            full.begin(digest, 0, 4)
        assert "Free space" in refused.value.remedy

    def test_abandoned_ones_go_after_a_day(self, uploads: Uploads) -> None:
        for number in range(MAX_UNFINISHED):
            digest = digest_of(bytes([number]))
            uploads.begin(digest, 0, 10)
            uploads.append(digest, 0, b"x", 10)
        with pytest.raises(Overloaded, match="unfinished"):
            uploads.begin(digest_of(b"more"), 0, 10)
        assert uploads.sweep() == []
        old = time.time() - ABANDONED_SECONDS - 60
        os.utime(uploads.path(digest_of(b"\0")), (old, old))
        assert uploads.sweep() == [digest_of(b"\0")]
        uploads.begin(digest_of(b"more"), 0, 10)

    def test_the_blob_stores_sweep_removes_them_too(self, tmp_path: Path, opened: Controller) -> None:
        blobs = opened.services.blobs
        uploads = Uploads(blobs, 100, reserve=0)
        uploads.begin(digest_of(b"old"), 0, 3)
        uploads.append(digest_of(b"old"), 0, b"o", 3)
        now = opened.services.clock() / 1000
        os.utime(uploads.path(digest_of(b"old")), (now - 90_000, now - 90_000))
        with opened.services.store.write() as session:
            blobs.sweep(session)
        assert uploads.progress(digest_of(b"old")).received == 0


# ---------------------------------------------------------------------------- over HTTP


class Served:
    """A controller's API on a real port, served from a thread; it can be stopped and started again."""

    def __init__(self, controller_settings: Settings) -> None:
        self._settings = controller_settings
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = probe.getsockname()[1]
        self.start()

    def start(self) -> None:
        self.controller = Controller(self._settings)
        self.controller.open()
        config = uvicorn.Config(
            create_api(self.controller),
            "127.0.0.1",
            self.port,
            lifespan="off",
            log_level="critical",
            http="h11",
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=lambda: asyncio.run(self._server.serve()))
        self._thread.start()
        deadline = time.monotonic() + 20
        while not self._server.started and time.monotonic() < deadline:
            time.sleep(0.01)

    def stop(self) -> None:
        self._server.should_exit = self._server.force_exit = True
        self._thread.join(20)
        self.controller.close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@pytest.fixture
def served(settings: Settings) -> Iterator[Served]:
    made = Served(settings)
    yield made
    made.stop()


def big_tar(path: Path, size: int = 3_000_000) -> Path:
    path.write_bytes(source_tar(members={"data.npz": random.Random(1).randbytes(size)}))
    return path


def sender(client: Client, seen: list[Sent] | None = None, piece: int = 1 << 18) -> Sender:
    seen = [] if seen is None else seen
    return Sender(client, seen.append, piece=piece, sleep=lambda _s: time.sleep(0.01), rng=random.Random(0))


def test_a_push_and_the_same_again(served: Served, tmp_path: Path) -> None:
    source = big_tar(tmp_path / "s.tar")
    with Client(served.url) as client:
        seen: list[Sent] = []
        version = client.push("digits", source, "first", seen.append)
        assert (version.number, version.state, version.note) == (1, "ingesting", "first")
        assert seen[0].received == 0 and seen[-1].received == seen[-1].total == source.stat().st_size
        seen.clear()
        assert client.push("digits", source, "again", seen.append).number == 2
        assert [s.resumed for s in seen] == [source.stat().st_size]  # nothing was sent
    with served.controller.services.store.read() as session:
        digest = digest_of(source.read_bytes())
        row = session.get(Blob, digest)
        assert row is not None and row.purpose == "source" and row.lease_until_ms
        assert {v.source_blob for v in session.query(Version)} == {digest}


def test_the_line_is_cut_again_and_again(served: Served, tmp_path: Path) -> None:
    source = big_tar(tmp_path / "s.tar")
    with (
        proxy(served.port, cuts=[300_000, 10, 700_000, 900_000]) as line,
        Client(f"http://127.0.0.1:{line.port}") as client,
    ):
        seen: list[Sent] = []
        digest = sender(client, seen).send(source)
        version = client.request("POST", "/models/digits/versions", data={"upload": digest}).json()
        assert version["state"] == "ingesting"
        assert line.connections >= 5
        assert any("dropped" in s.note for s in seen)
        sizes = [s.received for s in seen]
        assert sizes == sorted(sizes)  # nothing that arrived was sent twice


def test_bytes_damaged_on_the_way(served: Served, tmp_path: Path) -> None:
    source = big_tar(tmp_path / "s.tar")
    with (
        proxy(served.port, damage=1_500_000) as line,
        Client(f"http://127.0.0.1:{line.port}") as client,
    ):
        seen: list[Sent] = []
        digest = sender(client, seen).send(source)
        assert digest == digest_of(source.read_bytes())
        assert [s.note for s in seen if "damaged" in s.note]
        assert client.upload(digest).complete


def test_the_controller_is_restarted_in_between(served: Served, tmp_path: Path) -> None:
    source = big_tar(tmp_path / "s.tar")
    data = source.read_bytes()
    digest = digest_of(data)
    with Client(served.url) as client:
        assert client.append(digest, 0, len(data), data[:1_000_000]).received == 1_000_000
        served.stop()
        with pytest.raises(Unavailable):
            client.upload(digest)
        given_up: list[Sent] = []
        with pytest.raises(Unavailable):
            Sender(client, given_up.append, sleep=lambda _s: None).send(source)
        served.start()
        seen: list[Sent] = []
        sender(client, seen).send(source)
        assert seen[0].resumed == 1_000_000
        assert client.upload(digest).complete


def test_giving_up_says_how_to_go_on(tmp_path: Path) -> None:
    class Down:
        def upload(self, digest: str) -> schemas.Upload:
            return schemas.Upload(digest=digest, received=40, size=0, complete=False)

        def append(self, digest: str, offset: int, size: int, data: bytes) -> schemas.Upload:
            raise Unavailable("No controller answers.", "Start one.")

    (tmp_path / "x").write_bytes(b"x" * 100)
    delays: list[float] = []
    with pytest.raises(Unavailable) as refused:
        Sender(Down(), lambda _s: None, sleep=delays.append, rng=random.Random(3)).send(tmp_path / "x")
    assert "40 % arrived" in refused.value.remedy and "the same command" in refused.value.remedy
    assert len(delays) == sending.MAX_FAILURES
    longest = [min(sending.LONGEST_DELAY_S, sending.FIRST_DELAY_S * 2**n) for n in range(len(delays))]
    assert all(0 <= d <= most for d, most in zip(delays, longest, strict=True))


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_the_command_is_ended_and_given_again(served: Served, tmp_path: Path, how: signal.Signals) -> None:
    """`kill -9` or Ctrl-C in the middle: the next command goes on where the first one was."""
    task = tmp_path / "signs.py"
    task.write_text('class Signs:\n    files = ["data.npz"]\n')
    (tmp_path / "data.npz").write_bytes(random.Random(2).randbytes(4_000_000))
    environment = {**os.environ, "SHOAL_URL": served.url, "XDG_CONFIG_HOME": str(tmp_path)}
    command = [
        sys.executable,
        "-m",
        "shoal_controller.cli.main",
        "model",
        "push",
        str(task),
        "--name",
        "signs",
    ]
    room = Uploads(served.controller.services.blobs, 1).room
    # A line that dies after 1.5 MB holds the first command in its retries, where it is killed.
    with proxy(served.port, cuts=[1_500_000, *[0] * 50]) as line:
        slow = {**environment, "SHOAL_URL": f"http://127.0.0.1:{line.port}"}
        child = subprocess.Popen(
            command,
            env=slow,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not any(p.stat().st_size > 500_000 for p in _files(room)):
            time.sleep(0.02)
        child.send_signal(how)
        _, said = child.communicate(timeout=20)
        if how == signal.SIGINT:
            assert child.returncode == 130 and "the same command goes on from there" in said
    (left,) = _files(room)
    assert left.stat().st_size > 500_000
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "Going on where the last upload stopped" in done.stderr
    assert "signs v1 is ingesting" in done.stderr
    assert not _files(room)


def _files(room: Path) -> list[Path]:
    return list(room.iterdir()) if room.is_dir() else []


# ---------------------------------------------------------------------------- what is refused


async def test_versions_need_a_finished_upload(client: httpx.AsyncClient) -> None:
    data = source_tar()
    digest = digest_of(data)
    post = "/api/v1/models/digits/versions"
    answer = await client.post(post, data={"upload": digest})
    assert answer.status_code == 404 and "unfinished" in answer.text
    put = f"/api/v1/uploads/{digest}"
    half = await client.put(put, params={"offset": 0, "size": len(data)}, content=data[:500])
    assert half.json() == {"digest": digest, "received": 500, "size": len(data), "complete": False}
    assert (await client.get(put)).json()["received"] == 500
    assert (await client.post(post, data={"upload": digest})).status_code == 404
    wrong = await client.put(put, params={"offset": 0, "size": len(data)}, content=data)
    assert wrong.status_code == 409 and "byte 500" in wrong.json()["detail"]
    whole = await client.put(put, params={"offset": 500, "size": len(data)}, content=data[500:])
    assert whole.json()["complete"]
    assert (await client.get(put)).json() == whole.json()
    made = await client.post(post, data={"upload": digest, "note": "n"})
    assert made.status_code == 201 and made.json()["number"] == 1
    both = await client.post(post, data={"upload": digest}, files={"source": ("s.tar", data)})
    assert both.status_code == 422
    assert (await client.post(post)).status_code == 422


async def test_hostile_uploads(client: httpx.AsyncClient) -> None:
    digest = digest_of(b"abc")
    assert (await client.get("/api/v1/uploads/nonsense")).status_code == 422
    tampered = await client.put(f"/api/v1/uploads/{digest}", params={"offset": 0, "size": 3}, content=b"abd")
    assert tampered.status_code == 422 and tampered.json()["code"] == "tampered"
    longer = await client.put(f"/api/v1/uploads/{digest}", params={"offset": 0, "size": 3}, content=b"abcd")
    assert longer.status_code == 422 and "longer" in longer.text
    huge = await client.put(f"/api/v1/uploads/{digest}", params={"offset": 0, "size": 1 << 50}, content=b"a")
    assert huge.status_code == 422 and "max_upload_bytes" in huge.text
    no_tar = await client.put(f"/api/v1/uploads/{digest}", params={"offset": 0, "size": 3}, content=b"abc")
    assert no_tar.json()["complete"]
    refused = await client.post("/api/v1/models/digits/versions", data={"upload": digest})
    assert refused.status_code == 422 and "readable tar" in refused.text


async def test_an_older_controller_takes_the_whole(tmp_path: Path) -> None:
    """One that knows no uploads gets the multipart form."""
    asked: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(f"{request.method} {request.url.path}")
        if "/uploads/" in request.url.path:
            return httpx.Response(404, json={"code": "not_found", "detail": "Not Found"})
        body = request.read()
        assert b'name="source"' in body
        return httpx.Response(
            201, json={"id": "v-1", "model": "m", "number": 1, "state": "ingesting", "created_ms": 1}
        )

    (tmp_path / "s.tar").write_bytes(source_tar())
    client = Client("http://old", transport=httpx.MockTransport(answer))
    assert (await asyncio.to_thread(client.push, "m", tmp_path / "s.tar")).number == 1
    assert asked[1] == "POST /api/v1/models/m/versions"
