"""What doctor says of broken machines and networks: every remedy has its fault here."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import ssl
import threading
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from shoal_agent import cli, doctor, doors, joining, platforms, profile
from shoal_agent.checks import FAILED, OK, UNMEASURED, WARNING, Check
from shoal_agent.config import Config
from shoal_agent.doctor import Patient
from shoal_agent.doors import Door
from shoal_protos.tokens import encode
from shoal_protos.v1 import desired_pb2
from tests.agent.fake_controller import Authority, FakeController, _pem


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return Config(tmp_path / "state", http_port=0, grpc_port=0, metrics_port=0, runtimes=("onnxruntime",))


@pytest.fixture
def nobody(config: Config) -> Patient:
    return doctor.patient(config, {})


@pytest.fixture
async def joined(config: Config) -> AsyncIterator[tuple[FakeController, Config]]:
    async with FakeController() as controller:
        await joining.join(config, controller.token(), "bench")
        yield controller, config


def one(found: list[Check]) -> Check:
    assert len(found) == 1, found
    return found[0]


def named(checks: list[Check], part: str) -> Check:
    return next(check for check in checks if part in check.name)


# ---------------------------------------------------------------------------- as a whole


def test_before_joining(config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    state = str(config.state_dir)
    assert cli.main(["doctor", "--state-dir", state, "--json"]) in (0, 1)  # 8000 may be taken here
    value = json.loads(capsys.readouterr().out)
    assert set(value) == {"checks", "facts", "transitions"}
    by_name = {check["name"]: check for check in value["checks"]}
    assert (
        by_name["certificate"]["state"] == UNMEASURED
        and "shoal-agent join" in by_name["certificate"]["remedy"]
    )
    assert by_name["controller"]["state"] == UNMEASURED and "--token-file" in by_name["controller"]["remedy"]
    assert by_name["runtimes"]["state"] == OK
    assert not config.state_dir.exists(), "looking changes nothing"
    assert all(set(check) == {"name", "state", "found", "remedy"} for check in value["checks"])


async def test_a_joined_device(joined: tuple[FakeController, Config]) -> None:
    controller, config = joined
    checks = await asyncio.to_thread(doctor.examine, doctor.patient(config, {}))
    assert named(checks, f"agents door {controller.agents_address}").state == OK
    assert named(checks, f"enrolment door {controller.enrolment_address}").state == OK
    assert named(checks, "certificate").state == OK
    assert named(checks, "service").state == FAILED and "shoal-agent run" in named(checks, "service").remedy
    assert [check.name for check in checks][:3] == ["state directory", "disk", "memory"]
    await controller.stop()
    checks = await asyncio.to_thread(doctor.examine, doctor.patient(config, {}))
    refused = named(checks, "agents door")
    assert refused.state == FAILED and "127.0.0.1 refused the connection" in refused.found
    assert "shoal up --lan" in refused.remedy


async def test_a_token_says_where_to_knock(
    config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async with FakeController() as controller:
        (tmp_path / "token").write_text(encode(controller.token()))
        arguments = ["doctor", "--token-file", str(tmp_path / "token"), "--state-dir", str(config.state_dir)]
        await asyncio.to_thread(cli.main, arguments)
    assert f"enrolment door {controller.enrolment_address}" in capsys.readouterr().out


def test_a_check_that_fails_hides_no_other(nobody: Patient, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(who: Patient) -> list[Check]:
        raise RuntimeError("boom")

    monkeypatch.setattr(doctor, "_QUICK", {**doctor._QUICK, "disk": broken})
    checks = doctor.examine(nobody)
    assert named(checks, "disk").state == UNMEASURED and "boom" in named(checks, "disk").found
    assert named(checks, "memory").state in (OK, WARNING)


def test_lines_are_colored_only_when_asked() -> None:
    checks = [Check("disk", FAILED, "full", "Free some."), Check("a", OK, "fine")]
    plain = doctor.lines(checks, color=False)
    assert plain[0].split() == ["failed", "disk", "full"] and plain[1].strip() == "-> Free some."
    assert "\033" not in "".join(plain) and "\033[31m" in doctor.lines(checks, color=True)[0]


# ---------------------------------------------------------------------------- the machine


def test_state_directory(config: Config, nobody: Patient, monkeypatch: pytest.MonkeyPatch) -> None:
    assert one(doctor.state_directory(nobody)).found.endswith("not made yet")
    config.paths.create()
    assert one(doctor.state_directory(nobody)).state == OK
    config.state_dir.chmod(0o755)
    opened = one(doctor.state_directory(nobody))
    assert opened.state == FAILED and "chmod 700" in opened.remedy
    config.state_dir.chmod(0o700)
    with monkeypatch.context() as patch:
        patch.setattr(os, "geteuid", lambda: 4242)
        assert one(doctor.state_directory(nobody)).state == FAILED
    with monkeypatch.context() as patch:
        patch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_flag=os.ST_RDONLY))
        worn = one(doctor.state_directory(nobody))
    assert "read-only" in worn.found and "card" in worn.remedy


@pytest.mark.parametrize(
    ("free", "inodes", "state"),
    [
        (10_000_000_000, 10**6, OK),
        (200_000_000, 10**6, WARNING),
        (1_000_000, 10**6, FAILED),
        (10**10, 3, FAILED),
    ],
)
def test_disk(nobody: Patient, monkeypatch: pytest.MonkeyPatch, free: int, inodes: int, state: str) -> None:
    facts = SimpleNamespace(f_bavail=free, f_frsize=1, f_blocks=2 * free, f_files=10**6, f_favail=inodes)
    monkeypatch.setattr(os, "statvfs", lambda path: facts)
    check = one(doctor.disk(nobody))
    assert check.state == state and bool(check.remedy) == (state != OK)


def test_clock(nobody: Patient, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "not heard yet" in one(doctor.clock(nobody)).found
    assert one(doctor.clock(replace(nobody, offset_ms=400))).state == OK
    behind = one(doctor.clock(replace(nobody, offset_ms=-2 * 3_600_000)))
    assert behind.state == WARNING and "2 h behind the controller's" in behind.found
    monkeypatch.setattr(time, "time", lambda: 86_400.0)
    early = one(doctor.clock(nobody))
    assert early.state == FAILED and "1970-01-02" in early.found and "before this software" in early.found


def test_runtimes(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    assert one(platforms.runtimes(config)).found.startswith("onnxruntime ")
    assert one(platforms.runtimes(replace(config, runtimes=("nope",)))).state == FAILED
    with monkeypatch.context() as patch:
        patch.setitem(platforms._MODULES, "onnxruntime", "raise ImportError('libgomp is missing')")  # type: ignore[arg-type]
        broken = one(platforms.runtimes(config))
    assert (
        broken.state == FAILED
        and "libgomp is missing" in broken.found
        and "shoal[onnxruntime]" in broken.remedy
    )
    monkeypatch.setattr(profile, "runtime_versions", lambda only=None: {})
    none = one(platforms.runtimes(config))
    assert none.state == FAILED and "pip install 'shoal[onnxruntime]'" in none.remedy
    monkeypatch.setattr(platforms, "fitting_extras", lambda *facts: [])
    assert "64-bit" in one(platforms.runtimes(config)).remedy


@pytest.mark.parametrize(
    ("architecture", "libc", "expected"),
    [
        ("x86_64", (2, 31), ["onnxruntime", "openvino", "litert"]),
        ("aarch64", (2, 36), ["onnxruntime", "openvino", "litert"]),
        ("aarch64", (2, 31), ["onnxruntime", "litert"]),
        ("aarch64", (2, 17), []),
        ("armv7l", (2, 36), []),
    ],
)
def test_which_extras_fit(architecture: str, libc: tuple[int, int], expected: list[str]) -> None:
    assert platforms.fitting_extras(architecture, (3, 11), libc) == expected


def test_temperature_and_power(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert one(platforms.temperature(tmp_path)).state == UNMEASURED
    zone, firmware = (
        tmp_path / "sys/class/thermal/thermal_zone0",
        tmp_path / "sys/devices/platform/soc/soc:firmware",
    )
    zone.mkdir(parents=True)
    firmware.mkdir(parents=True)
    for celsius, bits, state, word in (
        (45, "0", OK, "45"), (85, "0", WARNING, "85"), (45, "50005", WARNING, "under-voltage, throttled"),
        (45, "50000", WARNING, "since the start: under-voltage"),
    ):  # fmt: skip
        (zone / "temp").write_text(f"{celsius}000\n")
        (firmware / "get_throttled").write_text(bits)
        check = one(platforms.temperature(tmp_path))
        assert check.state == state and word in check.found


# ---------------------------------------------------------------------------- the network


class Listener:
    """A server that answers every connection in one way."""

    def __init__(self, answer: bytes = b"", context: ssl.SSLContext | None = None) -> None:
        self._answer, self._context = answer, context
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._socket.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._socket.accept()
                threading.Thread(target=self._one, args=(connection,), daemon=True).start()

    def _one(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            if self._context is not None:
                with self._context.wrap_socket(connection, server_side=True) as channel:
                    channel.recv(100)
                return
            connection.recv(1000)
            if self._answer:
                connection.sendall(self._answer)
            else:
                time.sleep(3)

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def authority() -> Authority:
    return Authority("test")


@pytest.fixture
def listening() -> Iterator[Any]:
    opened: list[Listener] = []

    def make(**options: Any) -> Listener:
        opened.append(Listener(**options))
        return opened[-1]

    yield make
    for item in opened:
        item.close()


def knock(authority: Authority, address: str, limit_s: float = 1.0) -> Check:
    door = Door("agents", address, "test", _pem(authority.certificate).decode())
    return one(doors.check([door], limit_s))


def test_a_captive_portal(authority: Authority, listening: Any) -> None:
    answer = b"HTTP/1.1 302 Found\r\nLocation: http://hotel.example/login\r\n\r\n"
    found = knock(authority, listening(answer=answer).address)
    assert (
        found.state == FAILED
        and "http://hotel.example/login" in found.found
        and "captive portal" in found.remedy
    )


def test_a_web_server_on_the_port(authority: Authority, listening: Any) -> None:
    found = knock(authority, listening(answer=b"HTTP/1.1 200 OK\r\n\r\n").address)
    assert "plain HTTP" in found.found and "8443" in found.remedy


def test_something_that_says_nothing(authority: Authority, listening: Any) -> None:
    found = knock(authority, listening().address)
    assert found.state == FAILED and "speaks no TLS" in found.found


def test_a_proxy_that_opens_tls(authority: Authority, listening: Any, tmp_path: Path) -> None:
    proxy = Authority("corporate")
    key, certificate = proxy.door()
    (tmp_path / "both").write_bytes(key + certificate)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "both")
    found = knock(authority, listening(context=context).address)
    assert found.state == FAILED and "CN=corporate CA" in found.found and "proxy" in found.remedy


def test_an_address_that_is_only_a_hint_is_no_failure() -> None:
    """A token holds every address of the controller: on a board not all of them can answer."""

    def door(address: str, name: str = "agents") -> Door:
        return Door(name, address, "lab", "")

    def answer(one: Door, state: str) -> Check:
        return Check(f"{one.name} door {one.address}", state, "what was found", "" if state == OK else "mend")

    lan, name, loop = door("192.168.1.20:8443"), door("laptop.local:8443"), door("127.0.0.1:8443")
    other = door("192.168.1.20:8442", "enrolment")
    asked = [lan, name, loop, other]

    told = doors.weigh(
        asked, [answer(lan, OK), answer(name, FAILED), answer(loop, FAILED), answer(other, OK)]
    )
    assert [check.state for check in told] == [OK, UNMEASURED, OK], "loopback is left out"
    assert "another address answers" in told[1].found and not told[1].remedy

    told = doors.weigh(asked, [*(answer(one, FAILED) for one in asked[:3]), answer(other, OK)])
    assert [check.state for check in told] == [FAILED, FAILED, OK], "no agents' door answers"
    assert all(check.remedy for check in told[:2])

    assert doors.weigh([loop], [answer(loop, FAILED)])[0].state == FAILED, "the only one known"
    assert len(doors.weigh([lan, loop], [answer(lan, FAILED), answer(loop, OK)])) == 2


def test_names_and_ports(authority: Authority, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:

        def missing(*arguments: Any, **options: Any) -> Any:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

        patch.setattr(socket, "getaddrinfo", missing)
        unknown = knock(authority, "laptop.local:8443")
        assert "laptop.local cannot be resolved" in unknown.found and "DNS" in unknown.remedy
    with monkeypatch.context() as patch:

        def slow(*arguments: Any, **options: Any) -> list[Any]:
            time.sleep(1.0)
            return []

        patch.setattr(socket, "getaddrinfo", slow)
        hanging = knock(authority, "laptop.local:8443", limit_s=0.1)
        assert hanging.state == FAILED and "not resolved within" in hanging.found
    with monkeypatch.context() as patch:

        def silent(*arguments: Any, **options: Any) -> Any:
            raise TimeoutError("timed out")

        patch.setattr(socket, "create_connection", silent)
        lost = knock(authority, "127.0.0.1:8443")
        assert "127.0.0.1 did not answer" in lost.found and "another address" in lost.remedy


@pytest.mark.parametrize(
    ("environ", "state", "word"),
    [
        ({}, OK, "no proxy"),
        ({"https_proxy": "http://p:3128"}, WARNING, "no_proxy=10.0.0.5"),
        ({"HTTPS_PROXY": "http://ann:secret@p:3128"}, WARNING, "//...@p"),
        ({"https_proxy": "http://p:3128", "no_proxy": "localhost,10.0.0.0/8"}, OK, "not used"),
        ({"grpc_proxy": "http://p:3128", "NO_PROXY": "*"}, OK, "not used"),
        ({"http_proxy": "http://p:3128", "no_grpc_proxy": "10.0.0.5", "no_proxy": "b"}, OK, "not used"),
    ],
)
def test_proxies(environ: dict[str, str], state: str, word: str) -> None:
    check = doors.check_proxies(["10.0.0.5:8443"], environ)
    assert check.state == state and word in f"{check.found} {check.remedy}"
    assert "secret" not in f"{check.found} {check.remedy}"


# ---------------------------------------------------------------------------- the agent


async def test_certificates(joined: tuple[FakeController, Config], monkeypatch: pytest.MonkeyPatch) -> None:
    who = doctor.patient(joined[1], {})
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 25 * 86_400)
    late = one(doctor.certificate(who))
    assert late.state == WARNING and "should have been renewed" in late.found
    monkeypatch.setattr(time, "time", lambda: now + 40 * 86_400)
    expired = one(doctor.certificate(who))
    assert expired.state == FAILED and "expired 10 days ago" in expired.found
    right = replace(who, offset_ms=40 * 86_400_000)  # the clock is wrong, the certificate is not
    assert one(doctor.certificate(right)).state == OK
    (joined[1].paths.identity / "join.json").write_text("{")
    assert one(doctor.certificate(doctor.patient(joined[1], {}))).state == FAILED


def test_a_port_taken_by_somebody_else(config: Config) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        check = one(doctor.ports(doctor.patient(replace(config, http_port=port), {})))
    assert check.state == FAILED and check.name == f"port {port} (http)" and "--http-port" in check.remedy
    assert f"process {os.getpid()}" in check.found or "another program" in check.found


def test_bundles_and_failures(config: Config, nobody: Patient) -> None:
    assert one(doctor.bundles(nobody)).state == UNMEASURED and one(doctor.failures(nobody)).state == OK
    config.paths.create()
    bundle = "sha256:" + "a" * 64
    state = desired_pb2.DesiredState(
        generation=7, placements=[desired_pb2.Placement(endpoint="signs", bundle=bundle)]
    )
    config.paths.desired.write_bytes(
        desired_pb2.Signed(payload=state.SerializeToString()).SerializeToString()
    )
    whole = config.paths.desired.read_bytes()
    config.paths.desired.write_bytes(b"\xff" * 9)
    damaged = one(doctor.bundles(nobody))
    assert damaged.state == WARNING and "is damaged" in damaged.found and "anew" in damaged.remedy
    config.paths.desired.write_bytes(whole)
    missing = one(doctor.bundles(nobody))
    assert missing.state == WARNING and "aaaaaaaaaaaa for signs" in missing.found
    saved = {
        "placements": [
            {
                "endpoint": "signs",
                "wanted": {"bundle": bundle},
                "reason": "probe: golden mismatch",
                "detail": "",
            }
        ]
    }
    (config.paths.state / "placements.json").write_text(json.dumps(saved))
    failure = one(doctor.failures(nobody))
    assert failure.state == WARNING and "probe: golden mismatch" in failure.found
    looping = replace(nobody, pid=1, status={"crash_loop": "the server ended 3 times in 300 s"})
    assert named(doctor.failures(looping), "server").state == FAILED
