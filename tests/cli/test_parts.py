"""Spans of time, contexts, packing, supervision, the event stream."""

from __future__ import annotations

import contextlib
import json
import tarfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal_controller.cli import connect, durations, packing
from shoal_controller.cli.supervision import LONGEST_DELAY_S, STEADY_S, Restarts
from shoal_controller.client import parse_events
from shoal_protos.errors import InvalidInput, NotFound
from tests.cli.conftest import Shoal


class TestDurations:
    @pytest.mark.parametrize(
        ("text", "seconds"), [("90", 90), ("30s", 30), ("1h30m", 5400), ("2d", 172800), ("10ms", 0.01)]
    )
    def test_parse(self, text: str, seconds: float) -> None:
        assert durations.parse(text) == seconds

    @given(st.text(max_size=12))
    def test_anything_else_is_refused(self, text: str) -> None:
        with contextlib.suppress(InvalidInput):
            assert durations.parse(text) >= 0

    @given(st.integers(0, 10**7))
    def test_text_can_be_read_again(self, seconds: int) -> None:
        assert durations.parse(durations.text(seconds)) <= seconds


class TestContexts:
    def test_order(self, tmp_path: Path) -> None:
        home = tmp_path / "home"
        (home / "run").mkdir(parents=True)
        (home / "run" / "ports.json").write_text(json.dumps({"http": 4321, "enrolment": 1, "agents": 2}))
        config = tmp_path / "shoal" / "config.toml"
        config.parent.mkdir()
        config.write_text(
            'current = "lab"\n[contexts.lab]\nurl = "http://lab"\n[contexts.far]\nurl = "http://far"\n'
        )
        base = {"XDG_CONFIG_HOME": str(tmp_path), "HOME": str(tmp_path)}
        everything = {**base, "SHOAL_URL": "http://variable", "SHOAL_HOME": str(home)}
        assert connect.resolve({"url": "http://flag", "context": "far"}, everything).url == "http://flag"
        assert connect.resolve({"context": "far"}, everything).url == "http://far"
        assert connect.resolve({}, everything).url == "http://variable"
        assert connect.resolve({}, {**base, "SHOAL_HOME": str(home)}).url == "http://127.0.0.1:4321"
        assert connect.resolve({}, base).url == "http://lab"
        with pytest.raises(NotFound, match="context 'moon'"):
            connect.resolve({"context": "moon"}, base)

    def test_token_comes_from_a_file_or_the_environment(self, tmp_path: Path) -> None:
        (tmp_path / "token").write_text("abc\n")
        base = {"XDG_CONFIG_HOME": str(tmp_path), "SHOAL_URL": "http://x", "SHOAL_TOKEN": "variable"}
        assert connect.resolve({}, base).token == "variable"
        assert connect.resolve({"token_file": str(tmp_path / "token")}, base).token == "abc"

    def test_add_use_remove(self, shoal: Shoal, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
        monkeypatch.delenv("SHOAL_URL", raising=False)
        assert shoal("context", "add", "lab", "http://lab:8080").code == 0
        assert shoal("context", "add", "far", "http://far:8080").code == 0
        assert shoal("context", "use", "lab").code == 0
        rows = json.loads(shoal("context", "list", "--json").out)
        assert [(row["name"], row["current"]) for row in rows] == [("far", False), ("lab", True)]
        assert (tmp_path / "shoal" / "config.toml").stat().st_mode & 0o777 == 0o600
        assert shoal("context", "remove", "lab").code == 0
        assert shoal("context", "use", "lab").code == 2

    def test_a_broken_file_is_named(self, tmp_path: Path) -> None:
        path = tmp_path / "config.toml"
        path.write_text("current = [")
        with pytest.raises(InvalidInput, match=r"config\.toml"):
            connect.read_config(path)


class TestPacking:
    def test_files_are_read_without_importing(self) -> None:
        source = "raise RuntimeError\nclass T:\n    files: tuple = ('a.npz', 'b.txt')\n"
        assert packing.declared_files(source, "t.py") == ["a.npz", "b.txt"]

    @pytest.mark.parametrize("value", ["glob('*')", "'one'", "[1]", "[name]"])
    def test_other_values_are_refused(self, value: str) -> None:
        with pytest.raises(InvalidInput, match="plain list"):
            packing.declared_files(f"class T:\n    files = {value}\n", "t.py")

    def test_broken_python_names_the_line(self) -> None:
        with pytest.raises(InvalidInput, match="line 2"):
            packing.declared_files("x = 1\nclass\n", "t.py")

    @pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/../../b"])
    def test_nothing_outside_the_folder(self, tmp_path: Path, name: str) -> None:
        (tmp_path / "t.py").write_text(f"class T:\n    files = [{name!r}]\n")
        with pytest.raises(InvalidInput, match="outside"):
            packing.pack(tmp_path / "t.py", tmp_path / "t.tar")

    def test_missing_files_are_named(self, tmp_path: Path) -> None:
        (tmp_path / "t.py").write_text("class T:\n    files = ['gone.npz']\n")
        with pytest.raises(InvalidInput, match=r"gone\.npz"):
            packing.pack(tmp_path / "t.py", tmp_path / "t.tar")
        with pytest.raises(InvalidInput, match="cannot be read"):
            packing.pack(tmp_path / "none.py", tmp_path / "t.tar")

    def test_same_files_same_bytes(self, tmp_path: Path) -> None:
        (tmp_path / "t.py").write_text("class T:\n    files = ['data']\n")
        (tmp_path / "data").mkdir()
        (tmp_path / "data" / "x.npz").write_bytes(b"1")
        (tmp_path / "t.pt").write_bytes(b"weights")
        for name in ("one.tar", "two.tar"):
            assert packing.pack(tmp_path / "t.py", tmp_path / name, ["t.pt"]) == [
                "t.py",
                "data/x.npz",
                "t.pt",
            ]
        assert (tmp_path / "one.tar").read_bytes() == (tmp_path / "two.tar").read_bytes()
        with tarfile.open(tmp_path / "one.tar") as archive:
            assert next((m.name, m.uid, m.mtime) for m in archive.getmembers()) == ("t.py", 0, 0)


class TestRestarts:
    @given(st.lists(st.integers(0, 200), max_size=30))
    def test_delays_are_bounded_and_reset(self, lives: list[int]) -> None:
        state, now = Restarts(), 0.0
        for life in lives:
            state = state.begun(now)
            now += life
            state = state.died(now)
            assert 0 < state.due - now <= LONGEST_DELAY_S + 1e-6
            assert (state.deaths == 1) or life < STEADY_S
            now = state.due


class TestStream:
    def test_events(self) -> None:
        lines = [": hello", "event: tick", 'data: {"a":', "data: 1}", "", "data: plain", "", "event: lost"]
        assert list(parse_events(iter(lines))) == [
            {"event": "tick", "data": {"a": 1}},
            {"event": "message", "data": "plain"},
        ]

    @given(st.lists(st.text(max_size=20), max_size=20))
    def test_no_line_breaks_it(self, lines: list[str]) -> None:
        for event in parse_events(iter(lines)):
            assert set(event) == {"event", "data"}


class TestOptionalFiles:
    def test_they_travel_when_they_are_there(self, tmp_path: Path) -> None:
        (tmp_path / "t.py").write_text("class T:\n    files = ['a']\n    optional_files = ('t.pt', 'none')\n")
        (tmp_path / "a").write_bytes(b"1")
        assert packing.pack(tmp_path / "t.py", tmp_path / "t.tar") == ["t.py", "a"]
        (tmp_path / "t.pt").write_bytes(b"2")
        assert packing.pack(tmp_path / "t.py", tmp_path / "t.tar") == ["t.py", "a", "t.pt"]
