"""Downloads of the examples' data sets go on where they broke off, and are checked."""

from __future__ import annotations

import hashlib
from pathlib import Path

import public_data
import pytest
from public_data import Archive, DamagedDownload, DataSet, fetch

from tests.examples.conftest import Server

CONTENT = bytes(range(256)) * 3000


def archive(server: Server, content: bytes = CONTENT) -> Archive:
    server.files["set.zip"] = content
    return Archive(f"{server.address}/set.zip", hashlib.md5(CONTENT, usedforsecurity=False).hexdigest())


def test_an_archive_is_fetched_and_checked(server: Server, tmp_path: Path) -> None:
    path = fetch(archive(server), tmp_path / "cache")
    assert path.read_bytes() == CONTENT
    assert [entry.name for entry in path.parent.iterdir()] == ["set.zip"]


def test_a_broken_download_goes_on_where_it_was(server: Server, tmp_path: Path) -> None:
    wanted = archive(server)
    server.break_at.append(1000)
    with pytest.raises(OSError, match="run it again to go on"):
        fetch(wanted, tmp_path)
    assert (tmp_path / "set.zip.part").stat().st_size == 1000
    assert fetch(wanted, tmp_path).read_bytes() == CONTENT
    assert server.ranges == ["", "bytes=1000-"]


def test_a_download_that_only_lacked_its_last_step_is_taken(server: Server, tmp_path: Path) -> None:
    (tmp_path / "set.zip.part").write_bytes(CONTENT)
    assert fetch(archive(server), tmp_path).read_bytes() == CONTENT


def test_a_damaged_archive_is_removed(server: Server, tmp_path: Path) -> None:
    with pytest.raises(DamagedDownload, match="another MD5"):
        fetch(archive(server, b"an error page"), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_missing_archive_and_a_dead_server_say_what_to_do(server: Server, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="404"):
        fetch(Archive(f"{server.address}/other.zip"), tmp_path)
    with pytest.raises(OSError, match="run it again"):
        fetch(Archive("http://127.0.0.1:9/set.zip"), tmp_path)


def test_a_set_is_packed_once_beside_the_example(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("SHOAL_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    calls = []

    def pack(places: list[Path], target: Path) -> None:
        calls.append(public_data.locate(places, "set.zip"))
        target.write_bytes(b"packed")

    found = DataSet("set.npz", "A set", "example.org", "x.py", (archive(server),), pack)
    here = tmp_path / "here"
    here.mkdir()
    with pytest.raises(FileNotFoundError, match=r"x\.py --download.*example\.org.*SHOAL_DATA"):
        found.ensure(here, download=False)
    assert found.ensure(here, download=True) == here / "set.npz"
    assert found.ensure(here, download=True) == here / "set.npz"
    assert calls == [tmp_path / "cache" / "shoal-examples" / "set.zip"]
    assert capsys.readouterr().err == "packing set.npz\n"


def test_archives_that_are_there_are_packed_without_a_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, here = tmp_path / "data", tmp_path / "here"
    data.mkdir()
    here.mkdir()
    (data / "set.zip").write_bytes(b"archive")
    monkeypatch.setenv("SHOAL_DATA", str(data))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    unreachable = Archive("http://127.0.0.1:9/set.zip")

    def pack(places: list[Path], target: Path) -> None:
        target.write_bytes(public_data.locate(places, "set.zip").read_bytes())

    found = DataSet("set.npz", "A set", "example.org", "x.py", (unreachable,), pack)
    assert found.ensure(here, download=True).read_bytes() == b"archive"
