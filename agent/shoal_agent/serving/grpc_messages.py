"""Between the protocol's messages and arrays."""

from __future__ import annotations

from typing import Any

import numpy as np

from shoal_agent.runtimes.tensors import Array, check_batch, datatype_of
from shoal_agent.serving import describe
from shoal_agent.serving.loading import Loaded
from shoal_agent.serving.wire import Codec, classify, pack_text, view_of
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


def read_inputs(codec: Codec, request: Any) -> tuple[dict[str, Array], int]:
    raw = request.raw_input_contents
    if raw and len(raw) != len(request.inputs):
        raise InvalidInput(
            f"There are {len(request.inputs)} inputs, but {len(raw)} raw_input_contents.",
            "Send all tensors raw or none.",
        )
    inputs: dict[str, Array] = {}
    shapes = []
    for place, tensor in enumerate(request.inputs):
        name, shape = tensor.name, list(tensor.shape)
        if "shared_memory_region" in tensor.parameters:
            raise Unsupported("Shared memory is not offered here.", "Send the tensor in the request.")
        spec, dtype = codec.check_tensor(name, tensor.datatype, shape)
        if name in inputs:
            raise InvalidInput(f"Input '{name}' is given twice.")
        size = int(np.prod(shape, dtype=np.int64))
        if raw:
            if len(raw[place]) != size * dtype.itemsize:
                raise InvalidInput(
                    f"Input '{name}' has {len(raw[place])} bytes, but {spec.datatype} {shape} is "
                    f"{size * dtype.itemsize} bytes."
                )
            inputs[name] = view_of(raw[place], dtype, shape)
        else:
            inputs[name] = _typed(tensor, dtype, size).reshape(shape)
        shapes.append((spec, shape))
    for spec in codec.signature.inputs:
        if spec.name not in inputs:
            raise InvalidInput(f"Input '{spec.name}' is missing.")
    return inputs, check_batch(shapes)


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


def read_wanted(codec: Codec, request: Any) -> list[tuple[str, int]]:
    """(output, number of classes asked for or 0)."""
    if not request.outputs:
        return [(spec.name, 0) for spec in codec.signature.outputs]
    wanted = []
    for output in request.outputs:
        if "shared_memory_region" in output.parameters:
            raise Unsupported("Shared memory is not offered here.", "Take the tensor from the answer.")
        count = (
            output.parameters["classification"].int64_param if "classification" in output.parameters else 0
        )
        wanted.append((codec.check_output(output.name), max(0, int(count))))
    return wanted


def write_response(
    loaded: Loaded, request_id: str, wanted: list[tuple[str, int]], outputs: dict[str, Array]
) -> Any:
    response = oip.ModelInferResponse(model_name=loaded.endpoint, model_version=loaded.version, id=request_id)
    labels = loaded.bundle.config.signature.labels
    for name, classes in wanted:
        array = outputs[name]
        if classes:
            names = classify(array, classes, labels)
            response.outputs.add(name=name, datatype="BYTES", shape=names.shape)
            response.raw_output_contents.append(pack_text(names))
        else:
            response.outputs.add(name=name, datatype=datatype_of(array.dtype), shape=array.shape)
            response.raw_output_contents.append(array.tobytes())
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
