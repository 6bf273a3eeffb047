"""What a model gives and what its data say, held against what the task declares."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from shoal_agent.runtimes.tensors import dtype_of
from shoal_protos.bundle import TensorSpec
from shoal_protos.errors import InvalidInput

if TYPE_CHECKING:
    from shoal_optimizer.task import Task

_OUTSIDE = 0.5  # a box may reach beyond the picture's edge by this share of it


def check_output(task: Task, spec: TensorSpec, outputs: np.ndarray) -> None:
    shape = list(outputs.shape[1:])
    if len(spec.shape) != outputs.ndim or any(
        d not in (-1, have) for d, have in zip(spec.shape[1:], shape, strict=True)
    ):
        raise InvalidInput(
            f"The model gives shape [-1, {str(shape)[1:]}, `output` declares {list(spec.shape)}.",
            "Correct `output`, the model or postprocess().",
        )
    if dtype_of(spec.datatype) != outputs.dtype:
        raise InvalidInput(
            f"The model gives {outputs.dtype}, `output` declares {spec.datatype}.",
            "Correct `output` or cast in postprocess().",
        )
    if task.output_kind == "logits" and task.labels and outputs.shape[-1] != len(task.labels):
        raise InvalidInput(
            f"The model gives {outputs.shape[-1]} logits, the task has {len(task.labels)} labels.",
            "Name one label for each logit.",
        )
    if task.output_kind == "boxes" and (len(shape) != 2 or shape[-1] != 4 + len(task.labels)):
        raise InvalidInput(
            f"The model gives shape [-1, {str(shape)[1:]}, boxes of {len(task.labels)} labels are "
            f"[-1, candidates, {4 + len(task.labels)}].",
            "Decode the head in postprocess(): x1, y1, x2, y2 as shares, then one score a label.",
        )
    if task.output_kind == "boxes" and outputs.dtype != np.float32:
        raise InvalidInput(f"The model gives boxes as {outputs.dtype}.", "Give float32 in postprocess().")


def check_targets(task: Task, classes: int) -> None:
    """The default metric and loss of logits need class numbers."""
    for split in ("evaluation", "training"):
        data = task.data(split)
        if data is None:
            continue
        targets = data.targets
        where = f"{type(task).__name__}.{split}()"
        if targets.ndim != 1 or targets.dtype.kind not in "iu":
            raise InvalidInput(
                f"{where} gives targets of shape {list(targets.shape)} and type {targets.dtype}.",
                "Give one class number an item, or write metric() and loss().",
            )
        if targets.min() < 0 or targets.max() >= classes:
            raise InvalidInput(
                f"{where} gives classes {targets.min()} to {targets.max()}, the model has {classes} logits.",
                "Number the classes from 0 in the order of `labels`.",
            )


def check_boxes(task: Task) -> None:
    """The default metric of boxes needs targets of its form, as shares and not as pixels."""
    for split in ("evaluation", "training"):
        data = task.data(split)
        if data is None:
            continue
        where = f"{type(task).__name__}.{split}()"
        if data.targets.ndim != 3 or data.targets.shape[-1] != 5 or data.targets.dtype.kind != "f":
            raise InvalidInput(
                f"{where} gives targets of shape {list(data.targets.shape)} and type {data.targets.dtype}.",
                "Give float32 [boxes, 5] an item: x1, y1, x2, y2 as shares, class.",
            )
        rows = data.targets[data.targets[..., 4] >= 0]
        if not len(rows):
            raise InvalidInput(f"{where} has no box in any item.", "Give items with boxes.")
        classes, sides = rows[:, 4], rows[:, 2:4] - rows[:, :2]
        if (classes != np.rint(classes)).any() or classes.max() >= len(task.labels):
            raise InvalidInput(
                f"{where} gives the class {classes.max():g}, the task has {len(task.labels)} labels.",
                "Number the classes from 0 in the order of `labels`; class -1 is padding.",
            )
        if not np.isfinite(rows).all() or rows[:, :4].min() < -_OUTSIDE or rows[:, :4].max() > 1 + _OUTSIDE:
            raise InvalidInput(
                f"{where} gives box coordinates from {rows[:, :4].min():g} to {rows[:, :4].max():g}.",
                "Divide pixels by the picture's width and height: coordinates are shares.",
            )
        if sides.min() <= 0:
            raise InvalidInput(
                f"{where} gives a box of no size.", "Order a box as left, top, right, bottom: x1, y1, x2, y2."
            )
