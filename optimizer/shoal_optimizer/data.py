"""The data of a task, materialised: whole arrays in the signature's dtype."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from shoal_agent.runtimes.tensors import dtype_of
from shoal_optimizer.boxes import same_size
from shoal_optimizer.inputs import Reader
from shoal_protos.bundle import TensorSpec, canonical_json, digest_of
from shoal_protos.errors import InvalidInput

MAX_ITEMS = 2_000_000
MAX_DATA_BYTES = 4 << 30  # per split

Items = Iterable[tuple[Any, Any]]


@dataclass(frozen=True)
class TaskData:
    """One split, materialised: `inputs` [n, ...] in the signature's dtype, `targets` [n, ...]."""

    inputs: np.ndarray
    targets: np.ndarray

    def __len__(self) -> int:
        return len(self.inputs)

    def take(self, indices: np.ndarray | Sequence[int] | slice) -> TaskData:
        return TaskData(self.inputs[indices], self.targets[indices])

    def sample(self, count: int, seed: int) -> TaskData:
        """At most `count` items, chosen without replacement by `seed`, in their order."""
        if count >= len(self):
            return self
        chosen = np.random.default_rng(seed).choice(len(self), count, replace=False)
        return self.take(np.sort(chosen))

    @cached_property
    def digest(self) -> str:
        """Content digest over both arrays, dtypes and shapes included."""
        head = canonical_json(
            [[str(a.dtype), [int(d) for d in a.shape]] for a in (self.inputs, self.targets)]
        )
        return digest_of(
            head + np.ascontiguousarray(self.inputs).tobytes() + np.ascontiguousarray(self.targets).tobytes()
        )


def materialise(
    items: Any,
    spec: TensorSpec,
    where: str,
    reader: Reader | None = None,
) -> TaskData:
    """Collects (inputs, target) items or batches, or one (inputs, targets) pair of whole arrays.

    Args:
        reader: decodes items that are files; its signature tells whether targets are boxes, whose
            numbers may differ between items. None = arrays only.

    Raises:
        InvalidInput: empty, not pairs, shapes that differ from `spec` or each other, wrong values, too large.
    """
    rank = len(spec.shape)
    inputs: list[np.ndarray] = []
    targets: list[np.ndarray] = []
    size = 0
    for position, (value, target) in enumerate(_pairs(items, rank, where)):
        if reader is not None:
            value, target = reader.read(value, target, f"{where} item {position}")
        array, truth = _array(value, where), _array(target, where)
        if array.ndim == rank - 1:
            array, truth = array[None], truth[None]
        _check_item(array, truth, spec, f"{where} item {position}")
        size += array.nbytes
        if size > MAX_DATA_BYTES or len(inputs) >= MAX_ITEMS:
            raise InvalidInput(
                f"{where} gives more than {MAX_DATA_BYTES >> 30} GiB or {MAX_ITEMS} items.", "Give a subset."
            )
        inputs.append(array)
        targets.append(truth)
    if not inputs:
        raise InvalidInput(f"{where} gives no data.", "Return at least one (inputs, target) pair.")
    boxes = reader is not None and reader.signature.output_kind == "boxes"
    if boxes and all(truth.ndim == 3 and truth.shape[-1] == 5 for truth in targets):
        targets = same_size(targets)
    try:
        x, y = np.concatenate(inputs), np.concatenate(targets)
    except ValueError as error:
        raise InvalidInput(f"{where}: items differ in shape: {error}.", "Make them equal.") from error
    if not len(x):
        raise InvalidInput(f"{where} gives no data.", "Return at least one (inputs, target) pair.")
    return TaskData(_cast(x, spec, where), y)


def _pairs(items: Any, rank: int, where: str) -> Iterator[tuple[Any, Any]]:
    if isinstance(items, tuple) and len(items) == 2 and getattr(items[0], "ndim", -1) == rank:
        yield items[0], items[1]
        return
    try:
        iterator = iter(items)
    except TypeError as error:
        raise InvalidInput(
            f"{where} gives {type(items).__name__}.", "Return an iterable of (inputs, target) pairs."
        ) from error
    for position, item in enumerate(iterator):
        try:
            value, target = item
        except (TypeError, ValueError) as error:
            raise InvalidInput(
                f"{where} item {position} is not an (inputs, target) pair.", "Give pairs."
            ) from error
        yield value, target


def _array(value: Any, where: str) -> np.ndarray:
    if hasattr(value, "detach"):
        value = value.detach().cpu().numpy()
    array = np.asarray(value)
    if array.dtype == object:
        raise InvalidInput(f"{where} gives values that are no array.", "Convert them to numpy or torch.")
    return array


def _check_item(array: np.ndarray, truth: np.ndarray, spec: TensorSpec, where: str) -> None:
    wanted = list(spec.shape[1:])
    fits = array.ndim == len(spec.shape) and all(
        d in (-1, have) for d, have in zip(wanted, array.shape[1:], strict=True)
    )
    if not fits:
        raise InvalidInput(
            f"{where} has shape {list(array.shape)}, the input '{spec.name}' is [-1, {str(wanted)[1:]}.",
            "Change the data or the task's `input`.",
        )
    if truth.ndim < 1 or len(truth) != len(array):
        raise InvalidInput(
            f"{where} has {len(array)} inputs and targets of shape {list(truth.shape)}.", "Pair them."
        )


def _cast(array: np.ndarray, spec: TensorSpec, where: str) -> np.ndarray:
    wanted = dtype_of(spec.datatype)
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise InvalidInput(f"{where} contains NaN or infinity.", "Clean the data.")
    too_low = spec.low is not None and array.min() < spec.low
    if too_low or (spec.high is not None and array.max() > spec.high):
        raise InvalidInput(
            f"{where} has values from {array.min()} to {array.max()}, outside '{spec.name}' "
            f"[{spec.low}, {spec.high}].",
            "Correct `low` and `high` of the task's `input`, or scale the data.",
        )
    cast = array.astype(wanted)
    if wanted.kind in "iub" and array.dtype.kind == "f" and not np.array_equal(cast, array):
        raise InvalidInput(
            f"{where} gives values that are not whole numbers, '{spec.name}' is {spec.datatype}.",
            "Give raw values; scaling belongs into preprocess().",
        )
    return cast


def read_split(path: Path, split: str) -> TaskData | None:
    """A split of a file that `Task.save_data` wrote; None when it has none. Raises InvalidInput."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            if f"{split}:inputs" not in stored:
                return None
            return TaskData(stored[f"{split}:inputs"], stored[f"{split}:targets"])
    except (OSError, ValueError, KeyError) as error:
        raise InvalidInput(
            f"The data file '{path.name}' cannot be read: {error}.", "Push the task again."
        ) from error
