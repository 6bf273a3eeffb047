"""What every technique has in common: checked parameters, progress, cancelling, finite weights."""

from __future__ import annotations

import math
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, ClassVar

from shoal_protos.errors import InvalidInput, NotFound, ShoalError, Unsupported

if TYPE_CHECKING:
    from torch import Tensor, nn

    from shoal_optimizer.data import TaskData
    from shoal_optimizer.targets.base import Calibration, ClassSpec
    from shoal_optimizer.task import Task


class Cancelled(ShoalError):
    """The caller asked to stop; what was saved before remains."""

    code = "cancelled"


@dataclass(frozen=True)
class Parameter:
    """One parameter of a technique: its default and what it may be.

    `low` and `high` bound numbers (inclusive); `choices` lists the only values allowed; a text must match
    `pattern` as a whole.
    """

    default: Any
    low: float = -math.inf
    high: float = math.inf
    choices: tuple[Any, ...] = ()
    help: str = ""
    pattern: str = ""

    def check(self, name: str, value: Any) -> Any:
        """`value` in the default's type. Raises InvalidInput, saying what is allowed."""
        if self.choices:
            if value not in self.choices:
                raise InvalidInput(
                    f"{name} is {value!r}.", f"Use one of {', '.join(map(str, self.choices))}."
                )
            return value
        kind = type(self.default)
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if type(value) is not kind:
            raise InvalidInput(f"{name} is {value!r}.", f"Give a value of type {kind.__name__}.")
        if kind is str and not re.fullmatch(self.pattern, value):
            raise InvalidInput(f"{name} is {value!r}.", f"Its form is {self.help}.")
        if kind in (int, float) and not self.low <= value <= self.high:
            raise InvalidInput(f"{name} is {value}.", f"Use {self.low:g} to {self.high:g}.")
        return value


@dataclass(frozen=True)
class Work:
    """The state that steps pass on. `model` is None for tasks that are an ONNX file."""

    task: Task
    model: nn.Module | None
    teacher: nn.Module | None
    training: TaskData | None
    augment: Callable[[Tensor], Tensor]
    calibration: TaskData | None  # None = the task's own
    seed: int
    progress: Callable[[str, float | None, str], None]
    cancelled: Callable[[], bool]
    precision: str = "fp32"
    quantization: Calibration | None = None
    notes: tuple[str, ...] = ()
    class_spec: ClassSpec | None = None  # what it is made for; None = any class
    ends: float | None = None  # time of `clock` at which all steps shall be done; None = take the time
    clock: Callable[[], float] = time.monotonic

    @classmethod
    def start(
        cls,
        task: Task,
        *,
        teacher: nn.Module | None = None,
        training: TaskData | None = None,
        augment: Callable[[Tensor], Tensor] | None = None,
        calibration: TaskData | None = None,
        seed: int = 0,
        progress: Callable[[str, float | None, str], None] | None = None,
        cancelled: Callable[[], bool] | None = None,
        class_spec: ClassSpec | None = None,
        seconds: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> Work:
        """`seconds`: trainings are shortened so that all steps together end in this time."""
        from shoal_optimizer.techniques.masks import copied

        if teacher is None and task.has_module:
            teacher = task.original
        return cls(
            task=task,
            model=None if teacher is None else copied(teacher),
            teacher=teacher,
            training=training if training is not None else task.data("training"),
            augment=augment or task.augment,
            calibration=calibration,
            seed=seed,
            progress=progress or (lambda step, share, message: None),
            cancelled=cancelled or (lambda: False),
            class_spec=class_spec,
            ends=None if seconds is None else clock() + seconds,
            clock=clock,
        )

    def seconds_left(self, share: float = 1.0) -> float | None:
        """This share of the time that is left; None when there is no end."""
        return None if self.ends is None else max(0.0, share * (self.ends - self.clock()))

    def note(self, text: str) -> Work:
        return replace(self, notes=(*self.notes, text))

    def module(self) -> nn.Module:
        """The torch model. Raises Unsupported when the task is an ONNX file."""
        if self.model is None:
            raise Unsupported(
                "This task is an ONNX file: it can be converted and quantized only.",
                "Push a Python task with the torch module.",
            )
        return self.model

    def training_data(self) -> TaskData:
        """Raises Unsupported when the task has no training data."""
        if self.training is None:
            raise Unsupported(
                f"The task {self.task.label} has no training data.",
                "Write training() to fine-tune pruned models.",
            )
        return self.training

    def checkpoint(self) -> None:
        """Call between batches. Raises Cancelled when the caller asked to stop."""
        if self.cancelled():
            raise Cancelled("The work was cancelled.", "Start it again to continue.")


class Technique(ABC):
    """One compression step: `transform` does it, the base class owns limits and errors."""

    name: ClassVar[str]
    parameters: ClassVar[Mapping[str, Parameter]]
    quantizes: ClassVar[bool] = False  # marks the precision, leaves the torch model alone

    @abstractmethod
    def transform(self, work: Work, params: Mapping[str, Any]) -> Work:
        """Applies the step. `params` are complete and checked; `work.model` may be changed in place."""

    def check(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """All parameters, defaults filled in. Raises InvalidInput for unknown names and wrong values."""
        unknown = sorted(set(params) - set(self.parameters))
        if unknown:
            raise InvalidInput(
                f"{self.name} has no parameter '{unknown[0]}'.", f"It has {', '.join(self.parameters)}."
            )
        return {
            name: spec.check(f"{self.name}.{name}", params.get(name, spec.default))
            for name, spec in self.parameters.items()
        }

    def run(self, work: Work, params: Mapping[str, Any]) -> Work:
        """Checks, transforms, and refuses a result with weights that are no finite numbers."""
        complete = self.check(params)
        work.checkpoint()
        work.progress(self.name, 0.0, "")
        done = self.transform(work, complete)
        if done.model is not None:
            require_finite(done.model, self.name)
        work.progress(self.name, 1.0, "")
        return done


def require_finite(model: nn.Module, name: str) -> None:
    """Raises InvalidInput when a weight is NaN or infinite."""
    import torch

    for key, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise InvalidInput(
                f"After {name} the weight '{key}' is not finite.",
                "Lower the learning rate or the pruning ratio.",
            )


@cache
def find(name: str) -> Technique:
    """The technique named `name`. Raises NotFound, listing what is installed."""
    for entry in entry_points(group="shoal.techniques"):
        if entry.name == name:
            found: type[Technique] = entry.load()
            return found()
    known = ", ".join(sorted(entry.name for entry in entry_points(group="shoal.techniques")))
    raise NotFound(f"There is no technique '{name}'.", f"Installed techniques: {known}.")
