"""The user's own model: where it comes from, its weights, and which scaling of the data it was trained on.

Runs the user's code, in this process and on this machine.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from shoal_optimizer.scaffolding.found import Found
from shoal_optimizer.weights import require_torch
from shoal_protos.errors import InvalidInput

if TYPE_CHECKING:
    from torch import nn

SCALED_VALUES = 8_000_000  # numbers that mean and spread are taken of, about
PROBED = 256  # items that choose the scaling
WRAPPERS = ("state_dict", "model_state_dict", "model_state", "model", "net", "network")
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclass(frozen=True)
class Scaling:
    """What is taken off and divided by, per channel or column, in raw units."""

    title: str
    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass
class OwnModel:
    """A model that the user brought.

    Attributes:
        statement: the import line of the task; `call` makes the module.
        files: what must travel for it, beside the task.
        wrapper: key of the checkpoint that holds the weights; `prefix` is cut off their names.
        channel_axis: series get a channel axis before the network.
    """

    statement: str
    call: str
    files: list[str] = field(default_factory=list)
    weights: str = ""
    wrapper: str = ""
    prefix: str = ""
    channel_axis: bool = True
    scaling: Scaling | None = None
    module: Any = None


def bring(spec: str, weights: Path | None, folder: Path, decided: list[str]) -> OwnModel:
    """Imports `module:function` or `FILE.py:function`, calls it and loads the weights.

    Raises:
        InvalidInput: no such module, function or weights, or the weights are of another network.
    """
    require_torch()
    where, _, name = spec.rpartition(":")
    if not where or not name.isidentifier():
        raise InvalidInput(f"'{spec}' names no function.", "Write --model FILE.py:function.")
    if where.endswith(".py"):
        source = Path(where)
        if not source.is_file():
            raise InvalidInput(f"There is no file '{where}'.", "Check --model.")
        if not source.stem.isidentifier():
            raise InvalidInput(f"'{source.name}' cannot be imported.", "Rename it, e.g. to my_model.py.")
        own = OwnModel(f"from {source.stem} import {name}", f"{name}()", [_beside(source, folder, decided)])
        made = _call(_imported(source.stem, source.resolve().parent), name, spec)
    else:
        made, origin = _from_module(where, name, spec)
        own = OwnModel(f"from {where} import {name}", f"{name}()")
        own.files = _travelling_module(where, origin, folder, decided)
    own.module = made
    if weights is not None:
        own.weights = _beside(weights, folder, decided)
        own.wrapper, own.prefix = load_weights(made, weights)
        own.files.append(own.weights)
    made.float().eval()
    return own


def _imported(name: str, folder: Path) -> Any:
    with _on_path(folder):
        known = sys.modules.get(name)
        if known is not None and Path(getattr(known, "__file__", "") or "").parent != folder:
            del sys.modules[name]
        try:
            return importlib.import_module(name)
        except Exception as error:
            raise InvalidInput(
                f"Importing {name} raised {type(error).__name__}: {error}.",
                f"Run `python -c 'import {name}'` in {folder} to see the whole traceback.",
            ) from error


def _from_module(where: str, name: str, spec: str) -> tuple[nn.Module, Path | None]:
    module = _imported(where, Path.cwd())
    origin = getattr(sys.modules[where.partition(".")[0]], "__file__", None)
    return _call(module, name, spec), Path(origin) if origin else None


@contextmanager
def _on_path(folder: Path) -> Iterator[None]:
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


def _call(module: Any, name: str, spec: str) -> nn.Module:
    torch = require_torch()
    maker = getattr(module, name, None)
    if maker is None:
        raise InvalidInput(f"{module.__name__} has no '{name}'.", "Check --model.")
    if isinstance(maker, torch.nn.Module):
        raise InvalidInput(f"'{spec}' is a module, not a function.", "Write a function that returns it.")
    try:
        needed = [
            p.name
            for p in inspect.signature(maker).parameters.values()
            if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
        ]
    except (TypeError, ValueError):
        needed = []
    if needed:
        raise InvalidInput(
            f"{spec} wants {', '.join(needed)}.",
            "Write a function without arguments that returns the network, and name that.",
        )
    try:
        made = maker()
    except Exception as error:
        raise InvalidInput(f"{spec} raised {type(error).__name__}: {error}.", "Mend it.") from error
    if not isinstance(made, torch.nn.Module):
        raise InvalidInput(f"{spec} gives {type(made).__name__}, not a torch.nn.Module.", "Return it.")
    return cast("nn.Module", made)


def _beside(path: Path, folder: Path, decided: list[str]) -> str:
    """The file's name in the task's folder, where it is copied if it lies elsewhere."""
    if not path.is_file():
        raise InvalidInput(f"There is no file '{path}'.", "Check the path.")
    target = folder / path.name
    if path.resolve() != target.resolve():
        if target.exists() and target.read_bytes() != path.read_bytes():
            raise InvalidInput(f"{target} exists and is another file.", "Move or rename one of them.")
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
        decided.append(f"{path.name} is copied beside the task, since it travels with it.")
    return path.name


def _travelling_module(where: str, origin: Path | None, folder: Path, decided: list[str]) -> list[str]:
    """Files of a module that is no installed package; those must lie in the task's folder."""
    if origin is None or "site-packages" in origin.parts or "dist-packages" in origin.parts:
        top = where.partition(".")[0]
        decided.append(f"The network comes from the package '{top}': workers need it installed too.")
        return []
    if origin.name != "__init__.py":
        return [_beside(origin, folder, decided)]
    if origin.parent.parent.resolve() != folder.resolve():
        raise InvalidInput(
            f"The package '{origin.parent.name}' lies in {origin.parent.parent}, the task in {folder}.",
            f"Write the task there: --out {origin.parent.parent / 'task.py'}",
        )
    return [origin.parent.name]


