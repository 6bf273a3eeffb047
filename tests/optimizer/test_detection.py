"""Detectors as tasks: declarations, targets, metric, teacher, conversion, packing, golden cases."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shoal_agent import detection, runtimes
from shoal_agent.detection import Detections
from shoal_agent.runtimes.golden import check_golden, same_answer
from shoal_agent.telemetry import distances
from shoal_agent.telemetry.sketches import sketch
from shoal_optimizer import targets
from shoal_optimizer.adaptation import Labelled, adapt, difference
from shoal_optimizer.boxes import matches
from shoal_optimizer.data import TaskData
from shoal_optimizer.evaluation import evaluate_exported, evaluate_model, resampled, score
from shoal_optimizer.packing import Packed, lineage_of, pack
from shoal_optimizer.recipe import Applied, Recipe, Step, apply
from shoal_optimizer.targets import ClassSpec
from shoal_optimizer.task import Task, load_task
from shoal_optimizer.techniques.distillation import match_boxes
from shoal_protos.bundle import BoxRule, open_bundle, write_bundle
from shoal_protos.errors import InvalidInput
from shoal_protos.v1.telemetry_pb2 import SketchSet

Write = Callable[[str], Path]
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def blobs() -> Task:
    """The loaded task, shared: never change its `original`."""
    return load_task(HERE / "blobs.py")


# ---------------------------------------------------------------------------- declarations

TASK = """
import numpy as np, torch
from shoal_optimizer import BoxRule, Task, TensorSpec
class Find(Task):
    input = TensorSpec("x", "FP32", (-1, 3))
    output_kind = "boxes"
    labels = ("cat", "dog")
    def model(self): return torch.nn.Sequential(torch.nn.Linear(3, 24), torch.nn.Unflatten(1, (4, 6)))
    def evaluation(self): return [(np.zeros(3), target) for target in self.targets()]
    def targets(self): return [[[0.1, 0.1, 0.4, 0.4, 0]], [[0, 0, 1, 1, 1], [0.5, 0.5, 0.6, 0.7, 0]]]
