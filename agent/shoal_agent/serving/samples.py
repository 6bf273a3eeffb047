"""Recorded inputs on their way out: from an answered request to an `.npz` file."""

from __future__ import annotations

import os
import secrets
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from shoal_agent.runtimes.tensors import Array
from shoal_agent.telemetry.sampling import Policy, Sample, Sampler
from shoal_agent.telemetry.statistics import probabilities
from shoal_protos.bundle import Signature, digest_of_file


@dataclass(frozen=True)
class Batch:
    """Samples of one bundle under one endpoint that leave together."""

    endpoint: str
    bundle: str
    samples: list[Sample]


class Recorder:
    """The samples of one bundle under one endpoint. It outlives the bundle's instance: its samples may
    still wait for their labels. Thread-safe."""

    def __init__(self, endpoint: str, bundle: str, signature: Signature, policy: Policy) -> None:
        self.endpoint, self.bundle = endpoint, bundle
        self._output = signature.outputs[0].name
        self._classes = signature.output_kind == "logits"
        self._sampler = Sampler(policy)
        self._lock = threading.Lock()

    def set_policy(self, policy: Policy) -> None:
        with self._lock:
            self._sampler.policy = policy

    def wants(self) -> bool:
        """Draws the lottery for one request."""
        return self._sampler.wants()

    def offer(self, inputs: dict[str, Array], outputs: dict[str, Array], request_id: str, now: float) -> None:
        """Offers each item of an answered request, as copies."""
        scores = outputs[self._output]
        items = len(scores)
        if any(len(value) != items for value in inputs.values()):
            return  # an input that all items share cannot be cut into items
        best, confidence, margin = self._certainty(scores)
        with self._lock:
            for item in range(items):
                self._sampler.offer(
                    Sample(
                        time_s=now,
                        request_id=request_id,
                        item=item,
                        inputs={name: value[item].copy() for name, value in inputs.items()},
                        predicted=int(best[item]),
                        confidence=float(confidence[item]),
                        margin=float(margin[item]),
                    )
                )

    def _certainty(self, scores: Array) -> tuple[Array, Array, Array]:
        items = len(scores)
        if not self._classes:
            return np.full(items, -1), np.full(items, np.nan), np.zeros(items)
        shares = probabilities(scores)
        ordered = np.sort(shares, axis=1)
        second = ordered[:, -2] if shares.shape[1] > 1 else np.zeros(items)
        return shares.argmax(axis=1), ordered[:, -1], ordered[:, -1] - second

    def label(self, request_id: str, labels: list[int]) -> None:
        with self._lock:
            self._sampler.label(request_id, labels)

    def collect(self, now: float) -> Batch | None:
        """What may leave now."""
        with self._lock:
            taken = self._sampler.take(now)
        return Batch(self.endpoint, self.bundle, taken) if taken else None

    def __len__(self) -> int:
        return len(self._sampler)


def write(batch: Batch, directory: Path) -> dict[str, Any]:
    """Writes a batch as a new file, whole or not at all, and says what it is.

    Arrays: inputs by tensor name, batch first; "label" int64 (-1 = none), "predicted" int64,
    "confidence" float32. Items of another shape than the first are left out.
    """
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    first = batch.samples[0]
    shapes = {name: value.shape for name, value in first.inputs.items()}
    fitting = [s for s in batch.samples if {n: v.shape for n, v in s.inputs.items()} == shapes]
    arrays: dict[str, Array] = {
        name: np.stack([sample.inputs[name] for sample in fitting]) for name in first.inputs
    }
    arrays["label"] = np.asarray([sample.label for sample in fitting], np.int64)
    arrays["predicted"] = np.asarray([sample.predicted for sample in fitting], np.int64)
    arrays["confidence"] = np.asarray([sample.confidence for sample in fitting], np.float32)
    stem = secrets.token_hex(8)
    temporary, target = directory / f".{stem}.part", directory / f"{stem}.npz"
    with temporary.open("wb") as stream:
        np.savez_compressed(stream, allow_pickle=False, **arrays)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(target)
    return {
        "endpoint": batch.endpoint,
        "bundle": batch.bundle,
        "path": str(target),
        "digest": digest_of_file(target),
        "size": target.stat().st_size,
        "count": len(fitting),
        "labelled": int((arrays["label"] >= 0).sum()),
    }
