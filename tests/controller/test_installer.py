"""Door 8441 and the installer on a board: what it checks, what it survives, what it hands over."""

from __future__ import annotations

import ast
import asyncio
import base64
import contextlib
import hashlib
import json
import os
import platform
import signal
import socket
import sys
import zlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from shoal_controller import installer, wheels
from shoal_controller.gateway import installer as door
from shoal_controller.http import HttpDoor
from shoal_protos import __version__
from shoal_protos.errors import NotFound

from . import tiny

OLD_PYTHONS = [
    path
    for version in ("3.6", "3.8")
    for path in sorted((Path.home() / ".pyenv/versions").glob(f"{version}.*/bin/python"))[:1]
]

# Loads an installer, changes one function of it, runs it: `kill STEP` ends it at the start of a step.
DRIVER = """
import os, signal, sys, time, types
path, change, *arguments = sys.argv[1:]
module = types.ModuleType("installer")
exec(compile(open(path).read(), path, "exec"), module.__dict__)
kind, _, rest = change.partition(" ")
if kind == "kill":
    setattr(module, rest, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
elif kind == "set":
    name, _, value = rest.partition("=")
    setattr(module, name, eval(value))
elif kind == "clock":
    time.time, gmtime = lambda: float(rest), time.strftime
    time.strftime = lambda form: gmtime(form, time.gmtime(float(rest)))
try:
    module.main(arguments)
except module.Refused as refusal:
    print(f"shoal installer: {refusal}", file=sys.stderr)
    sys.exit(1)
"""


def token_of(**body: Any) -> str:
    data = json.dumps({"enrol": ["10.1.2.3:8442"], "agents": ["10.1.2.3:8443"], **body}).encode()
    data += zlib.crc32(data).to_bytes(4, "big")
    return "shj_" + base64.urlsafe_b64encode(data).rstrip(b"=").decode()


TOKEN = token_of(secret="s")


@dataclass
class Done:
    code: int
    out: str
    err: str

    @property
    def handed(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.out.splitlines()[-1])
        return found


