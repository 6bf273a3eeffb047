"""Between arrays and the protocol's messages, on the client's side."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from shoal_agent.client.memory import Area, aligned
from shoal_agent.runtimes.tensors import Array, datatype_of, dtype_of
from shoal_protos.bundle import BoxRule, Signature, TensorSpec
from shoal_protos.errors import InvalidInput

OUTPUT_THRESHOLD = 64 << 10  # bytes; smaller answers come in the message, as `memory.THRESHOLD`


def signature_of(metadata: Mapping[str, Any]) -> Signature:
    """The signature as a server describes it; of a server that isn't Shoal, plain tensors."""
    more = metadata.get("shoal") or {}
    rule = more.get("boxes")
    return Signature(
        inputs=tuple(_spec(item) for item in metadata["inputs"]),
        outputs=tuple(_spec(item) for item in metadata["outputs"]),
        input_kind=str(more.get("input_kind", "tensor")),
        output_kind=str(more.get("output_kind", "values")),
        labels=tuple(str(label) for label in more.get("labels") or ()),
        color=str(more.get("color", "")),
        resize=str(more.get("resize", "")),
        units=str(more.get("units", "")),
        pad=int(more.get("pad", 114)),
        sample_rate=int(more.get("sample_rate", 0)),
        boxes=None
        if rule is None
        else BoxRule(float(rule["score_threshold"]), float(rule["iou_threshold"]), int(rule["max_boxes"])),
    )


def _spec(item: Mapping[str, Any]) -> TensorSpec:
    return TensorSpec(
        str(item["name"]),
        str(item["datatype"]),
        tuple(int(size) for size in item["shape"]),
        str(item.get("layout", "")),
        item.get("low"),
        item.get("high"),
    )


def fitted(array: Array, spec: TensorSpec | None) -> Array:
    """The array with the signature's dtype where that loses nothing, and a batch dimension.

    Raises:
        InvalidInput: the input's type cannot hold the values.
    """
    if spec is None:
        return np.ascontiguousarray(array)
    dtype = dtype_of(spec.datatype)
    if array.dtype != dtype:
        converted = array.astype(dtype)
        exact = np.issubdtype(dtype, np.floating) or bool((converted == array).all())
        if not exact:
            raise InvalidInput(
                f"Input '{spec.name}' is {array.dtype}, which {spec.datatype} cannot hold exactly."
            )
        array = converted
    if array.ndim == len(spec.shape) - 1 and spec.shape[0] == -1:
        array = array[None]
    return np.ascontiguousarray(array)


def as_bytes(arrays: Mapping[str, Array], request_id: str) -> tuple[bytes, int]:
    """(body of a request with binary tensors, length of its JSON header)."""
    tensors = [
        {**_described(name, array), "parameters": {"binary_data_size": array.nbytes}}
        for name, array in arrays.items()
    ]
    header = json.dumps(
        {"id": request_id, "inputs": tensors, "parameters": {"binary_data_output": True}},
        separators=(",", ":"),
    ).encode()
    return b"".join([header, *(array.tobytes() for array in arrays.values())]), len(header)


