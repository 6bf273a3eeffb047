"""Fine-tuning with a teacher: what makes a pruned model right again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from shoal_optimizer.techniques.base import Parameter, Technique, Work
from shoal_optimizer.techniques.losses import match_boxes, match_teacher
from shoal_optimizer.techniques.training import TrainingPlan, train

__all__ = ["Distillation", "TrainingPlan", "match_boxes", "match_teacher", "train"]


class Distillation(Technique):
    """Fine-tunes the model on the training data towards the teacher's outputs and the targets."""

    name: ClassVar[str] = "distillation"
    parameters: ClassVar[Mapping[str, Parameter]] = {
        "epochs": Parameter(20, 1, 1000, help="passes over the training data"),
        "learning_rate": Parameter(5e-3, 1e-6, 1.0, help="peak of the one-cycle schedule"),
        "batch": Parameter(64, 1, 4096, help="items per step"),
        "alpha": Parameter(0.9, 0.0, 1.0, help="weight of the teacher"),
        "temperature": Parameter(4.0, 0.5, 20.0, help="softens the teacher's answers; logits only"),
        "steps": Parameter(0, 0, 10_000_000, help="at most so many optimizer steps; 0 = all of the epochs"),
    }

    def transform(self, work: Work, params: Mapping[str, Any]) -> Work:
        notes: list[str] = []
        model = train(
            work.module(),
            work.task,
            work.training_data(),
            TrainingPlan(seed=work.seed, **params),
            teacher=work.teacher,
            augment=work.augment,
            progress=lambda share, message: work.progress(self.name, share, message),
            checkpoint=work.checkpoint,
            note=notes.append,
            seconds=work.seconds_left(),
        )
        for text in notes:
            work = work.note(f"{self.name}: {text}")
        return replace(work, model=model)
