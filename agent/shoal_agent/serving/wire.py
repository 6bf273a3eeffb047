"""The Open Inference Protocol's tensors over HTTP: JSON header, binary tensor extension.

A request's header is parsed once: the resulting `Plan` is cached by the header's bytes, without the
request's own id where the id stands first (as every client writes it).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from shoal_agent.runtimes.tensors import Array, check_batch, check_shape, datatype_of, dtype_of, unknown_input
from shoal_agent.serving.shared_memory import Span, described, span_of
from shoal_protos.bundle import Signature, TensorSpec
from shoal_protos.errors import InvalidInput, Unsupported

MAX_CACHED_HEADER = 4096
MAX_PLANS = 64
_ID = re.compile(rb'\{"id": ?"([A-Za-z0-9 _.:/+=@-]{0,256})", ?')
_BOOL = np.dtype(np.bool_)


@dataclass(frozen=True)
class WantedOutput:
    name: str
    binary: bool
    class_count: int = 0  # classification extension: the best classes instead of the tensor
    span: Span | None = None  # where the tensor goes in shared memory, instead of the answer


@dataclass(frozen=True)
class _Part:
    spec: TensorSpec
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    offset: int  # in the binary part; -1 = the values are in the JSON or in shared memory
    size: int  # bytes
    span: Span | None = None  # in shared memory


class Plan:
    """Everything about a request that its header decides. Cached, so it keeps no values."""

    def __init__(self, parts: Sequence[_Part], outputs: Sequence[WantedOutput], batch: int) -> None:
        self.parts = parts
        self.outputs = outputs
        self.batch = batch
        self.binary_size = sum(part.size for part in parts if part.offset >= 0)
        self.cacheable = all(part.offset >= 0 or part.span for part in parts)
        self.shared_inputs = [part for part in parts if part.span is not None]
        self.shared_outputs = [output for output in outputs if output.span is not None]
        self.binary_out = all(o.binary and not o.class_count and o.span is None for o in outputs)
        self.heads: dict[tuple[Any, ...], tuple[bytes, bytes]] = {}


@dataclass(frozen=True)
class Parsed:
    request_id: str
    plan: Plan
    inputs: dict[str, Array]


class Codec:
    """Reads requests for, and writes answers of, one signature under one name and version."""

    def __init__(self, name: str, version: str, signature: Signature) -> None:
        self.name, self.version, self.signature = name, version, signature
        self._specs = {spec.name: spec for spec in signature.inputs}
        self._output_names = [spec.name for spec in signature.outputs]
        self._plans: dict[bytes, Plan] = {}

    # ------------------------------------------------------------------------ requests

    def parse(self, body: bytes, header_length: int | None) -> Parsed:
        """Reads a request body.

        Args:
            header_length: value of `Inference-Header-Content-Length`; None = the body is all JSON.

        Raises:
            InvalidInput: names the field that does not fit.
            Unsupported: a combination that this server does not offer.
        """
        if header_length is None:
            header_length = len(body)
        elif not 0 <= header_length <= len(body):
            raise InvalidInput(
                f"Inference-Header-Content-Length is {header_length}, the body has {len(body)} bytes."
            )
        request_id, rest = "", body[:header_length]
        match = _ID.match(rest)
        if match is not None:
            request_id = match.group(1).decode()
            rest = b"{" + rest[match.end() :]
        plan = self._plans.get(rest)
        if plan is not None:
            return Parsed(request_id, plan, self._binary_inputs(plan, body, header_length))
        message = _load_json(rest)
        if match is None:
            request_id = _text(message.get("id", ""), "id")
        elif "id" in message:
            raise InvalidInput("The request has two ids.")
        plan, tensors = self._plan(message)
        if plan.cacheable and len(rest) <= MAX_CACHED_HEADER and "id" not in message:
            if len(self._plans) >= MAX_PLANS:
                self._plans.clear()
            self._plans[rest] = plan
        inputs = self._binary_inputs(plan, body, header_length)
        for part, tensor in zip(plan.parts, tensors, strict=True):
            if part.offset < 0 and part.span is None:
                inputs[part.spec.name] = _from_json(part, tensor["data"])
        return Parsed(request_id, plan, inputs)

    def _plan(self, message: Mapping[str, Any]) -> tuple[Plan, list[Mapping[str, Any]]]:
        tensors = message.get("inputs")
        if not isinstance(tensors, list) or not all(isinstance(item, dict) for item in tensors):
            raise InvalidInput("The request has no list 'inputs'.")
        parameters = _parameters(message)
        parts: list[_Part] = []
        offset = 0
        for tensor in tensors:
            part = self._part(tensor, offset)
            if any(part.spec.name == other.spec.name for other in parts):
                raise InvalidInput(f"Input '{part.spec.name}' is given twice.")
            if part.offset >= 0:
                offset += part.size
            parts.append(part)
        given = {part.spec.name for part in parts}
        for name in self._specs:
            if name not in given:
                raise InvalidInput(f"Input '{name}' is missing.", f"Inputs are {', '.join(self._specs)}.")
        batch = check_batch((part.spec, part.shape) for part in parts)
        return Plan(parts, self._wanted(message, parameters), batch), tensors

    def _part(self, tensor: Mapping[str, Any], offset: int) -> _Part:
        name = _text(tensor.get("name", ""), "name")
        shape = tensor.get("shape")
        if not isinstance(shape, list) or not all(type(size) is int for size in shape):
            raise InvalidInput(f"The shape of input '{name[:80]}' is not a list of integers.")
        spec, dtype = self.check_tensor(name, _text(tensor.get("datatype", ""), "datatype"), shape)
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        parameters = _parameters(tensor)
        span = span_of(parameters)
        if span is not None:
            if span.size != size:
                raise InvalidInput(
                    f"Input '{name}' has {span.size} bytes in shared memory, but {spec.datatype} {shape} is "
                    f"{size} bytes."
                )
            return _Part(spec, dtype, tuple(shape), -1, size, span)
        declared = parameters.get("binary_data_size")
        if declared is None:
            if not isinstance(tensor.get("data"), list):
                raise InvalidInput(
                    f"Input '{name}' has neither 'data' nor the parameter 'binary_data_size'.",
                )
            return _Part(spec, dtype, tuple(shape), -1, size)
        if type(declared) is not int or declared != size:
            raise InvalidInput(
                f"Input '{name}' announces {declared!r} bytes, but {spec.datatype} {shape} is {size} bytes."
            )
        return _Part(spec, dtype, tuple(shape), offset, size)

    def check_tensor(
        self, name: str, datatype: str, shape: Sequence[int]
    ) -> tuple[TensorSpec, np.dtype[Any]]:
        """The spec of one input and its dtype. Raises InvalidInput on a wrong name, type or shape."""
        spec = self._specs.get(name)
        if spec is None:
            raise unknown_input(name, self._specs)
        if datatype != spec.datatype:
            raise InvalidInput(f"Input '{name}' is {datatype[:40]}, not {spec.datatype}.")
        check_shape(spec, shape)
        return spec, dtype_of(datatype)

    def _wanted(self, message: Mapping[str, Any], parameters: Mapping[str, Any]) -> list[WantedOutput]:
        by_default = bool(parameters.get("binary_data_output", False))
        wanted = message.get("outputs")
        if not wanted:
            return [WantedOutput(name, by_default) for name in self._output_names]
        if not isinstance(wanted, list) or not all(isinstance(item, dict) for item in wanted):
            raise InvalidInput("'outputs' is not a list of objects.")
        result = []
        for item in wanted:
            own = _parameters(item)
            span = span_of(own)
            count = own.get("classification", 0)
            if type(count) is not int or count < 0:
                raise InvalidInput("'classification' is not a number of classes.")
            if span is not None and count:
                raise Unsupported("Classes do not go to shared memory.", "Take them from the answer.")
            name = self.check_output(_text(item.get("name", ""), "name"))
            result.append(WantedOutput(name, bool(own.get("binary_data", by_default)), count, span))
        return result

    def check_output(self, name: str) -> str:
        if name not in self._output_names:
            raise InvalidInput(
                f"There is no output '{name[:80]}'.", f"Outputs are {', '.join(self._output_names)}."
            )
        return name

    @staticmethod
    def _binary_inputs(plan: Plan, body: bytes, header_length: int) -> dict[str, Array]:
        if len(body) - header_length != plan.binary_size:
            raise InvalidInput(
                f"The body has {len(body) - header_length} bytes of tensors, "
                f"{plan.binary_size} are announced."
            )
        return {
            part.spec.name: view_of(body, part.dtype, part.shape, header_length + part.offset)
            for part in plan.parts
            if part.offset >= 0
        }

    # ------------------------------------------------------------------------ answers

    def answer(
        self, plan: Plan, request_id: str, outputs: Mapping[str, Array]
    ) -> tuple[int | None, list[bytes]]:
        """(length of the JSON header, or None when all is JSON; the body in pieces)."""
        if not plan.binary_out:
            if len(plan.shared_outputs) == len(plan.outputs):
                return self._shared_answer(plan, request_id, outputs)
            return self._slow_answer(plan, request_id, outputs)
        arrays = [outputs[wanted.name] for wanted in plan.outputs]
        key = tuple(array.shape for array in arrays)
        head = plan.heads.get(key)
        if head is None:
            if len(plan.heads) >= MAX_PLANS:
                plan.heads.clear()
            listed = [
                _described(wanted.name, array, binary=True)
                for wanted, array in zip(plan.outputs, arrays, strict=True)
            ]
            head = plan.heads[key] = self._head(listed)
        start, end = head
        json_part = (
            start + b'"id":' + json.dumps(request_id).encode() + b"," + end if request_id else start + end
        )
        return len(json_part), [json_part, *(array.tobytes() for array in arrays)]

    def _shared_answer(
        self, plan: Plan, request_id: str, outputs: Mapping[str, Array]
    ) -> tuple[int | None, list[bytes]]:
        """The answer to a request whose outputs all went to shared memory."""
        key = tuple(outputs[wanted.name].shape for wanted in plan.outputs)
        head = plan.heads.get(key)
        if head is None:
            if len(plan.heads) >= MAX_PLANS:
                plan.heads.clear()
            listed = [_in_region(wanted, outputs[wanted.name]) for wanted in plan.outputs]
            head = plan.heads[key] = self._head(listed)
        middle = b'"id":' + json.dumps(request_id).encode() + b"," if request_id else b""
        return None, [head[0] + middle + head[1]]

    def _head(self, listed: list[dict[str, Any]]) -> tuple[bytes, bytes]:
        start = json.dumps({"model_name": self.name, "model_version": self.version}, separators=(",", ":"))
        end = json.dumps({"outputs": listed}, separators=(",", ":"))
        return start[:-1].encode() + b",", end[1:].encode()

    def _slow_answer(
        self, plan: Plan, request_id: str, outputs: Mapping[str, Array]
    ) -> tuple[int | None, list[bytes]]:
        listed: list[dict[str, Any]] = []
        binary: list[bytes] = []
        for wanted in plan.outputs:
            array = outputs[wanted.name]
            if wanted.class_count:
                names = classify(array, wanted.class_count, self.signature.labels)
                item: dict[str, Any] = {
                    "name": wanted.name,
                    "datatype": "BYTES",
                    "shape": list(names.shape),
                }
                if wanted.binary:
                    data = pack_text(names)
                    item["parameters"] = {"binary_data_size": len(data)}
                    binary.append(data)
                else:
                    item["data"] = names.ravel().tolist()
            elif wanted.span is not None:
                item = _in_region(wanted, array)
            else:
                item = _described(wanted.name, array, binary=wanted.binary)
                if wanted.binary:
                    binary.append(array.tobytes())
                else:
                    item["data"] = array.ravel().tolist()
            listed.append(item)
        start, end = self._head(listed)
        middle = b'"id":' + json.dumps(request_id).encode() + b"," if request_id else b""
        text = start + middle + end
        return (len(text) if binary else None), [text, *binary]


def view_of(data: bytes, dtype: np.dtype[Any], shape: Sequence[int], offset: int = 0) -> Array:
    """A read-only view of bytes as an array; a copy where the runtime needs an aligned or clean one."""
    count = 1
    for size in shape:
        count *= size
    if dtype == _BOOL:  # a byte other than 0 and 1 is no bool that C code may see
        return np.asarray(np.frombuffer(data, np.uint8, count, offset).reshape(shape) != 0)
    array: Array = np.frombuffer(data, dtype, count, offset)
    if not array.flags.aligned:
        array = array.copy()
    return array.reshape(shape)


def classify(array: Array, count: int, labels: Sequence[str]) -> Array:
    """The classification extension: "score:index:label" of the best classes, [N, count] of text."""
    flat = array.reshape(len(array), -1) if array.ndim > 1 else array.reshape(1, -1)
    count = min(count, flat.shape[1])
    order = np.argsort(-flat, axis=1, kind="stable")[:, :count]
    rows = [
        [
            f"{row[place]:f}:{place}" + (f":{labels[place]}" if place < len(labels) else "")
            for place in places.tolist()
        ]
        for row, places in zip(flat, order, strict=True)
    ]
    return np.asarray(rows, dtype=object)


def pack_text(values: Array) -> bytes:
    """BYTES elements as the protocol packs them: 4-byte little-endian length, then UTF-8."""
    parts = []
    for value in values.ravel().tolist():
        data = str(value).encode()
        parts.append(len(data).to_bytes(4, "little") + data)
    return b"".join(parts)


def _described(name: str, array: Array, *, binary: bool) -> dict[str, Any]:
    item: dict[str, Any] = {
        "name": name,
        "datatype": datatype_of(array.dtype),
        "shape": list(array.shape),
    }
    if binary:
        item["parameters"] = {"binary_data_size": array.nbytes}
    return item


def _in_region(wanted: WantedOutput, array: Array) -> dict[str, Any]:
    assert wanted.span is not None
    item = _described(wanted.name, array, binary=False)
    span = Span(wanted.span.region, wanted.span.offset, array.nbytes)
    return {**item, "parameters": described(span)}


def _load_json(data: bytes) -> dict[str, Any]:
    try:
        message = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"The request is not JSON: {str(error)[:200]}.") from error
    if not isinstance(message, dict):
        raise InvalidInput("The request is not a JSON object.")
    return message


def _parameters(message: Mapping[str, Any]) -> Mapping[str, Any]:
    parameters = message.get("parameters") or {}
    if not isinstance(parameters, dict):
        raise InvalidInput("'parameters' is not an object.")
    return parameters


def _text(value: Any, field: str) -> str:
    if not isinstance(value, str):
        raise InvalidInput(f"'{field}' is not a text.")
    return value


def _from_json(part: _Part, data: list[Any]) -> Array:
    name, datatype = part.spec.name, part.spec.datatype
    try:
        values = np.asarray(data)
        if values.dtype.kind not in "biuf":
            raise InvalidInput(f"The data of input '{name}' are not numbers of equal rows.")
        if part.dtype.kind in "iu" and values.dtype.kind == "f":
            raise InvalidInput(f"The data of input '{name}' are not integers, which {datatype} needs.")
        if part.dtype.kind in "iu" and values.size:
            limits = np.iinfo(part.dtype)
            if int(values.min()) < limits.min or int(values.max()) > limits.max:
                raise InvalidInput(f"A value of input '{name}' is outside of {datatype}.")
        array = values.astype(part.dtype)
    except (ValueError, OverflowError, TypeError) as error:
        raise InvalidInput(f"The data of input '{name}' are not {datatype}: {str(error)[:120]}.") from error
    if array.nbytes != part.size:
        raise InvalidInput(
            f"Input '{name}' has {array.size} values, but the shape {list(part.shape)} needs "
            f"{part.size // part.dtype.itemsize}."
        )
    return np.ascontiguousarray(array.reshape(part.shape))
