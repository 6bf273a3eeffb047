"""An application that calls the agents: tritonclient, a client that we did not write."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from shoal_protos.errors import MissingExtra

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Answers:
    """What one agent answered: `outputs` [n, ...], one row an input, and the requests' ids."""

    outputs: Array
    ids: Sequence[str]


def send(address: str, endpoint: str, tensor: Any, output: str, inputs: Array, prefix: str) -> Answers:
    """Sends each item as a request of its own over HTTP with binary tensors.

    Args:
        address: "host:port" of an agent. tensor: the signature's input (name, datatype).
        inputs: [n, ...] in the signature's dtype.
    """
    try:
        from tritonclient import http
    except ImportError as error:
        raise MissingExtra("dev", "tritonclient") from error
    client = http.InferenceServerClient(address)
    wanted = [http.InferRequestedOutput(output, binary_data=True)]
    rows, ids = [], []
    try:
        for index, item in enumerate(inputs):
            batch = np.ascontiguousarray(item[None])
            carried = http.InferInput(tensor.name, list(batch.shape), tensor.datatype)
            carried.set_data_from_numpy(batch, binary_data=True)
            request = f"{prefix}-{index}"
            answer = client.infer(endpoint, [carried], outputs=wanted, request_id=request)
            rows.append(answer.as_numpy(output)[0])
            ids.append(request)
    finally:
        client.close()
    return Answers(np.stack(rows), ids)


def send_to_all(
    addresses: Sequence[str], endpoint: str, tensor: Any, output: str, inputs: Array, prefix: str
) -> list[Answers]:
    """Sends all inputs to each agent, the agents at the same time; answers in the order of `addresses`."""

    def one(numbered: tuple[int, str]) -> Answers:
        number, address = numbered
        return send(address, endpoint, tensor, output, inputs, f"{prefix}-{number}")

    with ThreadPoolExecutor(len(addresses)) as pool:
        return list(pool.map(one, enumerate(addresses)))


def post_labels(address: str, endpoint: str, ids: Sequence[str], labels: Sequence[int]) -> None:
    """Posts the truth about answered requests, as an application does when it learns it."""
    for request, label in zip(ids, labels, strict=True):
        body = json.dumps({"id": request, "label": int(label)}).encode()
        call = urllib.request.Request(
            f"http://{address}/v2/models/{endpoint}/feedback",
            data=body,
            headers={"content-type": "application/json"},
        )
        with urllib.request.urlopen(call, timeout=10) as answer:  # noqa: S310
            answer.read()
