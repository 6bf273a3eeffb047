"""Adapting the original to the field: the world changed, so the original is as wrong as its variants.

The training data is moved to the field's measured statistics (matched augmentation, from histograms
alone), the original is fine-tuned on it together with clean data and posted labels, and it is kept
only if it beats what serves now on held-out data. Distilling the variants from it comes after.
"""

from __future__ import annotations

import copy
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from shoal_optimizer.evaluation import Score, bootstrap, resampled, score
from shoal_optimizer.matching import Matched, limits_of, match
from shoal_optimizer.task import Task, TaskData
from shoal_optimizer.techniques.distillation import TrainingPlan, train
from shoal_protos.bundle import Signature
from shoal_protos.errors import InvalidInput, Unsupported
from shoal_protos.v1.telemetry_pb2 import SketchSet

if TYPE_CHECKING:
    from torch import Tensor, nn

CHANGED_SHARE = 0.6  # of each training batch that is moved to the field; clean accuracy needs the rest
PLAN = TrainingPlan(epochs=8, learning_rate=2e-3, batch=64, alpha=0.0)
LABEL_SHARE = 0.15  # of the training data that labels are repeated up to
HELD_OUT_FROM = 40  # labels from which half are held out as evidence
MAX_SAMPLE_BYTES = 1 << 30  # of one sample file, unpacked
MIN_EVIDENCE = 20  # held-out labels below it decide nothing


@dataclass(frozen=True)
class Difference:
    """After minus before on the same items, with its 95 % interval."""

    value: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.value:+.3f} (95 % {self.low:+.3f} to {self.high:+.3f}, n {self.n})"


@dataclass(frozen=True)
class Verdict:
    """Whether the adapted original is kept, and why, for people."""

    kept: bool
    sentence: str


def decide(metric: str, matched: Difference, labels: Difference | None) -> Verdict:
    """Keeps what is better beyond noise on posted labels, or, where those can't tell, on matched data.

    Labels are the truth: if they say that it became worse, nothing else counts.
    """
    if labels is not None and labels.n >= MIN_EVIDENCE:
        if labels.high < 0:
            return Verdict(False, f"Not kept: on held-out labels of the field {metric} fell by {labels}.")
        if labels.low > 0:
            return Verdict(True, f"Kept: on held-out labels of the field {metric} rose by {labels}.")
    if matched.low > 0:
        truth = "" if labels is None else f"; on labels of the field {labels}"
        return Verdict(
            True, f"Kept: on held-out data moved to the field's statistics {metric} rose by {matched}{truth}."
        )
    return Verdict(
        False,
        f"Not kept: on held-out data moved to the field's statistics {metric} changed by {matched}, "
        "which is within the noise. More labels would tell.",
    )


# ---------------------------------------------------------------------------- data of the field


@dataclass(frozen=True)
class Labelled:
    """Recorded field inputs with their posted labels, split for training and for evidence."""

    training: TaskData | None
    held_out: TaskData | None

    @property
    def count(self) -> int:
        return sum(len(part) for part in (self.training, self.held_out) if part is not None)


