"""Fine-tuning with a teacher: what makes a pruned model right again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np

from shoal_optimizer.data import TaskData
from shoal_optimizer.techniques.base import Parameter, Technique, Work
from shoal_optimizer.techniques.hints import parse
from shoal_optimizer.techniques.losses import match_boxes, match_teacher
from shoal_optimizer.techniques.students import scaled
from shoal_optimizer.techniques.training import TrainingPlan, fine_tune, train

__all__ = ["Distillation", "TrainingPlan", "match_boxes", "match_teacher", "train"]


class Distillation(Technique):
    """Trains the model on `(1 - alpha) * loss + alpha * T^2 * KL(teacher || student)`, see `match_teacher`.

    The student is the network as it came (pruned, say), or a narrower one of its own structure with fresh
    or inherited weights. Unlabelled items of the task are answered by the teacher.
    """

    name: ClassVar[str] = "distillation"
    parameters: ClassVar[Mapping[str, Parameter]] = {
        "epochs": Parameter(20, 1, 1000, help="passes over the training data"),
        "learning_rate": Parameter(5e-3, 1e-6, 1.0, help="peak of the one-cycle schedule"),
        "batch": Parameter(64, 1, 4096, help="items per step"),
        "alpha": Parameter(0.9, 0.0, 1.0, help="weight of the teacher"),
        "temperature": Parameter(4.0, 0.5, 20.0, help="softens the teacher's answers; logits only"),
        "steps": Parameter(0, 0, 10_000_000, help="at most so many optimizer steps; 0 = all of the epochs"),
        "student": Parameter(
            "given",
            choices=("given", "fresh", "inherited"),
            help="given = the network as it is; fresh, inherited = a narrower one of its own structure",
        ),
        "width": Parameter(0.5, 0.05, 1.0, help="share of channels of a fresh or inherited student"),
        "hints": Parameter(0.0, 0.0, 100.0, help="weight of inner outputs; 0 = none"),
        "hint_layers": Parameter(
            "",
            pattern=r"([A-Za-z_][\w.]*(=[A-Za-z_][\w.]*)?|\d[\w.]*(=\d[\w.]*)?)(,[\w.]+(=[\w.]+)?)*|",
            help="student=teacher,...: pairs of layers for hints; empty = chosen",
        ),
        "unlabelled": Parameter(1.0, 0.0, 16.0, help="items without labels beside each labelled one"),
    }

    def transform(self, work: Work, params: Mapping[str, Any]) -> Work:
        plan = {k: v for k, v in params.items() if k not in ("student", "width", "hint_layers")}
        model = work.module()
        if params["student"] != "given":
            before = sum(p.numel() for p in model.parameters())
            inherit = params["student"] == "inherited"
            model = scaled(model, work.task, params["width"], inherit=inherit, seed=work.seed)
            after = sum(p.numel() for p in model.parameters())
            work = work.note(f"{self.name}: a student with {params['student']} weights, {before} -> {after}")
        data, more = work.training, unlabelled(work)
        if data is None and more is not None and work.teacher is not None:
            data, more, plan["alpha"] = TaskData(more, np.zeros(len(more), np.int64)), None, 1.0
            work = work.note(f"{self.name}: nothing is labelled, the teacher's answers alone are learned")
        notes: list[str] = []
        model = fine_tune(
            work,
            model,
            TrainingPlan(seed=work.seed, hint_layers=parse(params["hint_layers"]), **plan),
            lambda share, message: work.progress(self.name, share, message),
            data=data,
            note=notes.append,
            seconds=work.seconds_left(),
            unlabelled=more,
        )
        for text in notes:
            work = work.note(f"{self.name}: {text}")
        return replace(work, model=model)


def unlabelled(work: Work) -> np.ndarray | None:
    """Endpoint inputs that the task has no targets for."""
    found = work.task.data("unlabelled")
    return None if found is None else found.inputs