"""


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ("labels = ()", "labels is empty"),
        ('output = TensorSpec("boxes", "FP32", (-1, 4, 5))', r"FP32 \[-1, candidates, 6\]"),
        ('output = TensorSpec("boxes", "FP64", (-1, 4, 6))', "FP64"),
        ("boxes = (0.3, 0.5)", "is tuple"),
        ("boxes = BoxRule(score_threshold=0)", "between 0 and 1"),
        ("boxes = BoxRule(iou_threshold=1.5)", "between 0 and 1"),
        ("boxes = BoxRule(max_boxes=0)", "at least one box"),
        ('boxes = BoxRule()\n    output_kind = "values"', "output_kind is 'values'"),
        ('output_kind = "masks"', "boxes"),
        ('resize = "squash"', "letterbox"),
        ('color = "yuv"', "rgb"),
        ("pad = 256", "0 to 255"),
        ("sample_rate = -1", "0 to"),
        ("def training(self): return self.evaluation()", r"no loss\(\)"),
    ],
)
def test_a_declaration_that_cannot_be_is_refused(write_task: Write, change: str, complaint: str) -> None:
    with pytest.raises(InvalidInput, match=complaint) as caught:
        load_task(write_task(TASK + "    " + change + "\n"))
    assert caught.value.remedy


def test_the_rule_reaches_the_signature(blobs: Task, write_task: Write) -> None:
    signature = blobs.signature
    assert (signature.output_kind, signature.outputs[0].shape) == ("boxes", (-1, 64, 6))
    assert signature.boxes == BoxRule(0.3, 0.4, 10)
    assert (signature.pad, signature.resize, signature.labels) == (114, "letterbox", ("bright", "dark"))
    plain = load_task(write_task(TASK + "    pad = 0\n    sample_rate = 8000\n"))
    assert plain.signature.boxes == BoxRule()
    assert plain.signature.outputs[0].name == "boxes"
    assert (plain.signature.pad, plain.signature.sample_rate) == (0, 8000)
    assert not plain.trainable


@pytest.mark.parametrize("output", ["(8, 3)", "(24,)", "(2, 2, 6)"])
def test_a_model_that_gives_no_boxes_is_refused(write_task: Write, output: str) -> None:
    path = write_task(TASK.replace("(4, 6)", output))
    with pytest.raises(InvalidInput, match="candidates, 6"):
        _ = load_task(path).signature


# ---------------------------------------------------------------------------- targets


def test_items_may_have_different_numbers_of_boxes(write_task: Write) -> None:
    found = load_task(write_task(TASK)).required("evaluation").targets
    assert found.shape == (2, 2, 5)
    assert found.dtype == np.float32
    assert found[0, 1].tolist() == [0, 0, 0, 0, -1]
    empty = TASK.replace("[[[0.1, 0.1, 0.4, 0.4, 0]],", "[np.zeros((0, 5)),")
    assert load_task(write_task(empty)).required("evaluation").targets[0, :, 4].tolist() == [-1, -1]


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ("[12, 20, 40, 60, 0]", "shares"),
        ("[0.1, 0.1, 0.4, 0.4, 2]", "2 labels"),
        ("[0.1, 0.1, 0.4, 0.4, 0.5]", "class 0.5"),
        ("[0.4, 0.1, 0.1, 0.4, 0]", "no size"),
        ("[0.1, float('nan'), 0.4, 0.4, 0]", "coordinates"),
        ("[0.1, 0.1, 0.4, 0.4]", "Give float32"),
        ("[0, 0, 0, 0, -1]", "no box in any item"),
    ],
)
def test_targets_that_are_no_boxes_are_refused(write_task: Write, row: str, complaint: str) -> None:
    text = TASK.replace(
        "[[[0.1, 0.1, 0.4, 0.4, 0]], [[0, 0, 1, 1, 1], [0.5, 0.5, 0.6, 0.7, 0]]]", f"[[{row}]]"
    )
    with pytest.raises(InvalidInput) as caught:
        _ = load_task(write_task(text)).signature
    assert complaint in str(caught.value)


# ---------------------------------------------------------------------------- metric


def test_the_metric_is_what_the_client_would_see(blobs: Task) -> None:
    data = blobs.required("evaluation")
    outputs = blobs.predict(blobs.original, data.inputs)
    found = [detection.suppress(candidates, blobs.box_rule) for candidates in outputs]
    expected = detection.average_precision(found, data.targets)
    result = score(blobs, outputs, data.targets)
    assert (result.metric, result.value) == ("map50", expected)
    assert 0.9 < result.low <= result.value <= result.high <= 1.0
    assert result.n == len(data)
    true = data.targets[data.targets[..., 4] >= 0]
    assert {name: n for name, (_, n) in result.per_class.items()} == {
        "bright": int((true[:, 4] == 0).sum()),
        "dark": int((true[:, 4] == 1).sum()),
    }
    assert all(recall > 0.9 for recall, _ in result.per_class.values())


def test_another_rule_gives_another_figure(blobs: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    data = blobs.required("evaluation")
    outputs = blobs.predict(blobs.original, data.inputs)
    usual = blobs.metric(outputs, data.targets)
    monkeypatch.setattr(type(blobs), "boxes", BoxRule(score_threshold=0.9999))
    assert blobs.metric(outputs, data.targets) < usual


@pytest.fixture(scope="module")
def answers(blobs: Task) -> np.ndarray:
    """The original's candidates for the first 40 items."""
    return blobs.predict(blobs.original, blobs.required("evaluation").inputs[:40])


