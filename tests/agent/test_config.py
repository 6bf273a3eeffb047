from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from shoal_agent import config
from shoal_agent.config import Config, Paths, resolve
from shoal_protos.errors import Denied, InvalidInput


def test_flag_beats_environment_beats_file_beats_default(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"http_port": 1, "grpc_port": 1, "metrics_port": 1}))
    environ = {"SHOAL_AGENT_HTTP_PORT": "2", "SHOAL_AGENT_GRPC_PORT": "2"}
    found = resolve({"state_dir": str(tmp_path), "http_port": 3, "grpc_port": None}, environ)
    assert (found.http_port, found.grpc_port, found.metrics_port) == (3, 2, 1)
    assert found.heartbeat_seconds == Config(tmp_path).heartbeat_seconds == 20


@pytest.mark.parametrize("environ", [{"SHOAL_RUNTIMES": "a, b"}, {"SHOAL_AGENT_RUNTIMES": "a,b"}])
def test_runtimes(tmp_path: Path, environ: dict[str, str]) -> None:
    assert resolve({"state_dir": tmp_path}, environ).runtimes == ("a", "b")
    config.remember(Paths(tmp_path), runtimes=["c"])
    assert resolve({"state_dir": tmp_path}, {}).runtimes == ("c",)


@pytest.mark.parametrize(
    ("where", "value", "says"),
    [
        ("file", "{", "cannot be read"),
        ("file", "[]", "one JSON object"),
        ("file", '{"htp_port": 1}', "unknown setting 'htp_port'"),
        ("file", '{"http_port": "x"}', "must be a number"),
        ("file", '{"host": 3}', "must be an address"),
        ("flag", 70000, "the command line: http_port must be between 0 and 65535"),
        ("environment", "-1", "the environment"),
    ],
)
def test_bad_settings_name_where_they_stand(tmp_path: Path, where: str, value: Any, says: str) -> None:
    flags: dict[str, Any] = {"state_dir": tmp_path}
    environ = {}
    if where == "file":
        (tmp_path / "config.json").write_text(value)
    elif where == "flag":
        flags["http_port"] = value
    else:
        environ["SHOAL_AGENT_HTTP_PORT"] = value
    with pytest.raises(InvalidInput, match=says):
        resolve(flags, environ)


def test_default_directory_follows_the_environment(tmp_path: Path) -> None:
    assert config.default_state_dir({"SHOAL_AGENT_DIR": str(tmp_path)}) == tmp_path


def test_state_directory_is_closed_to_others(tmp_path: Path) -> None:
    paths = Paths(tmp_path / "state")
    paths.create()
    assert paths.root.stat().st_mode & 0o777 == 0o700
    assert all(room.stat().st_mode & 0o777 == 0o700 for room in paths.root.iterdir())
    paths.root.chmod(0o750)
    with pytest.raises(Denied, match="chmod 700"):
        paths.create()


def test_an_empty_open_directory_is_closed_instead(tmp_path: Path) -> None:
    root = tmp_path / "fresh"
    root.mkdir(mode=0o755)
    Paths(root).create()
    assert root.stat().st_mode & 0o777 == 0o700


def test_a_file_in_the_place_of_the_state_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidInput, match="is no directory") as refused:
        resolve({"state_dir": tmp_path / "file"}, {})
    assert "--state-dir" in refused.value.remedy
