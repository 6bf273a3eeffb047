"""Labels that applications post later, matched to answered requests by the request's own id."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass, field

import numpy as np

from shoal_agent.runtimes.tensors import Array
from shoal_agent.serving.observer import Observer
from shoal_protos.bundle import Signature
from shoal_protos.errors import InvalidInput, Unsupported

KEEP_S = 3600.0
MAX_REMEMBERED = 20_000  # about 300 bytes each
MAX_ID = 256


@dataclass
class _Answer:
    time_s: float
    predictions: list[tuple[Observer, Array]] = field(default_factory=list)
    labels: list[int] | None = None


class Feedback:
    """Remembers the predictions of answered requests for an hour, bounded in number. Thread-safe."""

    def __init__(self, keep_s: float = KEEP_S, capacity: int = MAX_REMEMBERED) -> None:
        self._keep_s, self._capacity = keep_s, capacity
        self._answers: OrderedDict[tuple[str, str], _Answer] = OrderedDict()
        self._lock = threading.Lock()

    def remember(
        self, endpoint: str, request_id: str, observer: Observer, predicted: Array, now: float
    ) -> None:
        """Keeps the arg-max of each item. A second answer of the same bundle under one id replaces the
        first; one of another bundle (a shadow) stands beside it."""
        if len(request_id) > MAX_ID:
            return
        key = (endpoint, request_id)
        with self._lock:
            answer = self._answers.get(key)
            if answer is None or any(known is observer for known, _ in answer.predictions):
                self._answers.pop(key, None)
                answer = self._answers[key] = _Answer(now)
                self._expire(now)
            answer.predictions.append((observer, predicted))
            labels = answer.labels
        if labels is not None:  # the shadow answered after the label came
            _count(observer, predicted, labels)

    def label(self, endpoint: str, request_id: str, labels: list[int], now: float) -> str:
        """Matches labels (class indices, one an item). Returns "matched", "duplicate" or "unmatched"."""
        with self._lock:
            self._expire(now)
            answer = self._answers.get((endpoint, request_id))
            if answer is None:
                return "unmatched"
            if answer.labels is not None:
                return "duplicate"
            items = len(answer.predictions[0][1])
            if len(labels) != items:
                raise InvalidInput(
                    f"The request '{request_id[:40]}' had {items} items, but {len(labels)} labels came.",
                    "Post one label for each item, in order.",
                )
            answer.labels = labels
            predictions = list(answer.predictions)
        for observer, predicted in predictions:
            _count(observer, predicted, labels)
        return "matched"

    def __len__(self) -> int:
        return len(self._answers)

    def _expire(self, now: float) -> None:
        while self._answers:
            key, answer = next(iter(self._answers.items()))
            if now - answer.time_s < self._keep_s and len(self._answers) <= self._capacity:
                return
            del self._answers[key]


def _count(observer: Observer, predicted: Array, labels: list[int]) -> None:
    observer.labels(len(labels), int((predicted == np.asarray(labels)).sum()))


def class_indices(signature: Signature, value: object) -> list[int]:
    """Class indices of a posted label: an index, a class name, or a list of them (one an item).

    Raises:
        Unsupported: the endpoint's outputs are no class scores.
        InvalidInput: an index out of range or an unknown name.
    """
    if signature.output_kind != "logits":
        raise Unsupported(
            f"This endpoint's outputs are {signature.output_kind}, not class scores.",
            "Only classifiers take labels so far.",
        )
    values = value if isinstance(value, list) else [value]
    if not values:
        raise InvalidInput("The list of labels is empty.")
    return [_class_index(signature, item) for item in values]


def _class_index(signature: Signature, value: object) -> int:
    if isinstance(value, str):
        if value in signature.labels:
            return signature.labels.index(value)
        raise InvalidInput(
            f"There is no class '{value[:80]}'.",
            f"Classes are {', '.join(signature.labels[:20])}." if signature.labels else "Post a class index.",
        )
    shape = signature.outputs[0].shape
    classes = max(shape[-1], len(signature.labels)) if shape else 0
    is_index = isinstance(value, int) and not isinstance(value, bool)
    if not is_index or value < 0 or (classes > 0 and value >= classes):  # type: ignore[operator]
        remedy = f"Use 0 to {classes - 1}." if classes > 0 else "Use 0 or more."
        raise InvalidInput(f"{value!r} is not a class index.", remedy)
    return value  # type: ignore[return-value]
