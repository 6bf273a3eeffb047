"""Accuracy with its error: the task's metric on a model's outputs and a 95 % interval."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from shoal_agent.detection import mean_precision
from shoal_agent.telemetry.intervals import Z95, wilson
from shoal_optimizer.boxes import matches
from shoal_optimizer.boxes import recalls as box_recalls
from shoal_optimizer.targets.base import Exported, load_exported, run_instance

if TYPE_CHECKING:
    from torch import nn

    from shoal_agent.runtimes.base import Instance
    from shoal_optimizer.data import TaskData
    from shoal_optimizer.task import Task

BOOTSTRAP_ROUNDS = 400
LARGE_ANSWERS = 100_000  # numbers in all targets, above which resampling them costs more than judging
GRAM_ITEMS = 2000


@dataclass(frozen=True)
class Score:
    """A metric's value with its 95 % interval over `n` items.

    `per_class` maps a label to (recall, n) for logits and boxes.
    """

    metric: str
    value: float
    low: float
    high: float
    n: int
    per_class: dict[str, tuple[float, int]] = field(default_factory=dict)

    @property
    def standard_error(self) -> float:
        return (self.high - self.low) / (2 * Z95)

    def to_json(self) -> dict[str, Any]:
        """As the job's events carry it: value, low, high, n, metric and per_class."""
        return {
            "metric": self.metric,
            "value": self.value,
            "low": self.low,
            "high": self.high,
            "n": self.n,
            "per_class": {name: {"recall": r, "n": n} for name, (r, n) in self.per_class.items()},
        }


def bootstrap(
    measure: Callable[[np.ndarray], float], n: int, *, seed: int = 0, rounds: int = BOOTSTRAP_ROUNDS
) -> tuple[float, float]:
    """Percentile interval of `measure(indices)` over items drawn with replacement."""
    random = np.random.default_rng(seed)
    values = [measure(random.integers(0, n, n)) for _ in range(rounds)]
    finite = np.array([value for value in values if math.isfinite(value)])
    if not len(finite):
        return -math.inf, math.inf
    return float(np.quantile(finite, 0.025)), float(np.quantile(finite, 0.975))


def resampled(task: Task, outputs: np.ndarray, targets: np.ndarray) -> Callable[[np.ndarray], float]:
    """The metric as a function of which items count (indices, repeated ones included); NaN where a
    resample lacks what the metric needs, such as a class."""
    if task.metric_name == "map50":
        # Suppression and matching are the same in every resample: once an image is enough.
        matched = matches(outputs, targets, task.box_rule)

    if task.metric_name == "r2" and targets.size >= LARGE_ANSWERS and 1 < len(targets) <= GRAM_ITEMS:
        return _r_squared(outputs, targets)

    def measure(indices: np.ndarray) -> float:
        try:
            if task.metric_name == "map50":
                return mean_precision([matched[index] for index in indices])
            return float(task.metric(outputs[indices], targets[indices]))
        except Exception:
            return math.nan

    return measure


def _r_squared(outputs: np.ndarray, targets: np.ndarray) -> Callable[[np.ndarray], float]:
    """R squared of resamples without going through large answers each time.

    With c[i] how often item i counts, the residual is c.r and the total c.s - c.G.c / n, r and s being the
    items' own sums of squares and G the products of the centred targets with each other.
    """
    n = len(targets)
    truth = np.asarray(targets, np.float64).reshape(n, -1)
    wrong = np.asarray(outputs, np.float64).reshape(n, -1) - truth
    truth = truth - truth.mean(axis=0)
    residuals, gram = np.einsum("ij,ij->i", wrong, wrong), truth @ truth.T

    def measure(indices: np.ndarray) -> float:
        counts = np.bincount(indices, minlength=n).astype(np.float64)
        total = float(counts @ np.diag(gram) - counts @ gram @ counts / len(indices))
        return 1.0 - float(counts @ residuals) / total if total > 0 else math.nan

    return measure


def score(task: Task, outputs: np.ndarray, targets: np.ndarray) -> Score:
    """The task's metric of endpoint outputs [n, ...] against targets [n, ...].

    Raises:
        InvalidInput: the metric raises or gives no finite number.
    """
    value = task.measured(outputs, targets)
    n = len(targets)
    if task.counts_correct:
        low, high = wilson(value * n, n)
    else:
        low, high = bootstrap(resampled(task, outputs, targets), n, seed=task.seed)
    return Score(
        task.metric_name, value, min(low, value), max(high, value), n, recalls(task, outputs, targets)
    )


def recalls(task: Task, outputs: np.ndarray, targets: np.ndarray) -> dict[str, tuple[float, int]]:
    """label -> (recall, n) of each class that occurs, n being items or true boxes; empty unless the
    outputs are logits of classes or boxes."""
    if task.metric_name == "map50":
        found = box_recalls(matches(outputs, targets, task.box_rule), len(task.labels))
        return {str(task.labels[kind]): recall for kind, recall in found.items()}
    if (
        task.output_kind != "logits"
        or targets.ndim != 1
        or targets.dtype.kind not in "iu"
        or outputs.ndim != 2
    ):
        return {}
    right = outputs.argmax(axis=-1) == targets
    counted = {}
    for index in np.unique(targets):
        mask = targets == index
        name = task.labels[index] if 0 <= index < len(task.labels) else str(index)
        counted[str(name)] = (float(right[mask].mean()), int(mask.sum()))
    return counted


def evaluate_model(task: Task, model: nn.Module | None, data: TaskData | None = None) -> Score:
    """Scores a torch model (or an ONNX task's file) by torch itself, on the evaluation data by default."""
    data = data or task.required("evaluation")
    return score(task, task.predict(model, data.inputs), data.targets)  # type: ignore[arg-type]


def evaluate_instance(task: Task, instance: Instance, data: TaskData | None = None) -> Score:
    """Scores a model loaded by one of the agent's runtimes: what devices will answer."""
    data = data or task.required("evaluation")
    return score(task, run_instance(instance, task.signature, data.inputs), data.targets)


def evaluate_exported(task: Task, exported: Exported, data: TaskData | None = None) -> Score:
    """Loads exported files, scores them and closes them again."""
    instance = load_exported(exported)
    try:
        return evaluate_instance(task, instance, data)
    finally:
        instance.close()
