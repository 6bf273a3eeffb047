"""Are the data what the task declares, and do they say enough?"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from shoal_optimizer.checks.report import CheckReport
from shoal_optimizer.data import TaskData
from shoal_optimizer.scaffolding.found import shortened
from shoal_optimizer.task import Task
from shoal_protos.errors import InvalidInput

FIRST_ITEMS = 512  # of data that come one by one
FEW_ITEMS = 50  # to judge by
SPLITS = ("evaluation", "training", "calibration")


def limit(task: Task) -> set[str]:
    """Lets the data methods give only their first items, where they give items one by one; returns the
    names of the splits that were cut, filled while they are read."""
    cut: set[str] = set()
    rank = len(task.input.shape)
    for split in SPLITS:
        method = getattr(task, split)

        def limited(method: Any = method, split: str = split) -> Any:
            items = method()
            whole = isinstance(items, tuple) and len(items) == 2 and getattr(items[0], "ndim", -1) == rank
            return items if items is None or whole else _first(items, rank, split, cut)

        setattr(task, split, limited)
    return cut


def _first(items: Any, rank: int, split: str, cut: set[str]) -> Iterator[Any]:
    seen = 0
    for item in items:
        if seen >= FIRST_ITEMS:
            cut.add(split)
            return
        yield item
        value = item[0] if isinstance(item, (tuple, list)) and item else None
        seen += len(value) if getattr(value, "ndim", -1) == rank else 1  # type: ignore[arg-type]


def check_inputs(report: CheckReport, task: Task, cut: set[str]) -> None:
    """Loads the splits; shapes, dtypes, NaN and declared ranges are judged while that happens."""
    evaluation = task.required("evaluation")
    training = task.data("training") if task.has_module else None
    parts = [f"{_count(evaluation, 'evaluation', cut)} judge"]
    if training is not None:
        parts.append(f"{_count(training, 'training', cut)} train")
    inputs = evaluation.inputs
    report.facts["items"] = {"evaluation": len(evaluation), "training": len(training) if training else 0}
    if inputs.dtype.names is not None:
        _check_columns(report, parts, inputs)
        return
    text = f"{', '.join(parts)}; {task.input.datatype} {list(inputs.shape[1:])}"
    low, high = float(inputs.min()), float(inputs.max())
    report.add("data", f"{text}, values {low:.4g} to {high:.4g}")
    if training is None and task.has_module:
        report.warn(
            "data",
            "There are no training data: the model can be converted and quantized, not pruned or distilled.",
            "Write training() to get smaller and faster variants.",
        )
    if len(evaluation) < FEW_ITEMS:
        report.warn(
            "data",
            f"{len(evaluation)} items judge: a share of right answers is known to about "
            f"{98 / len(evaluation) ** 0.5:.0f} points.",
            "Give evaluation() more of them.",
        )
    if low == high:
        report.fail("data", f"Every input value is {low:.4g}.", "Look at how evaluation() reads the data.")
    _check_range(report, task, low, high)
    if training is not None:
        _check_overlap(report, evaluation, training)


def _check_columns(report: CheckReport, parts: list[str], inputs: np.ndarray) -> None:
    """The inputs of an ONNX file with several."""
    told = []
    for name in inputs.dtype.names or ():
        low, high = float(inputs[name].min()), float(inputs[name].max())
        told.append(
            f"'{name}' {inputs[name].dtype} {list(inputs[name].shape[1:])}, values {low:.4g} to {high:.4g}"
        )
        if low == high:
            report.warn(
                "data",
                f"Every value of '{name}' is {low:.4g}.",
                f"Give it as 'fixed:{name}' if it never changes.",
            )
    report.add("data", f"{', '.join(parts)}; {'; '.join(told)}")


def _count(data: TaskData, split: str, cut: set[str]) -> str:
    return f"the first {len(data):,}" if split in cut else f"{len(data):,}"


def _check_range(report: CheckReport, task: Task, low: float, high: float) -> None:
    declared = task.input
    if declared.low is None or declared.high is None:
        return
    width = declared.high - declared.low
    if width > 0 and high - low < 0.02 * width:
        report.warn(
            "data",
            f"The input is declared {declared.low:g} to {declared.high:g}, the data use {low:.4g} to "
            f"{high:.4g}.",
            "Were they scaled before? Applications send raw values; scaling belongs into preprocess().",
        )


def _check_overlap(report: CheckReport, evaluation: TaskData, training: TaskData) -> None:
    """Items that both train and judge make a figure too good."""
    sample = evaluation.inputs[:512]
    known = {row.tobytes() for row in np.ascontiguousarray(training.inputs[:20_000])}
    both = sum(row.tobytes() in known for row in np.ascontiguousarray(sample))
    if both > 0.01 * len(sample):
        report.warn(
            "data",
            f"{both} of {len(sample)} items that judge are also among those that train.",
            "Split the data so that no item is in both; else accuracies are too good.",
        )


def check_targets(report: CheckReport, task: Task, cut: set[str]) -> None:
    """Class numbers, classes that never appear, targets that are all alike."""
    evaluation = task.required("evaluation")
    if task.output_kind != "logits":
        targets = evaluation.targets
        if task.output_kind == "values" and targets.dtype.kind in "iuf" and float(np.ptp(targets)) == 0:
            report.fail("targets", f"Every target is {targets.reshape(-1)[0]:.4g}.", "Look at evaluation().")
            return
        report.add("targets", f"{targets.dtype} {list(targets.shape[1:])} an item")
        return
    targets = evaluation.targets
    if targets.ndim != 1 or targets.dtype.kind not in "iu":
        if task.counts_correct:
            raise InvalidInput(
                f"Targets are {targets.dtype} {list(targets.shape[1:])}.",
                "Give one class number an item, or write metric() and loss().",
            )
        report.add("targets", f"{targets.dtype} {list(targets.shape[1:])}, for your own metric()")
        return
    names = list(task.labels) or [str(i) for i in range(int(targets.max()) + 1)]
    if targets.min() < 0 or targets.max() >= len(names):
        report.fail(
            "targets",
            f"Targets go from {targets.min()} to {targets.max()}, there are {len(names)} labels.",
            "Number the classes from 0 in the order of `labels`, and name every one.",
        )
        return
    if not task.labels:
        report.warn(
            "targets", "The classes have no names; answers will be numbers.", "Set `labels` in their order."
        )
    counts = np.bincount(targets, minlength=len(names))
    if int((counts > 0).sum()) == 1 and "evaluation" not in cut:
        report.fail(
            "targets", f"Only '{names[int(targets[0])]}' is ever right.", "Give items of every class."
        )
        return
    _check_absent(report, task, names, cut)
    report.add("targets", f"{len(names)} classes, {counts.min()} to {counts.max()} items each judge")


def _check_absent(report: CheckReport, task: Task, names: list[str], cut: set[str]) -> None:
    for split in ("evaluation", "training"):
        data = task.data(split) if task.has_module or split == "evaluation" else None
        if data is None or split in cut or data.targets.dtype.kind not in "iu" or data.targets.ndim != 1:
            continue
        counts = np.bincount(data.targets, minlength=len(names))
        absent = [names[i] for i in np.flatnonzero(counts[: len(names)] == 0)]
        if absent:
            report.warn(
                "targets",
                f"{shortened(absent)} never appears in {split}().",
                "Add items of it, or take it off `labels` and make the model without it.",
            )
