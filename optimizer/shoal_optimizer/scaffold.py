"""`shoal task new`: writes a ready task from pictures, a table, arrays or an ONNX file.

The source is inspected, what was found and decided is told, and the task is a plain Python file beside
one packed data file: it trains, is checked, optimized and pushed as it is, and is the user's to edit.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shoal_optimizer.scaffolding import models, onnx_file, write
from shoal_optimizer.scaffolding.found import Found
from shoal_protos.errors import Conflict, InvalidInput

KINDS = ("image", "audio", "series", "tensor")
OUTPUT_KINDS = ("logits", "values")


@dataclass(frozen=True)
class Scaffolded:
    """A written task.

    Attributes:
        task: the task file; `files` are the names beside it that travel with it.
        facts: (what, figure) lines; `decided` and `warnings` are sentences.
        trains: True when the built-in network has to train first.
    """

    task: Path
    files: tuple[str, ...]
    facts: tuple[tuple[str, str], ...]
    decided: tuple[str, ...]
    warnings: tuple[str, ...]
    trains: bool

    def to_json(self) -> dict[str, Any]:
        return {
            "task": str(self.task),
            "files": list(self.files),
            "facts": dict(self.facts),
            "decided": list(self.decided),
            "warnings": list(self.warnings),
            "trains": self.trains,
        }


def new(
    source: Path,
    *,
    name: str = "",
    out: Path | None = None,
    model: str = "",
    weights: Path | None = None,
    data: Path | None = None,
    target: str = "",
    kind: str = "",
    output_kind: str = "",
    size: tuple[int, int] | None = None,
    sample_rate: int = 0,
    force: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Scaffolded:
    """Inspects `source` and writes a task for it.

    Args:
        source: a folder of pictures (a sub-folder a class), a `.csv`, an `.npz`, or an `.onnx`.
        name: the task's name; default the source's.
        out: the task file; default `NAME.py` in the working directory.
        model: `FILE.py:function` or `module:function` that returns the user's network; "" = a small one
            that trains itself. `weights`: its state dict.
        data: `.npz` of an ONNX file that isn't named like it.
        target: column of a CSV to predict.
        kind: "image", "audio", "series" or "tensor" of an `.npz`; "" = guessed.
        output_kind: "logits" or "values"; "" = guessed.
        size: height and width that pictures are brought to.
        sample_rate: of audio or series, in Hz.
        force: replace files that exist.

    Raises:
        InvalidInput: the source, an option, the model or its weights are wrong; says what to mend.
        Conflict: the task file exists.
        MissingExtra: torch, onnx or Pillow is needed and not installed.
    """
    _check_options(source, kind, output_kind, model, weights, target)
    name = name or (out.stem if out is not None else source.resolve().stem)
    stem = safe_name(name)
    if source.suffix.lower() == ".onnx":
        return _onnx(source, out or Path(f"{stem}.onnx"), data, force)
    path = (out or Path(f"{stem}.py")).absolute()
    if path.suffix != ".py":
        raise InvalidInput(f"The task file '{path.name}' is no Python file.", "Name it with --out TASK.py.")
    packed = path.with_name(f"{path.stem}-data.npz")
    for taken in (path, packed):
        if taken.exists() and not force:
            raise Conflict(f"{taken} exists.", "Use another --out or --name, or --force to replace it.")
    found = _read(source, target, kind, output_kind, size, sample_rate, progress)
    path.parent.mkdir(parents=True, exist_ok=True)
    own, note = None, ""
    if model:
        own = models.bring(model, weights, path.parent, found.decided)
        note = _scale(own, found, size is not None or source.suffix != "")
    write.pack_data(found, packed)
    path.write_text(
        write.text(
            found,
            own,
            file=path.name,
            data=packed.name,
            weights=f"{path.stem}.pt",
            source=source.name,
            note=note,
        ),
        encoding="utf-8",
    )
    if own is None:
        found.decided.append(
            f"The network is a small one that trains itself: python {path.name}. Yours goes where the file "
            "says so, or give --model FILE.py:function --weights FILE."
        )
    files = (packed.name, *(own.files if own is not None else ()))
    return Scaffolded(
        path, files, tuple(found.facts), tuple(found.decided), tuple(found.warnings), own is None
    )


def safe_name(name: str) -> str:
    """A name for files, classes and models: lower-case letters, digits and `_`."""
    found = re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")
    return found if found and not found[0].isdigit() else f"task_{found}".rstrip("_")


def _check_options(
    source: Path, kind: str, output_kind: str, model: str, weights: Path | None, target: str
) -> None:
    if not source.exists():
        raise InvalidInput(f"There is nothing at '{source}'.", "Check the path.")
    for option, value, known in (("--kind", kind, KINDS), ("--output", output_kind, OUTPUT_KINDS)):
        if value and value not in known:
            raise InvalidInput(f"{option} {value} is not known.", f"Use one of {', '.join(known)}.")
    if weights is not None and not model:
        raise InvalidInput(
            "--weights needs the network they belong to.",
            "Name what makes it: --model FILE.py:function",
        )
    suffix = source.suffix.lower()
    if model and suffix == ".onnx":
        raise InvalidInput("An ONNX file is the model itself.", "Leave --model away.")
    if target and suffix not in (".csv", ".tsv"):
        raise InvalidInput("--target names a column of a CSV.", "Leave it away.")


def _read(
    source: Path,
    target: str,
    kind: str,
    output_kind: str,
    size: tuple[int, int] | None,
    sample_rate: int,
    progress: Callable[[int, int], None],
) -> Found:
    from shoal_optimizer.scaffolding import arrays, images, tables

    suffix = source.suffix.lower()
    if source.is_dir():
        return images.read(source, size=size, progress=progress)
    if suffix in (".csv", ".tsv", ".txt"):
        return tables.read(source, target=target, output_kind=output_kind)
    if suffix == ".npz":
        return arrays.read(source, kind=kind, output_kind=output_kind, sample_rate=sample_rate)
    raise InvalidInput(
        f"'{source.name}' is no source of a task.",
        "Give a folder of pictures (a sub-folder a class), a .csv, an .npz or an .onnx file.",
    )


def _scale(own: models.OwnModel, found: Found, sized: bool) -> str:
    """Chooses how the network is fed; returns what the file says about it."""
    sentence, knows = models.choose_scaling(own, found)
    assert own.scaling is not None
    found.decided.append(f"{sentence} It is fed {own.scaling.title}.")
    if found.input_kind == "image" and not sized:
        found.warnings.append(
            "If your network was trained on pictures of another size, give that: --size 32."
        )
    if not knows:
        found.warnings.append(
            "The network does no better than chance on these data, however they are scaled. Is it trained, "
            "and are the classes in its order? MEAN and STD in the file say how it is fed."
        )
    return f"Tried: {own.scaling.title} is best." if knows else "Nothing tried was good: check this."


def _onnx(source: Path, out: Path, data: Path | None, force: bool) -> Scaffolded:
    out = out.absolute()
    if out.suffix != ".onnx":
        raise InvalidInput(f"'{out.name}' is no ONNX file.", "The file is the task: --out NAME.onnx")
    if out.exists() and out.resolve() != source.resolve() and not force:
        raise Conflict(f"{out} exists.", "Use another --out or --name, or --force to replace it.")
    decided, warnings = onnx_file.prepare(source, out, data)
    decided.append("The ONNX file with its .npz is the task: converted and quantized, not trained.")
    return Scaffolded(out, (out.with_suffix(".npz").name,), (), tuple(decided), tuple(warnings), False)
