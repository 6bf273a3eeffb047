from __future__ import annotations

import asyncio
import shutil
import stat
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from shoal_agent import joining, keys, leaving, vault
from shoal_agent.config import Config
from shoal_agent.fs import RealFs
from shoal_agent.identity import IdentityStore
from shoal_agent.link import enrolment
from shoal_agent.lock import locked
from shoal_protos.errors import (
    Conflict,
    Denied,
    InvalidInput,
    NotFound,
    ShoalError,
    TamperedData,
    Unavailable,
)
from shoal_protos.tokens import encode
from tests.agent.fake_controller import FakeController, Token


@pytest.fixture
async def controller() -> AsyncIterator[FakeController]:
    async with FakeController() as opened:
        yield opened


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return Config(tmp_path / "device", runtimes=("onnxruntime",))


def store(config: Config) -> IdentityStore:
    return IdentityStore(config.paths.identity, RealFs())


async def test_joining(controller: FakeController, config: Config) -> None:
    joined = await joining.join(config, controller.token(), "bench")
    identity, profile_class = joined.identity, joined.profile_class
    assert (identity.fleet, identity.device, identity.name) == ("test", "d-0001", "bench")
    assert identity.agent_addresses == (controller.agents_address,)
    assert profile_class.endswith("+onnxruntime")
    assert keys.belongs(identity.key_pem, identity.certificate_pem)
    assert store(config).load() == identity
    assert "KEY" not in repr(identity)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in config.paths.identity.iterdir()}
    assert modes == {0o600}


async def test_joining_twice_with_one_key_is_one_device_and_one_use(
    controller: FakeController, config: Config
) -> None:
    token = controller.token(uses=1)
    first = (await joining.join(config, token, None)).identity
    again = (await joining.join(config, token, None)).identity
    assert (first.device, first.key_pem) == (again.device, again.key_pem)
    assert controller.tokens["secret"].uses == 0


@pytest.mark.parametrize(
    ("token", "says"),
    [(None, "not known"), (Token(0), "used up"), (Token(5, time.time() - 1), "expired")],
)
async def test_refused_tokens_say_why(
    controller: FakeController, config: Config, token: Token | None, says: str
) -> None:
    text = controller.token()
    controller.tokens.clear()
    if token is not None:
        controller.tokens["secret"] = token
    with pytest.raises(Denied, match=says):
        await joining.join(config, text, None)
    assert not store(config).exists()


async def test_unreachable_addresses_are_named(controller: FakeController, config: Config) -> None:
    token = controller.token(enrolment_addresses=("127.0.0.1:1", "127.0.0.1:2"))
    with pytest.raises(Unavailable) as error:
        await joining.join(config, token, None)
    for address in token.enrolment_addresses:
        assert f"{address}: connection refused" in str(error.value)
    token = controller.token(enrolment_addresses=("127.0.0.1:1", controller.enrolment_address))
    assert (await joining.join(config, token, None)).identity.device  # the next one answers


async def test_a_stranger_at_the_address_is_not_given_the_secret(
    controller: FakeController, config: Config
) -> None:
    async with FakeController("test") as stranger:
        token = controller.token(enrolment_addresses=(stranger.enrolment_address,))
        with pytest.raises(Unavailable, match="not this fleet's"):
            await joining.join(config, token, None)
        assert not stranger.devices


async def test_a_device_of_another_fleet_must_leave_first(controller: FakeController, config: Config) -> None:
    await joining.join(config, controller.token(), None)
    async with FakeController("other") as other:
        with pytest.raises(Conflict, match="leave"):
            await joining.join(config, other.token(), None)
        assert leaving.leave(config, offline=True).device == "d-0001"
        assert (await joining.join(config, other.token(), None)).identity.fleet == "other"


def test_what_never_joined(config: Config) -> None:
    config.paths.create()
    with pytest.raises(NotFound, match="shoal token create --join"):
        store(config).load()
    with pytest.raises(NotFound):
        leaving.leave(config, offline=True)


