"""What travels in a push: the task file and the files that its `files` names, as a tar.

The task is read as text, never imported: pushing needs neither torch nor trust in the file.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from shoal_optimizer.declared import declared_files
from shoal_protos.errors import InvalidInput

__all__ = ["declared_files", "locate", "pack", "travelling"]


def locate(folder: Path, name: str) -> Path:
    """Where a task's file lies: beside the task, else in the directory that SHOAL_DATA names."""
    elsewhere = Path(os.environ.get("SHOAL_DATA", folder)) / name
    return elsewhere if not (folder / name).exists() and elsewhere.is_file() else folder / name


def travelling(task: Path) -> list[str]:
    """The names that travel with a task: what its `files` declares and what of its `optional_files` is
    there; an ONNX file's `.npz`.

    Raises:
        InvalidInput: the task file is missing, or neither Python nor ONNX.
    """
    if task.suffix == ".onnx":
        return [task.with_suffix(".npz").name]
    try:
        source = task.read_text()
        optional = declared_files(source, task.name, "optional_files")
        return declared_files(source, task.name) + [
            name for name in optional if locate(task.parent, name).exists()
        ]
    except OSError as error:
        raise InvalidInput(f"The task file {task} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise InvalidInput(
            f"{task} is not a Python task file.", "Name the .py file of a task, or an .onnx file."
        ) from error


def pack(task: Path, destination: Path, extra: Sequence[str] = ()) -> list[str]:
    """Writes the tar and returns its members' names; `extra` names more files in the task's folder.
    The same files give the same bytes.

    Raises:
        InvalidInput: a file is missing, or a declared name leaves the task's folder.
    """
    members = dict.fromkeys(
        member for name in (task.name, *travelling(task), *extra) for member in _expand(task.parent, name)
    )
    with tarfile.open(destination, "w", format=tarfile.PAX_FORMAT) as archive:
        for name in members:
            _add(archive, task.parent, name)
    return list(members)


def _expand(folder: Path, name: str) -> list[str]:
    """A file is itself, a directory the files in it. Raises InvalidInput for names outside `folder`."""
    relative = PurePosixPath(name)
    if relative.is_absolute() or ".." in relative.parts:
        raise InvalidInput(
            f"`files` names '{name}', which is outside the task's folder.",
            "Put the file beside the task file.",
        )
    if not (folder / name).is_dir():
        return [name]
    found = sorted(path for path in (folder / name).rglob("*") if path.is_file())
    return [path.relative_to(folder).as_posix() for path in found if "__pycache__" not in path.parts]


def _add(archive: tarfile.TarFile, folder: Path, name: str) -> None:
    path = locate(folder, name)
    try:
        with path.open("rb") as stream:
            member = tarfile.TarInfo(PurePosixPath(name).as_posix())
            member.size, member.mode, member.mtime = os.fstat(stream.fileno()).st_size, 0o644, 0
            archive.addfile(member, stream)
    except OSError as error:
        raise InvalidInput(
            f"`files` names '{name}', but {path} cannot be read: {error.strerror or error}.",
            "Mend the list or make the file.",
        ) from error
