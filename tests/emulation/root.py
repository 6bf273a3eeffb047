"""An aarch64 machine without a container: Debian's arm64 packages in a folder, run by qemu-user.

`apt-get` downloads the packages into a folder of its own, `dpkg -x` unpacks them, and pip puts the wheels
for aarch64 beside them. Nothing is installed on this machine. What was built is kept in the user's cache,
named by the recipe that made it, so that later tests start at once and without a network.

    python -m tests.emulation.root     # builds it and prints the command prefix
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tomllib

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGES = (
    "libbz2-1.0", "libc6", "libcrypt1", "libexpat1", "libffi8", "libgcc-s1", "liblzma5", "libncursesw6",
    "libpython3.11-minimal", "libpython3.11-stdlib", "libreadline8", "libsqlite3-0", "libssl3", "libstdc++6",
    "libtinfo6", "libuuid1", "media-types", "python3.11-minimal", "python3.11-venv", "python3-pip-whl",
    "python3-setuptools-whl", "tzdata", "zlib1g",
)  # fmt: skip
EMULATOR = "qemu-user-static"
QEMU = "usr/bin/qemu-aarch64-static"
PYTHON = "usr/bin/python3.11"
EXTRAS = ("agent", "client", "onnxruntime")
# Newer ones crash while they are imported under the emulator (not tried on real hardware).
PINNED = {"onnxruntime": "onnxruntime==1.23.2"}
GLIBC = 36  # Debian 12
TIMEOUT_S = 300


class CannotEmulate(Exception):
    """There is no emulator here, for a reason that a skipped test can give."""


@dataclass(frozen=True)
class Board:
    """The emulated machine: where its files lie and how its programs are started."""

    qemu: Path
    root: Path
    site: Path  # site-packages without Shoal itself

    @property
    def prefix(self) -> list[str]:
        """Put before every command of the board; the kernel here cannot start its programs itself."""
        return [str(self.qemu), "-L", str(self.root)]

    @property
    def python(self) -> str:
        return str(self.root / PYTHON)

    def command(self, *arguments: str) -> list[str]:
        """The command line of the board's Python."""
        return [*self.prefix, self.python, *arguments]

    def environment(self, *paths: Path) -> dict[str, str]:
        """This process's environment with the board's packages on the import path, after `paths`."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "SHOAL"))}
        return {
            **kept,
            "PYTHONPATH": os.pathsep.join(map(str, (*paths, self.site))),
            "PYTHONDONTWRITEBYTECODE": "1",
            "OMP_NUM_THREADS": "1",
        }


def cache() -> Path:
    """Where boards are kept between test sessions."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "shoal-tests"


def board() -> Board:
    """The emulated machine, built at first use (about a minute, 150 MB).

    Raises:
        CannotEmulate: says what this machine lacks.
    """
    if platform.machine() != "x86_64":
        raise CannotEmulate(f"the emulator's packages are taken for x86-64, this is {platform.machine()}")
    for tool in ("apt-get", "dpkg"):
        if shutil.which(tool) is None:
            raise CannotEmulate(f"{tool} is not here")
    wheels = requirements(EXTRAS)
    recipe = json.dumps([PACKAGES, EMULATOR, wheels, GLIBC, platform.machine()])
    home = cache() / f"arm64-{hashlib.sha256(recipe.encode()).hexdigest()[:12]}"
    if not home.is_dir():
        cache().mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache(), prefix="building-") as folder:
            _build(Path(folder), wheels)
            try:
                (Path(folder) / "board").replace(home)
            except OSError:  # another session was quicker
                if not home.is_dir():
                    raise
    return Board(home / QEMU, home / "root", home / "site")


def requirements(extras: Sequence[str]) -> list[str]:
    """What pyproject.toml asks for, for Shoal itself and these extras; markers are kept."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    wanted = list(project["dependencies"])
    for extra in extras:
        wanted += [item for item in project["optional-dependencies"][extra] if not item.startswith("shoal[")]
    return sorted({PINNED.get(item.split(">")[0].split("=")[0], item) for item in wanted})


def platforms(glibc: int) -> list[str]:
    """pip's options for aarch64 wheels that run with glibc 2.`glibc`."""
    tags = [f"manylinux_2_{minor}_aarch64" for minor in range(17, glibc + 1)] + ["manylinux2014_aarch64"]
    return [option for tag in tags for option in ("--platform", tag)]


def _build(folder: Path, wheels: Sequence[str]) -> None:
    made = folder / "board"
    _unpack(folder, made / "root", "arm64", PACKAGES)
    _unpack(folder, folder / "host", "amd64", (EMULATOR,))
    (made / QEMU).parent.mkdir(parents=True)
    (folder / "host" / QEMU).replace(made / QEMU)  # without the emulators of everything else
    _run(
        "the registry gave no wheels",
        sys.executable, "-m", "pip", "install", "--quiet", "--only-binary=:all:", "--target",
        str(made / "site"), "--implementation", "cp", "--python-version", "3.11", *platforms(GLIBC), *wheels,
    )  # fmt: skip


def _unpack(folder: Path, target: Path, architecture: str, packages: Sequence[str]) -> None:
    """Downloads packages with a state of apt's own, and unpacks them without running their scripts."""
    work = folder / f"apt-{architecture}"
    for room in ("state/lists/partial", "cache/archives/partial", "packages"):
        (work / room).mkdir(parents=True)
    options = [
        f"Dir::State={work / 'state'}", "Dir::State::status=/dev/null", f"Dir::Cache={work / 'cache'}",
        f"APT::Architecture={architecture}", f"APT::Architectures={architecture}", "APT::Sandbox::User=",
        "Acquire::Languages=none", "Acquire::Retries=2", "Acquire::http::Timeout=30",
    ]  # fmt: skip
    apt = ["apt-get", "-qq", *(part for option in options for part in ("-o", option))]
    # A source of other architectures may fail here; a package that is missing then is told below.
    _run("apt-get could not read its sources", *apt, "update")
    names = [f"{name}:{architecture}" for name in packages]
    _run("apt-get could not download", *apt, "download", *names, cwd=work / "packages")
    target.mkdir(parents=True)
    for package in sorted((work / "packages").glob("*.deb")):
        _run("dpkg could not unpack", "dpkg", "-x", str(package), str(target))


def _run(problem: str, *command: str, cwd: Path | None = None) -> None:
    """Runs a command to its end. Raises CannotEmulate with the last of what it said."""
    try:
        done = subprocess.run(
            command, cwd=cwd, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=TIMEOUT_S,
            check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise CannotEmulate(f"{problem}: no end within {TIMEOUT_S} s") from error
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise CannotEmulate(f"{problem}: {said[-1] if said else f'exit code {done.returncode}'}")


def shoal_wheel(folder: Path) -> Path:
    """Builds Shoal's own wheel from this checkout into `folder`.

    Raises:
        CannotEmulate: the build's own requirement cannot be had.
    """
    _run(
        "Shoal's wheel could not be built",
        sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder),
        str(REPOSITORY),
    )  # fmt: skip
    (wheel,) = folder.glob("shoal-*.whl")
    return wheel


def install_shoal(target: Path) -> Path:
    """Shoal alone, installed into the folder `target` for any Python; returns it."""
    with tempfile.TemporaryDirectory() as folder:
        wheel = shoal_wheel(Path(folder))
        _run(
            "Shoal's wheel could not be installed",
            sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target),
            str(wheel),
        )  # fmt: skip
    return target


if __name__ == "__main__":
    found = board()
    print(" ".join(found.prefix))
    print(found.site)
