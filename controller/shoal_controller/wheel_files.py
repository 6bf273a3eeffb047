"""Reading wheels, and making one of a distribution that is installed here.

A device's agent must be the one that fits its controller, so Shoal's own wheel is not downloaded but made
of what runs here: of the files that an installed wheel recorded, or of the package folders of a checkout.
Same content, same bytes.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import io
import json
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from email.parser import HeaderParser
from importlib import metadata
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

import tomllib
from packaging.requirements import Requirement
from packaging.utils import InvalidWheelFilename, canonicalize_name, parse_wheel_filename

from shoal_protos.errors import InvalidInput, Unsupported

PACKAGES = ("shoal_protos", "shoal_agent", "shoal_optimizer", "shoal_controller")
EPOCH = (1980, 1, 1, 0, 0, 0)  # the oldest date that a zip file can hold: bytes must not depend on the day
NOT_RECORDED = {"RECORD", "INSTALLER", "REQUESTED", "direct_url.json", "RECORD.jws", "RECORD.p7s"}
LEGACY_GLIBC = {"manylinux1": (2, 5), "manylinux2010": (2, 12), "manylinux2014": (2, 17)}
BLOCK = 4096  # bytes; what a file occupies on a device's disk is a multiple


@dataclass(frozen=True)
class WheelFile:
    """What a wheel's name and metadata say."""

    path: Path
    name: str  # canonical: lower case, dashes
    version: str
    requires: tuple[str, ...]  # its Requires-Dist lines
    glibc: tuple[int, int]  # the oldest that it accepts; (0, 0) for pure Python
    sizes: Mapping[str, int]  # path inside -> bytes on disk, unpacked


