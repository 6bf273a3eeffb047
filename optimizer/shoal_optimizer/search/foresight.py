"""What a network will cost before it is trained, and which of several to train."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from shoal_optimizer.objective import Objective, show
from shoal_optimizer.recipe import Recipe
from shoal_optimizer.search import fidelity

if TYPE_CHECKING:
    from torch import nn

    from shoal_optimizer.search.kernels import Kernel
    from shoal_optimizer.search.learner import Learner
    from shoal_optimizer.task import Task

log = logging.getLogger(__name__)

SURE = 2.0  # relative errors beyond which a prediction counts as certain
RUNTIMES = ("onnxruntime", "openvino")  # whose times come from kernels of a graph


@dataclass(frozen=True)
class Foreseen:
    """Free facts of an untrained network.

    Attributes:
        parameters: of the network after its structural steps.
        predicted: class -> (milliseconds of its fastest form, relative error of the predictor).
        best: class -> the least milliseconds that any of its forms could take.
    """

    parameters: int
    predicted: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    best: Mapping[str, float] = field(default_factory=dict)

    def said(self) -> dict[str, Any]:
        """Class -> {"ms", "relative_error"}, for the report."""
        return {name: {"ms": ms, "relative_error": error} for name, (ms, error) in self.predicted.items()}

    def to_json(self) -> dict[str, Any]:
        return {"parameters": self.parameters, "predicted": self.said(), "best": dict(self.best)}

    @classmethod
    def from_json(cls, raw: Mapping[str, Any] | None) -> Foreseen | None:
        if raw is None:
            return None
        predicted = {n: (float(p["ms"]), float(p["relative_error"])) for n, p in raw["predicted"].items()}
        return cls(int(raw["parameters"]), predicted, dict(raw["best"]))

    def excess(self, objective: Objective) -> float:
        """How far the prediction misses the objective's latency, as a share; 0 = it meets it, or unknown."""
        bounds = [c for c in objective.constraints if c.metric.startswith("latency")]
        return min(
            (sum(c.excess(ms) for c in bounds) for ms in self.best.values()),
            default=0.0,
        )

    def refusal(self, objective: Objective, classes: int) -> str:
        """Why the network cannot meet the objective on any class, "" when it might.

        One byte a parameter is a bound of size; a latency is refused only beyond the predictor's own error.
        """
        for constraint in objective.constraints:
            if constraint.metric == "size" and self.parameters > constraint.bound:
                return f"{show('size', float(self.parameters))} even in int8, wanted {constraint}"
            if not constraint.metric.startswith("latency") or len(self.best) < classes or not self.best:
                continue
            if all(ms > constraint.bound for ms in self.best.values()):
                name = min(self.best, key=lambda n: self.best[n])
                ms, error = self.predicted[name]
                return (
                    f"predicted {show('latency_p50', ms)} in its fastest form (the predictor's error is "
                    f"{error:.0%}), wanted {constraint}"
                )
        return ""


def foresee(recipe: Recipe, task: Task, learner: Learner, *, seed: int, look: bool) -> Foreseen:
    """Applies the structural steps only, without training.

    Args:
        look: predict latencies too.
    """
    model, cost = fidelity.shaped(recipe, task, seed)
    if not look or model is None:
        return Foreseen(cost.parameters)
    predicted: dict[str, tuple[float, float]] = {}
    best: dict[str, float] = {}
    for precision in ("fp32", "int8"):
        found = _kernels(model, task, precision)
        for runtime in RUNTIMES:
            for name, answer in learner.predict_kernels(found, runtime).items():
                least = answer.ms * max(0.0, 1 - SURE * answer.relative_error)
                best[name] = min(best.get(name, least), least)
                if name not in predicted or answer.ms < predicted[name][0]:
                    predicted[name] = answer.ms, answer.relative_error
    return Foreseen(cost.parameters, predicted, best)


def _kernels(model: nn.Module, task: Task, precision: str) -> tuple[Kernel, ...]:
    """What the network would run, without exporting it; () where it cannot be told."""
    import numpy as np
    import torch

    from shoal_optimizer.search.tracing import kernels_of

    item = torch.from_numpy(np.ascontiguousarray(task.required("evaluation").inputs[:1]))
    try:
        with torch.no_grad():
            return kernels_of(model, task.pre(item), precision)
    except Exception:  # a prediction is a help, never a need
        log.debug("kernels cannot be told", exc_info=True)
        return ()
