"""Training a torch model on a task, alone or towards a teacher's answers."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from shoal_optimizer.data import TaskData
from shoal_optimizer.techniques import masks
from shoal_optimizer.techniques.feed import Feed, Lots, prepared
from shoal_optimizer.techniques.hints import Hints
from shoal_optimizer.techniques.losses import match_boxes, match_teacher
from shoal_optimizer.techniques.pace import Length, one_cycle, steps_left
from shoal_protos.errors import InvalidInput, Overloaded

if TYPE_CHECKING:
    from torch import Tensor, nn

    from shoal_optimizer.task import Task
    from shoal_optimizer.techniques.base import Work

PROBE = (2, 4)  # steps that warm up, steps that are timed
LOOK = 10  # steps between looks at the clock


@dataclass(frozen=True)
class TrainingPlan:
    """How to train: AdamW with a one-cycle learning rate.

    `alpha` weighs the teacher, 1 - alpha the task's own loss; alpha 0 trains on targets alone.
    `steps` is a cap on the optimizer steps, 0 = none; the schedule then fits into them. `unlabelled` items
    come with each labelled one where there are some. `hints` weighs the distance of inner outputs, of
    `hint_layers` (student's path, teacher's path) or of layers chosen by themselves.
    """

    epochs: int = 20
    learning_rate: float = 5e-3
    batch: int = 64
    alpha: float = 0.9
    temperature: float = 4.0
    weight_decay: float = 1e-4
    seed: int = 0
    steps: int = 0
    unlabelled: float = 1.0
    hints: float = 0.0
    hint_layers: tuple[tuple[str, str], ...] = ()


def fine_tune(
    work: Work,
    model: nn.Module,
    plan: TrainingPlan,
    progress: Callable[[float, str], None],
    *,
    data: TaskData | None = None,
    **more: Any,
) -> nn.Module:
    """`train` as a recipe's step asks for it: with the work's data, teacher, augmentation and cancelling.

    Args:
        data: instead of the work's training data.
        more: passed to `train`.
    """
    return train(
        model,
        work.task,
        data if data is not None else work.training_data(),
        plan,
        teacher=work.teacher,
        augment=work.augment,
        progress=progress,
        checkpoint=work.checkpoint,
        **more,
    )


def train(
    model: nn.Module,
    task: Task,
    data: TaskData,
    plan: TrainingPlan,
    *,
    teacher: nn.Module | None = None,
    augment: Callable[[Tensor], Tensor] | None = None,
    progress: Callable[[float, str], None] = lambda share, message: None,
    checkpoint: Callable[[], None] = lambda: None,
    after_step: Callable[[float], None] | None = None,
    note: Callable[[str], None] = lambda text: None,
    seconds: float | None = None,
    clock: Callable[[], float] = time.monotonic,
    unlabelled: np.ndarray | None = None,
) -> nn.Module:
    """Trains `model` in place and returns it in evaluation mode. Deterministic for equal seeds and threads.

    Weights that are zero on purpose (`masks.mark`) stay zero. `after_step` is called after each
    optimizer step with the share of steps done; it starts again after a divergence.

    For boxes the teacher is matched after postprocess(): how a head encodes boxes is the task's own.
    Teacher and student see the same augmented batch. If the loss stops being finite, it starts over
    once with a tenth of the learning rate; if memory does not suffice, once with half of the batch.

    Args:
        note: gets a sentence for the report about everything that did not go as planned.
        seconds: the schedule is shortened so that it ends in this time, from a measured step. Without
            it nothing depends on the clock.
        unlabelled: endpoint inputs [n, ...] without targets: the teacher's answers are theirs.

    Raises:
        InvalidInput: the loss was not finite at the lower learning rate either.
        Overloaded: memory did not suffice for half of the batch either.
        Cancelled: `checkpoint` said so.
    """
    start = copy.deepcopy(model.state_dict())
    ends = None if seconds is None else clock() + seconds

    def tell(text: str) -> None:
        progress(0.0, text)
        note(text)

    halved = slower = False
    while True:
        session = _Session(
            model, task, data, plan, teacher if plan.alpha > 0 or plan.hints > 0 else None,
            augment or task.augment, progress, checkpoint,
            _both(after_step, masks.keeper(model)), tell, clock, ends, unlabelled,
        )  # fmt: skip
        try:
            if session.run():
                return model
            if slower:
                model.load_state_dict(start)
                raise InvalidInput(
                    f"Training diverged at learning rates {10 * plan.learning_rate:g} "
                    f"and {plan.learning_rate:g}.",
                    "Lower the learning rate, or look for NaN in the training data and in loss().",
                )
            slower = True
            rate = plan.learning_rate
            plan = replace(plan, learning_rate=rate / 10)
            tell(f"the loss diverged at learning rate {rate:g}, trying a tenth")
        except Exception as error:
            if not out_of_memory(error):
                raise
            if halved or plan.batch < 4:
                raise Overloaded(
                    f"Memory does not suffice to train on {plan.batch} items at once.",
                    "Lower `batch`, or run the job where more memory is free.",
                ) from error
            halved = True
            tell(f"memory does not suffice for {plan.batch} items a step, trying {plan.batch // 2}")
            plan = replace(plan, batch=plan.batch // 2, steps=2 * plan.steps)
        model.load_state_dict(start)


def out_of_memory(error: BaseException | None) -> bool:
    """True where torch or numpy found no memory, also inside the user's code."""
    while error is not None:
        if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
            return True
        if type(error).__name__ == "OutOfMemoryError" or "not enough memory" in str(error):
            return True
        error = error.__cause__
    return False


