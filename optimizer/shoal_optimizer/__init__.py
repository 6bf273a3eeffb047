"""Makes a model fit the devices that run it: analyse, compress, convert, measure, pack.

Works as a library and a command line without any fleet. Importing this package imports neither
torch nor a runtime; `from shoal_optimizer import Task` loads only what declares a task.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shoal_optimizer.data import TaskData
    from shoal_optimizer.recipe import Recipe, Step
    from shoal_optimizer.task import Task, load_task
    from shoal_protos.bundle import BoxRule, TensorSpec

__all__ = ["BoxRule", "Recipe", "Step", "Task", "TaskData", "TensorSpec", "load_task"]

_HOMES = {
    "BoxRule": "shoal_protos.bundle",
    "Recipe": "shoal_optimizer.recipe",
    "Step": "shoal_optimizer.recipe",
    "Task": "shoal_optimizer.task",
    "TaskData": "shoal_optimizer.data",
    "TensorSpec": "shoal_protos.bundle",
    "load_task": "shoal_optimizer.task",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'shoal_optimizer' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
