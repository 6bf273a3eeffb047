"""Tensor types of the Open Inference Protocol, and the one check of arrays against a signature."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from shoal_protos.bundle import Signature, TensorSpec
from shoal_protos.errors import InvalidInput

Array = np.ndarray[Any, Any]

DTYPES: Mapping[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    "UINT8": np.dtype(np.uint8),
    "UINT16": np.dtype(np.uint16),
    "UINT32": np.dtype(np.uint32),
    "UINT64": np.dtype(np.uint64),
    "INT8": np.dtype(np.int8),
    "INT16": np.dtype(np.int16),
    "INT32": np.dtype(np.int32),
    "INT64": np.dtype(np.int64),
    "FP16": np.dtype(np.float16),
    "FP32": np.dtype(np.float32),
    "FP64": np.dtype(np.float64),
}
_DATATYPES = {dtype: name for name, dtype in DTYPES.items()}


def dtype_of(datatype: str) -> np.dtype[Any]:
    """numpy dtype of a protocol datatype. Raises InvalidInput for one that no runtime here has."""
    try:
        return DTYPES[datatype]
    except KeyError:
        known = ", ".join(DTYPES)
        raise InvalidInput(
            f"The datatype '{datatype[:40]}' is not supported.", f"Known are {known}."
        ) from None


def datatype_of(dtype: np.dtype[Any]) -> str:
    try:
        return _DATATYPES[dtype]
    except KeyError:
        raise InvalidInput(f"The dtype {dtype} has no protocol datatype.") from None


def check_shape(spec: TensorSpec, shape: Sequence[int]) -> None:
    """Raises InvalidInput unless `shape` fits the spec, -1 standing for any size of at least 1."""
    fits = len(shape) == len(spec.shape) and all(
        (have == want if want >= 0 else have >= 1) for have, want in zip(shape, spec.shape, strict=True)
    )
    if not fits:
        raise InvalidInput(
            f"Input '{spec.name}' has shape {list(shape)}, not {list(spec.shape)}.",
            "-1 stands for any size from 1.",
        )


def check_batch(shapes: Iterable[tuple[TensorSpec, Sequence[int]]]) -> int:
    """The common batch size: first dimension of every input whose signature leaves it open.

    Raises:
        InvalidInput: the inputs have different batch sizes.
    """
    sizes = {int(shape[0]) for spec, shape in shapes if spec.shape and spec.shape[0] == -1}
    if len(sizes) > 1:
        raise InvalidInput(f"The inputs have different batch sizes: {sorted(sizes)}.")
    return sizes.pop() if sizes else 1


def check_inputs(signature: Signature, inputs: Mapping[str, Array]) -> int:
    """Checks names, dtypes and shapes; returns the batch size. Raises InvalidInput."""
    specs = {spec.name: spec for spec in signature.inputs}
    for name in inputs:
        if name not in specs:
            raise unknown_input(name, specs)
    for name, spec in specs.items():
        if name not in inputs:
            raise InvalidInput(f"Input '{name}' is missing.", f"Inputs are {', '.join(specs)}.")
        array = inputs[name]
        if array.dtype != dtype_of(spec.datatype):
            raise InvalidInput(f"Input '{name}' is {array.dtype}, not {spec.datatype}.")
        check_shape(spec, array.shape)
    return check_batch((specs[name], array.shape) for name, array in inputs.items())


def unknown_input(name: str, known: Iterable[str]) -> InvalidInput:
    return InvalidInput(f"There is no input '{name[:80]}'.", f"Inputs are {', '.join(known)}.")


def check_model(
    signature: Signature,
    inputs: Mapping[str, tuple[str, Sequence[int]]],
    outputs: Mapping[str, tuple[str, Sequence[int]]],
) -> None:
    """Checks a loaded model's own tensors (name -> datatype, shape with -1) against the signature.

    Raises:
        InvalidInput: a name, datatype or shape differs: the conversion must lie inside the graph.
    """
    for side, specs, found in (("input", signature.inputs, inputs), ("output", signature.outputs, outputs)):
        names = {spec.name for spec in specs}
        if names != set(found):
            raise InvalidInput(
                f"The model's {side}s are {sorted(found)}, the signature's {sorted(names)}.",
                "Rename them when the variant is exported.",
            )
        for spec in specs:
            datatype, shape = found[spec.name]
            if datatype != spec.datatype:
                raise InvalidInput(
                    f"The model's {side} '{spec.name}' is {datatype}, the signature says {spec.datatype}."
                )
            if len(shape) != len(spec.shape) or any(
                have >= 0 and have != want for have, want in zip(shape, spec.shape, strict=True)
            ):
                raise InvalidInput(
                    f"The model's {side} '{spec.name}' has shape {list(shape)}, "
                    f"the signature says {list(spec.shape)}."
                )
