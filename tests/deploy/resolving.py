"""What an agent's packages resolve to on other machines, wheels only, asked of the configured registry.

python -m tests.deploy.resolving          # asks again and writes the tables of docs/platforms.md
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from packaging.utils import parse_wheel_filename

from tests.emulation.root import REPOSITORY, requirements

PAGE = REPOSITORY / "docs" / "platforms.md"
BEGIN, END = "<!-- resolved: begin {digest} -->", "<!-- resolved: end -->"
EXTRAS = ("agent", "client", "onnxruntime", "openvino", "litert")
RUNTIMES = ("onnxruntime", "openvino", "litert")
PYTHONS = ("3.10", "3.11", "3.13")
GLIBCS = (35, 36)  # Ubuntu 22.04 with JetPack 6; Debian 12
PYTHONS_32 = ("3.11", "3.13")
TIMEOUT_S = 240
OFFLINE = ("Failed to establish", "name resolution", "timed out", "ProxyError", "from versions: none")


class Unreachable(Exception):
    """The registry does not answer."""


@dataclass(frozen=True)
class Wheel:
    name: str
    version: str
    file: str


def resolve(
    wanted: Sequence[str], python: str, glibc: int, machine: str = "aarch64", *, alone: bool = False
) -> list[Wheel] | None:
    """The wheels that answer `wanted` with all they need; None = something has none.

    Args:
        glibc: 36 = wheels that run with glibc 2.36 and older.
        alone: without what they need.

    Raises:
        Unreachable: the registry does not answer.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        done = _pip(
            "install", "--dry-run", "--ignore-installed", "--target", f"{folder}/site", "--report",
            str(report),
            *(["--no-deps"] if alone else []), *_target(python, glibc, machine), *wanted,
        )  # fmt: skip
        if done.returncode == 0:
            return sorted(map(_wheel, json.loads(report.read_text())["install"]), key=lambda w: w.name)
    if any(word in done.stderr for word in OFFLINE) and not reachable():
        raise Unreachable(done.stderr.strip().splitlines()[-1])
    return None


def reachable() -> bool:
    """Whether the registry gives a package that every platform has."""
    with tempfile.TemporaryDirectory() as folder:
        target = f"{folder}/site"
        done = _pip("install", "--dry-run", "--ignore-installed", "--no-deps", "--target", target, "uvicorn")
    return done.returncode == 0


def _wheel(item: dict[str, dict[str, str]]) -> Wheel:
    file = unquote(urlsplit(item["download_info"]["url"]).path).rpartition("/")[2]
    name, version, _, _ = parse_wheel_filename(file)
    return Wheel(name, str(version), file)


def _target(python: str, glibc: int, machine: str) -> list[str]:
    tags = [f"manylinux_2_{minor}_{machine}" for minor in range(17, glibc + 1)]
    tags += [f"manylinux2014_{machine}", f"linux_{machine}"]
    options = ["--only-binary=:all:", "--implementation", "cp", "--python-version", python]
    return options + [option for tag in tags for option in ("--platform", tag)]


def _pip(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pip", "--quiet", "--no-input", *arguments],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=TIMEOUT_S, check=False,
    )  # fmt: skip


def of_extra(extra: str) -> list[str]:
    """Requirements of an extra, with Shoal's own; not those of the test harness, which pins a runtime."""
    return [line.replace("onnxruntime==1.23.2", _declared("onnxruntime")) for line in requirements((extra,))]


def _declared(extra: str) -> str:
    import tomllib

    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    return str(project["optional-dependencies"][extra][0])


def digest() -> str:
    """Changes with what pyproject.toml asks for: then the tables have to be made again."""
    wanted = json.dumps([(extra, of_extra(extra)) for extra in EXTRAS] + [PYTHONS, GLIBCS, PYTHONS_32])
    return hashlib.sha256(wanted.encode()).hexdigest()[:12]


# ---------------------------------------------------------------------------- the tables


def megabytes(wheels: Sequence[Wheel], python: str, glibc: int) -> float:
    """What fetching these takes."""
    with tempfile.TemporaryDirectory() as folder:
        exact = [f"{wheel.name}=={wheel.version}" for wheel in wheels]
        done = _pip("download", "--no-deps", "--dest", folder, *_target(python, glibc, "aarch64"), *exact)
        if done.returncode:
            raise Unreachable(done.stderr.strip().splitlines()[-1])
        return sum(path.stat().st_size for path in Path(folder).iterdir()) / 1e6


def tables() -> str:
    """The two tables of docs/platforms.md."""
    lines = ["| extra | " + " | ".join(f"Python {python}" for python in PYTHONS) + " |"]
    lines.append("|---" * (len(PYTHONS) + 1) + "|")
    for extra in EXTRAS:
        cells = [_cell(extra, python) for python in PYTHONS]
        lines.append(f"| `{extra}` | " + " | ".join(cells) + " |")
    lines += ["", "| package, armv7l | " + " | ".join(f"Python {python}" for python in PYTHONS_32) + " |"]
    lines.append("|---" * (len(PYTHONS_32) + 1) + "|")
    for requirement in packages_32():
        cells = [_cell_32(requirement, python) for python in PYTHONS_32]
        lines.append(f"| {name_of(requirement)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def packages_32() -> list[str]:
    """Every package that any extra names, once."""
    return sorted({line for extra in EXTRAS for line in of_extra(extra)}, key=name_of)


def name_of(requirement: str) -> str:
    return requirement.split(";")[0].split(">")[0].split("=")[0].split("<")[0].strip()


def _cell(extra: str, python: str) -> str:
    found = {glibc: resolve(of_extra(extra), python, glibc) for glibc in GLIBCS}
    oldest = next((glibc for glibc in GLIBCS if found[glibc] is not None), None)
    if oldest is None:
        return "no"
    wheels = found[oldest] or []
    size = f"{megabytes(wheels, python, oldest):.0f} MB"
    main = {"litert": "ai-edge-litert"}.get(extra, extra)
    version = next((wheel.version for wheel in wheels if wheel.name == main), "")
    since = "" if oldest == GLIBCS[0] else f", glibc 2.{oldest}"
    return f"{version or 'yes'}, {size}{since}"


def _cell_32(requirement: str, python: str) -> str:
    found = resolve([requirement], python, GLIBCS[-1], "armv7l", alone=True)
    return "no" if found is None else found[0].version


def written() -> tuple[str, dict[str, list[str]]]:
    """(digest, first cell -> other cells) of the tables in docs/platforms.md; ("", {}) without them.
    First cells are as written: extras stand in backticks, packages do not."""
    text = PAGE.read_text() if PAGE.exists() else ""
    rest = text.partition("<!-- resolved: begin ")[2]
    if not rest:
        return "", {}
    found, _, body = rest.partition(" -->")
    rows = {}
    for line in body.partition(END)[0].splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if line.startswith("|") and not line.startswith("|--"):
            rows[cells[0]] = cells[1:]
    return found, rows


def write() -> None:
    text = PAGE.read_text()
    before, _, rest = text.partition("<!-- resolved: begin ")
    after = rest.partition(END)[2]
    PAGE.write_text(f"{before}{BEGIN.format(digest=digest())}\n{tables()}\n{END}{after}")


if __name__ == "__main__":
    write()
