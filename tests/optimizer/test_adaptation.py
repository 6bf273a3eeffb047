"""What is kept of an adaptation, what samples are read, and the recovery on real digits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from shoal_agent.telemetry.sketches import sketch
from shoal_optimizer import adaptation, evaluation, recipe
from shoal_optimizer.adaptation import Difference, Labelled, decide
from shoal_optimizer.corruptions import Corruption
from shoal_optimizer.matching import Matched
from shoal_optimizer.search import space
from shoal_optimizer.targets import ClassSpec
from shoal_optimizer.targets.base import Exported, find, load_exported, run_instance
from shoal_optimizer.task import Task, TaskData, load_task
from shoal_protos.errors import InvalidInput, Unsupported

DIGITS = Path(__file__).parents[2] / "examples" / "digits.py"
BETTER, SAME, WORSE = (Difference(v, v - 0.05, v + 0.05, 100) for v in (0.3, 0.0, -0.3))


@pytest.mark.parametrize(
    ("matched", "labels", "kept"),
    [
        (BETTER, None, True),
        (SAME, None, False),
        (WORSE, None, False),
        (BETTER, SAME, True),
        (BETTER, WORSE, False),
        (SAME, BETTER, True),
        (SAME, SAME, False),
        (BETTER, Difference(-0.3, -0.5, -0.1, 5), True),  # five labels decide nothing
    ],
)
def test_labels_outrank_matched_data(matched: Difference, labels: Difference | None, kept: bool) -> None:
    verdict = decide("accuracy", matched, labels)
    assert verdict.kept is kept
    assert verdict.sentence.startswith("Kept" if kept else "Not kept") and "95 %" in verdict.sentence


def write_samples(path: Path, task: Task, labels: np.ndarray) -> Path:
    inputs = task.required("evaluation").inputs[: len(labels)]
    np.savez(path, **{task.input.name: inputs, "label": labels, "predicted": labels})  # type: ignore[arg-type]
    return path


def test_samples_are_split_and_damaged_ones_left_out(quadrants: Task, tmp_path: Path) -> None:
    labels = np.arange(100) % 4
    labels[::4] = -1
    labels[1] = 99  # no such class
    good = write_samples(tmp_path / "good.npz", quadrants, labels)
    damaged = tmp_path / "damaged.npz"
    damaged.write_bytes(good.read_bytes()[:200])
    foreign = tmp_path / "foreign.npz"
    np.savez(foreign, other=np.zeros(3), label=np.zeros(3, np.int64))
    found = adaptation.read_samples([good, damaged, foreign, tmp_path / "missing.npz"], quadrants)
    assert found.count == 74
    assert found.training is not None and found.held_out is not None
    assert abs(len(found.training) - len(found.held_out)) <= 1


def test_few_labels_all_train(quadrants: Task, tmp_path: Path) -> None:
    found = adaptation.read_samples(
        [write_samples(tmp_path / "few.npz", quadrants, np.zeros(10, np.int64))], quadrants
    )
    assert found.held_out is None and found.count == 10
    training = quadrants.required("training")
    share = (len(adaptation.with_labels(training, found)) - len(training)) / len(training)
    assert share == pytest.approx(adaptation.LABEL_SHARE, abs=0.05)


def test_moving_data_keeps_targets_and_dtype(quadrants: Task) -> None:
    data = quadrants.required("evaluation")
    matched = Matched(
        (Corruption("image", {"noise": 0.2}), Corruption("image", {"offset": 0.2})), (0.1, 0.2), 1.0
    )
    moved = adaptation.moved(data, matched, quadrants.signature, seed=1)
    again = adaptation.moved(data, matched, quadrants.signature, seed=1)
    assert moved.inputs.dtype == data.inputs.dtype and moved.inputs.shape == data.inputs.shape
    assert np.array_equal(moved.targets, data.targets) and np.array_equal(moved.inputs, again.inputs)
    assert not np.array_equal(moved.inputs, data.inputs)


def test_augmentation_leaves_a_part_clean(quadrants: Task) -> None:
    matched = Matched((Corruption("image", {"offset": 0.3}),), (0.1,), 1.0)
    data = quadrants.required("training")
    augment = adaptation.MatchedAugment(matched, quadrants.signature, data.inputs, lambda batch: batch)
    batch = torch.from_numpy(data.inputs[:40]).float()
    changed = augment(batch)
    same = (changed == batch).flatten(1).all(dim=1).sum()
    assert int(same) == 40 - round(adaptation.CHANGED_SHARE * 40)


def test_a_task_without_training_data_cannot_be_adapted(quadrants_path: Path) -> None:
    task = load_task(quadrants_path)
    task.training = lambda: None  # type: ignore[method-assign]
    with pytest.raises(Unsupported, match="training"):
        adaptation.require_training(task)


def test_an_unreadable_field_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="telemetry"):
        adaptation.read_field(None)


# ---------------------------------------------------------------------------- on real digits


def corrupt(inputs: np.ndarray, seed: int) -> np.ndarray:
    """Contrast 0.7 around the middle and noise of sigma 1.5, of 16."""
    random = np.random.default_rng(seed)
    changed = (inputs.astype(np.float64) - 8) * 0.7 + 8 + random.normal(0, 1.5, inputs.shape)
    return np.clip(changed, 0, 16).round().astype(np.uint8)


def deployed(task: Task, model: torch.nn.Module, spec: ClassSpec, calibration: TaskData | None) -> Exported:
    """The pruned, distilled network as int8 for ONNX Runtime."""
    applied = recipe.apply(space.complete(space.PLAIN, "int8"), task, teacher=model, calibration=calibration)
    return find("onnxruntime").export(applied.model, task, "int8", applied.calibration, spec)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_it_regains_what_the_shift_cost(seed: int, local_class: ClassSpec, tmp_path: Path) -> None:
    task = load_task(DIGITS, seed=seed)
    task.cache_dir = tmp_path
    holdout = task.required("holdout")
    field = corrupt(holdout.inputs[:400], seed)
    clean = holdout.take(slice(400, None))
    changed = TaskData(corrupt(clean.inputs, 100 + seed), clean.targets)
    network = space.network({"ratio": 0.5, "teacher": True, "epochs": 10})
    first = recipe.apply(network, task, seed=seed)
    assert first.model is not None
    serving = deployed(task, first.model, local_class, None)
    before = evaluation.evaluate_exported(task, serving, clean).value
    during = evaluation.evaluate_exported(task, serving, changed).value

    with load_exported(serving) as instance:
        found = adaptation.adapt(
            task,
            sketch("image", field, 0, 16),  # all that the field tells
            Labelled(None, None),
            lambda inputs: run_instance(instance, serving.signature, inputs),
            seed=seed,
        )
    assert found.verdict.kept, found.verdict.sentence
    second = recipe.apply(
        network, task, teacher=found.model, training=found.training, augment=found.augment, seed=seed
    )
    assert second.model is not None
    adapted = deployed(task, second.model, local_class, found.calibration)
    after = evaluation.evaluate_exported(task, adapted, changed).value
    still_clean = evaluation.evaluate_exported(task, adapted, clean).value
    share = (after - during) / (before - during)
    figures = f"{before:.3f} -> {during:.3f} -> {after:.3f}, clean {still_clean:.3f}"
    print(f"seed {seed}: {figures}, share {share:.3f}")
    assert during < before - 0.1
    assert share >= 0.8
    assert before - still_clean <= 0.025