def load_weights(module: nn.Module, path: Path) -> tuple[str, str]:
    """Loads a checkpoint strictly; returns the key it is under and the prefix of its names.

    Raises:
        InvalidInput: not a checkpoint, or one of another network; the difference is named.
    """
    torch = require_torch()
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise InvalidInput(
            f"{path.name} cannot be read as plain weights: {str(error).splitlines()[0][:200]}",
            f'Save them with torch.save(model.state_dict(), "{path.name}").',
        ) from error
    wrapper = ""
    if isinstance(stored, dict):
        wrapper = next((key for key in WRAPPERS if isinstance(stored.get(key), dict)), "")
        stored = stored[wrapper] if wrapper else stored
    if not isinstance(stored, dict) or not all(hasattr(v, "shape") for v in stored.values()) or not stored:
        raise InvalidInput(
            f"{path.name} holds no weights.", f'Save them with torch.save(model.state_dict(), "{path.name}").'
        )
    wanted = module.state_dict()
    prefix = next(
        (p for p in ("module.", "model.", "_orig_mod.") if all(k.startswith(p) for k in stored)), ""
    )
    if prefix and all(k.startswith(prefix) for k in wanted):
        prefix = ""
    stored = {key.removeprefix(prefix): value for key, value in stored.items()}
    problem = mismatch(wanted, stored)
    if problem:
        raise InvalidInput(
            f"{path.name} holds the weights of another network: {problem}.",
            "Name the function that made the network these weights were trained in, with the same arguments.",
        )
    module.load_state_dict(stored)
    return wrapper, prefix


def mismatch(wanted: dict[str, Any], stored: dict[str, Any]) -> str:
    """How two state dicts differ, for people; "" when they fit."""
    missing = [key for key in wanted if key not in stored]
    extra = [key for key in stored if key not in wanted]
    shaped = [k for k in wanted if k in stored and tuple(wanted[k].shape) != tuple(stored[k].shape)]
    parts = []
    if missing:
        parts.append(f"it lacks {len(missing)} of the network's {len(wanted)} tensors, e.g. {missing[0]}")
    if extra:
        parts.append(f"{len(extra)} of its {len(stored)} tensors have no place, e.g. {extra[0]}")
    if shaped:
        key = shaped[0]
        parts.append(
            f"{key} is {list(stored[key].shape)}, the network's is {list(wanted[key].shape)}"
            + (f" (and {len(shaped) - 1} more)" if len(shaped) > 1 else "")
        )
    return "; ".join(parts)


# ---------------------------------------------------------------------------- scaling