def read_samples(paths: Sequence[Path], task: Task) -> Labelled:
    """Reads sample files (inputs by tensor name, "label" int64, -1 = none). A damaged or foreign file
    is left out: it came from a device."""
    spec = task.input
    wanted = task.required("evaluation").inputs
    inputs: list[np.ndarray] = []
    labels: list[np.ndarray] = []
    for path in paths:
        arrays = _sample_arrays(path, spec.name)
        if arrays is None:
            continue
        x, y = arrays
        if x.dtype != wanted.dtype or x.shape[1:] != wanted.shape[1:] or y.shape != (len(x),):
            continue
        has = (y >= 0) & (y < max(len(task.labels), 1) if task.labels else y >= 0)
        inputs.append(x[has])
        labels.append(y[has].astype(task.required("evaluation").targets.dtype))
    count = sum(len(part) for part in inputs)
    if not count or task.output_kind != "logits":
        return Labelled(None, None)
    data = TaskData(np.concatenate(inputs), np.concatenate(labels))
    if count < HELD_OUT_FROM:
        return Labelled(data, None)
    order = np.random.default_rng(task.seed).permutation(count)
    return Labelled(data.take(np.sort(order[count // 2 :])), data.take(np.sort(order[: count // 2])))


def _sample_arrays(path: Path, name: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Inputs and labels of one sample file; None if it is damaged, foreign or would not fit."""
    try:
        with path.open("rb") as stream:
            with zipfile.ZipFile(stream) as archive:
                if sum(entry.file_size for entry in archive.infolist()) > MAX_SAMPLE_BYTES:
                    return None
            stream.seek(0)
            with np.load(stream, allow_pickle=False) as stored:
                return stored[name], stored["label"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
        return None


def with_labels(training: TaskData, labelled: Labelled) -> TaskData:
    """The training data plus posted labels, repeated until they are a fair share."""
    extra = labelled.training
    if extra is None:
        return training
    times = max(1, round(LABEL_SHARE * len(training) / len(extra)))
    return TaskData(
        np.concatenate([training.inputs, *[extra.inputs] * times]),
        np.concatenate([training.targets, *[extra.targets] * times]),
    )


class MatchedAugment:
    """The task's own augmentation, then most of the batch is moved to the field, each part by another
    of the matched changes. Draws from torch's global generator, which training seeds."""

    def __init__(
        self, matched: Matched, signature: Signature, inputs: np.ndarray, own: Callable[[Tensor], Tensor]
    ) -> None:
        self._matched = matched
        self._limits = limits_of(signature, inputs)
        self._own = own

    def __call__(self, batch: Tensor) -> Tensor:
        import torch

        batch = self._own(batch).clone()
        changes = self._matched.corruptions
        order = torch.randperm(len(batch))[: round(CHANGED_SHARE * len(batch))]
        for part in order.chunk(3):
            if len(part):
                chosen = changes[int(torch.randint(len(changes), ()))]
                batch[part] = chosen.apply(batch[part], self._limits)
        return batch


def moved(data: TaskData, matched: Matched, signature: Signature, seed: int) -> TaskData:
    """A copy of the data that looks like the field: each item under one of the matched changes."""
    import torch

    random = np.random.default_rng(seed)
    which = random.integers(0, len(matched.corruptions), len(data))
    generator = torch.Generator().manual_seed(seed)
    limits = limits_of(signature, data.inputs)
    result = np.empty_like(data.inputs)
    for number, corruption in enumerate(matched.corruptions):
        chosen = np.flatnonzero(which == number)
        if len(chosen):
            part = torch.from_numpy(np.ascontiguousarray(data.inputs[chosen])).float()
            result[chosen] = corruption.apply(part, limits, generator).numpy().astype(data.inputs.dtype)
    return TaskData(result, data.targets)


def mixed(data: TaskData, matched: Matched, signature: Signature, seed: int) -> TaskData:
    """The data with most items moved to the field and some left clean: int8 ranges chosen from the
    field alone would clip clean inputs, and the world may change back."""
    changed = moved(data, matched, signature, seed)
    clean = np.random.default_rng(seed).random(len(data)) >= CHANGED_SHARE
    mask = clean.reshape(-1, *[1] * (data.inputs.ndim - 1))
    return TaskData(np.where(mask, data.inputs, changed.inputs), data.targets)


# ---------------------------------------------------------------------------- adapting


@dataclass(frozen=True)
class Evidence:
    """What is known of an adaptation. Scores are on held-out data moved to the field, `clean_*` on the
    task's own evaluation data, `label_difference` on held-out labels."""

    method: str
    before: Score
    after: Score
    clean_before: Score
    clean_after: Score
    difference: Difference
    label_difference: Difference | None
    labels: int
    matched: tuple[str, ...]
    field_items: int
    distance_before: float
    distance_after: float

    def to_json(self) -> dict[str, Any]:
        raw = {
            name: getattr(self, name).to_json() for name in ("before", "after", "clean_before", "clean_after")
        }
        return {
            "method": self.method,
            **raw,
            "interval": asdict(self.difference),
            "label_interval": None if self.label_difference is None else asdict(self.label_difference),
            "labels": self.labels,
            "matched": list(self.matched),
            "field_items": self.field_items,
            "distance_before": self.distance_before,
            "distance_after": self.distance_after,
        }


@dataclass(frozen=True)
class Adaptation:
    """An original that was adapted, and the data it stands on."""

    model: nn.Module
    matched: Matched
    training: TaskData  # clean, plus labels
    augment: Callable[[Tensor], Tensor]
    calibration: TaskData  # mostly moved to the field
    field: TaskData  # evaluation data moved to the field: held out
    evidence: Evidence
    verdict: Verdict


Predict = Callable[[np.ndarray], np.ndarray]  # endpoint inputs [n, ...] -> endpoint outputs [n, ...]


def require_training(task: Task) -> TaskData:
    """Raises Unsupported when the task can't be fine-tuned."""
    training = task.data("training") if task.has_module else None
    if training is None:
        raise Unsupported(
            f"The task {task.label} cannot be adapted: it has no training data or is an ONNX file.",
            "Push a Python task with training(), or optimize again with newer data.",
        )
    return training


def ground(
    task: Task, matched: Matched, labelled: Labelled
) -> tuple[TaskData, MatchedAugment, TaskData, TaskData]:
    """(training data, augmentation, calibration data, held-out field data) of a matched field."""
    training = require_training(task)
    augment = MatchedAugment(matched, task.signature, training.inputs, task.augment)
    calibration = mixed(training.sample(400, task.seed), matched, task.signature, task.seed + 1)
    field = moved(task.required("evaluation"), matched, task.signature, task.seed + 2)
    return with_labels(training, labelled), augment, calibration, field


def adapt(
    task: Task,
    field: SketchSet,
    labelled: Labelled,
    incumbent: Predict,
    *,
    seed: int = 0,
    progress: Callable[[float, str], None] = lambda share, message: None,
) -> Adaptation:
    """Matches, fine-tunes a copy of the original, and judges it against the incumbent.

    Args:
        field: merged input sketches of the windows in which the inputs had changed.
        incumbent: answers of what serves now.

    Raises:
        Unsupported: the task has no training data.
        InvalidInput: the sketch is empty or of another kind.
    """
    training = require_training(task)
    progress(0.0, f"matching {field.count} inputs of the field")
    matched = match(
        field,
        training.inputs,
        task.signature,
        seed=seed,
        progress=lambda share: progress(0.3 * share, "matching"),
    )
    progress(0.3, matched.sentence)
    data, augment, calibration, held_out = ground(task, matched, labelled)
    model = copy.deepcopy(task.original)
    train(
        model,
        task,
        data,
        replace(PLAN, seed=seed),
        augment=augment,
        progress=lambda share, message: progress(0.3 + 0.6 * share, f"fine-tuning the original, {message}"),
    )
    progress(0.9, "comparing with what serves now")
    evidence = judge(task, model, matched, held_out, labelled, incumbent, field, seed=seed)
    verdict = decide(task.metric_name, evidence.difference, evidence.label_difference)
    progress(1.0, verdict.sentence)
    return Adaptation(model, matched, data, augment, calibration, held_out, evidence, verdict)


def judge(
    task: Task,
    model: nn.Module,
    matched: Matched,
    held_out: TaskData,
    labelled: Labelled,
    incumbent: Predict,
    field: SketchSet,
    *,
    seed: int,
) -> Evidence:
    """Scores incumbent and adapted original on the same held-out items."""
    clean = task.required("evaluation")

    def adapted(inputs: np.ndarray) -> np.ndarray:
        return task.predict(model, inputs)

    before, after = incumbent(held_out.inputs), adapted(held_out.inputs)
    labels = None
    if labelled.held_out is not None:
        truth = labelled.held_out
        labels = difference(task, incumbent(truth.inputs), adapted(truth.inputs), truth.targets, seed)
    return Evidence(
        method="matched augmentation" + (" and posted labels" if labelled.training is not None else ""),
        before=score(task, before, held_out.targets),
        after=score(task, after, held_out.targets),
        clean_before=score(task, incumbent(clean.inputs), clean.targets),
        clean_after=score(task, adapted(clean.inputs), clean.targets),
        difference=difference(task, before, after, held_out.targets, seed),
        label_difference=labels,
        labels=labelled.count,
        matched=tuple(c.sentence() for c in matched.corruptions),
        field_items=int(field.count),
        distance_before=matched.before,
        distance_after=matched.distances[0],
    )


def difference(
    task: Task, before: np.ndarray, after: np.ndarray, targets: np.ndarray, seed: int
) -> Difference:
    """Paired bootstrap of the metric's difference: both models answer the same resampled items."""

    measure_before, measure_after = resampled(task, before, targets), resampled(task, after, targets)

    def gain(indices: np.ndarray) -> float:
        return measure_after(indices) - measure_before(indices)

    n = len(targets)
    low, high = bootstrap(gain, n, seed=seed)
    return Difference(gain(np.arange(n)), low, high, n)


def read_field(path: Path | None) -> SketchSet:
    """The merged sketch file of a job. Raises InvalidInput when it is missing or damaged."""
    try:
        if path is None:
            raise OSError("none was given")
        return SketchSet.FromString(path.read_bytes())
    except Exception as error:  # protobuf's DecodeError and OSError share no base
        raise InvalidInput(
            f"The field's sketch cannot be read: {error}.",
            "Wait for telemetry of the endpoint, then start again.",
        ) from error


def save_data(path: Path, task: Task, adaptation: Adaptation) -> None:
    """The adapted version's data: evaluation unchanged, training with a copy moved to the field."""
    field_copy = moved(adaptation.training, adaptation.matched, task.signature, task.seed + 3)
    training = TaskData(
        np.concatenate([adaptation.training.inputs, field_copy.inputs]),
        np.concatenate([adaptation.training.targets, field_copy.targets]),
    )
    arrays: dict[str, Any] = {}
    for split, data in (
        ("calibration", adaptation.calibration),
        ("evaluation", task.required("evaluation")),
        ("training", training),
    ):
        arrays[f"{split}:inputs"], arrays[f"{split}:targets"] = data.inputs, data.targets
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, **arrays)