class Layout:
    """Where the tensors of requests of one form lie in the client's region. Made once a form."""

    def __init__(self, arrays: Mapping[str, Array], signature: Signature) -> None:
        self.inputs: list[tuple[str, int]] = []
        place = 0
        for name, array in arrays.items():
            place = aligned(place)
            self.inputs.append((name, place))
            place += array.nbytes
        batch = len(next(iter(arrays.values()))) if arrays else 1
        self.outputs: list[tuple[str, int, int]] = []
        sizes = [(spec.name, _size(spec, batch)) for spec in signature.outputs]
        if all(size > 0 for _, size in sizes) and sum(size for _, size in sizes) >= OUTPUT_THRESHOLD:
            for name, size in sizes:
                place = aligned(place)
                self.outputs.append((name, place, size))
                place += size
        self.size = place
        self._described = [_described(name, array) for name, array in arrays.items()]
        self._sizes = [array.nbytes for array in arrays.values()]
        self._rest: tuple[str, bytes] = ("", b"")

    def body(self, region: str, request_id: str) -> bytes:
        """The request's JSON. The part after the id is the same each time, which servers cache."""
        if self._rest[0] != region:
            tensors = [
                {**item, "parameters": _parameters(region, place, size)}
                for item, (_, place), size in zip(self._described, self.inputs, self._sizes, strict=True)
            ]
            message: dict[str, Any] = {"inputs": tensors, "parameters": {"binary_data_output": True}}
            if self.outputs:
                message["outputs"] = [
                    {"name": name, "parameters": _parameters(region, place, size)}
                    for name, place, size in self.outputs
                ]
            self._rest = region, json.dumps(message, separators=(",", ":")).encode()[1:]
        return b'{"id":' + json.dumps(request_id).encode() + b"," + self._rest[1]


def read_outputs(body: bytes, size: int | None, area: Area) -> tuple[dict[str, Any], dict[str, Array]]:
    """(the answer's header, its arrays: views of the body, or copies out of shared memory)."""
    header = _header(bytes(body if size is None else body[:size]))
    outputs: dict[str, Array] = {}
    offset = size or 0
    for tensor in header["outputs"]:
        dtype = dtype_of(tensor["datatype"])
        parameters = tensor.get("parameters", {})
        if "shared_memory_region" in parameters:
            place = int(parameters.get("shared_memory_offset", 0))
            outputs[tensor["name"]] = area.view(place, dtype, tensor["shape"]).copy()
            continue
        length = parameters.get("binary_data_size")
        if length is None:
            values: Array = np.asarray(tensor["data"], dtype)
        else:
            values = np.frombuffer(body, dtype, length // dtype.itemsize, offset)
            offset += length
        outputs[tensor["name"]] = values.reshape(tensor["shape"])
    return header, outputs


# The way Shoal's server begins an answer; other ones are read as a whole each time.
_HEAD = re.compile(
    rb'(\{"model_name":"[^"\\]*","model_version":"[^"\\]*",)"id":"([A-Za-z0-9 _.:/+=@-]{0,256})",(?=")'
)
_headers: dict[bytes, dict[str, Any]] = {}  # by the answer's header without the id
_MAX_HEADERS = 16
_MAX_HEADER = 4096


def _header(text: bytes) -> dict[str, Any]:
    """The answer's header. Answers of one form differ in their id only: the rest is read once."""
    match = _HEAD.match(text) if len(text) <= _MAX_HEADER else None
    if match is None:
        return dict(json.loads(text))
    rest = match.group(1) + text[match.end() :]
    known = _headers.get(rest)
    if known is None:
        known = dict(json.loads(rest))
        if any("data" in tensor for tensor in known["outputs"]):
            return dict(json.loads(text))  # values: no two answers are alike
        if len(_headers) >= _MAX_HEADERS:
            _headers.clear()
        _headers[rest] = known
    return {**known, "id": match.group(2).decode()}


def _described(name: str, array: Array) -> dict[str, Any]:
    return {"name": name, "datatype": datatype_of(array.dtype), "shape": list(array.shape)}


def _parameters(region: str, offset: int, size: int) -> dict[str, Any]:
    return {
        "shared_memory_region": region,
        "shared_memory_offset": offset,
        "shared_memory_byte_size": size,
    }


def _size(spec: TensorSpec, batch: int) -> int:
    """Bytes of an output at this batch; 0 = not known beforehand."""
    shape: Sequence[int] = (batch, *spec.shape[1:]) if spec.shape and spec.shape[0] == -1 else spec.shape
    if any(size < 0 for size in shape):
        return 0
    return int(np.prod(shape, dtype=np.int64)) * dtype_of(spec.datatype).itemsize
