"""Three fidelities of looking at a candidate, cheapest first.

1. free: what pruning without training tells (parameters, multiply-adds), against the objective's bounds;
2. cheap: accuracy on a part of the evaluation data and a short timing here, for every candidate;
3. true: the whole evaluation data, and a trial on a device of the class, for what may be kept.

The first two only steer the search. Figures that are claimed for a class come from a machine of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from shoal_agent.telemetry.intervals import wilson
from shoal_optimizer.analysis import Analysis, analyse
from shoal_optimizer.candidates import Candidate
from shoal_optimizer.jobspec import ProfileClass, RuntimeOptions
from shoal_optimizer.meter import UNMEASURED_EMULATED, Figure, Measurement
from shoal_optimizer.objective import Objective, recall_metric, show
from shoal_optimizer.recipe import Recipe, apply
from shoal_optimizer.search import frontier
from shoal_optimizer.search.frontier import Estimate, Point

if TYPE_CHECKING:
    from shoal_optimizer.task import Task

CHEAP_ITEMS = 1000  # half width of the interval near 95 %: 1.4 points
CHEAP_SECONDS = 0.3  # of timed rounds
TRUE_SECONDS = 1.5
_SECONDS_PER_MAC = 1.0 / 4e10  # of one core in training; measured 6e10 on small convolutions


# ---------------------------------------------------------------------------- 1: free


_SHAPING = frozenset({"channel_pruning", "architecture"})


def shaped(recipe: Recipe, task: Task, seed: int = 0) -> tuple[Any, Analysis]:
    """(the untrained module, what it will cost): only the steps that change the shape are applied."""
    steps = tuple(step for step in recipe.training.steps if step.technique in _SHAPING)
    applied = apply(Recipe(steps, recipe.name), task, seed=seed)
    return applied.model, analyse(task, applied.model)


def shape(recipe: Recipe, task: Task, seed: int = 0) -> Analysis:
    """What a network will cost, without training it."""
    return shaped(recipe, task, seed)[1]


def refusal(cost: Analysis, objective: Objective) -> str:
    """Why a network of this shape can't meet the objective, "" when it might.

    Only size is refused: one byte a parameter is a bound, while latency from counting multiply-adds
    is a guess.
    """
    for constraint in objective.constraints:
        if constraint.metric == "size" and cost.parameters > constraint.bound:
            return f"{show('size', float(cost.parameters))} even in int8, wanted {constraint}"
    return ""


def training_seconds(cost: Analysis, items: int, epochs: int) -> float:
    """A rough guess of one core's time: forward and backward of the student, forward of the teacher."""
    return 4.0 * cost.macs * items * epochs * _SECONDS_PER_MAC


def cheap_items(task: Task) -> int | None:
    """Evaluation items of the cheap look; None = all, where there are few."""
    return CHEAP_ITEMS if len(task.required("evaluation")) > 2 * CHEAP_ITEMS else None


# ---------------------------------------------------------------------------- 2 and 3: figures


@dataclass(frozen=True)
class Figures:
    """What is known of a candidate for one class.

    `source`: "trial", "local", "unmeasured", or "unmeasured (emulated)" where only emulated devices are of
    the class. `accuracy_source` is "emulated" where an emulated device answered the inputs.
    """

    accuracy: Figure | None = None
    latency_p50: Figure | None = None
    latency_p95: Figure | None = None
    memory: Figure | None = None
    int8_share: float | None = None
    source: str = "unmeasured"
    accuracy_source: str = ""  # "" = as `source`
    context: dict[str, str] | None = None
    ratio: Figure | None = None  # latency over the incumbent's, same rounds
    winner: str = "unmeasured"
    options: RuntimeOptions = field(default_factory=RuntimeOptions)  # that the latency is with
    per_class: Mapping[str, tuple[float, int]] = field(default_factory=dict)  # label -> (recall, n)

    def to_json(self, labels: Sequence[str] = ()) -> dict[str, Any]:
        """As `variant` lines carry them, with the recall of these classes of the data."""
        accuracy: dict[str, Any] | None = None if self.accuracy is None else self.accuracy.to_json()
        recalls = {label: self.per_class[label][0] for label in labels if label in self.per_class}
        if accuracy is not None and recalls:
            accuracy["recalls"] = recalls
        latency = None
        if self.latency_p95 is not None:
            p95, p50 = self.latency_p95, self.latency_p50 or self.latency_p95
            latency = {
                "p50_ms": p50.value,
                "p50_low_ms": p50.low,
                "p50_high_ms": p50.high,
                "p95_ms": p95.value,
                "p95_low_ms": p95.low,
                "p95_high_ms": p95.high,
                "n": p95.n,
            }
        return {
            "accuracy": accuracy,
            "latency": latency,
            "memory": None if self.memory is None else {"bytes": int(self.memory.value)},
            "int8_share": self.int8_share,
            "source": self.source,
            "sources": {"accuracy": self.accuracy_source or self.source},
            **({} if self.options.default else {"options": self.options.to_json()}),
        }


