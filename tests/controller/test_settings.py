"""Flag > environment > file > default; the data directory; one controller at a time."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from shoal_controller.app import Controller, take_lock
from shoal_controller.settings import Settings, prepare_home
from shoal_protos.errors import Conflict, Denied, InvalidInput, Unavailable


def test_the_nearer_source_wins(home: Path) -> None:
    (home / "controller.toml").write_text("http_port = 1\nagents_port = 2\nenrolment_port = 3\nui = false\n")
    environment = {"SHOAL_AGENTS_PORT": "20", "SHOAL_ENROLMENT_PORT": "30", "SHOAL_UI": "yes"}
    settings = Settings.load({"home": home, "enrolment_port": 300, "fleet": None}, environment)
    assert (settings.http_port, settings.agents_port, settings.enrolment_port) == (1, 20, 300)
    assert settings.ui is True and settings.fleet == ""
    assert settings.database_url == f"sqlite:///{home}/shoal.db"


def test_home_comes_from_the_environment(home: Path) -> None:
    assert Settings.load(environment={"SHOAL_HOME": str(home)}).home == home


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"http_port": 70000}, "http_port must be a port"),
        ({"http_port": "many"}, "http_port must be int.*command line"),
        ({"fleet": "My Fleet"}, "not a fleet name"),
        ({"heartbeat_seconds": 0}, "heartbeat_seconds must be above 0"),
        ({"colour": 3}, "no setting 'colour'"),
    ],
)
def test_a_wrong_value_names_itself_and_where_it_came_from(home: Path, flags: Any, message: Any) -> None:
    with pytest.raises(InvalidInput, match=message):
        Settings.load({"home": home, **flags}, {})


def test_a_wrong_file_is_refused(home: Path) -> None:
    (home / "controller.toml").write_text("colour = 3")
    with pytest.raises(InvalidInput, match=r"controller.toml: there is no setting 'colour'"):
        Settings.load({"home": home}, {})
    (home / "controller.toml").write_text("colour")
    with pytest.raises(InvalidInput, match="cannot be read"):
        Settings.load({"home": home}, {})


def test_a_directory_that_others_can_read_is_refused(home: Path) -> None:
    home.chmod(0o755)
    with pytest.raises(Denied, match=rf"mode 755.*chmod 700 {home}"):
        prepare_home(Settings.load({"home": home}, {}))


def test_a_new_directory_is_private(tmp_path: Path) -> None:
    settings = Settings.load({"home": tmp_path / "new" / "shoal"}, {})
    prepare_home(settings)
    assert settings.home.stat().st_mode & 0o777 == 0o700


def test_a_directory_that_cannot_be_made_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(Denied, match="--home"):
        prepare_home(Settings.load({"home": tmp_path / "file" / "shoal"}, {}))


def test_a_second_controller_is_refused_with_the_holders_process(
    opened: Controller, settings: Settings
) -> None:
    with pytest.raises(Conflict, match=rf"process {os.getpid()}.*--home"):
        Controller(settings).open()


def test_the_lock_of_a_killed_controller_does_not_hold(home: Path, settings: Settings) -> None:
    prepare_home(settings)
    script = "import sys,time;from pathlib import Path;from shoal_controller.app import take_lock;" + (
        "l=take_lock(Path(sys.argv[1]));print('held',flush=True);time.sleep(60)"
    )
    path = settings.run_dir / "controller.lock"
    other = subprocess.Popen([sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE)
    assert other.stdout is not None and other.stdout.readline() == b"held\n"
    with pytest.raises(Conflict, match=f"process {other.pid}"):
        take_lock(path)
    other.kill()
    other.communicate()
    take_lock(path).close()


async def test_a_taken_port_is_named_with_its_option(settings: Settings) -> None:
    for field, option in (
        ("http_port", "--http-port"),
        ("enrolment_port", "--enrolment-port"),
        ("agents_port", "--agents-port"),
    ):
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            port = taken.getsockname()[1]
            controller = Controller(dataclasses.replace(settings, **{field: port}))
            with pytest.raises(Unavailable, match=rf"Port {port}.*{option}"):
                await controller.start()
    # Nothing was left open: the directory is free again.
    again = Controller(settings)
    await again.start()
    await again.stop()


async def test_free_ports_are_written_down_and_found_again(settings: Settings) -> None:
    """Agents know the address: a controller that comes back must be where it was."""
    first = Controller(settings)
    await first.start()
    ports = dict(first.ports)
    await first.stop()
    written = json.loads(settings.ports_file.read_text())
    assert {name: written[name] for name in ports} == ports and written["host"] == "127.0.0.1"
    second = Controller(settings)
    await second.start()
    assert second.ports == ports
    await second.stop()


async def test_a_directory_of_another_fleet_is_refused(controller: Controller, settings: Settings) -> None:
    await controller.stop()
    other = Settings.load({"home": settings.home, "fleet": "other"}, {})
    with pytest.raises(Conflict, match="belongs to the fleet 'test'"):
        Controller(other).open()
    again = Controller(Settings.load({"home": settings.home}, {}))
    assert again.open().settings.fleet == "test"
    again.close()
