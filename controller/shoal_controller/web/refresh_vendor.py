"""Fetch the vendored assets again, as published: `python -m shoal_controller.web.refresh_vendor [--accept]`.

Reads `vendor.toml`, runs `npm pack` for each package, copies the named files to `static/vendor/FOLDER` and
refuses a file whose SHA-256 differs. To move to a new version edit `version` and run with `--accept`, which
writes the new hashes. Needs npm on the maintainer's machine only; neither users nor builds do.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import tomllib

HERE = Path(__file__).parent
VENDOR = HERE / "static" / "vendor"


def packages() -> list[dict[str, Any]]:
    """The entries of `vendor.toml`: name, version, license, folder, files {path in package: SHA-256}."""
    entries: list[dict[str, Any]] = tomllib.loads((HERE / "vendor.toml").read_text())["package"]
    return entries


def vendored(package: dict[str, Any], path: str) -> Path:
    """Where a package's file lies in the tree."""
    return VENDOR / str(package["folder"]) / Path(path).name


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def fetch(package: dict[str, Any]) -> dict[str, bytes]:
    """The package's named files as the registry serves them.

    Raises:
        KeyError: the package has no such file.
        subprocess.CalledProcessError: npm failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        spec = f"{package['name']}@{package['version']}"
        packed = subprocess.run(
            ["npm", "pack", "--silent", spec], cwd=folder, check=True, capture_output=True, text=True
        )
        files = {}
        with tarfile.open(Path(folder) / packed.stdout.split()[-1]) as tar:
            for path in package["files"]:
                member = tar.extractfile(f"package/{path}")
                if member is None:
                    raise KeyError(path)
                files[path] = member.read()
        return files


def main(argv: list[str]) -> int:
    accept = "--accept" in argv
    text = (HERE / "vendor.toml").read_text()
    for package in packages():
        for path, data in fetch(package).items():
            wanted, found = package["files"][path], sha256(data)
            if wanted != found and not accept:
                sys.stderr.write(f"{package['name']} {path}: expected {wanted}, the registry has {found}\n")
                return 1
            text = text.replace(wanted, found)
            vendored(package, path).parent.mkdir(parents=True, exist_ok=True)
            vendored(package, path).write_bytes(data)
    (HERE / "vendor.toml").write_text(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
