"""An `.npz`: arrays of inputs and targets, with or without class names and splits."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from shoal_agent.runtimes.tensors import datatype_of
from shoal_optimizer.scaffolding.found import Found, describe_classes, describe_items, shortened, stable_split
from shoal_protos.bundle import TensorSpec
from shoal_protos.errors import InvalidInput

PAIRS = (
    ("inputs", "targets"), ("x", "y"), ("data", "target"), ("data", "targets"), ("images", "labels"),
    ("features", "labels"), ("samples", "labels"), ("inputs", "labels"), ("x", "labels"), ("data", "labels"),
)  # fmt: skip
NAMES = ("labels", "classes", "class_names", "label_names", "target_names")
MASKS = ("evaluation", "is_test", "test", "split", "splits")
TRAINED, JUDGED = ("train", "training"), ("evaluation", "eval", "test", "val", "valid", "validation")
SHORTEST_SERIES = 64
MAX_CLASSES = 1000


def read(path: Path, *, kind: str = "", output_kind: str = "", sample_rate: int = 0) -> Found:
    """Reads an `.npz`.

    Args:
        kind: "image", "audio", "series" or "tensor"; "" = guessed from shape and type.
        output_kind: "logits" or "values"; "" = logits where targets are class numbers.
        sample_rate: of audio and series, in Hz; 0 = what an array `sample_rate` or `rate` says.

    Raises:
        InvalidInput: not an `.npz`, arrays missing or of different lengths, NaN, targets out of range.
    """
    arrays = load(path)
    inputs, targets, evaluation = _pair(arrays, path.name)
    inputs, spec, kind, color, decided = _inputs(inputs, kind, path.name)
    targets, labels, output_kind = _targets(targets, _names(arrays, len(inputs)), output_kind, path.name)
    for name in ("sample_rate", "rate"):
        if not sample_rate and name in arrays and arrays[name].size == 1:
            sample_rate = int(arrays[name].reshape(-1)[0])
    classes = targets if output_kind == "logits" else None
    chosen = stable_split([str(i) for i in range(len(inputs))], classes) if evaluation is None else evaluation
    if chosen.all() or not chosen.any():
        raise InvalidInput(f"{path.name} has no items to {'train' if chosen.all() else 'judge'} with.")
    found = Found(
        inputs, targets, chosen, spec, kind, output_kind, labels, color,
        "stretch" if kind == "image" else "", sample_rate if kind in ("audio", "series") else 0,
        decided=decided,
    )  # fmt: skip
    describe_items(found)
    found.facts.append(("each item", f"{spec.datatype} {list(spec.shape[1:])}, {_range(inputs)}"))
    if output_kind == "logits":
        describe_classes(found)
    else:
        found.facts.append(("predicts", f"{found.outputs} values, {_range(targets)}"))
    found.decided.append(
        "A fifth judges, spread over the classes."
        if evaluation is None
        else "The file says which items judge."
    )
    found.decided.insert(0, f"The input is of kind '{kind}'. Another: --kind image, audio, series or tensor.")
    return found


def load(path: Path) -> dict[str, np.ndarray]:
    """All arrays of a file. Raises InvalidInput for what is no `.npz` of plain arrays."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            return {name: stored[name] for name in stored.files}
    except (OSError, ValueError, AttributeError, EOFError, KeyError) as error:
        raise InvalidInput(
            f"{path.name} cannot be read as an .npz: {error}.",
            "Write it with numpy.savez(path, inputs=..., targets=...), without Python objects.",
        ) from error


