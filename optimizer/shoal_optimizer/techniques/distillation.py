"""Fine-tuning with a teacher: what makes a pruned model right again."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from shoal_optimizer.techniques import masks
from shoal_optimizer.techniques.base import Parameter, Technique, Work
from shoal_protos.errors import InvalidInput

if TYPE_CHECKING:
    from torch import Tensor, nn

    from shoal_optimizer.data import TaskData
    from shoal_optimizer.task import Task


@dataclass(frozen=True)
class TrainingPlan:
    """How to train: AdamW with a one-cycle learning rate.

    `alpha` weighs the teacher, 1 - alpha the task's own loss; alpha 0 trains on targets alone.
    """

    epochs: int = 20
    learning_rate: float = 5e-3
    batch: int = 64
    alpha: float = 0.9
    temperature: float = 4.0
    weight_decay: float = 1e-4
    seed: int = 0


class Distillation(Technique):
    """Fine-tunes the model on the training data towards the teacher's outputs and the targets."""

    name: ClassVar[str] = "distillation"
    parameters: ClassVar[Mapping[str, Parameter]] = {
        "epochs": Parameter(20, 1, 1000, help="passes over the training data"),
        "learning_rate": Parameter(5e-3, 1e-6, 1.0, help="peak of the one-cycle schedule"),
        "batch": Parameter(64, 1, 4096, help="items per step"),
        "alpha": Parameter(0.9, 0.0, 1.0, help="weight of the teacher"),
        "temperature": Parameter(4.0, 0.5, 20.0, help="softens the teacher's answers; logits only"),
    }

    def transform(self, work: Work, params: Mapping[str, Any]) -> Work:
        model = train(
            work.module(),
            work.task,
            work.training_data(),
            TrainingPlan(seed=work.seed, **params),
            teacher=work.teacher,
            augment=work.augment,
            progress=lambda share, message: work.progress(self.name, share, message),
            checkpoint=work.checkpoint,
        )
        return replace(work, model=model)


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
) -> nn.Module:
    """Trains `model` in place and returns it in evaluation mode. Deterministic for equal seeds and threads.

    Weights that are zero on purpose (`masks.mark`) stay zero. `after_step` is called after each
    optimizer step with the share of steps done; it starts again after a divergence.

    For boxes the teacher is matched after postprocess(): how a head encodes boxes is the task's own.
    Teacher and student see the same augmented batch. If the loss stops being finite, it starts over
    once with a tenth of the learning rate.

    Raises:
        InvalidInput: the loss was not finite at the lower learning rate either.
        Cancelled: `checkpoint` said so.
    """
    start = copy.deepcopy(model.state_dict())
    for rate in (plan.learning_rate, plan.learning_rate / 10):
        slower = replace(plan, learning_rate=rate)
        steps = _both(after_step, masks.keeper(model))
        if _train_once(
            model, task, data, slower, teacher, augment or task.augment, progress, checkpoint, steps
        ):
            return model
        model.load_state_dict(start)
        progress(0.0, f"the loss diverged at learning rate {rate:g}, trying a tenth")
    raise InvalidInput(
        f"Training diverged at learning rates {plan.learning_rate:g} and {plan.learning_rate / 10:g}.",
        "Lower the learning rate, or look for NaN in the training data and in loss().",
    )


def _both(after_step: Callable[[float], None] | None, keep: Callable[[], None]) -> Callable[[float], None]:
    def call(share: float) -> None:
        keep()
        if after_step is not None:
            after_step(share)

    return call


def _train_once(
    model: nn.Module,
    task: Task,
    data: TaskData,
    plan: TrainingPlan,
    teacher: nn.Module | None,
    augment: Callable[[Tensor], Tensor],
    progress: Callable[[float, str], None],
    checkpoint: Callable[[], None],
    after_step: Callable[[float], None],
) -> bool:
    """False when the loss stopped being finite."""
    import torch

    from shoal_optimizer.task import seeded

    for parameter in model.parameters():
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=plan.learning_rate, weight_decay=plan.weight_decay)
    # A last batch of one item would give batch norm no variance, so it is dropped.
    batches = max(1, len(data) // plan.batch + (len(data) % plan.batch > 1))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=plan.learning_rate, total_steps=batches * plan.epochs + 1
    )
    random = np.random.default_rng(plan.seed)
    if teacher is not None:
        teacher.eval()
    model.train()
    try:
        with seeded(plan.seed):
            for epoch in range(plan.epochs):
                order = random.permutation(len(data))
                total = 0.0
                for index in range(batches):
                    checkpoint()
                    chosen = order[index * plan.batch : (index + 1) * plan.batch]
                    loss = _step(model, task, data, chosen, plan, teacher, augment, optimizer)
                    if not math.isfinite(loss):
                        return False
                    total += loss
                    schedule.step()
                    done = (epoch + (index + 1) / batches) / plan.epochs
                    after_step(done)
                progress(done, f"epoch {epoch + 1} of {plan.epochs}, loss {total / batches:.3f}")
    finally:
        model.eval()
    return True


