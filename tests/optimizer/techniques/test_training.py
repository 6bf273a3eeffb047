"""Training within a given time, with little memory, with cached answers, hints and unlabelled items."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from shoal_optimizer.evaluation import evaluate_model
from shoal_optimizer.recipe import Recipe, Step, apply
from shoal_optimizer.task import Task, load_task
from shoal_optimizer.techniques import feed
from shoal_optimizer.techniques.hints import Hints, parse
from shoal_optimizer.techniques.losses import match_teacher
from shoal_optimizer.techniques.pace import Length, one_cycle, steps_left
from shoal_optimizer.techniques.training import TrainingPlan, out_of_memory, train
from shoal_protos.errors import InvalidInput, Overloaded, Unsupported
from tests.optimizer.techniques.networks import NETWORKS
from tests.optimizer.tones import Tones

PLAN = TrainingPlan(epochs=3, learning_rate=3e-3, alpha=0.5)


class Clock:
    """Every look at it takes `step` seconds."""

    def __init__(self, step: float) -> None:
        self.now, self.step = 0.0, step

    def __call__(self) -> float:
        return self.now


def fresh(task: Task) -> nn.Module:
    return copy.deepcopy(task.original)


def equal(one: nn.Module, two: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def like(task: Task, **changed: Any) -> Task:
    """The same task with some methods replaced."""
    made: Task = type("Like", (type(task),), changed)()
    made.__dict__.update({k: v for k, v in task.__dict__.items() if k != "_teacher_answers"})
    return made


# ---------------------------------------------------------------------------- time


class TestTime:
    def run(
        self, task: Task, seconds: float | None, a_step: float, **more: Any
    ) -> tuple[nn.Module, list[str]]:
        """Trains on a clock on which each step takes `a_step` seconds."""
        clock, model = Clock(a_step), fresh(task)
        notes: list[str] = []

        def tick() -> None:
            clock.now += clock.step

        train(
            model, task, task.required("training"), replace(PLAN, **more), seconds=seconds, clock=clock,
            checkpoint=tick, note=notes.append,
        )  # fmt: skip
        self.spent = clock.now
        return model, notes

    def test_enough_time_changes_nothing(self, quadrants: Task) -> None:
        free, _ = self.run(quadrants, None, 1.0)
        timed, notes = self.run(quadrants, 1000.0, 1.0)
        assert equal(free, timed) and not notes

    def test_a_shortened_training_is_that_of_a_recipe_with_fewer_epochs(self, quadrants: Task) -> None:
        """4 steps an epoch; 6 are spent to measure: 8 of the planned 12 fit into 15 seconds."""
        timed, notes = self.run(quadrants, 15.5, 1.0)
        two, _ = self.run(quadrants, None, 1.0, epochs=2)
        assert equal(timed, two)
        assert notes == ["the time that is left allows 2 of 3 epochs of training"]

    def test_less_than_an_epoch_still_runs_through_the_schedule(self, quadrants: Task) -> None:
        timed, notes = self.run(quadrants, 9.0, 1.0)
        two, _ = self.run(quadrants, None, 1.0, steps=2)
        assert equal(timed, two)
        assert notes == ["the time that is left allows 2 of 12 steps of training"]

    def test_a_machine_that_gets_slower_ends_in_time_too(self, quadrants: Task) -> None:
        clock = Clock(1.0)
        notes: list[str] = []
        shares: list[float] = []

        def tick() -> None:
            clock.now += clock.step
            if clock.now > 20:
                clock.step = 3.0

        train(
            fresh(quadrants), quadrants, quadrants.required("training"), replace(PLAN, epochs=25),
            seconds=120.0, clock=clock, checkpoint=tick, note=notes.append, after_step=shares.append,
        )  # fmt: skip
        assert clock.now <= 130  # not 230: the mean of all steps lags behind a little
        assert shares[-1] == 1.0 and shares == sorted(shares)
        assert any("slower than measured" in note for note in notes)

    def test_a_recipe_shares_its_time_among_its_steps(self, quadrants: Task) -> None:
        steps = (
            Step("channel_pruning", {"ratio": 0.5, "rounds": 2}),
            Step("distillation", {"epochs": 400}),
        )
        done = apply(Recipe(steps), quadrants, seconds=3.0)
        assert done.seconds < 30  # 400 epochs take more; generous for a busy machine
        assert any("epochs of training" in note or "steps" in note for note in done.notes)


@settings(max_examples=100, deadline=None)
@given(
    items=st.integers(1, 5000), batch=st.integers(1, 300), epochs=st.integers(1, 50),
    most=st.integers(0, 3000), seconds=st.floats(0, 500), step=st.floats(1e-4, 10),
)  # fmt: skip
def test_lengths_fit_and_stay_whole(
    items: int, batch: int, epochs: int, most: int, seconds: float, step: float
) -> None:
    length = Length.of(items, batch, epochs, most)
    assert 1 <= length.steps <= length.epochs * length.batches
    assert length.epochs * length.batches - length.steps < length.batches
    short = length.within(seconds, step)
    assert 1 <= short.steps <= length.steps
    assert short.steps == 1 or short.steps * step <= seconds
    assert short == length or short.steps % short.batches == 0 or short.epochs == 1
    assert 1 <= steps_left(length.steps, 0.0, seconds, step) <= length.steps


def test_the_cycle_rises_falls_and_is_that_of_torch() -> None:
    layer = nn.Linear(1, 1)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1.0, total_steps=1001)
    for step in range(1000):
        rate, momentum = one_cycle(step / 1000)
        assert rate == pytest.approx(optimizer.param_groups[0]["lr"], abs=0.02)
        assert momentum == pytest.approx(optimizer.param_groups[0]["betas"][0], abs=0.02)
        optimizer.step()
        schedule.step()


# ---------------------------------------------------------------------------- memory and NaN


def hungry(task: Task, least: int, raised: Callable[[], Exception]) -> Task:
    """Its loss finds no memory for batches of `least` items or more."""

    def loss(self: Task, outputs: Tensor, targets: Tensor) -> Tensor:
        if len(outputs) >= least:
            raise raised()
        return Task.loss(self, outputs, targets)

    return like(task, loss=loss)


@pytest.mark.parametrize(
    "raised", [MemoryError, lambda: RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes")]
)
def test_too_little_memory_halves_the_batch_once_and_says_so(
    quadrants: Task, raised: Callable[[], Exception]
) -> None:
    notes: list[str] = []
    model = fresh(quadrants)
    train(model, hungry(quadrants, 40, raised), quadrants.required("training"), PLAN, note=notes.append)
    assert notes == ["memory does not suffice for 64 items a step, trying 32"]
    half = train(fresh(quadrants), quadrants, quadrants.required("training"), replace(PLAN, batch=32))
    assert equal(model, half)
    with pytest.raises(Overloaded, match="32 items") as caught:
        train(fresh(quadrants), hungry(quadrants, 20, raised), quadrants.required("training"), PLAN)
    assert "batch" in caught.value.remedy


def test_other_errors_are_no_lack_of_memory() -> None:
    assert not out_of_memory(RuntimeError("shapes cannot be multiplied"))
    chained = InvalidInput("loss() raised MemoryError")
    chained.__cause__ = MemoryError()
    assert out_of_memory(chained)


def test_a_divergence_is_noted_for_the_report(quadrants: Task) -> None:
    calls = iter([math.nan])

    def loss(self: Task, outputs: Tensor, targets: Tensor) -> Tensor:
        return Task.loss(self, outputs, targets) * next(calls, 1.0)

    done = apply(
        Recipe((Step("distillation", {"epochs": 1, "learning_rate": 1e-2}),)), like(quadrants, loss=loss)
    )
    assert done.notes == ("distillation: the loss diverged at learning rate 0.01, trying a tenth",)


def test_a_gradient_that_is_no_number_is_a_divergence_too(quadrants: Task) -> None:
    """The square root of zero is zero, its slope is not."""
    calls = iter([0.0])

    def loss(self: Task, outputs: Tensor, targets: Tensor) -> Tensor:
        return Task.loss(self, outputs, targets) + torch.sqrt(outputs.sum() * next(calls, 1.0) ** 2 * 0)

    notes: list[str] = []
    with pytest.raises(InvalidInput, match="diverged"):
        train(fresh(quadrants), like(quadrants, loss=loss), quadrants.required("training"), PLAN,
              note=notes.append)  # fmt: skip
    assert "trying a tenth" in notes[0]


# ---------------------------------------------------------------------------- answers


class Counting(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.items = inner, 0

    def forward(self, inputs: Tensor) -> Tensor:
        self.items += len(inputs)
        out: Tensor = self.inner(inputs)
        return out


def taught(task: Task, teacher: nn.Module, **more: Any) -> nn.Module:
    return train(
        fresh(task), task, task.required("training"), replace(PLAN, **more), teacher=teacher
    )  # fmt: skip


def test_the_teacher_answers_once_per_item(quadrants: Task, tmp_path: Path) -> None:
    task, items = like(quadrants), len(quadrants.required("training"))
    task.cache_dir = tmp_path
    teacher = Counting(quadrants.original)
    one = taught(task, teacher)
    assert teacher.items == items
    two = taught(task, teacher)  # from memory
    other = like(quadrants)
    other.cache_dir = tmp_path
    three = taught(other, teacher)  # from the file
    assert teacher.items == items and equal(one, two) and equal(one, three)
    (path,) = tmp_path.iterdir()
    path.write_bytes(b"damaged")
    again = like(quadrants)
    again.cache_dir = tmp_path
    assert equal(taught(again, teacher), one) and teacher.items == 2 * items


def test_another_teacher_or_other_data_are_asked_anew(quadrants: Task, tmp_path: Path) -> None:
    task = like(quadrants)
    task.cache_dir = tmp_path
    taught(task, quadrants.original)
    changed = fresh(quadrants)
    next(changed.parameters()).data.mul_(1.1)
    taught(task, changed)
    few = quadrants.required("training").take(slice(0, 128))
    train(fresh(task), task, few, PLAN, teacher=changed)
    assert len(list(tmp_path.iterdir())) == 3


def test_a_task_that_augments_is_asked_every_time(quadrants: Task, tmp_path: Path) -> None:
    def augment(self: Task, inputs: Tensor) -> Tensor:
        return inputs + torch.rand_like(inputs)

    task = like(quadrants, augment=augment)
    task.cache_dir = tmp_path
    teacher = Counting(quadrants.original)
    taught(task, teacher)
    assert teacher.items == PLAN.epochs * len(quadrants.required("training"))
    assert not list(tmp_path.iterdir())


def test_few_steps_compute_nothing_ahead(quadrants: Task) -> None:
    teacher = Counting(quadrants.original)
    taught(like(quadrants), teacher, steps=2)
    assert teacher.items == 2 * PLAN.batch


def test_cached_answers_are_those_of_the_teacher(quadrants: Task) -> None:
    data = quadrants.required("training")
    found = feed.answers(like(quadrants), quadrants.original, data)
    assert found is not None
    with torch.no_grad():
        direct = quadrants.original(quadrants.pre(torch.from_numpy(data.inputs).float()))
    assert torch.allclose(found, direct, atol=1e-5)


def test_answers_of_values_and_boxes_are_kept_too(tmp_path: Path) -> None:
    from tests.optimizer.blobs import Blobs

    for task in (Tones(), Blobs()):
        task.cache_dir = tmp_path / type(task).__name__
        teacher = Counting(task.original)
        before = evaluate_model(task, task.original).value
        plan = TrainingPlan(epochs=2, learning_rate=1e-3, alpha=0.7)
        model = train(fresh(task), task, task.required("training"), plan, teacher=teacher)
        assert teacher.items == len(task.required("training"))
        assert evaluate_model(task, model).value > before - 0.1


# ---------------------------------------------------------------------------- layout


@pytest.mark.parametrize("name", list(NETWORKS))
def test_equal_seeds_give_equal_networks_in_any_layout(quadrants: Task, name: str) -> None:
    torch.manual_seed(0)
    start = NETWORKS[name]()
    plan = replace(PLAN, epochs=1)
    one, two = (
        train(copy.deepcopy(start), quadrants, quadrants.required("training"), plan) for _ in range(2)
    )
    assert equal(one, two)
    assert all(p.is_contiguous() for p in one.parameters())


# ---------------------------------------------------------------------------- unlabelled items


def with_more(quadrants: Task, more: Any) -> Task:
    task = like(quadrants, unlabelled=lambda self: more)
    task.__dict__["_splits"] = {k: v for k, v in quadrants._splits.items() if k != "unlabelled"}
    return task


def test_unlabelled_items_come_as_an_array_or_one_by_one(quadrants: Task) -> None:
    inputs = quadrants.required("training").inputs
    for more in (inputs, iter(inputs), torch.from_numpy(inputs)):
        found = with_more(quadrants, more).data("unlabelled")
        assert found is not None and np.array_equal(found.inputs, inputs)
    assert quadrants.data("unlabelled") is None
    with pytest.raises(InvalidInput, match=r"unlabelled\(\)"):
        with_more(quadrants, np.zeros((3, 9, 9, 1), np.uint8)).data("unlabelled")


def test_unlabelled_items_are_stored_and_read_back(quadrants: Task, tmp_path: Path) -> None:
    more = quadrants.required("training").inputs[:7]
    task = with_more(quadrants, more)
    task.save_data(tmp_path / "data.npz")
    again = load_task(Path(__file__).parent.parent / "quadrants.py", data=tmp_path / "data.npz")
    found = again.data("unlabelled")
    assert found is not None and np.array_equal(found.inputs, more)
    assert again.data_digest != quadrants.data_digest


def test_unlabelled_items_bring_a_student_nearer_to_its_teacher(quadrants: Task) -> None:
    """A fresh student with 6 labelled pictures, and with 250 more that the teacher answers."""
    data, judged = quadrants.required("training"), quadrants.required("evaluation").inputs
    few, more = data.take(slice(0, 6)), data.inputs[6:]
    step = Step(
        "distillation",
        {"epochs": 40, "student": "fresh", "width": 1.0, "batch": 6, "alpha": 0.7, "unlabelled": 4.0},
    )
    wanted = torch.from_numpy(quadrants.predict(quadrants.original, judged))
    away = [0.0, 0.0]
    for seed in range(3):
        for number, task in enumerate((with_more(quadrants, None), with_more(quadrants, more))):
            model = apply(Recipe((step,)), task, training=few, seed=seed).model
            assert model is not None
            outputs = torch.from_numpy(quadrants.predict(model, judged))
            away[number] += float(match_teacher(outputs, wanted, "logits", 1.0))
    assert away[1] < 0.7 * away[0]


def test_without_any_labels_the_teacher_alone_is_learned(quadrants: Task) -> None:
    task = with_more(like(quadrants, training=lambda self: None), quadrants.required("training").inputs)
    task._splits.pop("training")
    step = Step("distillation", {"epochs": 8, "student": "fresh", "width": 1.0})
    done = apply(Recipe((step,)), task)
    assert any("nothing is labelled" in note for note in done.notes)
    assert evaluate_model(task, done.model).value > 0.6


# ---------------------------------------------------------------------------- hints


def test_hints_pull_inner_outputs_towards_the_teacher(quadrants: Task) -> None:
    def distance(model: nn.Module) -> float:
        data = quadrants.required("evaluation")
        inputs = quadrants.pre(torch.from_numpy(data.inputs))
        with torch.no_grad():
            mine, theirs = model[:5](inputs), quadrants.original[:5](inputs)  # type: ignore[index]
        return float((mine - theirs).square().mean() / theirs.square().mean())

    data = quadrants.required("training")
    start = quadrants.network()  # type: ignore[attr-defined]
    far = []
    for weight in (0.0, 5.0):
        plan = TrainingPlan(epochs=6, alpha=0.5, hints=weight, hint_layers=(("4", "4"),))
        model = train(copy.deepcopy(start), quadrants, data, plan, teacher=quadrants.original)
        far.append(distance(model))
    assert far[1] < far[0]


def test_adapters_and_hooks_are_gone_afterwards(quadrants: Task) -> None:
    teacher, model = fresh(quadrants), fresh(quadrants)
    names = list(model.state_dict())
    train(
        model, quadrants, quadrants.required("training"), replace(PLAN, hints=1.0, epochs=1), teacher=teacher
    )
    assert list(model.state_dict()) == names
    assert not any(part._forward_hooks for net in (teacher, model) for part in net.modules())


def test_pruned_students_get_hints_of_layers_of_equal_name(quadrants: Task) -> None:
    steps = (
        Step("channel_pruning", {"ratio": 0.5}),
        Step("distillation", {"epochs": 4, "hints": 1.0, "hint_layers": "0,4=4"}),
    )
    done = apply(Recipe(steps), quadrants)
    assert evaluate_model(quadrants, done.model).value > 0.8


@pytest.mark.parametrize("name", list(NETWORKS))
def test_pairs_are_found_in_every_kind_of_network(quadrants: Task, name: str) -> None:
    torch.manual_seed(0)
    network = NETWORKS[name]().eval()
    smaller = apply(Recipe((Step("channel_pruning"),)), quadrants, teacher=network).model
    assert smaller is not None
    example = feed.prepared(quadrants, quadrants.required("training").inputs[:4])
    with Hints(smaller, network, example) as hints:
        smaller(example), network(example)
        assert len(hints.pairs) == 3 and bool(torch.isfinite(hints.loss()))
        assert len({one for one, _ in hints.pairs}) == 3


def test_hints_of_series_compare_channels() -> None:
    task = Tones()
    steps = (Step("channel_pruning"), Step("distillation", {"epochs": 1, "hints": 1.0}))
    smaller = apply(Recipe(steps), task).model
    assert smaller is not None
    example = feed.prepared(task, task.required("training").inputs[:4])
    with Hints(smaller, task.original, example) as hints:
        assert ("1", "1") in hints.pairs  # the convolution [n, 8 or 16, 28]
        assert isinstance(hints.adapters[0], nn.Conv1d)


def test_hints_between_strangers_are_refused_with_a_remedy(quadrants: Task) -> None:
    example = feed.prepared(quadrants, quadrants.required("training").inputs[:2])
    stranger = nn.ModuleDict({"body": nn.Flatten(1), "end": nn.Linear(64, 4)})
    stranger.forward = lambda inputs: stranger["end"](stranger["body"](inputs))  # type: ignore[method-assign,assignment]
    with pytest.raises(Unsupported, match="no layers of equal name") as caught:
        Hints(stranger, quadrants.original, example)
    assert "hint_layers" in caught.value.remedy
    with pytest.raises(InvalidInput, match="no layer 'nothing'"):
        Hints(fresh(quadrants), quadrants.original, example, (("nothing", "0"),))
    assert parse("a.b,c=d.e") == (("a.b", "a.b"), ("c", "d.e")) and parse("") == ()


# ---------------------------------------------------------------------------- students


@pytest.mark.parametrize("name", list(NETWORKS))
def test_a_fresh_student_is_narrower_and_knows_nothing(quadrants: Task, name: str) -> None:
    from shoal_optimizer.techniques.students import scaled

    torch.manual_seed(0)
    model = NETWORKS[name]().eval()
    inherited = scaled(model, quadrants, 0.5, inherit=True, seed=1)
    student, again = (scaled(model, quadrants, 0.5, inherit=False, seed=1) for _ in range(2))
    shapes = [[tuple(p.shape) for p in net.parameters()] for net in (inherited, student)]
    assert shapes[0] == shapes[1]
    assert equal(student, again) and not equal(student, inherited)
    assert sum(p.numel() for p in student.parameters()) < sum(p.numel() for p in model.parameters())
    for mine, other in zip(student.parameters(), inherited.parameters(), strict=True):
        assert mine.dim() < 2 or not torch.equal(mine, other)


def test_a_student_learns_from_the_teacher(quadrants: Task) -> None:
    scores = {}
    for start in ("fresh", "inherited"):
        step = Step("distillation", {"epochs": 12, "student": start, "width": 0.5})
        done = apply(Recipe((step,)), quadrants)
        assert any(f"a student with {start} weights" in note for note in done.notes)
        scores[start] = evaluate_model(quadrants, done.model).value
    assert min(scores.values()) > 0.85
