"""From a file to a Task: a Python file with one Task class, or an ONNX file with its `.npz`."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

from shoal_agent.runtimes.tensors import dtype_of
from shoal_optimizer.onnx_task import OnnxTask as OnnxTask
from shoal_optimizer.task import Task
from shoal_protos.bundle import BoxRule, TensorSpec, digest_of, digest_of_file
from shoal_protos.errors import InvalidInput

MODULE_PREFIX = "shoal_task_"


def load_python_task(path: Path) -> Task:
    """Imports `path` and makes an instance of its one Task class.

    Raises:
        InvalidInput: importing raises, there is no Task class or more than one, a declaration is
            wrong, or a file that it names is missing.
    """
    module = _import(path)
    found = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Task) and value.__module__ == module.__name__
    ]
    if not found:
        raise InvalidInput(
            f"{path.name} has no Task.", "Write a class that derives from shoal_optimizer.Task."
        )
    if len(found) > 1:
        names = ", ".join(sorted(kind.__name__ for kind in found))
        raise InvalidInput(f"{path.name} has several tasks: {names}.", "Keep one in a file.")
    try:
        task = found[0]()
    except Exception as error:
        raise InvalidInput(
            f"{found[0].__name__}() raised {type(error).__name__}: {error}.", "A task takes no arguments."
        ) from error
    task.directory, task.source = path.parent, path
    check_declarations(task)
    return task


def _import(path: Path) -> Any:
    # Named by content and place: a file that is loaded twice has one set of classes, and a copy of it
    # elsewhere its own, beside its own data. `module_like` finds the classes of stored modules again.
    place = digest_of(str(path).encode())[7:15]
    name = f"{MODULE_PREFIX}{path.stem}_{digest_of_file(path)[7:19]}_{place}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise InvalidInput(f"{path.name} is neither a Python nor an ONNX file.", "Give a .py or .onnx file.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))  # the task's own `files` may be modules
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        sys.modules.pop(name, None)
        raise InvalidInput(
            f"Importing {path.name} raised {type(error).__name__}: {error}.",
            f"Run `python {path.name}` to see the whole traceback.",
        ) from error
    return module


def module_like(name: str) -> str:
    """The loaded task module that a stored module's class belongs to: same content, else same file name.

    A worker unpacks a task anywhere, so places differ; content differs when the file was edited since.
    """
    loaded = [known for known in reversed(sys.modules) if known.startswith(MODULE_PREFIX)]
    for parts in (0, 1, 2):
        wanted = name.rsplit("_", parts)[0]
        for known in loaded:
            if known.rsplit("_", parts)[0] == wanted:
                return known
    return name


def check_declarations(task: Task) -> None:
    """Checks what a task declares, before any of its methods runs. Raises InvalidInput."""
    kind = type(task).__name__
    spec = getattr(task, "input", None)
    if not isinstance(spec, TensorSpec):
        raise InvalidInput(
            f"{kind}.input is not declared.",
            'Write input = TensorSpec("image", "UINT8", (-1, 32, 32, 3), "NHWC", 0, 255).',
        )
    dtype_of(spec.datatype)
    batches = (-1,) if task.has_module else (-1, 1)  # an ONNX file may insist on single items
    if len(spec.shape) < min(2, 1 + task.has_module) or spec.shape[0] not in batches:
        raise InvalidInput(f"{kind}.input has shape {spec.shape}.", "Start with -1, the batch dimension.")
    for field, value, known in (
        ("input_kind", task.input_kind, ("image", "audio", "series", "tensor")),
        ("output_kind", task.output_kind, ("logits", "boxes", "values")),
        ("color", task.color, ("", "gray", "rgb", "bgr")),
        ("resize", task.resize, ("", "stretch", "letterbox", "crop")),
    ):
        if value not in known:
            raise InvalidInput(
                f"{kind}.{field} is {value!r}.", f"Use one of {', '.join(filter(None, known))}."
            )
    for field, number, most in (("pad", task.pad, 255), ("sample_rate", task.sample_rate, 10_000_000)):
        if not isinstance(number, int) or not 0 <= number <= most:
            raise InvalidInput(f"{kind}.{field} is {number!r}.", f"Give a whole number from 0 to {most}.")
    _check_boxes(task)
    if isinstance(task.files, str):
        raise InvalidInput(f"{kind}.files is one string.", f"Write files = [{task.files!r}].")
    for name in task.files:
        path = (task.directory / name).resolve()
        if not path.is_relative_to(task.directory.resolve()):
            raise InvalidInput(f"{kind}.files names '{name}', outside the task's folder.", "Move it beside.")
        if not path.exists():
            raise InvalidInput(
                f"{kind}.files names '{name}', which is missing.",
                f"Put it into {task.directory} or take it off the list.",
            )


def _check_boxes(task: Task) -> None:
    """What the output kind "boxes" asks for, and nothing else may have."""
    kind = type(task).__name__
    rule = task.boxes
    if rule is not None and not isinstance(rule, BoxRule):
        raise InvalidInput(
            f"{kind}.boxes is {type(rule).__name__}.", "Write boxes = BoxRule(0.25, 0.5, 100)."
        )
    if task.output_kind != "boxes":
        if rule is not None:
            raise InvalidInput(
                f"{kind}.boxes is set, but output_kind is {task.output_kind!r}.",
                'Write output_kind = "boxes".',
            )
        return
    rule = task.box_rule
    if not (0 < rule.score_threshold < 1 and 0 < rule.iou_threshold <= 1 and rule.max_boxes >= 1):
        raise InvalidInput(
            f"{kind}.boxes is {rule}.",
            "Give thresholds between 0 and 1, and at least one box an image.",
        )
    if not task.labels:
        raise InvalidInput(f"{kind}.labels is empty.", "Name the classes in the order of their scores.")
    wanted = 4 + len(task.labels)
    if task.output is not None and (
        len(task.output.shape) != 3 or task.output.shape[-1] != wanted or task.output.datatype != "FP32"
    ):
        raise InvalidInput(
            f"{kind}.output is {task.output.datatype} {list(task.output.shape)}.",
            f"Boxes of {len(task.labels)} labels are FP32 [-1, candidates, {wanted}].",
        )
    trained = type(task).training is not Task.training
    if task.has_module and trained and type(task).loss is Task.loss:
        raise InvalidInput(
            f"{kind} has training() but no loss().",
            "Write loss(self, outputs, targets): only the task knows how its head encodes boxes "
            "(examples/detector.py shows one), or take training() away: then nothing is fine-tuned.",
        )


def load_onnx_task(path: Path, data: Path | None, weights: Path | None = None) -> OnnxTask:
    """An ONNX task of a user's file, or of what an ingest stored of it.

    Raises:
        InvalidInput: the ONNX or its data cannot be read, or do not fit each other.
    """
    task = OnnxTask(path, data, weights)
    check_declarations(task)
    return task