def _step(
    model: nn.Module,
    task: Task,
    data: TaskData,
    chosen: np.ndarray,
    plan: TrainingPlan,
    teacher: nn.Module | None,
    augment: Callable[[Tensor], Tensor],
    optimizer: Any,
) -> float:
    import torch

    with torch.no_grad():
        raw = torch.from_numpy(np.ascontiguousarray(data.inputs[chosen])).to(torch.float32)
        inputs = task.pre(task.guard("augment()", lambda: augment(raw)))
        wanted = teacher(inputs) if teacher is not None and plan.alpha > 0 else None
    targets = torch.from_numpy(np.ascontiguousarray(data.targets[chosen]))
    outputs = model(inputs)
    loss = task.guard("loss()", lambda: task.loss(outputs, targets))
    if wanted is not None:
        if task.output_kind == "boxes":
            matched = match_boxes(task.post(outputs), task.post(wanted))
        else:
            matched = match_teacher(outputs, wanted, task.output_kind, plan.temperature)
        loss = (1 - plan.alpha) * loss + plan.alpha * matched
    value = float(loss.detach())
    if not math.isfinite(value):
        return value
    optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
    optimizer.step()
    return value


def match_teacher(outputs: Tensor, wanted: Tensor, kind: str, temperature: float) -> Tensor:
    """Distance from the teacher's outputs.

    For logits `T^2 * KL(softmax(teacher/T) || softmax(student/T))`, the soft-target term of Hinton,
    Vinyals and Dean, "Distilling the Knowledge in a Neural Network" (2015), section 2; the factor T^2
    keeps its gradients of the size of the hard targets'. The mean is over items, not over classes
    ("batchmean"): dividing by the classes too would make the term vanish. For values: mean squares.
    """
    from torch.nn import functional

    if kind != "logits":
        return functional.mse_loss(outputs, wanted)
    return temperature**2 * functional.kl_div(
        functional.log_softmax(outputs.flatten(0, -2) / temperature, dim=-1),
        functional.log_softmax(wanted.flatten(0, -2) / temperature, dim=-1),
        reduction="batchmean",
        log_target=True,
    )


def match_boxes(candidates: Tensor, wanted: Tensor) -> Tensor:
    """Distance of a detector's candidates [n, candidates, 4 + classes] from the teacher's.

    With scores s (student) and t (teacher), and C the sum of weights c = (max t)^2 over candidates:

        sum |t - s|^2 BCE(s, t) / C  +  sum c * smooth_l1((b_s - b_t) / size of b_t) / C

    The first term is the quality focal loss of Li et al., "Generalized Focal Loss" (2020), equation 2
    with beta 2, the teacher's score being the soft target: the many candidates on which both see
    nothing weigh nothing. In the second only boxes that the teacher believes in are worth imitating,
    as in Chen et al., "Learning Efficient Object Detection Models with Knowledge Distillation" (2017).
    Differences of corners are divided by the teacher's width and height: small objects count alike.
    """
    import torch
    from torch.nn import functional

    least = 1e-4  # keeps logarithms and divisions finite in float32
    scores, truth = candidates[..., 4:].clamp(least, 1 - least), wanted[..., 4:].clamp(0, 1)
    confidence = truth.amax(-1, keepdim=True) ** 2
    total = confidence.sum().clamp(min=1.0)
    entropy = functional.binary_cross_entropy(scores, truth, reduction="none")
    size = (wanted[..., 2:4] - wanted[..., :2]).clamp(min=least)
    away = (candidates[..., :4] - wanted[..., :4]) / torch.cat([size, size], -1)
    boxes = functional.smooth_l1_loss(away, torch.zeros_like(away), reduction="none", beta=0.1)
    return (((truth - scores) ** 2 * entropy).sum() + (confidence * boxes).sum()) / total