def guess(candidate: Candidate, quick: Measurement | None) -> Figures:
    """For steering only: this machine's figures, whatever the class."""
    measured = quick if quick is not None and quick.status == "measured" else None
    return Figures(
        accuracy=candidate.accuracy,
        latency_p50=measured.latency_p50 if measured else None,
        latency_p95=measured.latency_p95 if measured else None,
        memory=measured.memory if measured else None,
        int8_share=candidate.int8_share,
        source="local" if measured else "unmeasured",
        per_class=candidate.per_class,
    )


def claim(
    candidate: Candidate,
    profile_class: ProfileClass,
    local: Measurement | None,
    trial: Measurement | None,
    accuracy: Figure | None = None,
    accuracy_source: str = "",
    per_class: Mapping[str, tuple[float, int]] | None = None,
    options: RuntimeOptions | None = None,
) -> Figures:
    """What may be said about a class: a trial's figures, else this machine's if it is of the class.

    Args:
        accuracy: from an `outputs` trial, whose source is `accuracy_source`, with its `per_class`.
        options: that `local` and `trial` were measured with.
    """
    if accuracy is None and profile_class.local:
        accuracy, accuracy_source, per_class = candidate.accuracy, "local", candidate.per_class
    recalls = dict(per_class or {})
    accuracy_source = accuracy_source if accuracy is not None else ""
    chosen = trial if trial is not None and trial.status == "measured" else None
    if chosen is None and profile_class.local and local is not None and local.status == "measured":
        chosen = local
    share = chosen.int8_share if chosen is not None else None
    if share is None and profile_class.local:
        share = candidate.int8_share
    if chosen is None:
        source = "local" if accuracy is not None and profile_class.local else "unmeasured"
        if not profile_class.local and (
            profile_class.emulated or (trial is not None and trial.source == UNMEASURED_EMULATED)
        ):
            source = UNMEASURED_EMULATED
        return Figures(
            accuracy=accuracy,
            int8_share=share,
            source=source,
            accuracy_source=accuracy_source,
            per_class=recalls,
        )
    return Figures(
        accuracy=accuracy,
        latency_p50=chosen.latency_p50,
        latency_p95=chosen.latency_p95,
        memory=chosen.memory or (local.memory if profile_class.local and local is not None else None),
        int8_share=share,
        source=chosen.source,
        accuracy_source=accuracy_source,
        context=dict(chosen.context),
        ratio=chosen.ratio,
        winner=chosen.winner,
        options=options or RuntimeOptions(),
        per_class=recalls,
    )


def float_refusal(candidate: Candidate, figures: Figures) -> str:
    """Why an int8 candidate is none on a class: its devices computed it in float. "" = they did not, or
    nobody has measured it. Where layers went back to float on purpose only a share of 0 is refused."""
    from shoal_optimizer.targets import gates

    if candidate.precision != "int8":
        return ""
    least = 0.0 if candidate.reverted else gates.MIN_INT8_SHARE
    reason = gates.share_refusal(figures.int8_share, least)
    return f"{reason}, as {figures.source} figures say" if reason else ""


def point(candidate: Candidate, figures: Figures) -> Point:
    """The candidate as the front sees it; its key is its name, which is unique within a class."""

    def estimate(figure: Figure | None) -> Estimate | None:
        return None if figure is None else figure.estimate

    return Point(
        candidate.name,
        {
            frontier.ACCURACY: estimate(figures.accuracy),
            "latency_p50": estimate(figures.latency_p50),
            frontier.LATENCY: estimate(figures.latency_p95),
            frontier.SIZE: Estimate(float(candidate.size_bytes)),
            frontier.WIRE: Estimate(float(candidate.wire_bytes)),
            frontier.MEMORY: estimate(figures.memory),
            **{recall_metric(label): recall_of(r, n) for label, (r, n) in figures.per_class.items()},
        },
    )


def recall_of(recall: float, items: int) -> Estimate:
    """The recall of one class of the data with its Wilson interval."""
    low, high = wilson(recall * items, items)
    return Estimate.from_interval(recall, min(low, recall), max(high, recall))
