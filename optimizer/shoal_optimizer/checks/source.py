"""Will the task work on a worker? What travels, what is imported, what is opened."""

from __future__ import annotations

import importlib.util
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

from shoal_optimizer.checks.report import CheckReport
from shoal_optimizer.declared import declared_files, imported_modules, local_modules
from shoal_optimizer.scaffolding.found import shortened

MAX_FILES = 1000  # what a controller takes
MAX_BYTES = 2 << 30
# Distributions that every worker has: the optimizer extra and what it brings.
PROVIDED = frozenset(
    {"shoal", "torch", "numpy", "onnx", "onnxscript", "onnxruntime", "pillow", "torch-pruning", "optuna",
     "jinja2", "typer", "rich", "protobuf", "grpcio", "psutil"}
)  # fmt: skip


def travelling(task: Path) -> list[str]:
    """Names that a push takes along: declared files, and optional ones that are there."""
    if task.suffix == ".onnx":
        return [task.with_suffix(".npz").name]
    source = task.read_text(encoding="utf-8")
    optional = declared_files(source, task.name, "optional_files")
    there = [name for name in optional if locate(task.parent, name) is not None]
    return list(dict.fromkeys([*declared_files(source, task.name), *there]))


def locate(folder: Path, name: str) -> Path | None:
    """Where a declared file is: beside the task, else in SHOAL_DATA."""
    for place in (folder, Path(os.environ.get("SHOAL_DATA", folder))):
        if (place / name).exists():
            return place / name
    return None


def check_files(report: CheckReport, task: Path) -> None:
    """How much a push sends, and whether it would be taken."""
    paths = [task]
    for name in travelling(task):
        path = locate(task.parent, name)
        if path is None:
            report.fail(
                "files",
                f"`files` names '{name}', which is missing.",
                f"Put it into {task.parent} or take it off the list.",
            )
            return
        paths += sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    size = sum(path.stat().st_size for path in paths)
    report.facts["files"] = [p.name for p in paths][:100]
    report.facts["push_bytes"] = size
    names = shortened([path.name for path in paths])
    if len(paths) > MAX_FILES or size > MAX_BYTES:
        report.fail(
            "files",
            f"A push would be {len(paths):,} files and {size / 1e6:,.0f} MB; it may be {MAX_FILES:,} files "
            f"and {MAX_BYTES / 1e6:,.0f} MB.",
            "Pack the data into one .npz at the input's size: `shoal task new FOLDER` does that.",
        )
        return
    report.add("files", f"{_size(size)} travel: {names}")


def check_imports(report: CheckReport, task: Path) -> None:
    """Modules that a worker would not find."""
    declared = set(travelling(task))
    local = local_modules(task)
    left = [path for path in local if path.name not in declared]
    for path in left:
        report.fail(
            "imports",
            f"{path.name} lies beside the task and is imported, but would not travel.",
            f'Add "{path.name}" to the task\'s `files`.',
        )
    known = {path.stem if path.suffix else path.name for path in local}
    foreign = []
    distributions = packages_distributions()
    sources = [task, *(f for p in local for f in ([p] if p.suffix else sorted(p.rglob("*.py"))))]
    imported = [n for f in sources for n in imported_modules(f.read_text(encoding="utf-8"), f.name)]
    for name in dict.fromkeys(imported):
        if name in known or name in sys.stdlib_module_names:
            continue
        if not {d.lower() for d in distributions.get(name, [])} & PROVIDED and not name.startswith("shoal_"):
            foreign.append(name)
    missing = [name for name in foreign if importlib.util.find_spec(name) is None]
    if missing:
        report.fail(
            "imports",
            f"{shortened(missing)} {'is' if len(missing) == 1 else 'are'} not installed here.",
            f"pip install {' '.join(missing)} (the package may be called otherwise)",
        )
    elif foreign:
        report.warn(
            "imports",
            f"The task imports {shortened(foreign)}, which Shoal does not bring.",
            "Install it where the controller's worker runs too, or keep what it makes in a file.",
        )
    elif not left:
        report.add("imports", "nothing that a worker lacks")


# ---------------------------------------------------------------------------- files that are opened

_watching: list[Opened] = []
_hooked = False


class Opened:
    """Files below a person's folders that the task's code opened for reading."""

    def __init__(self, task: Path) -> None:
        self.task, self.paths, self.since = task, dict[Path, None](), time.time()

    def see(self, name: Any, mode: Any) -> None:
        if not isinstance(name, (str, bytes, os.PathLike)) or (isinstance(mode, str) and "r" not in mode):
            return
        path = Path(os.path.abspath(os.fsdecode(name)))  # resolve() would open more
        self.paths[path] = None

    def strangers(self) -> list[Path]:
        """Those that exist and would not travel."""
        folder = self.task.parent.resolve()
        allowed = {(locate(folder, name) or folder / name).resolve() for name in travelling(self.task)}
        allowed |= {path.resolve() for path in local_modules(self.task)}
        allowed.add(self.task.resolve())
        found = []
        for path in self.paths:
            real = path.resolve()
            if not real.is_file() or _is_of_the_machine(real) or real.suffix in (".pyc", ".py", ".so"):
                continue
            if real.stat().st_mtime >= self.since:  # it was written meanwhile
                continue
            if not any(real == good or good in real.parents for good in allowed):
                found.append(real)
        return list(dict.fromkeys(found))


def _is_of_the_machine(path: Path) -> bool:
    roots = {sys.prefix, sys.base_prefix, "/proc", "/sys", "/dev", "/etc", "/usr", "/run", "/var"}
    if any(path.is_relative_to(Path(root).resolve()) for root in roots):
        return True
    return "site-packages" in path.parts or "torch" in path.parts or ".cache" in path.parts


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and _watching:
        for opened in _watching:
            opened.see(arguments[0], arguments[1])


@contextmanager
def watch_opening(task: Path) -> Iterator[Opened]:
    """Notes which files are opened meanwhile, in this process."""
    global _hooked
    if not _hooked:  # an audit hook cannot be taken off; without watchers it does nothing
        sys.addaudithook(_hook)
        _hooked = True
    opened = Opened(task)
    _watching.append(opened)
    try:
        yield opened
    finally:
        _watching.remove(opened)


def check_opened(report: CheckReport, opened: Opened) -> None:
    """Fails for data that the task read from places that a worker does not have."""
    strangers = opened.strangers()
    if strangers:
        report.fail(
            "reads",
            f"The task read {' and '.join(str(p) for p in strangers[:3])}, which would not travel.",
            "Put it beside the task file, name it in `files`, and open it by Path(__file__).parent.",
        )


def _size(count: int) -> str:
    return f"{count / 1e6:,.1f} MB" if count >= 1e5 else f"{count / 1e3:,.1f} kB"