@given(picks=st.lists(st.integers(0, 39), min_size=1, max_size=40))
def test_a_resample_counts_as_the_metric_does(blobs: Task, answers: np.ndarray, picks: list[int]) -> None:
    data, outputs = blobs.required("evaluation").take(slice(0, 40)), answers
    indices = np.array(picks)
    measured = resampled(blobs, outputs, data.targets)(indices)
    assert measured == pytest.approx(blobs.metric(outputs[indices], data.targets[indices]))


def test_a_resample_without_any_box_does_not_count(blobs: Task) -> None:
    nothing = np.zeros((3, 2, 5), np.float32)
    nothing[..., 4] = -1
    assert math.isnan(resampled(blobs, np.zeros((3, 64, 6), np.float32), nothing)(np.array([0, 1])))


def test_a_metric_of_the_users_own_is_left_alone(blobs: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(blobs), "metric", lambda self, outputs, targets: 0.25)
    data = blobs.required("evaluation")
    result = score(blobs, np.zeros((len(data), 64, 6), np.float32), data.targets)
    assert (result.metric, result.value, result.per_class) == ("metric", 0.25, {})


def test_a_detector_that_is_better_beyond_noise_is_told(blobs: Task) -> None:
    data = blobs.required("evaluation")
    good = blobs.predict(blobs.original, data.inputs)
    blind = good.copy()
    blind[::2, :, 4:] = 0
    gain = difference(blobs, blind, good, data.targets, seed=0)
    assert gain.low > 0.2


# ---------------------------------------------------------------------------- teacher


def _candidates(seed: int) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    corner = torch.rand(3, 9, 2, generator=random) * 0.5
    size = 0.05 + 0.3 * torch.rand(3, 9, 2, generator=random)
    return torch.cat([corner, corner + size, torch.rand(3, 9, 4, generator=random)], -1)


def test_a_student_like_its_teacher_has_nothing_to_learn() -> None:
    teacher = _candidates(0)
    assert float(match_boxes(teacher, teacher)) < 1e-6
    assert float(match_boxes(_candidates(1), teacher)) > 0.1


def test_boxes_the_teacher_does_not_believe_in_do_not_count() -> None:
    teacher = _candidates(0)
    teacher[:, 3:, 4:] = 0
    student = teacher.clone()
    student[:, 3:, :4] += 0.3
    assert float(match_boxes(student, teacher)) < 1e-3
    student[:, :3, :4] += 0.3
    assert float(match_boxes(student, teacher)) > 0.5


def test_following_the_gradient_leads_to_the_teacher() -> None:
    teacher = _candidates(0)
    raw = torch.zeros(3, 9, 8, requires_grad=True)
    optimizer = torch.optim.Adam([raw], lr=0.05)

    def student() -> torch.Tensor:
        return torch.cat([raw[..., :4], torch.sigmoid(raw[..., 4:])], -1)

    before = float(match_boxes(student().detach(), teacher))
    for _ in range(200):
        loss = match_boxes(student(), teacher)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    assert float(loss.detach()) < 0.05 * before
    assert torch.isfinite(raw).all()


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_certain_answers_have_finite_gradients(value: float) -> None:
    student = torch.full((1, 2, 6), value, requires_grad=True)
    loss = match_boxes(student, torch.full((1, 2, 6), 1 - value))
    loss.backward()  # type: ignore[no-untyped-call]
    assert student.grad is not None
    assert torch.isfinite(student.grad).all()


# ---------------------------------------------------------------------------- compressing and packing


@pytest.fixture(scope="module")
def small(blobs: Task) -> Applied:
    steps = (
        Step("channel_pruning", {"ratio": 0.5}),
        Step("distillation", {"epochs": 12, "alpha": 0.9, "batch": 32}),
        Step("quantization", {"samples": 100}),
    )
    return apply(Recipe(steps, "small"), blobs)


