"""What travels in a push: the task file and the files that its `files` names, as a tar.

The task is read as text, never imported: pushing needs neither torch nor trust in the file.
"""

from __future__ import annotations

import ast
import io
import tarfile
from pathlib import Path, PurePosixPath

from shoal_protos.errors import InvalidInput


def declared_files(source: str, name: str) -> list[str]:
    """The value of `files` in the task class of a task file; [] when it declares none.

    Raises:
        InvalidInput: not Python, or `files` is not a plain list of texts.
    """
    try:
        tree = ast.parse(source, filename=name)
    except SyntaxError as error:
        raise InvalidInput(f"{name} is not Python: line {error.lineno}: {error.msg}.") from error
    found: list[str] = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.ClassDef):
            continue
        for statement in node.body:
            value = _value_of_files(statement)
            if value is not None:
                found += _literal(value, name)
    return list(dict.fromkeys(found))


def _value_of_files(statement: ast.stmt) -> ast.expr | None:
    if isinstance(statement, ast.Assign):
        targets: list[ast.expr] = statement.targets
    elif isinstance(statement, ast.AnnAssign) and statement.value is not None:
        targets = [statement.target]
    else:
        return None
    if any(isinstance(target, ast.Name) and target.id == "files" for target in targets):
        return statement.value
    return None


def _literal(node: ast.expr, name: str) -> list[str]:
    try:
        value = ast.literal_eval(node)
    except ValueError:
        value = None
    if not isinstance(value, (list, tuple)) or not all(isinstance(item, str) for item in value):
        raise InvalidInput(
            f"{name}: `files` (line {node.lineno}) must be a plain list of file names.",
            'Write it as: files = ["signs.npz"]',
        )
    return list(value)


def pack(task: Path, destination: Path) -> list[str]:
    """Writes the tar and returns its members' names. The same files give the same bytes.

    Raises:
        InvalidInput: a file is missing, or a declared name leaves the task's folder.
    """
    try:
        source = task.read_text()
    except OSError as error:
        raise InvalidInput(f"The task file {task} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise InvalidInput(f"{task} is not a Python task file.", "Name the .py file of a task.") from error
    names = [task.name, *declared_files(source, task.name)]
    with tarfile.open(destination, "w", format=tarfile.PAX_FORMAT) as archive:
        for name in names:
            _add(archive, task.parent, name)
    return names


def _add(archive: tarfile.TarFile, folder: Path, name: str) -> None:
    relative = PurePosixPath(name)
    if relative.is_absolute() or ".." in relative.parts:
        raise InvalidInput(
            f"`files` names '{name}', which is outside the task's folder.",
            "Put the file beside the task file.",
        )
    path = folder / name
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InvalidInput(
            f"`files` names '{name}', but {path} cannot be read: {error.strerror}.",
            "Mend the list or make the file.",
        ) from error
    member = tarfile.TarInfo(relative.as_posix())
    member.size, member.mode, member.mtime = len(data), 0o644, 0
    archive.addfile(member, io.BytesIO(data))
