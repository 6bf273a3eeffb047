"""What a Core ML program says of itself, read without Core ML: names, types, shapes, operators, weights."""

from __future__ import annotations

import io
import json
import struct
import uuid
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from shoal_protos.bundle import Signature, TensorSpec
from shoal_protos.errors import InvalidInput, MissingExtra, Unsupported

FOLDER = "model.mlpackage"
SPEC = f"{FOLDER}/Data/com.apple.CoreML/model.mlmodel"
WEIGHTS = f"{FOLDER}/Data/com.apple.CoreML/weights/weight.bin"
MANIFEST = f"{FOLDER}/Manifest.json"
VERSION_MIN = 8  # of the specification: iOS 17, macOS 14
SMALL = 512  # elements; constants below it are no weights to speak of
_BLOB_MARK = 0xDEADBEEF  # starts the metadata of each blob in weight.bin
_NAMESPACE = uuid.UUID("6ba7b811-9dad-11d1-80b4-00c04fd430c8")
_EPOCH = (1980, 1, 1, 0, 0, 0)
_ARRAYS = {
    "FP32": np.float32,
    "FP16": np.float16,
    "UINT8": np.int32,
    "INT8": np.int32,
    "INT16": np.int32,
    "UINT16": np.int32,
    "INT32": np.int32,
    "INT64": np.int32,
}
_NAMES = {np.float32: "FLOAT32", np.float16: "FLOAT16", np.int32: "INT32"}


def array_type(datatype: str) -> Any:
    """The type of a Core ML array that holds an endpoint's type: it has no small integers, so the
    runtime widens them. Raises Unsupported for types without one."""
    if datatype not in _ARRAYS:
        raise Unsupported(
            f"Core ML has no input of type {datatype}.", f"Use one of {', '.join(sorted(_ARRAYS))}."
        )
    return _ARRAYS[datatype]


# ---------------------------------------------------------------------------- package


def read_package(package: Path) -> tuple[bytes, bytes, bytes]:
    """(specification, weights, manifest) of an mlpackage directory, made independent of when and where
    it was written: no date, fixed identifiers."""
    inner = package / "Data" / "com.apple.CoreML"
    weights = inner / "weights" / "weight.bin"
    model = parse((inner / "model.mlmodel").read_bytes())
    model.description.metadata.userDefined.pop("com.github.apple.coremltools.conversion_date", None)
    manifest = (package / "Manifest.json").read_text()
    for old, entry in json.loads(manifest)["itemInfoEntries"].items():
        manifest = manifest.replace(old, str(uuid.uuid5(_NAMESPACE, entry["path"])).upper())
    ordered = json.dumps(json.loads(manifest), indent=1, sort_keys=True)
    content = model.SerializeToString(deterministic=True)
    return content, weights.read_bytes() if weights.is_file() else b"", ordered.encode()


def pack(spec: bytes, weights: bytes, manifest: bytes) -> bytes:
    """The mlpackage as one uncompressed zip file: bundles hold files, and a device unpacks it once."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
        for name, content in ((MANIFEST, manifest), (SPEC, spec), (WEIGHTS, weights)):
            if content:
                archive.writestr(zipfile.ZipInfo(name, _EPOCH), content)
    return stream.getvalue()


def parse(spec: bytes) -> Any:
    """The `Model` message of a specification. Raises MissingExtra, or InvalidInput for other bytes."""
    from google.protobuf.message import DecodeError

    try:
        from coremltools.proto import Model_pb2
    except ImportError as error:
        raise MissingExtra("coreml", "coremltools") from error
    model = Model_pb2.Model()
    try:
        model.ParseFromString(spec)
    except DecodeError as error:
        raise InvalidInput("The Core ML specification is corrupt.") from error
    return model


# ---------------------------------------------------------------------------- check


def check(content: bytes, signature: Signature, precision: str) -> dict[str, Any]:
    """Facts of a packed program: "ops" (type -> number), "weights" (type -> elements), "spec_version".

    Raises:
        InvalidInput: it is no mlprogram for this signature, or its weights are not of the precision.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            names = set(archive.namelist())
            spec = archive.read(SPEC)
            weights = archive.read(WEIGHTS) if WEIGHTS in names else b""
            json.loads(archive.read(MANIFEST))
    except (zipfile.BadZipFile, KeyError, ValueError) as error:
        raise InvalidInput(f"This is no packed mlpackage: {error}.") from error
    model = parse(spec)
    if model.WhichOneof("Type") != "mlProgram" or model.specificationVersion < VERSION_MIN:
        raise _wrong(
            f"is a {model.WhichOneof('Type')} of version {model.specificationVersion}, "
            f"no mlprogram of version {VERSION_MIN}"
        )
    _check_features(model.description.input, signature.inputs, "input")
    _check_features(model.description.output, signature.outputs, "output")
    operations = list(_operations(model))
    stored = _stored(operations, weights)
    _check_precision(stored, precision)
    counts = Counter(item.type for item in operations if item.type != "const")
    return {
        "ops": dict(sorted(counts.items())),
        "weights": dict(sorted(stored.items())),
        "spec_version": int(model.specificationVersion),
    }


