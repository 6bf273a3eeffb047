"""Datatypes of the Open Inference Protocol as numpy dtypes."""

from __future__ import annotations

import numpy as np

from shoal_protos.errors import InvalidInput

DTYPES: dict[str, np.dtype] = {
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


def numpy_dtype(datatype: str) -> np.dtype:
    """The numpy dtype of an Open Inference Protocol datatype. Raises InvalidInput for unknown ones."""
    try:
        return DTYPES[datatype]
    except KeyError:
        raise InvalidInput(f"'{datatype}' is not a datatype.", f"Use one of {', '.join(DTYPES)}.") from None


def datatype_of(dtype: np.dtype) -> str:
    """The Open Inference Protocol's name of a numpy dtype. Raises InvalidInput for others."""
    for name, known in DTYPES.items():
        if known == dtype:
            return name
    raise InvalidInput(f"Arrays of {dtype} have no Open Inference Protocol datatype.", "Convert them first.")