def _pair(arrays: Mapping[str, np.ndarray], name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Inputs, targets, and which judge; None where the file does not say."""
    lower = {key.lower(): array for key, array in arrays.items()}
    split = _split_pair(lower)
    if split is not None:
        return split
    for first, second in PAIRS:
        if first in lower and second in lower:
            x, y = lower[first], lower[second]
            if x.ndim < 1 or y.ndim < 1 or len(x) != len(y):
                raise InvalidInput(
                    f"{name}: '{first}' has {list(x.shape)} and '{second}' {list(y.shape)}.",
                    "Give one target an item.",
                )
            return x, y, _mask(lower, len(x))
    raise InvalidInput(
        f"{name} has the arrays {shortened(list(arrays)) or 'none'}.",
        "Name them inputs and targets (or x and y; x_train, y_train, x_test, y_test).",
    )


def _split_pair(lower: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Arrays named like x_train or test_labels."""
    sides: dict[tuple[bool, bool], np.ndarray] = {}
    for key, array in lower.items():
        words = set(re.split(r"[_.:\-]", key))
        judged = bool(words & set(JUDGED))
        if not judged and not words & set(TRAINED):
            continue
        target = bool(words & {"y", "target", "targets", "label", "labels"})
        sides.setdefault((judged, target), array)
    if len(sides) < 4:
        return None
    try:
        x = np.concatenate([sides[False, False], sides[True, False]])
        y = np.concatenate([sides[False, True], sides[True, True]])
    except ValueError as error:
        raise InvalidInput(f"Training and evaluation arrays differ: {error}.", "Make them alike.") from error
    if len(x) != len(y):
        raise InvalidInput(f"There are {len(x)} inputs and {len(y)} targets.", "Give one target an item.")
    return x, y, np.arange(len(x)) >= len(sides[False, False])


def _mask(lower: Mapping[str, np.ndarray], count: int) -> np.ndarray | None:
    for key in MASKS:
        array = lower.get(key)
        if array is None or array.shape != (count,):
            continue
        if array.dtype.kind in "US":
            return np.isin(np.char.lower(array.astype(str)), JUDGED)
        return array.astype(bool)
    return None


def _names(arrays: Mapping[str, np.ndarray], count: int) -> tuple[str, ...]:
    """Class names, if an array of texts holds them."""
    for key in NAMES:
        array = arrays.get(key)
        if array is not None and array.dtype.kind in "US" and array.ndim == 1 and len(array) != count:
            return tuple(array.astype(str).tolist())
    return ()


def _inputs(array: np.ndarray, kind: str, name: str) -> tuple[np.ndarray, TensorSpec, str, str, list[str]]:
    """Inputs as they go over the wire, their declaration, kind and colour order, what was decided."""
    decided = []
    if array.dtype.kind not in "iufb" or array.ndim < 2:
        raise InvalidInput(
            f"{name}: inputs are {array.dtype} {list(array.shape)}.", "Give numbers, the items first."
        )
    if array.dtype.kind == "f":
        broken = ~np.isfinite(array).reshape(len(array), -1).all(axis=1)
        if broken.any():
            first = ", ".join(str(i) for i in np.flatnonzero(broken)[:5])
            raise InvalidInput(
                f"{name}: {int(broken.sum())} of {len(array)} inputs hold NaN or infinity (items {first}).",
                "Clean or leave out those items.",
            )
    if array.dtype.kind == "f" and array.dtype != np.float32:
        array = array.astype(np.float32)
        decided.append("Inputs are sent as float32.")
    kind = kind or _kind(array)
    layout, color = "", ""
    if kind == "image":
        array, layout, color = _as_image(array, name, decided)
    elif kind in ("audio", "series"):
        layout = "NT" if array.ndim == 2 else "NTC"
    elif array.ndim == 2:
        layout = "NC"
    low, high = (0.0, 255.0) if kind == "image" and array.dtype == np.uint8 else (None, None)
    if kind in ("audio", "series") and array.dtype == np.int16:
        low, high = -32768.0, 32767.0
    shape = (-1, *(int(d) for d in array.shape[1:]))
    title = {"image": "image", "audio": "sound", "series": "series"}.get(kind, "input")
    return array, TensorSpec(title, datatype_of(array.dtype), shape, layout, low, high), kind, color, decided


def _kind(array: np.ndarray) -> str:
    if array.dtype == np.uint8 and (array.ndim == 3 or (array.ndim == 4 and _channels(array))):
        return "image"
    if array.ndim == 2 and array.shape[1] >= SHORTEST_SERIES:
        return "series"
    return "series" if array.ndim == 3 and array.shape[1] >= SHORTEST_SERIES > array.shape[2] else "tensor"


def _channels(array: np.ndarray) -> bool:
    return array.shape[-1] in (1, 3) or array.shape[1] in (1, 3)


def _as_image(array: np.ndarray, name: str, decided: list[str]) -> tuple[np.ndarray, str, str]:
    """Pictures as [n, height, width, channels]."""
    if array.ndim == 3:
        array = array[..., None]
    if array.ndim != 4 or not _channels(array):
        raise InvalidInput(
            f"{name}: inputs {list(array.shape)} are no pictures.", "Give [n, height, width, 1 or 3]."
        )
    if array.shape[-1] not in (1, 3):
        array = np.ascontiguousarray(array.transpose(0, 2, 3, 1))
        decided.append("Channels are moved last: applications send height, width, channels.")
    return array, "NHWC", "gray" if array.shape[-1] == 1 else "rgb"


def _targets(
    array: np.ndarray, labels: tuple[str, ...], wanted: str, name: str
) -> tuple[np.ndarray, tuple[str, ...], str]:
    if array.ndim == 2 and array.shape[1] == 1 and array.dtype.kind in "iuUSb":
        array = array[:, 0]
    if array.dtype.kind in "US" and array.ndim == 1:
        labels = tuple(sorted(set(array.astype(str).tolist())))
        return np.searchsorted(np.array(labels), array.astype(str)).astype(np.int64), labels, "logits"
    if array.dtype.kind not in "iufb":
        raise InvalidInput(f"{name}: targets are {array.dtype}.", "Give class numbers, names or quantities.")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise InvalidInput(f"{name}: targets hold NaN or infinity.", "Leave those items out.")
    classes = (
        array.ndim == 1 and array.dtype.kind in "iub" and (bool(labels) or int(array.max()) < MAX_CLASSES)
    )
    kind = wanted or ("logits" if classes else "values")
    if kind == "values":
        values = array.astype(np.float32)
        return values[:, None] if values.ndim == 1 else values, (), "values"
    if array.ndim != 1 or (array.dtype.kind == "f" and not (array == np.round(array)).all()):
        raise InvalidInput(f"{name}: targets are no class numbers.", "Use --output values.")
    numbers = array.astype(np.int64)
    if numbers.min() < 0 or (labels and numbers.max() >= len(labels)):
        raise InvalidInput(
            f"{name}: targets go from {numbers.min()} to {numbers.max()}, "
            + (f"but there are {len(labels)} class names." if labels else "below 0."),
            "Number the classes from 0 in the order of their names.",
        )
    return numbers, labels or tuple(str(i) for i in range(int(numbers.max()) + 1)), "logits"


def _range(array: np.ndarray) -> str:
    return f"{array.min():.4g} to {array.max():.4g}"