def _wrong(what: str) -> InvalidInput:
    return InvalidInput(f"The Core ML program {what}.", "Report it with the task: the conversion went wrong.")


def _check_features(found: Any, wanted: tuple[TensorSpec, ...], kind: str) -> None:
    described = {item.name: item.type.multiArrayType for item in found}
    if sorted(described) != sorted(spec.name for spec in wanted):
        raise _wrong(f"has the {kind}s {sorted(described)} instead of {[spec.name for spec in wanted]}")
    for spec in wanted:
        array = described[spec.name]
        given = array.ArrayDataType.Name(array.dataType)
        expected = _NAMES[array_type(spec.datatype)]
        if given != expected:
            raise _wrong(f"has the {kind} '{spec.name}' as {given} instead of {expected}")
        if kind == "input" and not _holds(array, spec.shape):
            raise _wrong(f"does not take {list(spec.shape)} as '{spec.name}'")


def _holds(array: Any, shape: tuple[int, ...]) -> bool:
    """True when an array's sizes and their ranges fit a signature's shape; -1 = any."""
    ranges = array.shapeRange.sizeRanges
    if len(array.shape) != len(shape):
        return False
    bounds = [(r.lowerBound, r.upperBound) for r in ranges] or [(size, size) for size in array.shape]
    return all(
        low <= 1 < high if size < 0 else (low, high) == (size, size)
        for size, (low, high) in zip(shape, bounds, strict=True)
    )


def _operations(model: Any) -> Iterator[Any]:
    for function in model.mlProgram.functions.values():
        yield from _of_block(function.block_specializations[function.opset])


def _of_block(block: Any) -> Iterator[Any]:
    for operation in block.operations:
        yield operation
        for inner in operation.blocks:
            yield from _of_block(inner)


def _stored(operations: list[Any], weights: bytes) -> Counter[str]:
    """Type -> elements of the constants in the weight file. Raises InvalidInput where one is missing."""
    from coremltools.proto import MIL_pb2

    found: Counter[str] = Counter()
    for operation in operations:
        arguments = [bound.value for item in operation.inputs.values() for bound in item.arguments]
        for value in (*operation.attributes.values(), *arguments):
            if value.WhichOneof("value") != "blobFileValue":
                continue
            offset = value.blobFileValue.offset
            if offset + 8 > len(weights) or struct.unpack_from("<I", weights, offset)[0] != _BLOB_MARK:
                raise _wrong(f"misses weights of {operation.type} at byte {offset}")
            tensor = value.type.tensorType
            size = 1
            for dimension in tensor.dimensions:
                size *= dimension.constant.size
            found[MIL_pb2.DataType.Name(tensor.dataType).lower()] += size
    return found


def _check_precision(stored: Counter[str], precision: str) -> None:
    """Weights are of the precision: scales, biases and small weights may be wider."""
    wider = {"fp16": ("float32",), "int8_weights": ("float32", "float16")}.get(precision, ())
    wide = sum(stored[kind] for kind in wider)
    narrow = sum(stored.values()) - wide
    if precision == "int8_weights" and not stored["int8"]:
        raise Unsupported(
            f"No weight of this model has more than {SMALL} elements, so none becomes int8.",
            "Use the precision fp16.",
        )
    if wide > narrow:
        raise _wrong(f"stores {wide} weights wider than {precision}, {narrow} as asked")