@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
def test_pruned_distilled_and_quantized(
    blobs: Task, small: Applied, target: str, local_class: ClassSpec
) -> None:
    plain = targets.find(target).export(blobs.original, blobs)
    assert evaluate_exported(blobs, plain).value == pytest.approx(
        evaluate_model(blobs, blobs.original).value, abs=1e-3
    )
    tiny = targets.find(target).export(small.model, blobs, "int8", small.calibration, local_class)
    assert tiny.signature == plain.signature
    assert tiny.size_bytes < 0.6 * plain.size_bytes
    assert tiny.facts["int8_share"] == 1.0
    assert evaluate_exported(blobs, tiny).value > 0.6


@pytest.fixture(scope="module")
def packed(blobs: Task, small: Applied, tmp_path_factory: pytest.TempPathFactory) -> Packed:
    exported = targets.find("onnxruntime").export(small.model, blobs, "int8", small.calibration)
    recipe = Recipe((), "small")
    return pack(exported, blobs, recipe, lineage_of(blobs, recipe, exported), tmp_path_factory.mktemp("pack"))


def test_golden_cases_have_boxes_and_clear_answers(blobs: Task, packed: Packed) -> None:
    bundle = open_bundle(packed.layout, packed.digest)
    assert bundle.config.golden is not None
    with np.load(bundle.file("golden.npz")) as stored:
        outputs = stored["output:boxes"]
    best = outputs[..., 4:].max(axis=(1, 2))
    assert (best >= blobs.box_rule.score_threshold).all()
    with runtimes.find("onnxruntime").load(bundle) as instance:
        report = check_golden(bundle, instance)
    assert (report.ok, report.agreement, report.cases) == (True, 1.0, 12)


@pytest.mark.parametrize("other", ["another model", "another place"])
def test_golden_cases_catch_another_answer(blobs: Task, packed: Packed, other: str, tmp_path: Path) -> None:
    bundle = open_bundle(packed.layout, packed.digest)
    files = {layer.title: bundle.file(layer.title).read_bytes() for layer in bundle.manifest.layers}
    if other == "another model":
        torch.manual_seed(1)
        fresh = type(blobs)().network().eval()  # type: ignore[attr-defined]
        exported = targets.find("onnxruntime").export(fresh, blobs)
        files[bundle.config.runtime.model_file] = exported.files["model.onnx"]
    else:
        with np.load(bundle.file("golden.npz")) as stored:
            arrays = dict(stored)
        arrays["output:boxes"][..., [0, 2]] += 0.2
        np.savez(tmp_path / "golden.npz", **arrays)
        files["golden.npz"] = (tmp_path / "golden.npz").read_bytes()
    changed = open_bundle(tmp_path, write_bundle(tmp_path, bundle.config, files))
    with runtimes.find("onnxruntime").load(changed) as instance:
        report = check_golden(changed, instance)
    assert not report.ok
    assert report.agreement < 0.5


def test_golden_outputs_that_are_no_boxes_are_refused(packed: Packed, tmp_path: Path) -> None:
    bundle = open_bundle(packed.layout, packed.digest)
    files = {layer.title: bundle.file(layer.title).read_bytes() for layer in bundle.manifest.layers}
    with np.load(bundle.file("golden.npz")) as stored:
        arrays = dict(stored)
    signature = bundle.config.signature
    flat = dataclasses.replace(signature.outputs[0], shape=(-1, 4))
    config = dataclasses.replace(bundle.config, signature=dataclasses.replace(signature, outputs=(flat,)))
    arrays["output:boxes"] = np.zeros((12, 4), np.float32)
    np.savez(tmp_path / "golden.npz", **arrays)
    files["golden.npz"] = (tmp_path / "golden.npz").read_bytes()
    changed = open_bundle(tmp_path, write_bundle(tmp_path, config, files))

    class Silent:
        def run(self, inputs: object) -> dict[str, np.ndarray]:
            return {"boxes": np.zeros((1, 4), np.float32)}

    with pytest.raises(InvalidInput, match="no boxes"):
        check_golden(changed, Silent())  # type: ignore[arg-type]


