"""What devices without internet install from: one set of wheels per platform and Python.

`wheels/` in the data directory:

    aarch64-cp313/*.whl, set.json     a whole set; set.json says what it is and the SHA-256 of every file
    .aarch64-cp313.new/               a set that is being filled; an interrupted `add` goes on from it
    installers/SHA256.py              installers as they were rendered (installer.py)

A set is replaced by renaming folders, so a reader sees the old one or the new one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import platform as this_platform
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from packaging.requirements import InvalidRequirement, Requirement

from shoal_agent.fs import RealFs
from shoal_controller import wheel_closure, wheel_files, wheel_pip
from shoal_controller.clock import Clock, now_ms
from shoal_controller.wheel_closure import Target
from shoal_controller.wheel_pip import RUNTIMES, Source
from shoal_protos import __version__
from shoal_protos.errors import Conflict, InvalidInput, NotFound, ShoalError

ALWAYS = ("agent", "client")  # extras of every set
DEFAULT_EXTRAS = ("onnxruntime",)
DEFAULT_GLIBC = (2, 35)  # Ubuntu 22.04, JetPack 6; Debian 12 has 2.36
PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
PLATFORM = re.compile(r"[a-z0-9_]{3,20}\Z")
ALIASES = {"arm64": "aarch64", "amd64": "x86_64", "armv7": "armv7l", "armhf": "armv7l"}
SCHEMA = 1
MAX_ROUNDS = 4  # of asking pip for what its own Python's markers hid
# Files of packages that a device never opens: a second copy of ONNX Runtime for C programs (27 to 36 MB),
# and tests. See docs/decisions/0005-what-a-device-does-not-install.md.
LEFT_OUT = ("onnxruntime/capi/libonnxruntime.so.*", "numpy/*/tests")


@dataclass(frozen=True)
class SetFile:
    name: str
    sha256: str
    size: int


@dataclass(frozen=True)
class Set:
    """One whole set, as its `set.json` says."""

    platform: str
    python: str
    extras: tuple[str, ...]  # runtimes; agent and client are in every set
    glibc: str  # the oldest that all its wheels accept
    version: str  # of Shoal
    files: tuple[SetFile, ...]
    installed_bytes: int  # on a device's disk
    added_ms: int

    @property
    def name(self) -> str:
        return Target(self.platform, self.python).name

    @property
    def size(self) -> int:
        """Bytes to download."""
        return sum(file.size for file in self.files)


# ---------------------------------------------------------------------------- reading


def sets(directory: Path) -> list[Set]:
    """All whole sets under `wheels/`, by name; a damaged one is left out."""
    found = []
    for path in sorted(directory.glob("[!.]*/set.json")):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            found.append(_parse(json.loads(path.read_text())))
    return found


def find_file(directory: Path, sha256: str, name: str) -> Path:
    """A wheel by its digest and name.

    Raises:
        NotFound: no set has it.
    """
    for item in sets(directory):
        for file in item.files:
            if (file.sha256, file.name) == (sha256, name):
                path = directory / item.name / name
                if path.is_file():
                    return path
    raise NotFound(
        "This controller has no such wheel any more.", "Make a new line with: shoal token create --join"
    )


def find_set(directory: Path, name: str) -> Set:
    """Raises NotFound, naming the sets that are there."""
    known = {item.name: item for item in sets(directory)}
    if name not in known:
        raise NotFound(f"There is no set '{name[:60]}'.", f"Sets: {', '.join(known) or 'none'}.")
    return known[name]


def facts(item: Set) -> dict[str, Any]:
    """The set as the API shows it."""
    return {
        "name": item.name,
        "platform": item.platform,
        "python": item.python,
        "extras": list(item.extras),
        "files": len(item.files),
        "size": item.size,
        "glibc": item.glibc,
        "added_ms": item.added_ms,
        "installed_bytes": item.installed_bytes,
    }


def _parse(value: dict[str, Any]) -> Set:
    return Set(
        platform=value["platform"],
        python=value["python"],
        extras=tuple(value["extras"]),
        glibc=value["glibc"],
        version=value["version"],
        files=tuple(SetFile(**file) for file in value["files"]),
        installed_bytes=value["installed_bytes"],
        added_ms=value["added_ms"],
    )


# ---------------------------------------------------------------------------- filling


def target(platform: str, python: str, glibc: str = "") -> Target:
    """Checks what was asked for.

    Raises:
        InvalidInput: not a platform, a Python or a glibc that can be installed for.
    """
    platform = ALIASES.get(platform.lower(), platform.lower())
    if not PLATFORM.match(platform):
        raise InvalidInput(
            f"'{platform[:40]}' is not a platform.", "Use what `uname -m` says: aarch64, x86_64."
        )
    if python not in PYTHONS:
        raise InvalidInput(
            f"An agent does not run on Python {python[:20]}.", f"Choose one of {', '.join(PYTHONS)}."
        )
    found = re.fullmatch(r"2\.(\d{1,2})", glibc or wheel_pip.text_of(DEFAULT_GLIBC))
    if found is None:
        raise InvalidInput(
            f"'{glibc[:20]}' is not a glibc version.", "Write it as 2.36; `ldd --version` says it."
        )
    return Target(platform, python, (2, int(found[1])))


def this_machine() -> tuple[str, str, str]:
    """Platform, Python and glibc of this machine."""
    libc, version = this_platform.libc_ver()
    glibc = version if libc == "glibc" and re.fullmatch(r"2\.\d+", version) else ""
    return this_platform.machine(), f"{sys.version_info[0]}.{sys.version_info[1]}", glibc


def check_extras(extras: Sequence[str]) -> tuple[str, ...]:
    """Raises InvalidInput for an extra that is no runtime."""
    for extra in extras:
        if extra not in RUNTIMES:
            raise InvalidInput(
                f"'{extra[:40]}' is no runtime that can be installed.",
                f"Choose from {', '.join(RUNTIMES)}; agent and client are always there.",
            )
    return tuple(dict.fromkeys(extras))


def check_constraints(constraints: Sequence[str]) -> tuple[str, ...]:
    """Raises InvalidInput for a line that is no requirement."""
    for line in constraints:
        _check_constraint(line)
    return tuple(constraints)


def _check_constraint(line: str) -> None:
    try:
        Requirement(line)
    except InvalidRequirement as error:
        raise InvalidInput(
            f"'{line[:80]}' is no constraint.", "Write it as 'onnxruntime==1.23.2'."
        ) from error


def add(
    directory: Path,
    wanted: Target,
    *,
    extras: Sequence[str] = DEFAULT_EXTRAS,
    constraints: Sequence[str] = (),
    source: Source = Source(),  # noqa: B008  # frozen
    say: Callable[[str], None] = lambda _: None,
    clock: Clock = now_ms,
) -> Set:
    """Fills the set of `wanted`, replacing the one that is there only when the new one is whole.

    Raises:
        InvalidInput: an unknown extra, a malformed constraint, or a folder that does not exist.
        Unsupported: something has no wheel for these devices; the remedy names what fits.
        Unavailable: the registry cannot be reached.
        Conflict: another `add` is at work.
    """
    extras, constraints = check_extras(extras), check_constraints(constraints)
    if source.folder is not None and not source.folder.is_dir():
        raise InvalidInput(
            f"There is no folder {source.folder}.", "Name one that holds wheels with --from DIR."
        )
    with locked(directory):
        fresh = directory / f".{wanted.name}.new"
        fresh.mkdir(mode=0o700, exist_ok=True)
        _lend(directory / wanted.name, fresh)
        say(f"{wanted.name}: agent, client, {', '.join(extras) or 'no runtime'}")
        closure = _collect(fresh, wanted, extras, constraints, source, say)
        made = _write_set(fresh, wanted, extras, closure, clock())
        swap(fresh, directory / wanted.name)
    return made


def _lend(present: Path, fresh: Path) -> None:
    """What the present set holds need not be downloaded again."""
    for path in present.glob("*.whl"):
        with contextlib.suppress(FileExistsError):
            os.link(path, fresh / path.name)


def _collect(
    fresh: Path,
    wanted: Target,
    extras: Sequence[str],
    constraints: Sequence[str],
    source: Source,
    say: Callable[[str], None],
) -> wheel_closure.Closure:
    for old in fresh.glob("shoal-*.whl"):
        old.unlink()  # never written in place: the present set may hold the same file
    own = wheel_files.own_wheel(fresh)
    root = ",".join((*ALWAYS, *extras))
    requirements = [f"{own}[{root}]"]
    pip = _add_pip(fresh, source, say)
    for _ in range(MAX_ROUNDS):
        names = wheel_pip.download(requirements, constraints, wanted, source, fresh, say)
        files = [wheel_files.read(fresh / name) for name in sorted({*names, own.name, pip})]
        closure = wheel_closure.close(files, (f"shoal[{root}]", "pip"), wanted)
        if not closure.missing:
            return closure
        requirements += [item for item in closure.missing if item not in requirements]
    raise Conflict(f"pip left out {', '.join(closure.missing)}.", "Name a version with --constraint.")


def _add_pip(fresh: Path, source: Source, say: Callable[[str], None]) -> str:
    """pip's own wheel, which installs the others: the newest, or the one that runs here."""
    if source.folder is not None:
        there = sorted(source.folder.glob("pip-*-py3-none-any.whl"), key=lambda path: path.stat().st_mtime)
        if there:
            (fresh / there[-1].name).unlink(missing_ok=True)
            return shutil.copyfile(there[-1], fresh / there[-1].name).name
        return wheel_files.rebuild("pip", fresh).name
    here = f"{sys.version_info[0]}.{sys.version_info[1]}"
    try:
        return wheel_pip.download(["pip"], (), Target("any", here), source, fresh, say).pop()
    except ShoalError:
        return wheel_files.rebuild("pip", fresh).name


