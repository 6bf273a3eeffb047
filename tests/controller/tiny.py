"""Tiny wheels, and sets of them: what stands for an agent where only the way there is tested."""

from __future__ import annotations

import functools
import json
import sys
import tempfile
from pathlib import Path

from shoal_controller import wheel_files, wheels
from shoal_controller.wheel_closure import Target
from shoal_controller.wheels import Set, SetFile
from shoal_protos import __version__

HERE = f"{sys.version_info[0]}.{sys.version_info[1]}"

# Says what it was started with; the real one joins.
AGENT = """
import json, os, sys
def main():
    names = ("SHOAL_JOIN_TOKEN", "SHOAL_AGENT_CHILD_PREFIX", "no_grpc_proxy")
    kept = {name: os.environ.get(name, "") for name in names}
    print(json.dumps({"arguments": sys.argv[1:], "script": sys.argv[0], "prefix": sys.prefix, **kept}))
"""


def wheel(folder: Path, name: str, version: str, *requires: str, files: dict[str, str] | None = None) -> Path:
    """A pure wheel of that name with these requirements."""
    module = name.replace("-", "_").lower()
    info = f"{module}-{version}.dist-info"
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    lines += [f"Requires-Dist: {line}" for line in requires]
    inside = {f"{module}/__init__.py": "", f"{info}/METADATA": "\n".join(lines) + "\n\n", **(files or {})}
    data = {path: text.encode() for path, text in inside.items()}
    folder.mkdir(exist_ok=True)
    return wheel_files.write(module, version, data, folder)


# Unpacks wheels as pip does, in a tenth of the time.
PIP = """
import configparser, pathlib, sys, sysconfig, zipfile
site = pathlib.Path(sysconfig.get_path("purelib"))
for wheel in [word for word in sys.argv if word.endswith(".whl")]:
    zipfile.ZipFile(wheel).extractall(site)
script = pathlib.Path(sys.prefix) / "bin" / "shoal-agent"
script.write_text(f"#!{sys.executable}\\nfrom shoal_agent_tiny import main\\nmain()\\n")
script.chmod(0o755)
"""


def agent_requirements(folder: Path) -> Path:
    """What `shoal[agent,client,onnxruntime]` asks for, each an empty package."""
    for name, version in (
        ("protobuf", "6.33.0"),
        ("cryptography", "50.0"),
        ("grpcio", "1.85"),
        ("numpy", "2.4"),
        ("uvicorn", "0.54"),
        ("httptools", "0.9"),
        ("uvloop", "0.23"),
        ("prometheus-client", "0.26"),
        ("psutil", "7.2"),
        ("pillow", "13.0"),
    ):
        wheel(folder, name, version)
    wheel(folder, "onnxruntime", "1.32", "numpy>=1.21", "sympy", "old-times; python_version < '3.2'")
    pip_wheel(folder)
    return folder


def installable(
    directory: Path, *, platform: str, python: str = HERE, glibc: str = "2.17", real_pip: bool = False
) -> Set:
    """A whole set in the store `directory`: pip, and a package with a script `shoal-agent`."""
    folder = directory / Target(platform, python).name
    folder.mkdir(parents=True)
    tests = {"shoal_agent_tiny.py": AGENT, "numpy/core/tests/test_big.py": "#" * 5000, "numpy/core/a.py": ""}
    points = {
        f"shoal-{__version__}.dist-info/entry_points.txt": (
            "[console_scripts]\nshoal-agent = shoal_agent_tiny:main\n"
        )
    }
    made = [
        wheel(folder, "shoal", __version__, files={**tests, **points}),
        pip_wheel(folder) if real_pip else wheel(folder, "pip", "0", files={"pip/__main__.py": PIP}),
    ]
    files = tuple(SetFile(path.name, wheels.digest(path), path.stat().st_size) for path in sorted(made))
    found = Set(platform, python, ("onnxruntime",), glibc, __version__, files, 1_000_000, 1)
    write_set(directory, found)
    return found


@functools.cache
def _pip() -> tuple[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        made = wheel_files.rebuild("pip", Path(folder))
        return made.name, made.read_bytes()


def pip_wheel(folder: Path) -> Path:
    """The pip that runs here, as a wheel."""
    name, data = _pip()
    (folder / name).write_bytes(data)
    return folder / name


def write_set(directory: Path, item: Set) -> None:
    value = {
        **item.__dict__,
        "schema": 1,
        "extras": list(item.extras),
        "files": [file.__dict__ for file in item.files],
    }
    folder = directory / item.name
    folder.mkdir(exist_ok=True)
    (folder / "set.json").write_text(json.dumps(value))
