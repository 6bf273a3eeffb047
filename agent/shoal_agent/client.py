"""A small client for applications on or near a device: the protocol's binary tensors over HTTP.

    from shoal_agent.client import Client
    client = Client("127.0.0.1:8000", model="digits")
    client.classify(image)          # [Class(label="seven", index=7, probability=0.98)]

Needs the standard library and numpy. Any Open Inference Protocol client works as well.
"""

from __future__ import annotations

import http.client
import itertools
import json
import os
import socket
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import numpy as np

from shoal_agent.runtimes.tensors import Array, datatype_of, dtype_of
from shoal_agent.telemetry.statistics import probabilities
from shoal_protos.errors import (
    Conflict,
    Denied,
    InvalidInput,
    NotFound,
    Overloaded,
    ShoalError,
    Unavailable,
    Unsupported,
)

_ERRORS: Mapping[int, type[ShoalError]] = {
    400: InvalidInput,
    403: Denied,
    404: NotFound,
    409: Conflict,
    413: InvalidInput,
    501: Unsupported,
    503: Overloaded,
}


@dataclass(frozen=True)
class Class:
    label: str  # the class's name, or its index as text where the signature has no names
    index: int
    probability: float


@dataclass(frozen=True)
class Answer:
    """One answered request; `request_id` is what `Client.feedback` takes."""

    request_id: str
    model: str
    version: str
    outputs: dict[str, Array]


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


class Client:
    """Talks to one server over one kept connection; safe to share between threads.

    Args:
        address: "host:port", or the path of a Unix socket (`run/app.sock` of an agent).
        model: the endpoint; may be left out where the server has exactly one.
        timeout: seconds to wait for an answer.
    """

    def __init__(self, address: str = "127.0.0.1:8000", model: str = "", timeout: float = 30.0) -> None:
        self._address, self._model, self._timeout = (
            address.removeprefix("http://").rstrip("/"),
            model,
            timeout,
        )
        self._connection: http.client.HTTPConnection | None = None
        self._lock = threading.Lock()
        self._metadata: dict[str, dict[str, Any]] = {}
        self._prefix = f"{os.getpid():x}-{os.urandom(4).hex()}-"
        self._numbers = itertools.count(1)

    # ------------------------------------------------------------------------ calls

    def infer(self, inputs: Array | Mapping[str, Array], request_id: str = "") -> Answer:
        """Sends one request.

        Args:
            inputs: arrays by tensor name, batch first; or one array for a model with one input. An array
                without the batch dimension is sent as a batch of one.
            request_id: for `feedback`; made up when left out.

        Raises:
            InvalidInput: the inputs don't fit the signature.
            Overloaded: the server has no room now; try again later.
            Unavailable: nobody answers.
        """
        model = self._endpoint()
        request_id = request_id or f"{self._prefix}{next(self._numbers)}"
        specs = self.metadata(model)["inputs"]
        if not isinstance(inputs, Mapping):
            if len(specs) != 1:
                raise InvalidInput(f"The model has {len(specs)} inputs.", "Pass a mapping by name.")
            inputs = {specs[0]["name"]: inputs}
        tensors, data = [], []
        by_name = {spec["name"]: spec for spec in specs}
        for name, value in inputs.items():
            array = _fitted(np.asarray(value), by_name.get(name))
            data.append(array.tobytes())
            tensors.append(
                {
                    "name": name,
                    "datatype": datatype_of(array.dtype),
                    "shape": list(array.shape),
                    "parameters": {"binary_data_size": len(data[-1])},
                }
            )
        header = json.dumps(
            {"id": request_id, "inputs": tensors, "parameters": {"binary_data_output": True}},
            separators=(",", ":"),
        ).encode()
        headers = {
            "Content-Type": "application/octet-stream",
            "Inference-Header-Content-Length": str(len(header)),
        }
        body, size = self._call(
            "POST", f"/v2/models/{quote(model, safe='')}/infer", b"".join([header, *data]), headers
        )
        return _read_answer(body, size)

    def classify(self, inputs: Array | Mapping[str, Array], request_id: str = "") -> list[Class]:
        """The best class of each item of a classifier's batch. Raises as `infer`."""
        answer = self.infer(inputs, request_id)
        scores = next(iter(answer.outputs.values()))
        labels = self.labels()
        shares = probabilities(scores)
        best = shares.argmax(axis=1)
        return [
            Class(labels[index] if index < len(labels) else str(index), index, float(row[index]))
            for index, row in zip(best.tolist(), shares, strict=True)
        ]

    def feedback(self, request_id: str, label: int | str | Sequence[int | str]) -> bool:
        """Posts the truth about an earlier request: a class index or name, or a list, one an item.

        Returns:
            Whether the server still knew the request and had no label for it yet.
        """
        value = label if isinstance(label, (int, str)) else list(label)
        body, _ = self._call(
            "POST",
            f"/v2/models/{quote(self._endpoint(), safe='')}/feedback",
            json.dumps({"id": request_id, "label": value}).encode(),
            {"Content-Type": "application/json"},
        )
        return bool(json.loads(body)["matched"])

    def metadata(self, model: str = "") -> dict[str, Any]:
        """The model's metadata: names, datatypes, shapes, and, from Shoal, labels. Asked for once."""
        model = model or self._endpoint()
        if model not in self._metadata:
            body, _ = self._call("GET", f"/v2/models/{quote(model, safe='')}")
            self._metadata[model] = json.loads(body)
        return self._metadata[model]

    def labels(self) -> list[str]:
        """Class names in order; empty where the signature has none."""
        return [str(label) for label in self.metadata()["outputs"][0].get("labels", [])]

    def ready(self) -> bool:
        try:
            self._call("GET", "/v2/health/ready")
        except ShoalError:
            return False
        return True

    def close(self) -> None:
        with self._lock:
            if self._connection is not None:
                self._connection.close()
                self._connection = None

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ------------------------------------------------------------------------ transport

    def _endpoint(self) -> str:
        if not self._model:
            body, _ = self._call("POST", "/v2/repository/index", b"{}")
            names = sorted({row["name"] for row in json.loads(body)})
            if len(names) != 1:
                raise InvalidInput(
                    f"The server has {len(names)} models: {', '.join(names) or 'none'}.", "Name one."
                )
            self._model = names[0]
        return self._model

    def _open(self) -> http.client.HTTPConnection:
        if "/" in self._address:
            return _UnixConnection(self._address, self._timeout)
        return http.client.HTTPConnection(self._address, timeout=self._timeout)

    def _call(
        self, method: str, target: str, body: bytes = b"", headers: Mapping[str, str] | None = None
    ) -> tuple[bytes, int | None]:
        """(body, length of its JSON header or None) of a 2xx answer."""
        with self._lock:
            kept = self._connection is not None
            try:
                return self._exchange(method, target, body, headers or {})
            except (ConnectionError, http.client.RemoteDisconnected) as error:
                if not kept:
                    raise Unavailable(f"{self._address} does not answer: {error}.") from error
            except (OSError, http.client.HTTPException) as error:
                raise Unavailable(f"{self._address} does not answer: {error}.") from error
            try:  # a kept connection may have been closed since: once more on a fresh one
                return self._exchange(method, target, body, headers or {})
            except (OSError, http.client.HTTPException) as error:
                raise Unavailable(f"{self._address} does not answer: {error}.") from error

    def _exchange(
        self, method: str, target: str, body: bytes, headers: Mapping[str, str]
    ) -> tuple[bytes, int | None]:
        if self._connection is None:
            self._connection = self._open()
        connection = self._connection
        try:
            connection.request(method, target, body, dict(headers))
            response = connection.getresponse()
            data = response.read()
        except BaseException:
            self._connection = None
            connection.close()
            raise
        if response.status >= 300:
            raise _ERRORS.get(response.status, ShoalError)(_message(data, response.status))
        size = response.headers.get("Inference-Header-Content-Length")
        return data, None if size is None else int(size)