def _write_set(
    fresh: Path, wanted: Target, extras: Sequence[str], closure: wheel_closure.Closure, time_ms: int
) -> Set:
    wheels = sorted(closure.needed.values(), key=lambda wheel: wheel.path.name)
    names = {wheel.path.name for wheel in wheels}
    for path in fresh.iterdir():
        if path.name not in names:
            path.unlink()
    made = Set(
        platform=wanted.platform,
        python=wanted.python,
        extras=tuple(extras),
        glibc=wheel_pip.text_of(max(wheel.glibc for wheel in wheels)),
        version=__version__,
        files=tuple(_describe(wheel.path) for wheel in wheels),
        installed_bytes=sum(installed_bytes(wheel) for wheel in wheels if wheel.name != "pip"),
        added_ms=time_ms,
    )
    text = json.dumps({"schema": SCHEMA, **dataclasses.asdict(made)}, indent=1)
    RealFs().write(fresh / "set.json", text.encode())
    RealFs().fsync(fresh / "set.json")
    return made


def installed_bytes(wheel: wheel_files.WheelFile) -> int:
    """What an installed wheel takes on a device's disk, without what the installer removes."""
    return sum(
        size
        for name, size in wheel.sizes.items()
        if not any(fnmatch(name, rule) or fnmatch(name, f"{rule}/*") for rule in LEFT_OUT)
    )


