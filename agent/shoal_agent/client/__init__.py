"""A client for applications: a picture or a sound in, a name or boxes out.

    from shoal_agent.client import Client
    client = Client("localhost")
    client.classify("cat.jpg")         # [Class(label='cat', probability=0.98, index=3)]
    client.detect(frame, color="bgr")  # [Box(label='stop', score=0.91, x1=12.0, y1=30.5, x2=88.0, y2=101.2)]

Needs numpy, and Pillow for pictures: pip install 'shoal[client]'. Any Open Inference Protocol client
works as well; this one also decodes, resizes and names by the model's own rule.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

import numpy as np

from shoal_agent import detection, imaging, sounds
from shoal_agent.client import messages
from shoal_agent.client.memory import THRESHOLD, Area
from shoal_agent.client.transport import Transport, parse_address, random_text
from shoal_agent.imaging import Placed
from shoal_agent.runtimes.tensors import Array
from shoal_agent.telemetry.statistics import probabilities
from shoal_protos.bundle import BoxRule, Signature
from shoal_protos.errors import InvalidInput, ShoalError, Unsupported

__all__ = ["Answer", "Box", "Class", "Client"]

_JSON = {"Content-Type": "application/json"}


@dataclass(frozen=True)
class Class:
    """One class of an answer. `request_id` names the request to `Client.feedback`."""

    label: str  # the class's name, or its index as text where the signature has no names
    index: int
    probability: float
    request_id: str = field(default="", repr=False, compare=False)

    def __repr__(self) -> str:
        return f"Class(label={self.label!r}, probability={self.probability:.3g}, index={self.index})"


@dataclass(frozen=True)
class Box:
    """One found object; x to the right and y down, in pixels of the upright picture."""

    label: str
    score: float
    x1: float
    y1: float
    x2: float
    y2: float
    index: int = 0  # of the class
    request_id: str = field(default="", repr=False, compare=False)

    def __repr__(self) -> str:
        corners = ", ".join(f"{name}={getattr(self, name):.1f}" for name in ("x1", "y1", "x2", "y2"))
        return f"Box(label={self.label!r}, score={self.score:.3g}, {corners})"


@dataclass(frozen=True)
class Answer:
    """One answered request; `request_id` is what `Client.feedback` takes."""

    request_id: str
    model: str
    version: str
    outputs: dict[str, Array]


class Client:
    """Talks to one server over one kept connection; safe to share between threads.

    Args:
        address: "host" (port 8000), "host:port", or the path of a Unix socket (`run/app.sock` of an agent).
        model: the endpoint; may be left out where the server has exactly one.
        timeout: seconds to wait for an answer.
        shared_memory: False sends every tensor through the socket. By default large ones go through
            shared memory where the server is on this machine and allows it.
    """

    def __init__(
        self,
        address: str = "localhost",
        model: str = "",
        timeout: float = 30.0,
        *,
        shared_memory: bool = True,
    ) -> None:
        self._model = model
        self._transport = Transport(parse_address(address), timeout)
        self._area = Area(self._transport)
        self._area.refused = not shared_memory
        self._described: dict[str, tuple[dict[str, Any], Signature]] = {}
        self._layouts: dict[tuple[Any, ...], messages.Layout] = {}
        self._prefix = f"{random_text()}-"
        self._numbers = itertools.count(1)

    # ------------------------------------------------------------------------ calls

    def classify(self, source: Any, *, top: int = 1, color: str = "", request_id: str = "") -> list[Class]:
        """The best classes of one picture, sound or array, best first; or the best one of each of several.

        Args:
            source: a path, the bytes of a file, a Pillow image or an array; or several: a list of
                these, or an array with a batch dimension. A mapping of arrays by input name also works.
            top: how many classes; 1 where there are several items (`classify_all` gives more).
            color: an array's channel order, "bgr" for OpenCV; left out, the model's own.
            request_id: for `feedback`; made up when left out.

        Raises:
            Unsupported: the model is no classifier, or takes no such thing.
            as `infer` and, for files, as `imaging.place` and `sounds.decode`.
        """
        found = self.classify_all(source, top=top, color=color, request_id=request_id)
        if len(found) == 1:
            return found[0]
        if top != 1:
            raise InvalidInput(
                f"There are {len(found)} items.", "Call classify_all for more than one class each."
            )
        return [classes[0] for classes in found]

    def classify_all(
        self, source: Any, *, top: int = 1, color: str = "", request_id: str = ""
    ) -> list[list[Class]]:
        """For each of several items the `top` best classes, best first. As `classify`."""
        signature = self.signature()
        # A server that isn't Shoal does not say what its outputs are: the caller knows.
        if signature.output_kind != "logits" and self._is_shoal():
            raise Unsupported(
                f"The model answers {signature.output_kind}, not classes.",
                "Call detect()." if signature.output_kind == "boxes" else "Call infer().",
            )
        arrays, _ = self._prepared(source, signature, color)
        answer = self._send(arrays, request_id)
        shares = probabilities(next(iter(answer.outputs.values())))
        order = np.argsort(-shares, axis=1, kind="stable")[:, : max(1, top)]
        return [
            [
                Class(_label(signature.labels, place), place, float(row[place]), answer.request_id)
                for place in places
            ]
            for row, places in zip(shares, order.tolist(), strict=True)
        ]

    def detect(self, source: Any, *, color: str = "", request_id: str = "") -> list[Box]:
        """What is in one picture, best first.

        Args:
            source: a path, the bytes of a file, a Pillow image, or a frame (uint8 [height, width, 3]).
            color: a frame's channel order, "bgr" for OpenCV; left out, the model's own.

        Raises:
            Unsupported: the model is no detector. As `infer` and `imaging.place`.
        """
        found = self.detect_all([source], color=color, request_id=request_id)
        return found[0]

    def detect_all(self, sources: Sequence[Any], *, color: str = "", request_id: str = "") -> list[list[Box]]:
        """For each of several pictures what is in it; they travel as one batch. As `detect`."""
        signature = self.signature()
        if signature.output_kind != "boxes":
            raise Unsupported(
                f"The model answers {signature.output_kind}, not boxes.",
                "Call classify()." if signature.output_kind == "logits" else "Call infer().",
            )
        arrays, placed = self._prepared(list(sources), signature, color)
        answer = self._send(arrays, request_id)
        rule = signature.boxes or BoxRule()
        return [
            _boxes(detection.suppress(candidates, rule), where, signature.labels, answer.request_id)
            for candidates, where in zip(answer.outputs[signature.outputs[0].name], placed, strict=True)
        ]

    def infer(self, inputs: Any, request_id: str = "", *, color: str = "") -> Answer:
        """Sends one request and returns the raw outputs.

        Args:
            inputs: arrays by tensor name, batch first; or one array, picture or sound for a model with
                one input. An array without the batch dimension is sent as a batch of one.
            request_id: for `feedback`; made up when left out.

        Raises:
            InvalidInput: the inputs don't fit the signature.
            Overloaded: the server has no room now; try again later.
            Unavailable: nobody answers.
        """
        signature = self.signature()
        if isinstance(inputs, np.ndarray) and not color and len(signature.inputs) == 1:
            inputs = {signature.inputs[0].name: inputs}  # as it is: nothing is resized
        arrays, _ = self._prepared(inputs, signature, color)
        return self._send(arrays, request_id)

    def feedback(self, request: str | Class, label: int | str | Sequence[int | str]) -> bool:
        """Posts the truth about an earlier answer.

        Args:
            request: what `classify` answered, or the id of a request.
            label: a class index or name, or a list, one an item.

        Returns:
            Whether the server still knew the request and had no label for it yet.
        """
        value = label if isinstance(label, (int, str)) else list(label)
        request_id = request if isinstance(request, str) else request.request_id
        body, _ = self._transport.call(
            "POST",
            f"/v2/models/{quote(self._endpoint(), safe='')}/feedback",
            json.dumps({"id": request_id, "label": value}).encode(),
            _JSON,
        )
        return bool(json.loads(body)["matched"])

    def metadata(self, model: str = "") -> dict[str, Any]:
        """The model's metadata as the server gives it: names, datatypes, shapes, and, from Shoal, the
        rest of its signature under "shoal". Asked for once."""
        return self._describe(model or self._endpoint())[0]

    def signature(self) -> Signature:
        """What the model takes and gives: kinds, sizes, labels, units, resize and box rules."""
        return self._describe(self._endpoint())[1]

    def labels(self) -> list[str]:
        """Class names in order; empty where the signature has none."""
        return list(self.signature().labels)

    def refresh(self) -> None:
        """Forgets what is known about the model: the next call asks the server anew."""
        self._described.clear()
        self._layouts.clear()

    def ready(self) -> bool:
        try:
            self._transport.call("GET", "/v2/health/ready")
        except ShoalError:
            return False
        return True

    def close(self) -> None:
        with self._transport.lock:
            self._area.close()
            self._transport.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ------------------------------------------------------------------------ the way to tensors

    def _endpoint(self) -> str:
        if not self._model:
            body, _ = self._transport.call("POST", "/v2/repository/index", b"{}")
            names = sorted({row["name"] for row in json.loads(body)})
            if len(names) != 1:
                raise InvalidInput(
                    f"The server has {len(names)} models: {', '.join(names) or 'none'}.",
                    "Name one: Client(address, model=NAME)." if names else "Load one first.",
                )
            self._model = names[0]
        return self._model

    def _describe(self, model: str) -> tuple[dict[str, Any], Signature]:
        found = self._described.get(model)
        if found is None:
            body, _ = self._transport.call("GET", f"/v2/models/{quote(model, safe='')}")
            metadata = json.loads(body)
            found = self._described[model] = metadata, messages.signature_of(metadata)
        return found

    def _is_shoal(self) -> bool:
        return "shoal" in self.metadata()

    def _prepared(
        self, source: Any, signature: Signature, color: str
    ) -> tuple[dict[str, Array], list[Placed]]:
        """(arrays by input name, batch first; where each picture lies in its tensor)."""
        specs = {spec.name: spec for spec in signature.inputs}
        if isinstance(source, Mapping):
            return {n: messages.fitted(np.asarray(v), specs.get(n)) for n, v in source.items()}, []
        if len(specs) != 1:
            raise InvalidInput(
                f"The model has {len(specs)} inputs: {', '.join(specs)}.", "Pass a mapping by name."
            )
        spec = signature.inputs[0]
        if isinstance(source, np.ndarray) and not color and _fits(source, spec.shape):
            array = messages.fitted(source, spec)
            height, width = array.shape[1:3] if array.ndim == 4 else (0, 0)
            whole = Placed(array[0], (1.0, 1.0), (0.0, 0.0), (width, height))
            return {spec.name: array}, [whole] * len(array)
        if signature.input_kind == "image":
            pictures = _several(source, 4)
            placed = [imaging.place(picture, signature, color) for picture in pictures]
            return {spec.name: _stacked([part.tensor for part in placed])}, placed
        if _is_file(source) or (isinstance(source, (list, tuple)) and source and _is_file(source[0])):
            files = source if isinstance(source, (list, tuple)) else [source]
            return {spec.name: _stacked([sounds.decode(file, signature) for file in files])}, []
        return {spec.name: messages.fitted(np.asarray(source), spec)}, []

    # ------------------------------------------------------------------------ the way over the wire

    def _send(self, arrays: Mapping[str, Array], request_id: str) -> Answer:
        request_id = request_id or f"{self._prefix}{next(self._numbers)}"
        target = f"/v2/models/{quote(self._endpoint(), safe='')}/infer"
        with self._transport.lock:
            size = sum(array.nbytes for array in arrays.values())
            if size >= THRESHOLD and not self._area.refused:
                answer = self._through_memory(arrays, request_id, target)
                if answer is not None:
                    return answer
            body, length = messages.as_bytes(arrays, request_id)
            headers = {
                "Content-Type": "application/octet-stream",
                "Inference-Header-Content-Length": str(length),
            }
            return self._read(*self._transport.call("POST", target, body, headers))

    def _through_memory(self, arrays: Mapping[str, Array], request_id: str, target: str) -> Answer | None:
        """The answer, or None where it has to go through the socket."""
        key = tuple((name, array.dtype, array.shape) for name, array in arrays.items())
        layout = self._layouts.get(key)
        if layout is None:
            if len(self._layouts) >= 16:
                self._layouts.clear()
            layout = self._layouts[key] = messages.Layout(arrays, self.signature())
        for _ in range(2):  # the server may have forgotten the region, or started anew: once more
            if not self._area.ready(layout.size):
                return None
            for name, place in layout.inputs:
                self._area.view(place, arrays[name].dtype, arrays[name].shape)[...] = arrays[name]
            try:
                return self._read(
                    *self._transport.call("POST", target, layout.body(self._area.name, request_id), _JSON)
                )
            except ShoalError as error:
                if "region" not in error.message and "hared memory" not in error.message:
                    raise
                self._area.forget()
        self._area.refused = True
        return None

    def _read(self, body: bytes, size: int | None) -> Answer:
        header, outputs = messages.read_outputs(body, size, self._area)
        return Answer(header.get("id", ""), header["model_name"], header.get("model_version", ""), outputs)


def _fits(array: Array, shape: Sequence[int]) -> bool:
    """Whether an array has the input's shape, with or without the batch dimension."""
    if array.ndim == len(shape) - 1 and shape[0] == -1:
        shape = shape[1:]
    return array.ndim == len(shape) and all(
        want < 0 or have == want for have, want in zip(array.shape, shape, strict=True)
    )


