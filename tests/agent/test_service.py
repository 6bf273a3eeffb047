from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from shoal_agent import notify, service
from shoal_agent.config import Config, Paths
from shoal_agent.service import Service
from shoal_protos.errors import InvalidInput
from tests.agent.board import script


def tools(path: Path, answer: str) -> dict[str, str]:
    script(path / "systemctl", f"echo {answer}")
    return {"PATH": str(path), "HOME": str(path)}


@pytest.mark.parametrize(
    ("uid", "systemd", "answer", "expected"),
    [
        (0, True, "running", "system"),
        (0, False, "running", "direct"),
        (1000, True, "degraded", "user"),
        (1000, True, "offline", "direct"),
        (1000, False, "", "direct"),
    ],
)
def test_auto_takes_what_the_machine_offers(
    uid: int, systemd: bool, answer: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environ = tools(tmp_path / "bin", answer)
    monkeypatch.setenv("PATH", environ["PATH"] + ":" + os.environ["PATH"])
    monkeypatch.setattr(os, "geteuid", lambda: uid)
    runs = tmp_path / "run"
    if systemd:
        runs.mkdir()
    monkeypatch.setattr(service, "SYSTEMD_RUNS", runs)
    assert service.choose("auto", environ) == expected
    assert service.choose("none", environ) == "none"
    if expected == "direct":
        with pytest.raises(InvalidInput):
            service.choose("user" if uid else "system", tools(tmp_path / "bin", "offline"))
    if uid:
        with pytest.raises(InvalidInput, match="root"):
            service.choose("system", environ)


def test_where_units_belong() -> None:
    assert service.unit_path("system", {}) == "/etc/systemd/system/shoal-agent.service"
    home = {"HOME": "/home/ann"}
    assert service.unit_path("user", home) == "/home/ann/.config/systemd/user/shoal-agent.service"
    chosen = service.unit_path("user", {**home, "XDG_CONFIG_HOME": "/cfg"})
    assert chosen == "/cfg/systemd/user/shoal-agent.service"
    assert service.unit_path("direct", home) == ""


def test_the_command_goes_by_the_link_and_through_the_emulator(tmp_path: Path) -> None:
    config = Config(tmp_path, child_prefix="/bin/true -L /arm")
    words = service.command(config, "/opt/shoal-agent")
    assert words[:4] == ["/bin/true", "-L", "/arm", "/opt/shoal-agent/agent/current/bin/python"]
    assert words[4:] == ["-m", "shoal_agent", "run", "--state-dir", str(tmp_path)]
    line = service.boot_line(config, Service("direct", prefix="/opt/shoal-agent"))
    assert line.startswith("/bin/true -L /arm /opt/shoal-agent/agent/current/bin/python -m shoal_agent ")


def test_the_choice_is_remembered_also_for_the_installer(tmp_path: Path) -> None:
    paths = Paths(tmp_path / "state")
    paths.root.mkdir()
    assert service.stored(paths) is None
    (tmp_path / "install.json").write_text(json.dumps({"version": "1", "service": "none", "unit": ""}))
    service.store(paths, Service("direct", "", str(tmp_path)))
    assert service.stored(paths) == Service("direct", "", str(tmp_path))
    assert json.loads((tmp_path / "install.json").read_text()) == {
        "version": "1", "service": "none", "unit": "",
    }  # fmt: skip
    (paths.root / "service.json").write_text("{")
    assert service.stored(paths) is None


def test_notifying(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    notify.tell(notify.READY)  # nobody asked
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "none"))
    notify.tell(notify.READY)  # nobody listens
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(tmp_path / "socket"))
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "socket"))
        notify.tell(notify.READY)
        assert listener.recv(100) == b"READY=1"
    for usec, pid, expected in (("120000000", "", 120.0), ("120000000", "1", 0.0), ("x", "", 0.0)):
        monkeypatch.setenv("WATCHDOG_USEC", usec)
        monkeypatch.setenv("WATCHDOG_PID", pid or str(os.getpid()))
        assert notify.watchdog_s() == expected