def _fitted(array: Array, spec: Mapping[str, Any] | None) -> Array:
    """The array with the signature's dtype where that loses nothing, and a batch dimension."""
    if spec is None:
        return np.ascontiguousarray(array)
    dtype = dtype_of(spec["datatype"])
    if array.dtype != dtype:
        converted = array.astype(dtype)
        exact = np.issubdtype(dtype, np.floating) or bool((converted == array).all())
        if not exact:
            raise InvalidInput(
                f"Input '{spec['name']}' is {array.dtype}, which {spec['datatype']} cannot hold exactly."
            )
        array = converted
    shape = spec["shape"]
    if array.ndim == len(shape) - 1 and shape[0] == -1:
        array = array[None]
    return np.ascontiguousarray(array)


def _read_answer(body: bytes, size: int | None) -> Answer:
    header = json.loads(body if size is None else body[:size])
    outputs: dict[str, Array] = {}
    offset = size or 0
    for tensor in header["outputs"]:
        dtype = dtype_of(tensor["datatype"])
        length = tensor.get("parameters", {}).get("binary_data_size")
        if length is None:
            values = np.asarray(tensor["data"], dtype)
        else:
            values = np.frombuffer(body, dtype, length // dtype.itemsize, offset)
            offset += length
        outputs[tensor["name"]] = values.reshape(tensor["shape"])
    return Answer(header.get("id", ""), header["model_name"], header.get("model_version", ""), outputs)


def _message(data: bytes, status: int) -> str:
    try:
        return str(json.loads(data)["error"])
    except (ValueError, KeyError, TypeError):
        return data[:200].decode(errors="replace") or f"The server answered with status {status}."