def test_the_same_boxes_in_another_order_are_the_same_answer() -> None:
    boxes = np.array([[0, 0, 0.2, 0.2], [0.5, 0.5, 0.9, 0.9]], np.float32)
    one = Detections(boxes, np.array([0.9, 0.8], np.float32), np.array([0, 1]))
    other = Detections(boxes[::-1] + 0.01, np.array([0.9, 0.8], np.float32), np.array([1, 0]))
    assert same_answer(one, other)
    assert not same_answer(one, Detections(other.boxes, other.scores, np.array([0, 1])))
    assert not same_answer(one, Detections(boxes[:1], one.scores[:1], one.classes[:1]))


def test_a_blind_detector_passes_the_output_threshold_and_a_clean_one_does_not(
    blobs: Task, packed: Packed
) -> None:
    bundle = open_bundle(packed.layout, packed.digest)
    reference = SketchSet.FromString(bundle.file(packed.config.reference.outputs).read_bytes())
    limits = packed.config.reference.thresholds["50"]
    assert {"psi", "ks", "output_psi", "output_ks"} <= set(limits)
    threshold = blobs.box_rule.score_threshold
    outputs = blobs.predict(blobs.original, blobs.required("evaluation").inputs[:50])
    with runtimes.find("onnxruntime").load(bundle) as instance:
        clean = instance.run({"pixels": blobs.required("evaluation").inputs[:50]})["boxes"]
    found = distances.largest(reference, sketch("boxes", clean, threshold=threshold))
    assert found["ks"][0] <= limits["output_ks"]
    outputs[..., 4:] *= 0.1
    assert (
        distances.largest(reference, sketch("boxes", outputs, threshold=threshold))["ks"][0]
        > limits["output_ks"]
    )


# ---------------------------------------------------------------------------- an ONNX file


def test_an_onnx_detector_with_box_targets_is_a_task(blobs: Task, tmp_path: Path) -> None:
    exported = targets.find("onnxruntime").export(blobs.original, blobs)
    (tmp_path / "found.onnx").write_bytes(exported.files["model.onnx"])
    data = blobs.required("evaluation")
    names = np.array(blobs.labels)
    np.savez(tmp_path / "found.npz", inputs=data.inputs, targets=data.targets, labels=names)
    task = load_task(tmp_path / "found.onnx")
    assert (task.output_kind, task.metric_name) == ("boxes", "map50")
    assert task.signature.boxes == BoxRule()
    assert evaluate_model(task, None).value > 0.9
    quantized = targets.find("onnxruntime").export(None, task, "int8")
    assert evaluate_exported(task, quantized).value > 0.8


def test_matches_are_one_an_image(blobs: Task) -> None:
    data = blobs.required("evaluation")
    outputs = blobs.predict(blobs.original, data.inputs)
    assert len(matches(outputs, data.targets, blobs.box_rule)) == len(data)


# ---------------------------------------------------------------------------- the field


@pytest.mark.slow
def test_a_detector_adapts_to_a_darker_noisier_world(blobs: Task) -> None:
    def field_of(data: TaskData) -> TaskData:
        random = np.random.default_rng(5)
        darker = data.inputs * 0.45 + random.normal(0, 6, data.inputs.shape)
        return TaskData(np.clip(darker, 0, 255).astype(np.uint8), data.targets)

    world = field_of(blobs.required("evaluation"))
    seen = sketch("image", world.inputs[:120], 0, 255)
    found = adapt(
        blobs, seen, Labelled(None, None), lambda inputs: blobs.predict(blobs.original, inputs), seed=0
    )
    before = evaluate_model(blobs, blobs.original, world).value
    after = evaluate_model(blobs, found.model, world).value
    assert found.verdict.kept, found.verdict.sentence
    assert after > before + 0.05
    assert found.evidence.after.metric == "map50"