@dataclass
class Board:
    """A device: a prefix of its own, and the door that it installs from."""

    root: Path
    store: Path
    url: str
    digest: str

    @property
    def prefix(self) -> Path:
        return self.root / "prefix"

    async def run(
        self, change: str = "", *, python: str = sys.executable, url: str = "", **variables: str
    ) -> Done:
        path = self.store / installer.FOLDER / f"{self.digest}.py"
        environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(self.root),
            "SHOAL_PREFIX": str(self.prefix),
            "SHOAL_JOIN_TOKEN": TOKEN,
            **variables,
        }
        start = ["-I", "-c", DRIVER, str(path), change] if change else ["-I", str(path)]
        process = await asyncio.create_subprocess_exec(
            python,
            *start,
            url or self.url,
            env=environment,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        out, err = await asyncio.wait_for(process.communicate(), 90)
        return Done(process.returncode or 0, out.decode(), err.decode())


@pytest.fixture
def store(tmp_path: Path) -> Path:
    directory = tmp_path / "wheels"
    directory.mkdir()
    return directory


@pytest.fixture
def ranges() -> list[str]:
    """The ranges that the door was asked for."""
    return []


@pytest.fixture
async def url(store: Path, ranges: list[str]) -> AsyncIterator[str]:
    application = door.create(store)

    async def watched(scope: Any, receive: Any, send: Any) -> None:
        ranges.extend(value.decode() for name, value in scope.get("headers", ()) if name == b"range")
        await application(scope, receive, send)

    opened = HttpDoor(watched, "--installer-port", connections=door.MAX_CONNECTIONS)
    port = await opened.start("127.0.0.1", 0)
    yield f"http://127.0.0.1:{port}"
    await opened.stop()


@pytest.fixture
def board(tmp_path: Path, store: Path, url: str) -> Board:
    tiny.installable(store, platform=platform.machine())
    (tmp_path / "board").mkdir()
    return Board(tmp_path / "board", store, url, installer.publish(store))


Changed = Callable[..., Board]


@pytest.fixture
def changed(board: Board) -> Changed:
    """The board with another set in the installer: `changed(glibc="2.99")`."""

    def change(**facts: Any) -> Board:
        (present,) = wheels.sets(board.store)
        tiny.write_set(board.store, replace(present, **facts))
        if {"platform", "python"} & set(facts):
            (board.store / present.name / "set.json").unlink()
        return replace(board, digest=installer.publish(board.store))

    return change


# ---------------------------------------------------------------------------- rendering


class TestRendering:
    def test_the_same_sets_make_the_same_text(self, store: Path) -> None:
        made = tiny.installable(store, platform="aarch64")
        text = installer.render([made])
        assert text == installer.render(wheels.sets(store))
        ast.parse(text, feature_version=(3, 6))
        digest = installer.publish(store)
        assert digest == hashlib.sha256(text.encode()).hexdigest()
        assert installer.find(store, digest).read_text() == text
        for file in made.files:
            assert file.sha256 in text

    def test_without_wheels_there_is_no_installer(self, store: Path) -> None:
        with pytest.raises(NotFound, match="shoal controller wheels add"):
            installer.publish(store)

    def test_the_line_is_one_line_with_the_digest_and_no_secret_in_an_argument(self) -> None:
        line = installer.line("http://10.0.0.9:8441", "ab" * 32, "shj_x")
        assert "\n" not in line and line.count("ab" * 32) == 3
        assert "SHOAL_JOIN_TOKEN=shj_x python3 -I $f http://10.0.0.9:8441" in line
        assert "curl" in line and "wget" in line

    @pytest.mark.parametrize("name", ["", "../set.json", "0" * 63, "0" * 64])
    def test_only_digests_are_looked_up(self, store: Path, name: str) -> None:
        with pytest.raises(NotFound):
            installer.find(store, name)


# ---------------------------------------------------------------------------- the door


class TestDoor:
    async def test_it_gives_installer_and_wheels_and_nothing_else(self, board: Board) -> None:
        (made,) = wheels.sets(board.store)
        wheel = made.files[0]
        async with httpx.AsyncClient(base_url=board.url) as client:
            front = await client.get("/")
            assert front.status_code == 200 and "shoal token create --join" in front.text
            text = await client.get(f"/installer/{board.digest}")
            assert hashlib.sha256(text.content).hexdigest() == board.digest
            path = f"/wheels/{wheel.sha256}/{wheel.name}"
            head = await client.head(path)
            assert head.status_code == 200 and int(head.headers["content-length"]) == wheel.size
            part = await client.get(path, headers={"Range": "bytes=10-"})
            assert part.status_code == 206 and len(part.content) == wheel.size - 10
            for answer in (front, text, head, part):
                assert answer.headers["x-shoal-installer"] == __version__
            for other in (
                "/wheels",
                "/wheels/",
                f"/wheels/{wheel.sha256}",
                f"/wheels/{wheel.sha256}/other.whl",
                f"/wheels/{'0' * 64}/{wheel.name}",
                f"/wheels/{wheel.sha256}/..%2f..%2fset.json",
                f"/installer/{'0' * 64}",
                "/installer/../set.json",
                f"/{made.name}/set.json",
                "/api/v1/devices",
                "/metrics",
            ):
                assert (await client.get(other)).status_code == 404, other
            gone = await client.get(f"/installer/{'0' * 64}")
            assert "shoal token create --join" in gone.text

    @pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS"])
    async def test_it_only_reads(self, board: Board, method: str) -> None:
        async with httpx.AsyncClient(base_url=board.url) as client:
            assert (await client.request(method, f"/installer/{board.digest}")).status_code == 405

    async def test_one_address_cannot_take_all_of_it(self, store: Path) -> None:
        entered, release = 0, asyncio.Event()

        async def slow(scope: Any, receive: Any, send: Any) -> None:
            nonlocal entered
            entered += 1
            await release.wait()
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b""})

        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(door.Bounded(slow)), base_url="http://door"
        ) as client:
            waiting = [asyncio.create_task(client.get("/")) for _ in range(door.MAX_TRANSFERS_AN_ADDRESS)]
            while entered < door.MAX_TRANSFERS_AN_ADDRESS:
                await asyncio.sleep(0)
            refused = await client.get("/")
            assert refused.status_code == 503 and refused.headers["retry-after"]
            release.set()
            assert {answer.status_code for answer in await asyncio.gather(*waiting)} == {200}
            assert (await client.get("/")).status_code == 200

    async def test_a_client_that_takes_nothing_is_let_go(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(door, "STALLED_S", 0.01)

        async def answer(scope: Any, receive: Any, send: Any) -> None:
            await send({"type": "http.response.start", "status": 200, "headers": []})

        async def stuck(message: Any) -> None:
            await asyncio.Event().wait()

        async def receive() -> Any:
            return {"type": "http.request"}

        with pytest.raises(TimeoutError):
            await door.Bounded(answer)({"type": "http", "client": ("10.0.0.1", 1)}, receive, stuck)


# ---------------------------------------------------------------------------- on the board


class TestInstalling:
    async def test_it_installs_and_hands_over(self, tmp_path: Path, store: Path, url: str) -> None:
        tiny.installable(store, platform=platform.machine(), real_pip=True)
        board = Board(tmp_path / "board", store, url, installer.publish(store))
        board.root.mkdir()
        done = await board.run()
        assert done.code == 0, done.err
        prefix = board.prefix
        handed = done.handed
        assert handed["arguments"] == ["join", "--service", "auto", "--wait", "60", "--prefix", str(prefix)]
        assert handed["script"] == str(prefix / "agent/current/bin/shoal-agent")
        assert handed["SHOAL_JOIN_TOKEN"] == TOKEN and "10.1.2.3" in handed["no_grpc_proxy"]
        assert handed["prefix"] == str(prefix / "agent" / __version__)  # the renamed environment
        assert os.readlink(prefix / "agent/current") == __version__
        facts = json.loads((prefix / "install.json").read_text())
        assert facts == {
            "service": "none",
            "unit": "",
            "version": __version__,
            "extras": ["onnxruntime"],
            "source": board.url,
            "command": str(prefix / "bin/shoal-agent"),
        }
        assert sorted(path.name for path in prefix.iterdir()) == ["agent", "bin", "install.json"]
        assert os.readlink(prefix / "bin/shoal-agent") == str(prefix / "agent/current/bin/shoal-agent")
        assert not list(prefix.rglob("tests")) and list(prefix.rglob("numpy/core/a.py"))
        assert TOKEN not in done.err
        # The same line again fetches nothing, and keeps what `join` noted about its service.
        path = prefix / "install.json"
        path.write_text(json.dumps({**facts, "service": "user", "unit": "/u"}))
        again = await board.run(url="http://127.0.0.1:9")  # nobody there, and nobody is asked
        assert again.code == 0 and "Fetching" not in again.err
        facts = json.loads(path.read_text())
        assert (facts["service"], facts["unit"]) == ("user", "/u")

    async def test_another_program_of_that_name_stays(self, board: Board) -> None:
        other = board.prefix / "bin/shoal-agent"
        other.parent.mkdir(parents=True)
        other.write_text("mine")
        done = await board.run()
        assert done.code == 0, done.err
        assert other.read_text() == "mine" and "another program" in done.err

    async def test_killed_at_any_step_the_same_line_finishes_it(self, board: Board) -> None:
        """One board that loses power at each step in turn, and at last does not."""
        for step in (
            "fetch",
            "make_environment",
            "install_wheels",
            "leave_out",
            "finish_environment",
            "adopt",
            "switch",
            "write_facts",
            "hand_over",
        ):
            done = await board.run(f"kill {step}")
            assert done.code == -signal.SIGKILL, (step, done.err)
        done = await board.run()
        assert done.code == 0 and done.handed["arguments"][0] == "join"
        assert sorted(path.name for path in (board.prefix / "agent").iterdir()) == [__version__, "current"]

    async def test_a_new_build_of_the_same_version_takes_the_place_of_the_old(self, board: Board) -> None:
        assert (await board.run()).code == 0
        (present,) = wheels.sets(board.store)
        folder = board.store / present.name
        tiny.wheel(folder, "extra", "1")
        path = folder / "extra-1-py3-none-any.whl"
        more = wheels.SetFile(path.name, wheels.digest(path), path.stat().st_size)
        tiny.write_set(board.store, replace(present, files=(*present.files, more)))
        newer = replace(board, digest=installer.publish(board.store))
        final = board.prefix / "agent" / __version__
        killed = await newer.run(
            "set adopt=lambda fresh, final: (os.rename(final, final + '.old'), os._exit(9))"
        )
        assert killed.code != 0 and not final.exists()  # between two renames
        done = await newer.run()
        assert done.code == 0 and list(final.rglob("extra/__init__.py"))
        assert not final.with_name(f"{__version__}.old").exists()

    async def test_half_a_wheel_is_completed_and_a_damaged_one_fetched_anew(
        self, board: Board, ranges: list[str]
    ) -> None:
        (made,) = wheels.sets(board.store)
        half, damaged = made.files
        data = wheels.find_file(board.store, half.sha256, half.name).read_bytes()
        download = board.prefix / "download"
        download.mkdir(parents=True)
        (download / f"{half.name}.part").write_bytes(data[:1000])
        (download / f"{damaged.name}.part").write_bytes(b"x" * (damaged.size + 5))
        # Neither a clock in 1970 nor a proxy of the environment is an obstacle.
        done = await board.run("clock 86400", http_proxy="http://127.0.0.1:9")
        assert done.code == 0, done.err
        assert ranges == ["bytes=1000-"]
        assert "clock says 1970" in done.err
        assert "The proxy in http_proxy is not used" in done.err

    async def test_an_emulator_stands_before_every_command(self, board: Board) -> None:
        log = board.root / "log"
        emulator = board.root / "emulator"
        emulator.write_text(f'#!/bin/sh\necho "$1" >> {log}\nexec "$@"\n')
        emulator.chmod(0o755)
        done = await board.run(SHOAL_COMMAND_PREFIX=f"{emulator}")
        assert done.code == 0, done.err
        assert done.handed["SHOAL_AGENT_CHILD_PREFIX"] == str(emulator)
        started = log.read_text().split()
        assert started == [
            str(board.prefix / "agent" / f"{__version__}.new/bin/python"),
            str(board.prefix / "agent/current/bin/python"),
        ]


class TestRefusing:
    async def refused(self, board: Board, *words: str, change: str = "", **options: Any) -> None:
        done = await board.run(change, **options)
        assert done.code == 1, done.err
        for word in words:
            assert word in done.err, done.err
        assert "Traceback" not in done.err
        assert not (board.prefix / "agent/current").exists()

    @pytest.mark.parametrize("token", ["", "abc", TOKEN[:-3], TOKEN[:20] + "x" + TOKEN[21:], "shj_"])
    async def test_a_mistyped_token_before_anything_is_fetched(self, board: Board, token: str) -> None:
        await self.refused(board, "token", "Copy the line again", SHOAL_JOIN_TOKEN=token)
        assert not board.prefix.exists()

    async def test_the_wrong_architecture(self, changed: Changed) -> None:
        board = changed(platform="riscv64")
        python = f"{sys.version_info[0]}.{sys.version_info[1]}"
        await self.refused(
            board,
            f"This machine is {platform.machine()}; the controller has wheels for riscv64",
            f"shoal controller wheels add --platform {platform.machine()} --python {python}",
        )

    async def test_32_bit_systems(self, board: Board) -> None:
        await self.refused(board, "armv7l", "install a 64-bit system", change="set machine=lambda: 'armv7l'")

    async def test_a_python_without_a_set(self, changed: Changed) -> None:
        await self.refused(changed(python="3.19"), "wheels for Python 3.19", "shoal controller wheels add")

    async def test_an_old_glibc(self, changed: Changed) -> None:
        await self.refused(changed(glibc="2.99"), "need 2.99", "--glibc 2.")

    async def test_another_c_library(self, board: Board) -> None:
        await self.refused(board, "has no glibc", change="set glibc=lambda: None")

    async def test_no_space(self, changed: Changed) -> None:
        await self.refused(changed(installed_bytes=10**15), "not enough space", "SHOAL_PREFIX=DIR")

    async def test_a_place_that_cannot_be_written(self, board: Board) -> None:
        (board.root / "file").write_text("")
        board = replace(board, root=board.root / "file")
        await self.refused(board, "cannot be written", "SHOAL_PREFIX=DIR")

    async def test_nobody_answers(self, board: Board) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            url = f"http://127.0.0.1:{free.getsockname()[1]}"
        await self.refused(board, f"no answer from {url}", "refused", change="set PATIENCE=1", url=url)

    async def test_somebody_else_answers(self, board: Board) -> None:
        async def proxy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with contextlib.suppress(ConnectionError):
                await reader.readuntil(b"\r\n\r\n")
                writer.write(b"HTTP/1.1 200 OK\r\nServer: squid\r\nContent-Length: 7\r\n\r\nsign in")
                await writer.drain()
            writer.close()

        server = await asyncio.start_server(proxy, "127.0.0.1", 0)
        async with server:
            url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
            await self.refused(
                board, url, "it is not the controller", "server squid", change="set PATIENCE=1", url=url
            )

    async def test_changed_bytes(self, board: Board) -> None:
        (made,) = wheels.sets(board.store)
        path = board.store / made.name / made.files[0].name
        path.write_bytes(bytes(len(path.read_bytes())))
        await self.refused(board, "SHA-256 differs", "shoal token create --join")

    async def test_wheels_that_are_gone(self, board: Board) -> None:
        (made,) = wheels.sets(board.store)
        (board.store / made.name / made.files[0].name).unlink()
        await self.refused(board, "has these wheels no more", "shoal token create --join")

    async def test_two_at_once(self, board: Board) -> None:
        import fcntl

        (board.prefix / "agent").mkdir(parents=True)
        folder = os.open(board.prefix / "agent", os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            await self.refused(board, "Another installer works on")
        finally:
            os.close(folder)

    async def test_no_address(self, board: Board) -> None:
        await self.refused(board, "http://CONTROLLER:8441", url="10.0.0.1:8441")

    @pytest.mark.skipif(not OLD_PYTHONS, reason="no old Python here")
    async def test_an_old_python_names_a_newer_one(self, board: Board) -> None:
        for python in OLD_PYTHONS:
            newer = str(Path(sys.executable).parent)
            await self.refused(
                board, "needs CPython 3.10 or newer; this is cpython 3.", python=str(python), PATH=newer
            )