def own_scaling(found: Found) -> Scaling:
    """Mean and spread of the training data, per channel or column, missing values left out."""
    data = found.training_inputs
    data = data[:: max(1, data.size // SCALED_VALUES)]
    axes: tuple[int, ...] = tuple(range(data.ndim))
    if found.input_kind == "image" or found.table is not None:
        axes = axes[:-1]
    elif found.input_kind == "tensor" and data.ndim == 2:
        axes = (0,)
    if found.table is not None:
        data = data[:, found.table.numbers]
    if not data.shape[-1]:
        return Scaling("the data's own", (), ())
    values = data.astype(np.float64)
    mean = np.atleast_1d(np.nanmean(values, axis=axes))
    std = np.atleast_1d(np.nanstd(values, axis=axes))
    std = np.where(std > 1e-9, std, 1.0)
    if len(mean) > 256:  # too many to read in a file: one for all
        mean, std = np.array([values.mean()]), np.array([values.std() or 1.0])
    return Scaling("the data's own mean and spread", _round(mean), _round(std))


def _round(values: np.ndarray) -> tuple[float, ...]:
    return tuple(float(f"{value:.6g}") for value in values)


def usual_scalings(found: Found) -> list[Scaling]:
    """How networks for such data are usually fed, the most usual first."""
    own = own_scaling(found)
    if found.input_kind == "image" and found.inputs.dtype == np.uint8:
        channels = found.input.shape[-1]
        scalings = [Scaling("0 to 1", (0.0,) * channels, (255.0,) * channels)]
        if channels == 3:
            scaled = (tuple(round(255 * v, 3) for v in part) for part in IMAGENET)
            scalings.append(Scaling("ImageNet's mean and spread", *scaled))
        scalings.append(Scaling("-1 to 1", (127.5,) * channels, (127.5,) * channels))
        return [*scalings, own, Scaling("0 to 255", (0.0,) * channels, (1.0,) * channels)]
    count = len(own.mean)
    scalings = [Scaling("as they are", (0.0,) * count, (1.0,) * count), own]
    if found.inputs.dtype == np.int16:
        scalings.insert(1, Scaling("-1 to 1", (0.0,) * count, (32768.0,) * count))
    return scalings


def choose_scaling(own: OwnModel, found: Found) -> tuple[str, bool]:
    """Feeds the model some items in each usual scaling and keeps the one it is best with.

    Returns:
        A sentence about it, and whether the model seems to know the data.

    Raises:
        InvalidInput: the model cannot take these inputs, or answers in another shape.
    """
    judged = np.flatnonzero(found.evaluation)
    chosen = judged[:: max(1, len(judged) // PROBED)][:PROBED]
    inputs, targets = found.inputs[chosen], found.targets[chosen]
    results: list[tuple[float, Scaling, bool]] = []
    failure = ""
    axes = (True, False) if found.input_kind in ("series", "audio") and inputs.ndim == 2 else (False,)
    for scaling in usual_scalings(found):
        for axis in axes:
            try:
                outputs = _outputs(own.module, _prepared(inputs, found, scaling, axis))
            except Exception as error:
                failure = failure or f"{type(error).__name__}: {error}"
                continue
            _check_outputs(outputs, found)
            results.append((_score(outputs, targets, found), scaling, axis))
    if not results:
        shape = list(_prepared(inputs[:1], found, usual_scalings(found)[0], axes[0]).shape[1:])
        raise InvalidInput(
            f"The network cannot take {shape}: {failure[:300]}",
            "Use the input size it was made for (--size for pictures), or leave --model away.",
        )
    best = max(results, key=lambda r: r[0])
    own.scaling, own.channel_axis = best[1], best[2]
    name = "right" if found.output_kind == "logits" else "R squared"
    shown = ", ".join(
        f"{r[1].title} {r[0]:.0%}" if name == "right" else f"{r[1].title} {r[0]:.2f}" for r in results
    )
    chance = float(np.bincount(targets).max()) / len(targets) if found.output_kind == "logits" else 0.0
    return f"Fed with {len(chosen)} items, the network is {name}: {shown}.", best[0] > chance + 0.02


def _prepared(inputs: np.ndarray, found: Found, scaling: Scaling, axis: bool) -> Any:
    """What the generated `preprocess()` gives the network."""
    torch = require_torch()
    if found.table is not None:
        return torch.from_numpy(_table_rows(inputs, found, scaling))
    values = (inputs.astype(np.float32) - _floats(scaling.mean)) / _floats(scaling.std)
    if found.input_kind == "image":
        values = values.transpose(0, 3, 1, 2)
    elif found.input_kind in ("series", "audio"):
        if values.ndim == 3:
            values = values.transpose(0, 2, 1)
        elif axis:
            values = values[:, None]
    return torch.from_numpy(np.ascontiguousarray(values))


def _floats(values: tuple[float, ...]) -> np.ndarray:
    return np.array(values, np.float32)


def _table_rows(inputs: np.ndarray, found: Found, scaling: Scaling) -> np.ndarray:
    assert found.table is not None
    rows = np.where(np.isnan(inputs), _floats(found.table.fill), inputs)
    parts = [(rows[:, found.table.numbers] - _floats(scaling.mean)) / _floats(scaling.std)]
    for i, texts in found.table.categories.items():
        parts.append((rows[:, i : i + 1] == np.arange(len(texts))).astype(np.float32))
    return np.concatenate(parts, axis=1).astype(np.float32)


def _outputs(module: Any, prepared: Any) -> np.ndarray:
    torch = require_torch()
    with torch.inference_mode():
        answer = torch.cat([module(part) for part in prepared.split(32)])
    return np.asarray(answer.numpy())


def _check_outputs(outputs: np.ndarray, found: Found) -> None:
    if found.output_kind == "logits" and outputs.shape[-1] != found.outputs:
        raise InvalidInput(
            f"The network gives {outputs.shape[-1]} logits, the data have {found.outputs} classes.",
            "Make the network for these classes, in the order of their names.",
        )
    if found.output_kind == "values" and outputs[:1].size != found.outputs:
        raise InvalidInput(
            f"The network gives {list(outputs.shape[1:])}, the data have {found.outputs} values an item.",
            "Check --target and --output.",
        )


def _score(outputs: np.ndarray, targets: np.ndarray, found: Found) -> float:
    if found.output_kind == "logits":
        return float(np.mean(outputs.argmax(-1) == targets))
    outputs = outputs.reshape(targets.shape).astype(np.float64)
    total = float(np.sum((targets - targets.mean(axis=0)) ** 2)) or 1.0
    return 1.0 - float(np.sum((outputs - targets) ** 2)) / total
