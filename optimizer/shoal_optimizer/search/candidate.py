"""What a search makes: trained networks, and candidates with what this machine found out about them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shoal_optimizer.jobspec import ProfileClass
from shoal_optimizer.meter import BundleRef, Figure
from shoal_optimizer.recipe import Recipe
from shoal_optimizer.search.space import Params

if TYPE_CHECKING:
    from torch import Tensor, nn

    from shoal_optimizer import evaluation
    from shoal_optimizer.packing import FieldReference
    from shoal_optimizer.task import TaskData


@dataclass(frozen=True)
class Network:
    """A trained torch model that several exports share. `model` is None for ONNX tasks."""

    recipe: Recipe  # its training part
    model: nn.Module | None
    seconds: float = 0.0
    params: Params | None = None
    notes: tuple[str, ...] = ()
    threads: int = 1  # that trained it: other numbers add in another order, and bits differ
    shortened: bool = False  # the budget ended before all of the recipe's steps were done

    @property
    def key(self) -> str:
        return self.recipe.key[7:23]

    @property
    def plain(self) -> bool:
        return not self.recipe.steps


@dataclass(frozen=True)
class Candidate:
    """A packed export of a network with what this machine found out about it.

    `accuracy` is on the task's evaluation data and `field_accuracy` on held-out data moved to the
    field; both from the agent's runtime on this machine, None where it can't load the file. `predicted` is
    the median latency that a table expected before it was measured.
    """

    key: str
    name: str
    network: str
    bundle: str
    layout: str
    target: str
    precision: str
    recipe: tuple[Mapping[str, Any], ...]
    classes: tuple[str, ...]
    size_bytes: int
    wire_bytes: int
    plain: bool
    accuracy: Figure | None = None
    field_accuracy: Figure | None = None
    int8_share: float | None = None
    items: int = 0  # evaluation items behind `accuracy`
    quantizer: str = ""  # as `Export.quantizer` names it
    predicted: Mapping[str, Mapping[str, float]] = field(default_factory=dict)  # class -> ms, relative_error
    per_class: Mapping[str, tuple[float, int]] = field(default_factory=dict)  # label -> (recall, n)
    reverted: tuple[Mapping[str, Any], ...] = ()  # layers back in float: "layers", "regained", "microseconds"

    @property
    def ref(self) -> BundleRef:
        return BundleRef(self.bundle, Path(self.layout))

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Candidate:
        values = dict(raw)
        for name in ("accuracy", "field_accuracy"):
            values[name] = Figure.from_json(values.get(name))
        for name in ("recipe", "classes", "reverted"):
            values[name] = tuple(values.get(name, ()))
        found = values.get("per_class") or {}
        values["per_class"] = {label: (float(recall), int(n)) for label, (recall, n) in found.items()}
        return cls(**values)


@dataclass(frozen=True)
class Ground:
    """What networks are trained from and judged on: the task's own, or moved to the field."""

    teacher: nn.Module | None = None  # None = the task's original
    training: TaskData | None = None
    augment: Callable[[Tensor], Tensor] | None = None
    calibration: TaskData | None = None
    field: TaskData | None = None  # held-out data that looks like the field
    reference: FieldReference | None = None
    parent: str = ""


def as_figure(score: evaluation.Score) -> Figure:
    return Figure(score.value, score.low, score.high, score.n)


def variant_event(
    candidate: Candidate, classes: Mapping[str, ProfileClass], figures: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """Fields of a `variant` line. `figures`: class -> accuracy, latency, memory, int8_share, source."""
    return {
        "bundle": candidate.bundle,
        "layout": candidate.layout,
        "name": candidate.name,
        "target": candidate.target,
        "precision": candidate.precision,
        "recipe": [dict(step) for step in candidate.recipe],
        "size_bytes": candidate.size_bytes,
        "wire_bytes": candidate.wire_bytes,
        "plain": candidate.plain,
        "classes": {name: dict(figures[name]) for name in candidate.classes if name in classes},
    }