def _several(source: Any, batch_rank: int) -> Sequence[Any]:
    """The items of a list or of an array with a batch dimension; a single item as a list of one."""
    if isinstance(source, (list, tuple)):
        if not source:
            raise InvalidInput("The list of pictures is empty.")
        return source
    if isinstance(source, np.ndarray) and source.ndim == batch_rank:
        return list(source)
    return [source]


def _is_file(source: Any) -> bool:
    return isinstance(source, (str, os.PathLike, bytes, bytearray, memoryview))


def _stacked(tensors: Sequence[Array]) -> Array:
    if len(tensors) == 1:
        return tensors[0][None]
    if len({tensor.shape for tensor in tensors}) > 1:
        raise InvalidInput("The items have different sizes.", "Send them one by one.")
    return np.stack(tensors)


def _label(labels: Sequence[str], place: int) -> str:
    return labels[place] if place < len(labels) else str(place)


def _corners(boxes: Array, placed: Placed) -> list[list[float]]:
    """`Placed.to_picture` of a few boxes, in plain numbers: the same arithmetic, ten array calls less."""
    sides = placed.tensor.shape[1::-1] * 2
    offset, scale, size = placed.offset * 2, placed.scale * 2, placed.size * 2
    return [
        [
            min(max((share * side - begin) / step, 0.0), float(end))
            for share, side, begin, step, end in zip(row, sides, offset, scale, size, strict=True)
        ]
        for row in boxes.tolist()
    ]


def _boxes(found: detection.Detections, placed: Placed, labels: Sequence[str], request_id: str) -> list[Box]:
    if not len(found):
        return []
    corners = placed.to_picture(found.boxes).tolist() if len(found) > 16 else _corners(found.boxes, placed)
    return [
        Box(_label(labels, place), score, x1, y1, x2, y2, place, request_id)
        for (x1, y1, x2, y2), score, place in zip(
            corners, found.scores.tolist(), found.classes.tolist(), strict=True
        )
    ]