def read(path: Path) -> WheelFile:
    """Reads a wheel without unpacking it.

    Raises:
        InvalidInput: not a wheel, or damaged.
    """
    try:
        name, version, _, tags = parse_wheel_filename(path.name)
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            inner = next(
                entry for entry in entries if re.fullmatch(r"[^/]+\.dist-info/METADATA", entry.filename)
            )
            text = archive.read(inner).decode("utf-8", "replace")
    except (InvalidWheelFilename, StopIteration, OSError, zipfile.BadZipFile) as error:
        raise InvalidInput(
            f"{path.name} is not a whole wheel.", "Remove it and add the set again."
        ) from error
    return WheelFile(
        path=path,
        name=str(name),
        version=str(version),
        requires=tuple(HeaderParser().parsestr(text).get_all("Requires-Dist") or ()),
        glibc=min((glibc_of(tag.platform) for tag in tags), default=(0, 0)),
        sizes={entry.filename: -(-entry.file_size // BLOCK) * BLOCK for entry in entries},
    )


def glibc_of(platform: str) -> tuple[int, int]:
    """The glibc that a wheel's platform tag asks for: `manylinux_2_28_aarch64` -> (2, 28)."""
    found = re.match(r"manylinux_(\d+)_(\d+)_", platform)
    if found:
        return int(found[1]), int(found[2])
    return LEGACY_GLIBC.get(platform.partition("_")[0], (0, 0))


# ---------------------------------------------------------------------------- making


def own_wheel(folder: Path) -> Path:
    """Writes Shoal's own wheel into `folder`.

    Raises:
        Unsupported: this installation's files cannot be found.
    """
    distribution = metadata.distribution("shoal")
    project = _editable_project(distribution)
    if project is None:
        return rebuild("shoal", folder)
    files = {}
    for package in PACKAGES:
        files.update(_package_files(package))
    examples = project / "examples" / "digits.py"  # `shoal demo` outside a checkout
    if examples.is_file():
        files["shoal_controller/examples/digits.py"] = examples.read_bytes()
    version, headers, points = _read_project(project / "pyproject.toml")
    info = f"shoal-{version}.dist-info"
    files[f"{info}/METADATA"] = headers
    files[f"{info}/entry_points.txt"] = points
    if (project / "LICENSE").is_file():
        files[f"{info}/licenses/LICENSE"] = (project / "LICENSE").read_bytes()
    return write("shoal", version, files, folder)


def rebuild(name: str, folder: Path) -> Path:
    """Writes the wheel of a pure Python distribution as it is installed here.

    Raises:
        Unsupported: it is not installed, or not from a wheel.
    """
    try:
        distribution = metadata.distribution(name)
    except metadata.PackageNotFoundError as error:
        raise Unsupported(
            f"{name} is not installed here.", f"Install it: python -m pip install {name}"
        ) from error
    files: dict[str, bytes] = {}
    for entry in distribution.files or ():
        inner = PurePosixPath(entry)
        if inner.parts[0] == ".." or inner.is_absolute() or inner.suffix == ".pyc":
            continue
        if inner.parent.name.endswith(".dist-info") and inner.name in NOT_RECORDED:
            continue
        path = Path(str(distribution.locate_file(entry)))
        if path.is_file():
            files[inner.as_posix()] = path.read_bytes()
    if not any(inner.endswith(".dist-info/METADATA") for inner in files):
        raise Unsupported(
            f"{name} was not installed from a wheel: its list of files is missing.",
            f"Install it again: python -m pip install --force-reinstall {name}",
        )
    files = {inner: data for inner, data in files.items() if not inner.endswith(".dist-info/WHEEL")}
    return write(canonicalize_name(name).replace("-", "_"), distribution.version, files, folder)


def _editable_project(distribution: metadata.Distribution) -> Path | None:
    """The checkout that an editable installation points to."""
    text = distribution.read_text("direct_url.json")
    if not text:
        return None
    value = json.loads(text)
    if not value.get("dir_info", {}).get("editable"):
        return None
    folder = Path(unquote(urlsplit(value["url"]).path))
    if not (folder / "pyproject.toml").is_file():
        raise Unsupported(
            f"The checkout that Shoal runs from, {folder}, has no pyproject.toml.",
            "Install Shoal again from a whole checkout or a wheel.",
        )
    return folder


def _package_files(package: str) -> dict[str, bytes]:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise Unsupported(f"The package {package} is not installed here.", "Install Shoal again, whole.")
    root = Path(next(iter(spec.submodule_search_locations)))
    return {
        f"{package}/{path.relative_to(root).as_posix()}": path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".pyc"
    }


def _read_project(path: Path) -> tuple[str, bytes, bytes]:
    """Version, METADATA and entry_points.txt of a checkout: what was recorded when it was installed may be
    older than the checkout is."""
    project = tomllib.loads(path.read_text())["project"]
    lines = [
        "Metadata-Version: 2.4",
        f"Name: {project['name']}",
        f"Version: {project['version']}",
        f"Summary: {project['description']}",
        f"License-Expression: {project['license']}",
        f"Requires-Python: {project['requires-python']}",
        *(f"Requires-Dist: {Requirement(text)}" for text in project["dependencies"]),
    ]
    for extra, wanted in project["optional-dependencies"].items():
        lines.append(f"Provides-Extra: {extra}")
        for text in wanted:
            found = Requirement(text)
            marker = f"({found.marker}) and extra == '{extra}'" if found.marker else f"extra == '{extra}'"
            found.marker = None
            lines.append(f"Requires-Dist: {found}; {marker}")
    groups = {"console_scripts": project["scripts"], **project.get("entry-points", {})}
    points = "\n".join(
        f"[{group}]\n" + "".join(f"{name} = {value}\n" for name, value in sorted(found.items()))
        for group, found in sorted(groups.items())
    )
    return project["version"], ("\n".join(lines) + "\n\n").encode(), points.encode()


def write(name: str, version: str, files: dict[str, bytes], folder: Path) -> Path:
    """A pure wheel of `files` (path inside -> bytes); its bytes depend on nothing else."""
    info = f"{name}-{version}.dist-info"
    files = {
        **files,
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: shoal\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{inner},{_record_hash(data)},{len(data)}\n" for inner, data in sorted(files.items()))
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=6) as archive:
        for inner, data in [
            *sorted(files.items()),
            (f"{info}/RECORD", f"{record}{info}/RECORD,,\n".encode()),
        ]:
            entry = zipfile.ZipInfo(inner, EPOCH)
            entry.external_attr = 0o644 << 16
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, data)
    path = folder / f"{name}-{version}-py3-none-any.whl"
    path.unlink(missing_ok=True)  # never in place: another set may hold the same file
    path.write_bytes(buffer.getvalue())
    return path


def _record_hash(data: bytes) -> str:
    return "sha256=" + base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
