"""What a training step gets: prepared inputs and the teacher's answers, computed once where that is right."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor, nn

    from shoal_optimizer.data import TaskData
    from shoal_optimizer.task import Task

KEEP_BYTES = 384 << 20  # of prepared inputs, and of answers, that are kept in memory
STORE_BYTES = 128 << 20  # of answers that are kept on disk
BLOCK = 256  # items at once: always the same ones together, so that the bits do not depend on the batch
_KEPT = 2  # tables of answers that a task remembers


class Feed:
    """Batches of one split, by index.

    Where the task does not augment, an item is the same in every epoch: then inputs are prepared once,
    and the teacher answers once per item. Its answers are kept by content, in the task's memory and in
    `task.cache_dir`: the next network learns from the same ones.
    """

    def __init__(
        self,
        task: Task,
        data: TaskData,
        augment: Callable[[Tensor], Tensor],
        teacher: nn.Module | None,
        draws: int,
    ) -> None:
        """
        Args:
            teacher: None = no answers are wanted. draws: items that will be asked for in all; fewer
                than there are: nothing is computed ahead.
        """
        self.task, self.data, self.augment, self.teacher = task, data, augment, teacher
        still = is_still(task, augment) and draws >= len(data)
        self._prepared = self._prepare() if still else None
        self._answers = answers(task, teacher, data) if still and teacher is not None else None

    def __call__(self, chosen: np.ndarray) -> tuple[Tensor, Tensor | None]:
        """(prepared inputs [len(chosen), ...], the teacher's answers or None)."""
        import torch

        with torch.no_grad():
            if self._prepared is not None:
                inputs = self._prepared[torch.from_numpy(chosen)]
            else:
                raw = torch.from_numpy(np.ascontiguousarray(self.data.inputs[chosen])).to(torch.float32)
                inputs = self.task.pre(self.task.guard("augment()", lambda: self.augment(raw)))
            if self.teacher is None:
                return inputs, None
            if self._answers is not None:
                return inputs, self._answers[torch.from_numpy(chosen)]
            return inputs, self.teacher(inputs)

    def _prepare(self) -> Tensor | None:
        import torch

        with torch.no_grad():
            first = self._block(0)
            if first[0].numel() * first.element_size() * len(self.data) > KEEP_BYTES:
                return None
            parts = [first, *(self._block(start) for start in range(BLOCK, len(self.data), BLOCK))]
            return torch.cat(parts)

    def _block(self, start: int) -> Tensor:
        return prepared(self.task, self.data.inputs[start : start + BLOCK])


class Lots:
    """Draws items in random order, each once before any comes again."""

    def __init__(self, count: int, seed: int) -> None:
        self._count, self._random = count, np.random.default_rng(seed)
        self._left = np.empty(0, np.int64)

    def draw(self, count: int) -> np.ndarray:
        while len(self._left) < count:
            self._left = np.concatenate([self._left, self._random.permutation(self._count)])
        drawn, self._left = self._left[:count], self._left[count:]
        return drawn


def is_still(task: Task, augment: Callable[[Tensor], Tensor]) -> bool:
    """True when training sees every item unchanged."""
    from shoal_optimizer.task import Task as Base

    return getattr(augment, "__func__", None) is Base.augment


def prepared(task: Task, inputs: np.ndarray) -> Tensor:
    """What the model gets in training for endpoint inputs that are not augmented."""
    import torch

    result: Tensor = task.pre(torch.from_numpy(np.ascontiguousarray(inputs)).to(torch.float32))
    return result


def answers(task: Task, teacher: nn.Module, data: TaskData) -> Tensor | None:
    """The teacher's outputs (before postprocess) for all items; None where they are too many to keep."""
    from shoal_optimizer.targets.onnx import fingerprint

    key = f"{fingerprint(teacher, task)}-{data.digest[7:23]}"
    memory: dict[str, Tensor] = vars(task).setdefault("_teacher_answers", {})
    if key not in memory:
        path = None if task.cache_dir is None else task.cache_dir / f"answers-{key}.npy"
        found = _read(path, len(data))
        if found is None:
            found = _ask(task, teacher, data)
            if found is None:
                return None
            _write(path, found)
        while len(memory) >= _KEPT:
            memory.pop(next(iter(memory)))
        memory[key] = found
    return memory[key]


def _ask(task: Task, teacher: nn.Module, data: TaskData) -> Tensor | None:
    import torch

    parts: list[Any] = []
    teacher.eval()
    with torch.no_grad():
        for start in range(0, len(data), BLOCK):
            parts.append(teacher(prepared(task, data.inputs[start : start + BLOCK])))
            if not isinstance(parts[0], torch.Tensor):
                return None
            if parts[0][0].numel() * parts[0].element_size() * len(data) > KEEP_BYTES:
                return None
    return torch.cat(parts)


def _read(path: Path | None, count: int) -> Tensor | None:
    import torch

    if path is None or not path.is_file():
        return None
    try:
        found = np.load(path, allow_pickle=False)
    except (OSError, ValueError):
        return None  # damaged: asked again
    return torch.from_numpy(found) if len(found) == count and found.dtype == np.float32 else None


def _write(path: Path | None, found: Tensor) -> None:
    if path is None or found.numel() * found.element_size() > STORE_BYTES:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            np.save(file, found.numpy())
        partial.replace(path)
    except OSError:  # a full disk costs only the cache
        partial.unlink(missing_ok=True)
