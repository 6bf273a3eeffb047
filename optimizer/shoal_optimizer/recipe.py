"""Recipes: ordered compression steps, and applying one to a task's model."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from shoal_optimizer.techniques.base import Cancelled, Work, find
from shoal_protos.bundle import canonical_json, digest_of
from shoal_protos.errors import InvalidInput

if TYPE_CHECKING:
    from torch import Tensor, nn

    from shoal_optimizer.data import TaskData
    from shoal_optimizer.targets.base import Calibration, ClassSpec
    from shoal_optimizer.task import Task

Progress = Callable[[str, float | None, str], None]  # step, share 0..1 or None, message


@dataclass(frozen=True)
class Step:
    """One technique with its parameters."""

    technique: str
    params: Mapping[str, Any] = field(default_factory=dict)

    def __hash__(self) -> int:
        return hash(canonical_json(self.to_json()))

    def to_json(self) -> dict[str, Any]:
        return {"technique": self.technique, "params": dict(self.params)}


@dataclass(frozen=True)
class Recipe:
    """An ordered list of steps; no steps = the plain model."""

    steps: tuple[Step, ...] = ()
    name: str = "plain"

    @property
    def precision(self) -> str:
        """What the last quantizing step asks for; "fp32" when there is none."""
        asked = [s.params.get("precision", "int8") for s in self.steps if find(s.technique).quantizes]
        return str(asked[-1]) if asked else "fp32"

    @property
    def training(self) -> Recipe:
        """The steps that change the torch model, without the quantization: shared by fp32 and int8."""
        kept = tuple(step for step in self.steps if not find(step.technique).quantizes)
        return replace(self, steps=kept)

    @property
    def key(self) -> str:
        """Digest of the steps: equal recipes of any name are equal work."""
        return digest_of(canonical_json(self.to_json()))

    def to_json(self) -> list[dict[str, Any]]:
        return [step.to_json() for step in self.steps]

    @classmethod
    def from_json(cls, steps: Any, name: str = "recipe") -> Recipe:
        """Raises InvalidInput when `steps` is no list of {"technique", "params"}."""
        try:
            return cls(tuple(Step(str(s["technique"]), dict(s.get("params", {}))) for s in steps), name)
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise InvalidInput(
                f"A recipe is a list of steps: {error!r}.",
                'Write [{"technique": "channel_pruning", "params": {}}].',
            ) from error

    def checked(self) -> Recipe:
        """The same recipe with every parameter filled in. Raises InvalidInput or NotFound."""
        return replace(
            self, steps=tuple(Step(s.technique, find(s.technique).check(s.params)) for s in self.steps)
        )


@dataclass(frozen=True)
class Applied:
    """What applying a recipe gave: a module to export (None for ONNX tasks), and how."""

    model: nn.Module | None
    precision: str
    calibration: Calibration | None
    recipe: Recipe
    seconds: float
    notes: tuple[str, ...] = ()


def apply(
    recipe: Recipe,
    task: Task,
    *,
    teacher: nn.Module | None = None,
    training: TaskData | None = None,
    augment: Callable[[Tensor], Tensor] | None = None,
    calibration: TaskData | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    cancelled: Callable[[], bool] | None = None,
    class_spec: ClassSpec | None = None,
    seconds: float | None = None,
) -> Applied:
    """Applies the steps in order to a copy of the teacher.

    Args:
        teacher: the model to compress and to distil from; the task's original when None.
        training, augment, calibration: replace the task's own, as adaptation to the field does.
        progress: called with (technique, share of the step, message).
        cancelled: asked between batches; True stops with `Cancelled`.
        class_spec: the profile class that it is made for; steps that only some hardware profits from
            (N:M masks) are refused without it.
        seconds: trainings are shortened so that all steps end in about this time; the notes say so.
            Without it nothing depends on the clock.

    Raises:
        InvalidInput: a parameter is wrong, or training diverged twice.
        Unsupported: a step needs a torch model or training data that the task does not have.
        Cancelled: `cancelled` said so.
    """
    started = time.monotonic()
    complete = recipe.checked()
    work = Work.start(
        task,
        teacher=teacher,
        training=training,
        augment=augment,
        calibration=calibration,
        seed=seed,
        progress=progress,
        cancelled=cancelled,
        class_spec=class_spec,
        seconds=seconds,
    )
    for step in complete.steps:
        work = find(step.technique).run(work, step.params)
    return Applied(
        work.model, work.precision, work.quantization, complete, time.monotonic() - started, work.notes
    )


__all__ = ["Applied", "Cancelled", "Progress", "Recipe", "Step", "apply"]