def _describe(path: Path) -> SetFile:
    RealFs().fsync(path)
    return SetFile(path.name, digest(path), path.stat().st_size)


def digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


# ---------------------------------------------------------------------------- keeping


def remove(directory: Path, name: str) -> Set:
    """Removes a set; lines that were made with it stop working.

    Raises:
        NotFound: there is no such set.
        Conflict: an `add` is at work.
    """
    with locked(directory):
        present = find_set(directory, name)
        gone = directory / f".{name}.old"
        (directory / name).rename(gone)
        RealFs().fsync_directory(directory)
        shutil.rmtree(gone)
        return present


def swap(fresh: Path, target_folder: Path) -> None:
    """Puts a whole folder in the place of another. `recover` ends what a crash in between left."""
    old = target_folder.with_name(f".{target_folder.name}.old")
    if target_folder.exists():
        target_folder.rename(old)
    fresh.rename(target_folder)
    RealFs().fsync_directory(target_folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def recover(directory: Path) -> None:
    """After a crash in the middle of `swap` or `remove`."""
    for old in directory.glob(".*.old"):
        name = old.name[1:].removesuffix(".old")
        if (directory / name).exists() or not (directory / f".{name}.new").exists():
            shutil.rmtree(old)
        else:
            old.rename(directory / name)


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """One at a time. Raises Conflict if another command has the store."""
    directory.mkdir(mode=0o700, exist_ok=True)
    with open(os.open(directory / ".lock", os.O_RDWR | os.O_CREAT, 0o600), "r+") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise Conflict(
                "Another command is filling the wheel store.", "Wait for it; it goes on where it stopped."
            ) from None
        recover(directory)
        yield
