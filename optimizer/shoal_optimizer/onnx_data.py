"""The `.npz` beside an ONNX file: which array is for which input, what is fixed, what is judged.

    inputs, targets            a model of one input; the first output is judged
    inputs:NAME                one row an item, for each input of a model of several
    fixed:NAME                 a value that never changes (a sample rate, an initial state)
    targets:NAME               the truth for that output
    calibration[:NAME]         inputs that choose int8 ranges; without them half of the items do
    labels                     class names

Items of a model with several inputs travel as one structured array: a field an input, a row an item.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from shoal_protos.bundle import TensorSpec
from shoal_protos.errors import InvalidInput

FEWEST = 2  # items: one to calibrate, one to judge


@dataclass(frozen=True)
class Arrays:
    """What a data file says.

    Attributes:
        inputs: input's name -> [n, ...]; the name is "" where the file has one array `inputs`.
        targets: [n, ...]; judged: the output's name, "" = the first.
        calibration: like `inputs`, other items; empty = a half of them calibrates.
    """

    inputs: Mapping[str, np.ndarray]
    targets: np.ndarray
    judged: str = ""
    fixed: Mapping[str, np.ndarray] = field(default_factory=dict)
    calibration: Mapping[str, np.ndarray] = field(default_factory=dict)
    labels: tuple[str, ...] = ()

    @property
    def count(self) -> int:
        return len(self.targets)


def read(path: Path, model: str) -> Arrays:
    """Reads a user's `.npz` for the ONNX file named `model`.

    Raises:
        InvalidInput: it cannot be read, lacks arrays, or they do not fit each other.
    """
    try:
        with np.load(path, allow_pickle=False) as stored:
            arrays = dict(stored)
    except (OSError, ValueError) as error:
        raise InvalidInput(
            f"The data file '{path.name}' of {model} cannot be read: {error}.",
            "Put an .npz of the same name beside the ONNX file, with arrays `inputs` and `targets`.",
        ) from error
    inputs, calibration = _group(arrays, "inputs"), _group(arrays, "calibration")
    targets = _group(arrays, "targets")
    for name, found in (("inputs", inputs), ("targets", targets)):
        if not found:
            raise InvalidInput(f"'{path.name}' lacks the array '{name}'.", "Add it.")
    if len(targets) > 1:
        raise InvalidInput(
            f"'{path.name}' has targets for {', '.join(targets)}.", "Keep those of one output: it is judged."
        )
    judged, truth = next(iter(targets.items()))
    made = Arrays(
        inputs,
        truth,
        judged,
        _group(arrays, "fixed"),
        calibration,
        tuple(str(name) for name in arrays.get("labels", ())),
    )
    _check(path.name, made)
    return made


def stored_labels(path: Path) -> tuple[str, ...]:
    """Class names of a data file that an ingest wrote."""
    with np.load(path, allow_pickle=False) as stored:
        return tuple(str(name) for name in stored["labels"]) if "labels" in stored else ()


def _group(arrays: Mapping[str, np.ndarray], kind: str) -> dict[str, np.ndarray]:
    prefix = f"{kind}:"
    found = {name[len(prefix) :]: value for name, value in arrays.items() if name.startswith(prefix)}
    if kind in arrays:
        found[""] = arrays[kind]
    return found


def _check(file: str, arrays: Arrays) -> None:
    if "" in arrays.inputs and len(arrays.inputs) > 1:
        raise InvalidInput(f"'{file}' has both `inputs` and `inputs:NAME`.", "Keep the named ones.")
    for kind, group in (("inputs", arrays.inputs), ("calibration", arrays.calibration)):
        for name, value in group.items():
            shown = f"{kind}:{name}" if name else kind
            if value.ndim < 1 or value.dtype.kind not in "fiub":
                raise InvalidInput(f"'{file}' has '{shown}' of type {value.dtype}.", "Give numbers.")
            if value.dtype.kind == "f" and not np.isfinite(value).all():
                raise InvalidInput(f"'{shown}' of '{file}' contains NaN or infinity.", "Clean the data.")
            if kind == "inputs" and len(value) != arrays.count:
                raise InvalidInput(
                    f"'{shown}' of '{file}' has {len(value)} rows, the targets have {arrays.count}.",
                    "Give one row an item.",
                )
    if arrays.calibration and set(arrays.calibration) != set(arrays.inputs):
        raise InvalidInput(
            f"'{file}' calibrates {', '.join(arrays.calibration)}, inputs are {', '.join(arrays.inputs)}.",
            "Give calibration arrays for the same inputs.",
        )
    if len({len(value) for value in arrays.calibration.values()}) > 1:
        raise InvalidInput(f"The calibration arrays of '{file}' differ in length.", "Give one row an item.")
    if arrays.count < (1 if arrays.calibration else FEWEST):
        raise InvalidInput(
            f"'{file}' has {arrays.count} items.",
            "Half of the items choose int8 ranges and the other half judges: give at least a hundred, or a "
            "`calibration` array.",
        )


def as_items(group: Mapping[str, np.ndarray], specs: tuple[TensorSpec, ...]) -> np.ndarray:
    """One array of items [n, ...] in the model's types; structured where there are several inputs.

    Raises:
        InvalidInput: values that the input's type cannot hold.
    """
    if len(specs) == 1:
        return _typed(next(iter(group.values())), specs[0])
    columns = {spec.name: _typed(group[spec.name], spec) for spec in specs}
    kinds = [(name, value.dtype, value.shape[1:]) for name, value in columns.items()]
    made = np.empty(len(next(iter(columns.values()))), np.dtype(kinds))
    for name, value in columns.items():
        made[name] = value
    return made


def _typed(values: np.ndarray, spec: TensorSpec) -> np.ndarray:
    from shoal_agent.runtimes.tensors import dtype_of

    wanted = dtype_of(spec.datatype)
    made = values.astype(wanted)
    if wanted.kind in "iub" and not np.array_equal(made, values):
        raise InvalidInput(
            f"The data of '{spec.name}' do not fit {spec.datatype}: they go from {values.min()} to "
            f"{values.max()}.",
            "Give the whole numbers that applications send.",
        )
    return made
