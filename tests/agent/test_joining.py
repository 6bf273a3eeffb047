"""Joining and leaving as a person does it: the command line, a service, power cuts on the way."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from shoal_agent import leaving, service
from shoal_protos.errors import InvalidInput
from tests.agent.board import PORTS, Board
from tests.agent.fake_controller import FakeController

KILLED = -signal.SIGKILL


@pytest.fixture
async def board(tmp_path: Path) -> AsyncIterator[Board]:
    async with FakeController() as controller:
        made = Board(controller, tmp_path)
        yield made
        made.end()


pytestmark = pytest.mark.skipif(
    service.SYSTEMD_RUNS.is_dir(), reason="would install a unit on this machine's own systemd"
)


async def test_without_systemd_the_agent_is_started_directly(board: Board) -> None:
    code, output = await board.agent("join", "--token-file", board.token(), "--name", "kitchen", *PORTS)
    assert code == 0, output
    device = board.controller.devices["d-0001"]
    assert device.heartbeats, "exit 0 only after the first accepted heartbeat"
    status = board.status
    for words in (
        "as kitchen (d-0001)", f"class       {status['profile_class']}", "measured",
        "systemd does not run here", "service start --state-dir", f"http {status['ports']['http']}",
        str(board.paths.logs), "Next: shoal-agent status",
    ):  # fmt: skip
        assert words in output
    first = board.pid
    assert first and os.getsid(first) == first, "a session of its own survives the shell"
    assert board.environ.get("SHOAL_JOIN_TOKEN") is None
    assert (await board.agent("service", "status"))[0] == 0

    # Joining again with a new token: the same device, new addresses, what was set stays set.
    moved = board.controller.agents_address.replace("127.0.0.1", "localhost")
    code, output = await board.agent(
        "join", "--token-file", board.token(secret="another", agent_addresses=(moved,))
    )
    assert code == 0, output
    assert json.loads((board.paths.identity / "join.json").read_text())["agent_addresses"][0] == moved
    assert "(d-0001)" in output and list(board.controller.devices) == ["d-0001"]
    assert board.pid not in (0, first)
    assert json.loads((board.paths.config).read_text())["http_port"] == 0

    code, output = await board.agent("service", "stop")
    assert code == 0 and not board.pid, output
    code, output = await board.agent("leave", "--yes", "--reason", "moved out")
    assert code == 0, output
    assert board.controller.left == {"d-0001": "moved out"}
    assert not (board.paths.identity / "key.pem").exists() and board.paths.config.exists()
    code, output = await board.agent("leave", "--yes")
    assert code == 1 and "nothing to leave" in output


async def test_a_user_unit_and_purging_it(board: Board) -> None:
    unit, prefix = board.with_systemd(linger=False), board.with_prefix()
    outside = board.home / "precious"
    outside.mkdir()
    (outside / "photo").write_text("mine")
    (prefix / "agent/0.1.0/link").symlink_to(outside)
    code, output = await board.agent(
        "join", "--service", "user", "--prefix", str(prefix), "--token-file", board.token(), *PORTS
    )
    assert code == 0, output
    assert str(unit) in output and "loginctl enable-linger" in output and "journalctl --user" in output
    text = unit.read_text()
    assert f"ExecStart={prefix}/agent/current/bin/python -m shoal_agent run" in text
    installed = json.loads((prefix / "install.json").read_text())
    assert installed == {
        "version": "0.1.0", "extras": ["onnxruntime"], "service": "user", "unit": str(unit),
    }  # fmt: skip
    assert (board.home / "systemd/enabled").read_text() == "enable"
    assert (await board.agent("service", "status"))[1].count("active, enabled") == 1
    (board.paths.store / "escape").symlink_to(outside)

    command, agent = board.home / "shoal-agent", prefix / "agent/current/bin/shoal-agent"
    command.symlink_to(agent)
    (prefix / "install.json").write_text(json.dumps({**installed, "command": str(command)}))

    code, output = await board.agent("leave", "--purge", "--yes")
    assert code == 0, output
    assert board.controller.left and not board.pid
    assert not command.is_symlink() and not unit.exists() and not prefix.exists() and not board.state.exists()
    assert (outside / "photo").read_text() == "mine" and prefix.parent.is_dir()
    assert (board.home / "systemd/enabled").read_text() == "disable"


async def test_power_cuts_while_joining(board: Board) -> None:
    """Each cut is followed by the same command, cut at the next step; at last it goes through."""
    board.with_systemd()
    prefix = board.with_prefix()
    join = ("join", "--service", "user", "--prefix", str(prefix), "--token-file", board.token(uses=1), *PORTS)
    for fault in (
        "keys:new_key_pem", "identity:IdentityStore.save", "joining:remember", "leaving:withdraw",
        "service:store+", "service:install+", "service:start+",
    ):  # fmt: skip
        code, output = await board.agent(*join, fault=fault)
        assert code == KILLED, (fault, output)
    code, output = await board.agent(*join)
    assert code == 0, output
    assert list(board.controller.devices) == ["d-0001"] and board.controller.tokens["secret"].uses == 0
    # Once it was let in the token is not needed any more.
    code, output = await board.agent("join", "--service", "user")
    assert code == 0 and "Joined already" in output, output


async def test_power_cuts_while_leaving(board: Board) -> None:
    unit, prefix = board.with_systemd(), board.with_prefix()
    code, output = await board.agent(
        "join", "--service", "user", "--prefix", str(prefix), "--token-file", board.token(), *PORTS
    )
    assert code == 0, output
    leave = ("leave", "--purge", "--yes")
    for fault in (
        "leaving:_tell", "leaving:_tell+", "leaving:_write+", "service:stop+",
        "service:uninstall+", "leaving:forget+", "leaving:_purge",
    ):  # fmt: skip
        code, output = await board.agent(*leave, fault=fault)
        assert code == KILLED, (fault, output)
    code, output = await board.agent(*leave)
    assert code == 0 and "d-0001 has left" in output, output
    assert not unit.exists() and not prefix.exists() and not board.state.exists() and not board.pid


async def test_power_cut_between_state_directory_and_installation(board: Board) -> None:
    prefix = board.with_prefix()
    join = ("join", "--service", "none", "--prefix", str(prefix), "--token-file", board.token())
    assert (await board.agent(*join))[0] == 0
    leave = ("leave", "--purge", "--yes", "--prefix", str(prefix))
    code, _ = await board.agent(*leave, fault="leaving:_remove_empty+")
    assert code == KILLED and not board.state.exists() and prefix.exists()
    code, output = await board.agent(*leave)
    assert code == 0 and not prefix.exists(), output


async def started_again(board: Board, seconds: float = 30.0) -> None:
    """Until a directly started agent holds its lock: a busy machine takes a while to get there."""
    async with asyncio.timeout(seconds):
        while not board.pid:
            await asyncio.sleep(0.05)


async def test_no_heartbeat_says_why_and_joining_again_finishes(board: Board) -> None:
    token = board.token()
    board.controller.heartbeat_replies = False
    code, output = await board.agent("join", "--token-file", token, "--wait", "3", *PORTS)
    assert code == 1 and "No heartbeat was accepted within 3 s" in output, output
    board.controller.heartbeat_replies = True
    await board.controller.stop()
    code, output = await board.agent("join", "--wait", "2")
    assert code == 4, output
    assert "agents door" in output and "refused the connection" in output and "run join again" in output
    code, output = await board.agent("join", "--token-file", token)
    assert code == 4 and "enrolment door" in output, output
    await started_again(board)  # what ran goes on
    await board.controller.start()
    code, output = await board.agent("join")
    assert code == 0 and "first heartbeat accepted" in output, output


async def test_an_agent_that_cannot_start_is_said_at_once(board: Board) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        flags = ("--http-port", "0", "--grpc-port", "0", "--metrics-port", port)
        code, output = await board.agent("join", "--token-file", board.token(), *flags)
    assert code == 1 and f"metrics port {port}" in output and f"port {port} (metrics)" in output, output


async def test_a_foreground_agent_is_in_the_way(board: Board) -> None:
    token = board.token()
    assert (await board.agent("join", "--service", "none", "--token-file", token, *PORTS))[0] == 0
    with board.paths.lock.open("w") as stream:
        import fcntl

        fcntl.flock(stream, fcntl.LOCK_EX)
        stream.write(str(os.getpid()))
        stream.flush()
        for command in (("join", "--token-file", token), ("leave", "--yes")):
            code, output = await board.agent(*command)
            assert code == 1 and f"process {os.getpid()}" in output, output
    assert not board.controller.left


async def test_an_unreachable_controller_keeps_everything_unless_offline(board: Board) -> None:
    assert (await board.agent("join", "--service", "none", "--token-file", board.token(), *PORTS))[0] == 0
    await board.controller.stop()
    code, output = await board.agent("leave", "--purge", "--yes")
    assert code == 4 and board.controller.agents_address in output, output
    assert (
        "Nothing was removed" in output and "--offline" in output and "shoal device remove d-0001" in output
    )
    assert (board.paths.identity / "key.pem").exists()
    code, output = await board.agent("leave", "--purge", "--yes", "--offline")
    assert code == 0 and "shoal device remove d-0001" in output and not board.state.exists(), output


async def test_what_is_not_the_agents_stays(board: Board) -> None:
    assert (await board.agent("join", "--service", "none", "--token-file", board.token(), *PORTS))[0] == 0
    (board.state / "notes.txt").write_text("mine")
    code, output = await board.agent("leave", "--purge", "--yes")
    assert code == 0 and f"left        {board.state}" in output, output
    assert [path.name for path in board.state.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("prefix", ["/", "/usr", "/opt", "relative/dir", "/usr/../etc/x"])
def test_odd_prefixes_are_refused(prefix: str) -> None:
    with pytest.raises(InvalidInput):
        leaving.check_prefix(Path(prefix))


def test_home_and_foreign_directories_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "people/ann"
    home.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    (home / "install.json").write_text("{}")
    for prefix in (home, home.parent):
        with pytest.raises(InvalidInput):
            leaving.check_prefix(prefix)
    with pytest.raises(InvalidInput, match=r"install\.json"):
        leaving.check_prefix(Path("/var/log"))


async def test_a_wrong_prefix_or_service_changes_nothing(board: Board) -> None:
    token = board.token()
    code, output = await board.agent("join", "--prefix", str(board.home), "--token-file", token)
    assert code == 2 and "no agent under" in output, output
    code, output = await board.agent("join", "--service", "system", "--token-file", token)
    assert code == 2 and ("systemd does not run here" in output or "needs root" in output), output
    assert not board.controller.devices
