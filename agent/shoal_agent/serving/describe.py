"""What the protocol says about a server and its models, as plain values for both transports."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from shoal_agent.runtimes.tensors import DTYPES
from shoal_agent.serving.loading import Loaded
from shoal_protos import __version__

SERVER_NAME = "shoal"
EXTENSIONS = (
    "binary_tensor_data",
    "classification",
    "model_configuration",
    "model_repository",
    "statistics",
    "system_shared_memory",
)
MAX_BATCH_SIZE = 64  # told to clients that ask; larger batches are answered as well
# Triton's DataType enumeration counts the types in the order of DTYPES.
DATA_TYPES: Mapping[str, int] = {name: number for number, name in enumerate(DTYPES, 1)}


def server_metadata() -> dict[str, Any]:
    return {"name": SERVER_NAME, "version": __version__, "extensions": list(EXTENSIONS)}


def platform_of(loaded: Loaded) -> str:
    need = loaded.bundle.config.runtime
    kind = "onnx" if need.model_file.endswith(".onnx") else need.model_file.rpartition(".")[2]
    return f"{need.name}_{'ir' if kind == 'xml' else kind}"


def model_metadata(loaded: Loaded) -> dict[str, Any]:
    """The protocol's fields, plus what an application needs: layout, range and class names."""
    signature = loaded.bundle.config.signature
    inputs = [
        {
            "name": spec.name,
            "datatype": spec.datatype,
            "shape": list(spec.shape),
            **({"layout": spec.layout} if spec.layout else {}),
            **({"low": spec.low, "high": spec.high} if spec.low is not None else {}),
        }
        for spec in signature.inputs
    ]
    outputs = [
        {
            "name": spec.name,
            "datatype": spec.datatype,
            "shape": list(spec.shape),
            **({"labels": list(signature.labels)} if place == 0 and signature.labels else {}),
        }
        for place, spec in enumerate(signature.outputs)
    ]
    return {
        "name": loaded.endpoint,
        "versions": [loaded.version],
        "platform": platform_of(loaded),
        "inputs": inputs,
        "outputs": outputs,
        "shoal": for_applications(loaded),
    }


def for_applications(loaded: Loaded) -> dict[str, Any]:
    """What turns a picture or a sound into tensors and the answer into names."""
    signature = loaded.bundle.config.signature
    rule = signature.boxes
    return {
        "bundle": loaded.bundle.digest,
        "input_kind": signature.input_kind,
        "output_kind": signature.output_kind,
        "labels": list(signature.labels),
        "color": signature.color,
        "resize": signature.resize,
        "pad": signature.pad,
        "sample_rate": signature.sample_rate,
        "units": signature.units,
        "boxes": None if rule is None else dataclasses.asdict(rule),
    }


def model_config(loaded: Loaded) -> dict[str, Any]:
    """Triton's configuration, as far as clients read it."""
    signature = loaded.bundle.config.signature
    batched = all(spec.shape and spec.shape[0] == -1 for spec in (*signature.inputs, *signature.outputs))
    start = 1 if batched else 0
    return {
        "name": loaded.endpoint,
        "platform": platform_of(loaded),
        "backend": loaded.bundle.config.runtime.name,
        "max_batch_size": MAX_BATCH_SIZE if batched else 0,
        "input": [
            {"name": spec.name, "data_type": f"TYPE_{spec.datatype}", "dims": list(spec.shape[start:])}
            for spec in signature.inputs
        ],
        "output": [
            {"name": spec.name, "data_type": f"TYPE_{spec.datatype}", "dims": list(spec.shape[start:])}
            for spec in signature.outputs
        ],
        "parameters": {"shoal": {"string_value": json.dumps(for_applications(loaded))}},
    }


def statistics(loaded: Loaded) -> dict[str, Any]:
    """Triton's statistics of a model since it was loaded."""
    totals = loaded.observer.totals
    count = totals.success
    return {
        "name": loaded.endpoint,
        "version": loaded.version,
        "last_inference": totals.last_inference_ms,
        "inference_count": totals.items,
        "execution_count": round(totals.executions),
        "inference_stats": {
            "success": {"count": count, "ns": totals.success_ns},
            "fail": {"count": totals.failed, "ns": totals.failed_ns},
            "queue": {"count": count, "ns": totals.queue_ns},
            # Inputs are views of the request and outputs are written once: neither is timed apart.
            "compute_input": {"count": count, "ns": 0},
            "compute_infer": {"count": count, "ns": totals.compute_ns},
            "compute_output": {"count": count, "ns": 0},
        },
        "batch_stats": [],
    }