def _both(after_step: Callable[[float], None] | None, keep: Callable[[], None]) -> Callable[[float], None]:
    def call(share: float) -> None:
        keep()
        if after_step is not None:
            after_step(share)

    return call


@dataclass
class _Session:
    """One attempt at one learning rate."""

    model: nn.Module
    task: Task
    data: TaskData
    plan: TrainingPlan
    teacher: nn.Module | None
    augment: Callable[[Tensor], Tensor]
    progress: Callable[[float, str], None]
    checkpoint: Callable[[], None]
    after_step: Callable[[float], None]
    tell: Callable[[str], None]
    clock: Callable[[], float]
    ends: float | None
    unlabelled: np.ndarray | None
    hints: Hints | None = None

    def run(self) -> bool:
        """False when the loss stopped being finite."""
        import torch

        from shoal_optimizer.task import seeded

        for parameter in self.model.parameters():
            parameter.requires_grad_(True)
        if self.teacher is not None:
            self.teacher.eval()
        self._channels_last(torch.channels_last)
        try:
            with self._hinted():
                self._open(Length.of(len(self.data), self.plan.batch, self.plan.epochs, self.plan.steps))
                length = self._length()
                self.model.train()
                with seeded(self.plan.seed):
                    return self._steps(length)
        finally:
            self._channels_last(torch.contiguous_format)
            self.model.eval()

    def _hinted(self) -> Any:
        if self.teacher is None or not self.plan.hints:
            return nullcontext()
        from shoal_optimizer.task import seeded

        example = prepared(self.task, self.data.inputs[:2])
        with seeded(self.plan.seed):  # the adapters' first weights
            self.hints = Hints(self.model, self.teacher, example, self.plan.hint_layers)
        return self.hints

    def _open(self, length: Length) -> None:
        """Opens the data. Hints need the teacher to run on every batch."""
        plan = self.plan
        draws = 0 if self.hints is not None else length.steps * plan.batch
        self._feed = Feed(self.task, self.data, self.augment, self.teacher, draws)
        self._more, self._extra = None, 0
        if self.unlabelled is not None and self.teacher is not None and plan.alpha > 0:
            self._extra = min(round(plan.unlabelled * plan.batch), len(self.unlabelled))
            if self._extra:
                wanted = TaskData(self.unlabelled, np.zeros(len(self.unlabelled), np.int64))
                draws = 0 if self.hints is not None else length.steps * self._extra
                self._more = Feed(self.task, wanted, self.augment, self.teacher, draws)

    def _length(self) -> Length:
        plan = self.plan
        length = Length.of(len(self.data), plan.batch, plan.epochs, plan.steps)
        if self.ends is None:
            return length
        self.step_seconds = self._probe(length)
        fitting = length.within(self.ends - self.clock(), self.step_seconds)
        if fitting != length:
            planned = (
                f"{length.epochs} epochs" if fitting.steps % length.batches == 0 else f"{length.steps} steps"
            )
            done = fitting.epochs if fitting.steps % length.batches == 0 else fitting.steps
            self.tell(f"the time that is left allows {done} of {planned} of training")
        return fitting

    def _channels_last(self, layout: Any) -> None:
        """Convolutions of batches train up to twice as fast on CPUs with channels last."""
        from torch import nn

        for layer in self.model.modules():
            if isinstance(layer, nn.Conv2d):
                layer.to(memory_format=layout)  # type: ignore[call-overload]

    def _optimizer(self) -> Any:
        import torch

        adapters = [] if self.hints is None else list(self.hints.adapters.parameters())
        return torch.optim.AdamW(
            [*self.model.parameters(), *adapters],
            lr=self.plan.learning_rate,
            weight_decay=self.plan.weight_decay,
        )

    def _probe(self, length: Length) -> float:
        """Seconds of one step. Leaves model and random numbers as they were."""
        from shoal_optimizer.task import seeded

        start = copy.deepcopy(self.model.state_dict())
        self.model.train()
        optimizer = self._optimizer()
        order = np.arange(len(self.data))
        self._lots = Lots(0 if self.unlabelled is None else len(self.unlabelled), self.plan.seed)
        begun, timed = self.clock(), 0
        with seeded(self.plan.seed):
            for index in range(sum(PROBE)):
                if index == PROBE[0]:
                    begun = self.clock()
                self.checkpoint()
                self._step(self._batch(order, index % length.batches), optimizer)
                timed = max(1, index + 1 - PROBE[0])
        seconds = (self.clock() - begun) / timed
        self.model.load_state_dict(start)
        return seconds

    def _batch(self, order: np.ndarray, index: int) -> np.ndarray:
        return order[index * self.plan.batch : (index + 1) * self.plan.batch]

    def _steps(self, length: Length) -> bool:
        plan = self.plan
        optimizer = self._optimizer()
        random = np.random.default_rng(plan.seed)
        self._lots = Lots(0 if self.unlabelled is None else len(self.unlabelled), plan.seed + 1)
        share, left, begun = 0.0, length.steps, self.clock()
        for epoch in range(length.epochs):
            order = random.permutation(len(self.data))
            total, count = 0.0, min(length.batches, left)
            for index in range(count):
                self.checkpoint()
                _set(optimizer, plan.learning_rate, share)
                loss = self._step(self._batch(order, index), optimizer)
                if not math.isfinite(loss):
                    return False
                total += loss
                # Equal parts of what is left: the schedule ends with the last step also when that moves.
                share = 1.0 if left == 1 else share + (1 - share) / left
                left -= 1
                self.after_step(share)
                done = length.steps - left
                if self.ends is not None and left and done % LOOK == 0:
                    now = self.clock()
                    fitting = steps_left(left, now, self.ends, (now - begun) / done)
                    if fitting < left:
                        self.tell(f"training was slower than measured, {left - fitting} steps are left out")
                        left = fitting
                        length = replace(length, steps=done + left)
                if not left:
                    break
            self.progress(share, f"epoch {epoch + 1} of {length.epochs}, loss {total / max(count, 1):.3f}")
            if not left:
                break
        return True

    def _step(self, chosen: np.ndarray, optimizer: Any) -> float:
        import torch

        inputs, wanted = self._feed(chosen)
        targets = torch.from_numpy(np.ascontiguousarray(self.data.targets[chosen]))
        if self._more is not None:
            more, said = self._more(self._lots.draw(self._extra))
            inputs, wanted = torch.cat([inputs, more]), torch.cat([wanted, said])  # type: ignore[list-item]
            if self.hints is not None and self.teacher is not None:
                with torch.no_grad():
                    self.teacher(inputs)  # the hints listen to the whole batch
        outputs = self.model(inputs)
        loss = self._loss(outputs, targets, wanted)
        value = float(loss.detach())
        if not math.isfinite(value):
            return value
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 5.0)
        if not bool(torch.isfinite(norm)):
            return math.nan  # the loss is a number, its gradient is none
        optimizer.step()
        return value

    def _loss(self, outputs: Tensor, targets: Tensor, wanted: Tensor | None) -> Tensor:
        """(1 - alpha) * the task's loss of the labelled + alpha * distance from the teacher + hints."""
        plan, task = self.plan, self.task
        teaches = wanted is not None and plan.alpha > 0
        loss: Any = 0.0
        if not teaches or plan.alpha < 1:
            labelled = outputs[: len(targets)]
            loss = task.guard("loss()", lambda: task.loss(labelled, targets))
        if teaches and wanted is not None:
            if task.output_kind == "boxes":
                matched = match_boxes(task.post(outputs), task.post(wanted))
            else:
                matched = match_teacher(outputs, wanted, task.output_kind, plan.temperature)
            loss = (1 - plan.alpha) * loss + plan.alpha * matched
        if self.hints is not None:
            loss = loss + plan.hints * self.hints.loss()
        return loss  # type: ignore[no-any-return]


def _set(optimizer: Any, peak: float, share: float) -> None:
    rate, momentum = one_cycle(share)
    for group in optimizer.param_groups:
        group["lr"] = peak * rate
        group["betas"] = (momentum, group["betas"][1])
