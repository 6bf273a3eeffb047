"""What a task file says about itself, read as text: nothing is imported, torch is not needed."""

from __future__ import annotations

import ast
from pathlib import Path

from shoal_protos.errors import InvalidInput


def parse(source: str, name: str) -> ast.Module:
    """The syntax tree of a Python file. Raises InvalidInput, naming the line."""
    try:
        return ast.parse(source, filename=name)
    except SyntaxError as error:
        raise InvalidInput(f"{name} is not Python: line {error.lineno}: {error.msg}.") from error


def declared_files(source: str, name: str, attribute: str = "files") -> list[str]:
    """The value of `files` (or `optional_files`) in the task class of a task file; [] when there is none.

    Raises:
        InvalidInput: not Python, or the value is not a plain list of texts.
    """
    found: list[str] = []
    for node in ast.walk(parse(source, name)):
        if not isinstance(node, ast.ClassDef):
            continue
        for statement in node.body:
            value = _value_of(statement, attribute)
            if value is not None:
                found += _literal(value, name, attribute)
    return list(dict.fromkeys(found))


def imported_modules(source: str, name: str) -> list[str]:
    """Top-level names of every module that a file imports, inside functions too."""
    found: list[str] = []
    for node in ast.walk(parse(source, name)):
        if isinstance(node, ast.Import):
            found += [alias.name.partition(".")[0] for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.append(node.module.partition(".")[0])
    return list(dict.fromkeys(found))


def local_modules(path: Path) -> list[Path]:
    """Files and packages beside a Python file that it imports, directly or through one another."""
    folder, found, waiting = path.parent, dict[Path, None](), [path]
    while waiting:
        current = waiting.pop()
        for name in imported_modules(current.read_text(encoding="utf-8"), current.name):
            module, package = folder / f"{name}.py", folder / name
            if module.is_file() and module != path and module not in found:
                found[module] = None
                waiting.append(module)
            elif (package / "__init__.py").is_file() and package not in found:
                found[package] = None
                waiting += sorted(package.rglob("*.py"))
    return list(found)


def _value_of(statement: ast.stmt, attribute: str) -> ast.expr | None:
    if isinstance(statement, ast.Assign):
        targets: list[ast.expr] = statement.targets
    elif isinstance(statement, ast.AnnAssign) and statement.value is not None:
        targets = [statement.target]
    else:
        return None
    if any(isinstance(target, ast.Name) and target.id == attribute for target in targets):
        return statement.value
    return None


def _literal(node: ast.expr, name: str, attribute: str) -> list[str]:
    try:
        value = ast.literal_eval(node)
    except ValueError:
        value = None
    if not isinstance(value, (list, tuple)) or not all(isinstance(item, str) for item in value):
        raise InvalidInput(
            f"{name}: `{attribute}` (line {node.lineno}) must be a plain list of file names.",
            f'Write it as: {attribute} = ["signs.npz"]',
        )
    return list(value)
