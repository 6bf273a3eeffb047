from __future__ import annotations

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from shoal_optimizer.evaluation import evaluate_model
from shoal_optimizer.recipe import Recipe, Step, apply
from shoal_optimizer.task import Task
from shoal_optimizer.techniques.distillation import TrainingPlan, match_teacher, train
from shoal_protos.errors import InvalidInput


def test_soft_targets_follow_the_paper() -> None:
    random = np.random.default_rng(0)
    student, teacher, temperature = random.normal(size=(5, 7)), random.normal(size=(5, 7)), 3.0

    def soft(logits: np.ndarray) -> np.ndarray:
        powers = np.exp(logits / temperature)
        return np.asarray(powers / powers.sum(axis=1, keepdims=True))

    divergence = (soft(teacher) * np.log(soft(teacher) / soft(student))).sum(axis=1).mean()
    got = match_teacher(torch.from_numpy(student), torch.from_numpy(teacher), "logits", temperature)
    assert float(got) == pytest.approx(temperature**2 * divergence)


def test_gradients_keep_their_size_when_the_temperature_rises() -> None:
    teacher = torch.tensor([[4.0, 0.0, -4.0]])
    sizes = []
    for temperature in (5.0, 20.0):
        student = torch.zeros(1, 3, requires_grad=True)
        match_teacher(student, teacher, "logits", temperature).backward()  # type: ignore[no-untyped-call]
        assert student.grad is not None
        sizes.append(float(student.grad.norm()))
    assert sizes[1] == pytest.approx(sizes[0], rel=0.1)


def test_values_are_matched_by_squares() -> None:
    assert float(match_teacher(torch.tensor([1.0, 3.0]), torch.tensor([1.0, 1.0]), "values", 9.0)) == 2.0


def test_pruning_ruins_and_distilling_repairs(quadrants: Task) -> None:
    pruned = Step("channel_pruning", {"ratio": 0.5})
    ruined = evaluate_model(quadrants, apply(Recipe((pruned,)), quadrants).model)
    repaired = evaluate_model(
        quadrants, apply(Recipe((pruned, Step("distillation", {"epochs": 6}))), quadrants).model
    )
    original = evaluate_model(quadrants, quadrants.original)
    assert repaired.value > ruined.value
    assert repaired.value >= original.value - 0.02


def test_other_data_augmentation_and_teacher_are_used(quadrants: Task) -> None:
    seen: list[int] = []

    def augment(inputs: Tensor) -> Tensor:
        seen.append(len(inputs))
        assert inputs.dtype == torch.float32
        return inputs

    few = quadrants.required("training").take(slice(0, 33))
    apply(
        Recipe((Step("distillation", {"epochs": 1, "batch": 16}),)), quadrants, training=few, augment=augment
    )
    assert seen == [16, 16]  # a last batch of one item is dropped: batch norm cannot learn from it


class _Explodes(Task):
    """Loss that is not finite for the first `bad` steps."""

    bad = 1

    def __init__(self, like: Task) -> None:
        self.__dict__.update(like.__dict__)
        self.calls = 0

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        self.calls += 1
        value = super().loss(outputs, targets)
        return value * math.nan if self.calls <= self.bad else value


def _exploding(quadrants: Task, bad: int) -> _Explodes:
    task = type("Explodes", (_Explodes, type(quadrants)), {"bad": bad})(quadrants)
    assert isinstance(task, _Explodes)
    return task


def test_a_loss_that_explodes_once_is_tried_again_with_a_tenth_of_the_rate(quadrants: Task) -> None:
    said: list[str] = []
    model = copy.deepcopy(quadrants.original)
    plan = TrainingPlan(epochs=1, alpha=0.0)
    train(model, _exploding(quadrants, 1), quadrants.required("training"), plan,
          progress=lambda share, message: said.append(message))  # fmt: skip
    assert any("trying a tenth" in message for message in said)
    fresh = train(copy.deepcopy(quadrants.original), quadrants, quadrants.required("training"),
                  replace(plan, learning_rate=plan.learning_rate / 10))  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), fresh.parameters(), strict=True))


def test_a_loss_that_explodes_again_fails_clearly_and_restores_the_weights(quadrants: Task) -> None:
    model = copy.deepcopy(quadrants.original)
    with pytest.raises(InvalidInput, match="diverged") as caught:
        train(model, _exploding(quadrants, 99), quadrants.required("training"), TrainingPlan(epochs=1))
    assert "loss()" in caught.value.remedy
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), quadrants.original.parameters(), strict=True)
    )