async def test_damaged_files_say_join_again(controller: FakeController, config: Config) -> None:
    await joining.join(config, controller.token(), None)
    for name in ("key.pem", "cert.pem", "join.json"):
        path = config.paths.identity / name
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(TamperedData, match=r"[Jj]oin again"):
            store(config).load()
        path.write_bytes(whole)
    store(config).load()


class Killed(BaseException):
    pass


class KillingFs(RealFs):
    def __init__(self, left: int) -> None:
        self.left = left

    def _tick(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise Killed

    def write(self, path: Path, data: bytes) -> None:
        self._tick()
        super().write(path, data[:10] if self.left == 0 else data)

    def replace(self, source: Path, target: Path) -> None:
        self._tick()
        super().replace(source, target)


async def test_killed_at_any_moment_of_a_renewal_the_identity_is_whole(
    controller: FakeController, config: Config, tmp_path: Path
) -> None:
    old = (await joining.join(config, controller.token(), None)).identity
    for at in range(30):
        directory = tmp_path / f"kill-{at}"
        shutil.copytree(config.paths.identity, directory)
        killed = False
        try:
            await enrolment.renew_stored(IdentityStore(directory, KillingFs(at)))
        except Killed:
            killed = True
        found = IdentityStore(directory, RealFs()).load()
        assert keys.belongs(found.key_pem, found.certificate_pem)
        renewed = await enrolment.renew_stored(IdentityStore(directory, RealFs()))
        assert renewed.device == old.device and renewed.key_pem != old.key_pem
        if not killed:
            return
    raise AssertionError("a renewal takes more operations than expected")


async def test_revoked_device_is_not_renewed(controller: FakeController, config: Config) -> None:
    identity = (await joining.join(config, controller.token(), None)).identity
    controller.revoke(identity.device)
    with pytest.raises(Denied, match="revoked"):
        await vault.renew(config.paths.identity)
    assert store(config).load() == identity


async def test_renewal_time_is_two_thirds_of_life(controller: FakeController, config: Config) -> None:
    identity = (await joining.join(config, controller.token(), None)).identity
    now = time.time() * 1000
    share = (identity.renew_at_ms - now) / (identity.expires_ms - now)
    assert share == pytest.approx(2 / 3, abs=0.01)


def test_tokens_come_from_file_or_environment_never_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    controller = FakeController()
    controller.enrolment_port = controller.agents_port = 1
    token = controller.token()
    (tmp_path / "t").write_text(encode(token) + "\n")
    assert joining.read_token(str(tmp_path / "t"), {}) == token
    assert joining.read_token(None, {"SHOAL_JOIN_TOKEN": encode(token)}) == token
    with pytest.raises(InvalidInput, match="cannot be read"):
        joining.read_token(str(tmp_path / "none"), {})
    with (tmp_path / "t").open() as stream:
        monkeypatch.setattr("sys.stdin", stream)
        with pytest.raises(InvalidInput, match="--token-file"):
            joining.read_token(None, {})
        assert joining.read_token("-", {}) == token


async def test_one_agent_a_directory(controller: FakeController, config: Config) -> None:
    await joining.join(config, controller.token(), None)
    assert joining.status(config)["running"] is False
    with locked(config.paths):
        with pytest.raises(Conflict, match="Another agent"):
            await joining.join(config, controller.token(), None)
        with pytest.raises(ShoalError):
            leaving.leave(config, offline=True)
        assert joining.status(config)["running"] is True


async def test_a_cancelled_join_leaves_no_lock(controller: FakeController, config: Config) -> None:
    token = controller.token(enrolment_addresses=("127.0.0.1:1",))
    task = asyncio.ensure_future(joining.join(config, token, None))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises((asyncio.CancelledError, Unavailable)):
        await task
    with locked(config.paths):
        pass
