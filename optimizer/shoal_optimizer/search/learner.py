"""Asking and feeding the tables while a search goes on."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from shoal_optimizer.jobspec import ProfileClass
from shoal_optimizer.meter import Measurement
from shoal_optimizer.search import prior
from shoal_optimizer.search.candidate import Candidate
from shoal_optimizer.search.exports import Export
from shoal_optimizer.search.knowledge import Knowledge
from shoal_optimizer.search.latency import Kernel, Prediction, kernels
from shoal_protos.bundle import open_bundle

if TYPE_CHECKING:
    from shoal_optimizer.objective import Objective

log = logging.getLogger(__name__)

FORMATS = {"openvino": "ir", "litert": "tflite", "coreml": "mlpackage"}  # of targets; others ship ONNX


class Learner:
    """Knows the tables, and what it fed to them already."""

    def __init__(self, knowledge: Knowledge, classes: Sequence[ProfileClass], kind: str) -> None:
        """
        Args:
            kind: of network, as `prior.kind_of` says.
        """
        self.knowledge = knowledge
        self.kind = kind
        self._classes = {c.name: c for c in classes}
        self._kernels: dict[str, tuple[Kernel, ...] | None] = {}
        self._fed: set[tuple[str, ...]] = set()

    @classmethod
    def none(cls, classes: Sequence[ProfileClass]) -> Learner:
        """One that knows nothing."""
        return cls(Knowledge(), classes, "")

    # ------------------------------------------------------------------ asking

    def predict(self, candidate: Candidate) -> dict[str, dict[str, float]]:
        """Class -> {"ms", "relative_error"} of the median latency, where the table knows enough."""
        found = self._kernels_of(candidate)
        return {} if found is None else self._predicted(candidate.target, candidate.classes, found)

    def predict_kernels(self, found: Sequence[Kernel], runtime: str) -> dict[str, Prediction]:
        """Class that has the runtime -> prediction."""
        said = {}
        for name, profile_class in self._classes.items():
            if found and runtime in profile_class.runtimes:
                answer = self.knowledge.latency.predict(name, runtime, found)
                if answer is not None:
                    said[name] = answer
        return said

    def _predicted(
        self, runtime: str, classes: Iterable[str], found: Sequence[Kernel]
    ) -> dict[str, dict[str, float]]:
        said = {}
        for name in classes:
            answer = self.knowledge.latency.predict(name, runtime, found)
            if answer is not None:
                said[name] = {"ms": answer.ms, "relative_error": answer.relative_error}
        return said

    def verdict(self, export: Export, objective: Objective) -> str:
        """Why a form is not worth making, "" when it may be: it is slower on every class that has it.

        What is slower may still be smaller: nothing is refused where bytes are asked for.
        """
        if export.precision == "fp32" or any(objective.names(m) for m in ("size", "wire", "memory")):
            return ""
        reasons = [
            self.knowledge.priors.verdict(self._key(export.quantizer, export.target, c))
            for c in export.classes
        ]
        return reasons[0] if reasons and all(reasons) else ""

    def _key(self, quantizer: str, runtime: str, profile_class: ProfileClass) -> prior.Key:
        tier = prior.tier_of(profile_class.isa)
        return prior.Key(quantizer, FORMATS.get(runtime, "onnx"), runtime, tier, self.kind)

    # ------------------------------------------------------------------ feeding

    def observe(self, candidate: Candidate, measured: Measurement | None, classes: Iterable[str]) -> None:
        """Adds a measured latency, once for each bundle and class."""
        if measured is None or measured.status != "measured" or measured.latency_p50 is None:
            return
        found = self._kernels_of(candidate)
        if found is None:
            return
        for name in classes:
            if name not in self._classes or not self._new("latency", candidate.bundle, name):
                continue
            for table in (self.knowledge.latency, self.knowledge.learned_latency):
                table.observe(name, candidate.target, found, measured.latency_p50.value)

    def compare(self, measured: Sequence[tuple[Candidate, Measurement]], classes: Iterable[str]) -> None:
        """Adds how each quantized candidate does beside the fp32 form of the same network and runtime."""
        plain = {(c.network, c.target): m for c, m in measured if c.precision == "fp32" and m.latency_p50}
        for candidate, found in measured:
            rival = plain.get((candidate.network, candidate.target))
            if rival is None or not candidate.quantizer or found.latency_p50 is None:
                continue
            assert rival.latency_p50 is not None
            ratio = found.latency_p50.value / rival.latency_p50.value
            for name in classes:
                if name not in candidate.classes or name not in self._classes:
                    continue
                key = self._key(candidate.quantizer, candidate.target, self._classes[name])
                if self._new("prior", candidate.network, *(str(v) for v in key.__dict__.values())):
                    for table in (self.knowledge.priors, self.knowledge.learned_priors):
                        table.observe(key, ratio)

    def _new(self, *what: str) -> bool:
        if what in self._fed:
            return False
        self._fed.add(what)
        return True

    def _kernels_of(self, candidate: Candidate) -> tuple[Kernel, ...] | None:
        """The kernels of an ONNX candidate; None for other formats and unreadable graphs."""
        if candidate.bundle not in self._kernels:
            try:
                bundle = open_bundle(Path(candidate.layout), candidate.bundle, verify=False)
                path = bundle.model_file
                onnx = bundle.config.runtime.model_file.endswith(".onnx")
                self._kernels[candidate.bundle] = (kernels(path.read_bytes()) or None) if onnx else None
            except Exception:  # a prediction is a help: whatever the parser makes of a graph
                log.debug("no kernels of %s", candidate.name, exc_info=True)
                self._kernels[candidate.bundle] = None
        return self._kernels[candidate.bundle]
