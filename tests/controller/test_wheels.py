"""The wheel store: what a set holds, what is refused, what survives an interruption."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from shoal_controller import wheel_closure, wheel_files, wheel_pip, wheels
from shoal_controller.cli.main import main
from shoal_controller.wheel_closure import Target
from shoal_controller.wheel_pip import Source
from shoal_protos import __version__
from shoal_protos.errors import Conflict, InvalidInput, NotFound, Unavailable, Unsupported

from . import tiny

BOARD = Target("aarch64", "3.13")


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "wheels"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny.agent_requirements(tmp_path / "from")


class TestWheelFiles:
    def test_shoals_own_wheel_is_whole_and_always_the_same(self, tmp_path: Path) -> None:
        for name in ("a", "b"):
            (tmp_path / name).mkdir()
        first, second = (wheel_files.own_wheel(tmp_path / name) for name in ("a", "b"))
        assert first.read_bytes() == second.read_bytes()
        found = wheel_files.read(first)
        assert (found.name, found.version, found.glibc) == ("shoal", __version__, (0, 0))
        assert any("pillow" in line and "client" in line for line in found.requires)
        inside = set(zipfile.ZipFile(first).namelist())
        assert {"shoal_agent/supervisor.py", "shoal_protos/v1/desired_pb2.py"} <= inside
        assert f"shoal-{__version__}.dist-info/entry_points.txt" in inside
        assert not any(name.endswith(".pyc") or "__pycache__" in name for name in inside)

    def test_the_installed_pip_becomes_a_wheel_that_runs(self, tmp_path: Path) -> None:
        made = wheel_files.rebuild("pip", tmp_path)
        done = subprocess.run(
            [sys.executable, str(made / "pip"), "--version"], capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0 and made.name in done.stdout

    def test_what_is_not_installed_cannot_be_made(self, tmp_path: Path) -> None:
        with pytest.raises(Unsupported, match="pip install no-such-package"):
            wheel_files.rebuild("no-such-package", tmp_path)

    @pytest.mark.parametrize(
        ("tag", "glibc"),
        [
            ("manylinux_2_28_aarch64", (2, 28)),
            ("manylinux2014_x86_64", (2, 17)),
            ("manylinux1_x86_64", (2, 5)),
            ("any", (0, 0)),
        ],
    )
    def test_tags_name_a_glibc(self, tag: str, glibc: tuple[int, int]) -> None:
        assert wheel_files.glibc_of(tag) == glibc

    def test_half_a_wheel_is_refused(self, tmp_path: Path) -> None:
        path = tiny.wheel(tmp_path, "half", "1.0")
        path.write_bytes(path.read_bytes()[:-20])
        with pytest.raises(InvalidInput, match="not a whole wheel"):
            wheel_files.read(path)


class TestClosure:
    def test_markers_are_judged_by_the_devices_python(self, tmp_path: Path) -> None:
        tiny.wheel(tmp_path, "app", "1", "old; python_version < '3.11'", "arm; platform_machine == 'aarch64'")
        for name in ("old", "arm"):
            tiny.wheel(tmp_path, name, "1")
        files = [wheel_files.read(path) for path in tmp_path.glob("*.whl")]
        assert set(wheel_closure.close(files, ["app"], Target("aarch64", "3.13")).needed) == {"app", "arm"}
        assert set(wheel_closure.close(files, ["app"], Target("x86_64", "3.10")).needed) == {"app", "old"}

    def test_extras_are_followed_and_what_is_missing_is_named(self, tmp_path: Path) -> None:
        tiny.wheel(tmp_path, "app", "1", "base>=2; extra == 'more'", "gone")
        tiny.wheel(tmp_path, "base", "1.9")
        files = [wheel_files.read(path) for path in tmp_path.glob("*.whl")]
        assert wheel_closure.close(files, ["app"], BOARD).missing == ["gone"]
        assert set(wheel_closure.close(files, ["app[more]"], BOARD).missing) == {"gone", "base>=2"}

    def test_what_onnxruntime_never_imports_stays_out(self, folder: Path) -> None:
        files = [wheel_files.read(path) for path in folder.glob("*.whl")]
        found = wheel_closure.close(files, ["onnxruntime"], BOARD)
        assert set(found.needed) == {"onnxruntime", "numpy"} and found.left_out == {"sympy"}


class TestAdding:
    def test_a_set_is_whole_and_names_every_digest(self, store: Path, folder: Path) -> None:
        said: list[str] = []
        made = wheels.add(store, BOARD, source=Source(folder), say=said.append, clock=lambda: 7)
        assert wheels.sets(store) == [made]
        assert (made.name, made.extras, made.added_ms) == ("aarch64-cp313", ("onnxruntime",), 7)
        names = {file.name.partition("-")[0] for file in made.files}
        assert {"shoal", "pip", "onnxruntime", "pillow", "cryptography"} <= names and "sympy" not in names
        for file in made.files:
            path = wheels.find_file(store, file.sha256, file.name)
            assert (wheels.digest(path), path.stat().st_size) == (file.sha256, file.size)
        assert {path.name for path in (store / made.name).iterdir()} == {
            "set.json",
            *(file.name for file in made.files),
        }
        assert said[0].startswith("aarch64-cp313: agent, client, onnxruntime")

    def test_the_present_set_stays_until_the_new_one_is_whole(self, store: Path, folder: Path) -> None:
        before = wheels.add(store, BOARD, source=Source(folder))
        next(folder.glob("uvloop-*")).rename(folder / "hidden")
        (store / before.name / "uvloop-0.23-py3-none-any.whl").unlink()
        with pytest.raises(Unsupported, match=r"no wheel of uvloop.*Put it there"):
            wheels.add(store, BOARD, source=Source(folder))
        assert wheels.sets(store) == [before]

    def test_the_newest_wheel_wins_and_the_old_one_goes(self, store: Path, folder: Path) -> None:
        tiny.wheel(folder, "numpy", "2.5")
        tiny.wheel(folder, "numpy", "2.3")
        made = wheels.add(store, BOARD, source=Source(folder))
        assert [file.name for file in made.files if "numpy" in file.name] == ["numpy-2.5-py3-none-any.whl"]
        back = wheels.add(store, BOARD, source=Source(folder), constraints=["numpy==2.4"])
        assert [file.name for file in back.files if "numpy" in file.name] == ["numpy-2.4-py3-none-any.whl"]

    def test_a_constraint_that_nothing_meets_names_what_does(self, store: Path, folder: Path) -> None:
        with pytest.raises(Unsupported) as refused:
            wheels.add(store, BOARD, source=Source(folder), constraints=["onnxruntime==1.40"])
        assert "no wheel of onnxruntime==1.40 for aarch64 with Python 3.13" in refused.value.message
        assert "--constraint 'onnxruntime==1.32'" in refused.value.remedy

    def test_a_runtime_without_a_wheel_names_one_that_fits(self, store: Path, folder: Path) -> None:
        with pytest.raises(Unsupported) as refused:
            wheels.add(store, BOARD, extras=["litert"], source=Source(folder))
        assert "ai-edge-litert" in refused.value.message
        assert "--extra onnxruntime" in refused.value.remedy

    def test_a_wheel_for_a_newer_glibc_names_it(self, store: Path, folder: Path) -> None:
        plain = next(folder.glob("numpy-*"))
        plain.rename(folder / "numpy-2.4-cp313-cp313-manylinux_2_39_aarch64.whl")
        with pytest.raises(Unsupported, match=r"asks for glibc 2\.39.*--glibc 2\.39"):
            wheels.add(store, BOARD, source=Source(folder))
        made = wheels.add(store, wheels.target("aarch64", "3.13", "2.39"), source=Source(folder))
        assert made.glibc == "2.39"

    def test_32_bit_systems_are_told_the_truth(self, tmp_path: Path) -> None:
        empty = Source(tmp_path)
        text = wheel_pip.remedy("numpy>=1.26", Target("armv7l", "3.13"), empty)
        assert "Put it there" in text  # a folder is asked for what it lacks
        assert "32-bit systems cannot run one" in wheel_pip.no_wheel(Target("armv7l", "3.13"))

    def test_an_unreachable_registry_is_no_missing_wheel(self) -> None:
        output = (
            "WARNING: Retrying: Failed to establish a new connection\n"
            "ERROR: Could not find a version that satisfies the requirement numpy>=1 (from versions: none)\n"
        )
        assert isinstance(wheel_pip.explain(output, BOARD, Source()), Unavailable)

    def test_two_at_once_are_refused(self, store: Path) -> None:
        store.mkdir()
        with wheels.locked(store), pytest.raises(Conflict, match="Another command"), wheels.locked(store):
            raise AssertionError

    @pytest.mark.parametrize(
        ("platform", "python", "glibc", "words"),
        [
            ("../etc", "3.13", "", "not a platform"),
            ("aarch64", "3.9", "", "does not run on Python 3.9"),
            ("aarch64", "three", "", "does not run"),
            ("aarch64", "3.13", "musl", "not a glibc"),
        ],
    )
    def test_impossible_targets_are_refused(self, platform: str, python: str, glibc: str, words: str) -> None:
        with pytest.raises(InvalidInput, match=words):
            wheels.target(platform, python, glibc)

    def test_platforms_have_aliases(self) -> None:
        assert wheels.target("arm64", "3.11", "2.36") == Target("aarch64", "3.11", (2, 36))

    def test_unknown_extras_constraints_and_folders_are_refused(self, store: Path, tmp_path: Path) -> None:
        with pytest.raises(InvalidInput, match="no runtime"):
            wheels.add(store, BOARD, extras=["torch"])
        with pytest.raises(InvalidInput, match="no constraint"):
            wheels.add(store, BOARD, constraints=["--index-url x"])
        with pytest.raises(InvalidInput, match="no folder"):
            wheels.add(store, BOARD, source=Source(tmp_path / "none"))


class TestKeeping:
    def test_a_crash_between_two_renames_is_mended(self, store: Path) -> None:
        made = tiny.installable(store, platform="aarch64")
        (store / made.name).rename(store / f".{made.name}.old")
        (store / f".{made.name}.new").mkdir()
        assert wheels.sets(store) == []
        with wheels.locked(store):
            assert wheels.sets(store) == [made]

    def test_a_crash_before_the_old_set_was_deleted_is_mended(self, store: Path) -> None:
        made = tiny.installable(store, platform="aarch64")
        (store / f".{made.name}.old").mkdir()
        with wheels.locked(store):
            assert not (store / f".{made.name}.old").exists()
        assert wheels.sets(store) == [made]

    def test_a_removed_set_is_gone_and_an_unknown_one_named(self, store: Path) -> None:
        made = tiny.installable(store, platform="aarch64")
        with pytest.raises(NotFound, match=f"Sets: {made.name}"):
            wheels.remove(store, "armv7l-cp310")
        assert wheels.remove(store, made.name) == made
        assert wheels.sets(store) == []
        with pytest.raises(NotFound, match="token create --join"):
            wheels.find_file(store, made.files[0].sha256, made.files[0].name)

    @hypothesis_settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(
        st.one_of(
            st.binary(max_size=60),
            st.recursive(st.none() | st.integers(), st.lists).map(lambda value: json.dumps(value).encode()),
        )
    )
    def test_a_damaged_set_is_left_out(self, tmp_path: Path, text: bytes) -> None:
        (tmp_path / "x-cp313").mkdir(exist_ok=True)
        (tmp_path / "x-cp313" / "set.json").write_bytes(text)
        assert wheels.sets(tmp_path) == []


class TestCommandLine:
    def test_add_list_remove(self, tmp_path: Path, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
        home = ["--home", str(tmp_path / "home")]
        line = ["controller", "wheels", "add", *home, "--python", "3.13", "--from", str(folder), "--json"]
        assert main(line) == 0
        out, err = capfd.readouterr()
        (made,) = json.loads(out)
        assert made["name"] == "aarch64-cp313" and "shoal token create --join" in err
        assert main(["controller", "wheels", "list", *home, "--json"]) == 0
        assert json.loads(capfd.readouterr().out) == [made]
        assert main(["controller", "wheels", "remove", *home, "aarch64-cp313"]) == 2  # nobody to ask
        assert main(["controller", "wheels", "remove", *home, "aarch64-cp313", "--yes"]) == 0
        capfd.readouterr()
        assert main(["controller", "wheels", "list", *home, "-o", "name"]) == 0
        assert capfd.readouterr().out == ""

    def test_what_cannot_be_is_a_wrong_line(self, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
        home = ["--home", str(tmp_path / "home")]
        assert main(["controller", "wheels", "add", *home, "--python", "3.8"]) == 2
        assert main(["controller", "wheels", "add", *home, "--this-machine", "--platform", "aarch64"]) == 2
        assert "--this-machine already names" in capfd.readouterr().err


def test_the_template_stays_readable_for_python_3_6() -> None:
    path = Path(wheels.__file__).with_name("installer_template.py")
    ast.parse(path.read_text(), feature_version=(3, 6))
