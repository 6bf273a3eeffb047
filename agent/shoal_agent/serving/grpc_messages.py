"""Between the protocol's messages and arrays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from shoal_agent.runtimes.tensors import Array, check_batch, datatype_of
from shoal_agent.serving import describe
from shoal_agent.serving.loading import Loaded
from shoal_agent.serving.shared_memory import Span, described, span_of
from shoal_agent.serving.wire import Codec, WantedOutput, classify, pack_text, view_of
from shoal_protos.errors import InvalidInput, Unsupported
from shoal_protos.oip import service_pb2 as oip

_CONTENTS = {
    "BOOL": "bool_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "UINT8": "uint_contents",
    "UINT16": "uint_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
}


Read = Callable[[Span, "np.dtype[Any]", "tuple[int, ...]"], Array]


def read_inputs(codec: Codec, request: Any, read: Read) -> tuple[dict[str, Array], int]:
    """(arrays by name, batch size); `read` fetches what lies in shared memory."""
    raw = iter(request.raw_input_contents)
    spans = [_span(tensor) for tensor in request.inputs]
    inline, given = spans.count(None), len(request.raw_input_contents)
    if given and given != inline:
        raise InvalidInput(
            f"There are {inline} inputs, but {given} raw_input_contents.", "Send all tensors raw or none."
        )
    inputs: dict[str, Array] = {}
    shapes = []
    for tensor, span in zip(request.inputs, spans, strict=True):
        name, shape = tensor.name, list(tensor.shape)
        spec, dtype = codec.check_tensor(name, tensor.datatype, shape)
        if name in inputs:
            raise InvalidInput(f"Input '{name}' is given twice.")
        size = int(np.prod(shape, dtype=np.int64))
        if span is not None:
            _check_size(name, span.size, spec.datatype, shape, size * dtype.itemsize)
            inputs[name] = read(span, dtype, tuple(shape))
        elif given:
            data = next(raw)
            _check_size(name, len(data), spec.datatype, shape, size * dtype.itemsize)
            inputs[name] = view_of(data, dtype, shape)
        else:
            inputs[name] = _typed(tensor, dtype, size).reshape(shape)
        shapes.append((spec, shape))
    for spec in codec.signature.inputs:
        if spec.name not in inputs:
            raise InvalidInput(f"Input '{spec.name}' is missing.")
    return inputs, check_batch(shapes)


def _check_size(name: str, have: int, datatype: str, shape: list[int], want: int) -> None:
    if have != want:
        raise InvalidInput(f"Input '{name}' has {have} bytes, but {datatype} {shape} is {want} bytes.")


def _span(tensor: Any) -> Span | None:
    """Where a tensor lies in shared memory, by its parameters; None = it doesn't."""
    if not tensor.parameters or "shared_memory_region" not in tensor.parameters:
        return None
    values = {}
    for name, parameter in tensor.parameters.items():
        kind = parameter.WhichOneof("parameter_choice")
        values[name] = getattr(parameter, kind) if kind else None
    return span_of(values)


def _typed(tensor: Any, dtype: np.dtype[Any], size: int) -> Array:
    field = _CONTENTS.get(tensor.datatype)
    if field is None:
        raise InvalidInput(
            f"{tensor.datatype} has no typed contents in the protocol.", "Send raw_input_contents."
        )
    values = np.asarray(getattr(tensor.contents, field))
    if len(values) != size:
        raise InvalidInput(
            f"Input '{tensor.name}' has {len(values)} values in {field}, but the shape needs {size}."
        )
    if dtype.kind in "iu":
        limits = np.iinfo(dtype)
        if int(values.min()) < limits.min or int(values.max()) > limits.max:
            raise InvalidInput(f"A value of input '{tensor.name}' is outside of {tensor.datatype}.")
    return values.astype(dtype)


def read_wanted(codec: Codec, request: Any) -> list[WantedOutput]:
    if not request.outputs:
        return [WantedOutput(spec.name, True) for spec in codec.signature.outputs]
    wanted = []
    for output in request.outputs:
        count = (
            output.parameters["classification"].int64_param if "classification" in output.parameters else 0
        )
        span = _span(output)
        if span is not None and count:
            raise Unsupported("Classes do not go to shared memory.", "Take them from the answer.")
        wanted.append(WantedOutput(codec.check_output(output.name), True, max(0, int(count)), span))
    return wanted


def write_response(
    loaded: Loaded,
    request_id: str,
    wanted: list[WantedOutput],
    outputs: dict[str, Array],
    write: Callable[[Span, Array], None],
) -> Any:
    """The answer's message; `write` takes what goes to shared memory."""
    response = oip.ModelInferResponse(model_name=loaded.endpoint, model_version=loaded.version, id=request_id)
    labels = loaded.bundle.config.signature.labels
    for output in wanted:
        name, array = output.name, outputs[output.name]
        if output.class_count:
            names = classify(array, output.class_count, labels)
            response.outputs.add(name=name, datatype="BYTES", shape=names.shape)
            response.raw_output_contents.append(pack_text(names))
            continue
        listed = response.outputs.add(name=name, datatype=datatype_of(array.dtype), shape=array.shape)
        if output.span is None:
            response.raw_output_contents.append(array.tobytes())
            continue
        write(output.span, array)
        response.raw_output_contents.append(b"")  # keeps the places of the others
        for key, value in described(Span(output.span.region, output.span.offset, array.nbytes)).items():
            if isinstance(value, str):
                listed.parameters[key].string_param = value
            else:
                listed.parameters[key].int64_param = value
    return response


def write_statistics(loaded: Loaded) -> Any:
    found = describe.statistics(loaded)
    stats = oip.InferStatistics(
        **{name: oip.StatisticDuration(**value) for name, value in found["inference_stats"].items()}
    )
    return oip.ModelStatistics(
        name=found["name"],
        version=found["version"],
        last_inference=found["last_inference"],
        inference_count=found["inference_count"],
        execution_count=found["execution_count"],
        inference_stats=stats,
    )
