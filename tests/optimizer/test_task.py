from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

from shoal_optimizer import targets
from shoal_optimizer.data import TaskData, materialise
from shoal_optimizer.evaluation import evaluate_model
from shoal_optimizer.recipe import Recipe, Step, apply
from shoal_optimizer.task import Task, load_task, seeded
from shoal_protos.bundle import TensorSpec
from shoal_protos.errors import InvalidInput, Unsupported

Write = Callable[[str], Path]

GOOD = """
import numpy as np, torch
from torch import nn
from shoal_optimizer import Task, TensorSpec

class Small(Task):
    input = TensorSpec("x", "FP32", (-1, 3))
    output_kind = "logits"
    labels = ("a", "b")
    def model(self): return nn.Linear(3, 2)
    def evaluation(self): return [(np.zeros(3, np.float32), 0), (np.ones(3, np.float32), 1)]
"""


def _refusal(path: Path, use: Callable[[Task], object] = lambda task: task.signature) -> InvalidInput:
    with pytest.raises(InvalidInput) as caught:
        use(load_task(path))
    assert caught.value.remedy, "a refusal says what to do next"
    return caught.value


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("class Small(Task)", "class Small(object)"), "has no Task"),
        (("import numpy", "import nowhere_to_be_found; import numpy"), "nowhere_to_be_found"),
        (("class Small", "1/0\nclass Small"), "ZeroDivisionError"),
        (("class Small", "class Small:\n  oops\nclass Small"), "oops"),
        (('    labels = ("a", "b")', '    labels = ("a", "b")\n    files = ["missing.npz"]'), "missing.npz"),
        (('    labels = ("a", "b")', '    files = ["../outside.npz"]'), "outside the task's folder"),
        (('    labels = ("a", "b")', '    files = "one.npz"'), "files is one string"),
        (('    input = TensorSpec("x", "FP32", (-1, 3))', ""), "input is not declared"),
        (('"FP32"', '"FLOAT"'), "FLOAT"),
        (("(-1, 3)", "(1, 3)"), "shape"),
        (('output_kind = "logits"', 'output_kind = "boxen"'), "output_kind"),
        (("return nn.Linear(3, 2)", "raise OSError('disk gone')"), "model() raised OSError: disk gone"),
        (("return nn.Linear(3, 2)", "return 'model.pt'"), "not a torch.nn.Module"),
        (("return nn.Linear(3, 2)", "return nn.Linear(4, 2)"), "model() raised"),
        (("return nn.Linear(3, 2)", "return nn.Linear(3, 5)"), "5 logits"),
        (("return [(np.zeros(3, np.float32), 0), (np.ones(3, np.float32), 1)]", "return []"), "no data"),
        (("return [(np.zeros(3, np.float32), 0), (np.ones(3, np.float32), 1)]", "return None"), "no data"),
        (("return [(np.zeros(3, np.float32), 0), (np.ones(3, np.float32), 1)]", "return 7"), "int"),
        (("np.zeros(3, np.float32), 0)", "np.zeros(4, np.float32), 0)"), "evaluation() item 0 has shape"),
        (("np.ones(3, np.float32), 1)", "np.ones((2, 2), np.float32), 1)"), "evaluation() item 1"),
        (("np.zeros(3, np.float32), 0)", "np.full(3, np.nan), 0)"), "NaN"),
        (("np.zeros(3, np.float32), 0)", "np.zeros(3, np.float32),)"), "pair"),
        (("np.zeros(3, np.float32), 0)", "open('/nowhere/data.bin'), 0)"), "/nowhere/data.bin"),
        (("np.zeros(3, np.float32), 0)", "np.zeros(3, np.float32), 2)"), "the model has 2 logits"),
        (("np.zeros(3, np.float32), 0)", "np.zeros(3, np.float32), 0.5)"), "float64"),
        (("    def evaluation", "    def evaluations"), "evaluation() is not implemented"),
    ],
)
def test_a_bad_task_is_refused_naming_the_field(
    write_task: Write, change: tuple[str, str], message: str
) -> None:
    assert change[0] in GOOD
    assert message in _refusal(write_task(GOOD.replace(*change))).message


def test_a_good_task_has_a_signature(write_task: Write) -> None:
    signature = load_task(write_task(GOOD)).signature
    assert signature.inputs[0].name == "x"
    assert (signature.outputs[0].name, signature.outputs[0].shape) == ("logits", (-1, 2))
    assert signature.labels == ("a", "b")


def test_several_tasks_are_named(write_task: Write) -> None:
    text = GOOD + "\nclass Other(Small): pass\n"
    assert "Other, Small" in _refusal(write_task(text)).message


def test_there_is_no_such_file(tmp_path: Path) -> None:
    assert "nothing.py" in _refusal(tmp_path / "nothing.py").message


@pytest.mark.parametrize("value", ["float('nan')", "float('inf')", "None", "'high'"])
def test_a_metric_that_is_no_number_is_refused(write_task: Write, value: str) -> None:
    path = write_task(GOOD + f"    def metric(self, outputs, targets): return {value}\n")
    assert "metric()" in _refusal(path, lambda task: evaluate_model(task, task.original)).message


def test_a_model_that_answers_nan_is_refused(write_task: Write) -> None:
    text = GOOD.replace("return nn.Linear(3, 2)", "m = nn.Linear(3, 2); m.bias.data[0] = np.nan; return m")
    error = _refusal(write_task(text), lambda task: evaluate_model(task, task.original))
    assert "NaN for 100%" in error.message


def test_a_metric_that_raises_is_refused(write_task: Write) -> None:
    path = write_task(GOOD + "    def metric(self, outputs, targets): return outputs[99]\n")
    error = _refusal(path, lambda task: evaluate_model(task, task.original))
    assert "metric() raised IndexError" in error.message


def test_a_model_that_cannot_be_exported_is_refused(write_task: Write) -> None:
    text = GOOD.replace(
        "class Small",
        "class Loops(nn.Module):\n"
        "    def forward(self, x):\n"
        "        while x.sum() < 10: x = x + 1\n"
        "        return x[:, :2]\n"
        "class Small",
    ).replace("nn.Linear(3, 2)", "Loops()")
    path = write_task(text)
    error = _refusal(path, lambda task: targets.find("onnxruntime").export(task.original, task))
    assert "cannot be exported for onnxruntime" in error.message
    assert "while x.sum() < 10" in error.message
    assert "no branches" in error.remedy


def test_a_missing_data_file_names_it(write_task: Write) -> None:
    path = write_task(GOOD.replace("return nn.Linear(3, 2)", "return torch.load('/nowhere/w.pt')"))
    assert "/nowhere/w.pt" in _refusal(path).message


SPEC = TensorSpec("x", "UINT8", (-1, 2), low=0, high=16)


@pytest.mark.parametrize(
    "items",
    [
        [([1, 2], 0), ([3, 4], 1), ([5, 6], 0)],
        [([[1, 2], [3, 4]], [0, 1]), ([5, 6], 0)],
        (np.array([[1, 2], [3, 4], [5, 6]]), np.array([0, 1, 0])),
        (torch.tensor([[1, 2], [3, 4], [5, 6]]), torch.tensor([0, 1, 0])),
        zip(np.array([[1, 2], [3, 4], [5, 6]]), [0, 1, 0], strict=True),
    ],
)
def test_items_batches_and_whole_arrays_give_the_same_data(items: object) -> None:
    data = materialise(items, SPEC, "evaluation()")
    assert data.inputs.dtype == np.uint8
    assert data.inputs.tolist() == [[1, 2], [3, 4], [5, 6]]
    assert data.targets.tolist() == [0, 1, 0]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([1, 17], "outside"),
        ([-1, 0], "outside"),
        ([0.5, 1.0], "whole numbers"),
        ([1, 2, 3], "shape"),
        ([object(), 1], "no array"),
    ],
)
def test_values_that_the_signature_does_not_allow(value: list[object], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        materialise([(value, 0)], SPEC, "evaluation()")


@given(st.integers(0, 30), st.integers(0, 5))
def test_sampling_is_deterministic_and_keeps_order(count: int, seed: int) -> None:
    data = TaskData(np.arange(20)[:, None], np.arange(20))
    sample = data.sample(count, seed)
    assert len(sample) == min(count, 20)
    assert sample.targets.tolist() == sorted(set(sample.targets.tolist()))
    assert sample.digest == data.sample(count, seed).digest


def test_digest_tells_content_dtype_and_shape_apart() -> None:
    zeros = TaskData(np.zeros((2, 2), np.uint8), np.zeros(2, np.int64))
    others = [
        TaskData(np.zeros((2, 2), np.int8), zeros.targets),
        TaskData(np.zeros((2, 1), np.uint8), zeros.targets),
        TaskData(zeros.inputs, np.ones(2, np.int64)),
    ]
    assert len({data.digest for data in (zeros, *others)}) == 4


def test_stored_weights_and_data_replace_the_users_code(
    quadrants: Task, quadrants_path: Path, tmp_path: Path
) -> None:
    applied = apply(Recipe((Step("channel_pruning"),)), quadrants)
    files = quadrants.save(tmp_path, applied.model)
    again = load_task(quadrants_path, weights=files.weights, data=files.data)
    again.evaluation = again.training = None  # type: ignore[assignment,method-assign]
    inputs = quadrants.required("evaluation").inputs
    assert again.data_digest == quadrants.data_digest
    assert applied.model is not None
    np.testing.assert_array_equal(
        again.predict(again.original, inputs), quadrants.predict(applied.model, inputs)
    )


def test_equal_data_give_equal_bytes(quadrants: Task, tmp_path: Path) -> None:
    quadrants.save_data(tmp_path / "a.npz")
    quadrants.save_data(tmp_path / "b.npz")
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


def test_damaged_blobs_are_refused(quadrants_path: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    bad.write_bytes(b"not a blob")
    with pytest.raises(InvalidInput, match="weights"):
        _ = load_task(quadrants_path, weights=bad).original
    with pytest.raises(InvalidInput, match="data file"):
        load_task(quadrants_path, data=bad).data("evaluation")


def test_training_in_model_is_seeded_and_leaves_the_generators_alone(quadrants_path: Path) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, two = load_task(quadrants_path, seed=3).original, load_task(quadrants_path, seed=3).original
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_seeded_restores_after_an_error() -> None:
    before = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError), seeded(1):
        _ = 1 / (torch.rand(3).numel() - 3)
    assert torch.equal(before, torch.get_rng_state())


def test_regression_is_judged_by_r_squared(write_task: Write) -> None:
    text = GOOD.replace('output_kind = "logits"', 'output_kind = "values"').replace('labels = ("a", "b")', "")
    text = text.replace("nn.Linear(3, 2)", "nn.Linear(3, 1)")
    task = load_task(write_task(text))
    targets_ = np.array([1.0, 2.0, 3.0])
    assert task.metric(targets_[:, None], targets_) == pytest.approx(1.0)
    assert task.metric(np.full((3, 1), 2.0), targets_) == pytest.approx(0.0)
    assert task.metric_name == "r2"


# ---------------------------------------------------------------------------- ONNX files


@pytest.fixture
def onnx_file(tmp_path: Path) -> Path:
    """A linear classifier: x [n, 3] -> logits [n, 2], with its data beside it."""
    weight = np.array([[1.0, -1.0], [0.5, 0.5], [-1.0, 1.0]], np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["logits"], name="m")],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", 2])],
        [helper.make_tensor("w", TensorProto.FLOAT, weight.shape, weight.flatten())],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    path = tmp_path / "linear.onnx"
    onnx.save(model, str(path))
    inputs = np.random.default_rng(0).normal(size=(80, 3)).astype(np.float32)
    np.savez(tmp_path / "linear.npz", inputs=inputs, targets=(inputs @ weight).argmax(1))
    return path


def test_an_onnx_file_with_data_is_a_task(onnx_file: Path, tmp_path: Path) -> None:
    task = load_task(onnx_file)
    assert (task.label, task.output_kind, task.trainable) == ("linear", "logits", False)
    assert evaluate_model(task, None).value == 1.0
    assert len(task.required("evaluation")) == len(task.required("calibration")) == 40
    applied = apply(Recipe((Step("quantization"),)), task)
    exported = targets.find("onnxruntime").export(None, task, "int8", applied.calibration)
    assert exported.facts["int8_share"] == 1.0
    files = task.save(tmp_path / "stored")
    again = load_task(onnx_file, weights=files.weights, data=files.data)
    assert again.data_digest == task.data_digest
    assert again.signature == task.signature


def test_an_onnx_task_cannot_be_trained(onnx_file: Path) -> None:
    task = load_task(onnx_file)
    with pytest.raises(Unsupported, match="ONNX file"):
        apply(Recipe((Step("channel_pruning"),)), task)
    with pytest.raises(Unsupported, match="ONNX file"):
        _ = task.original


def test_an_onnx_file_needs_its_data(onnx_file: Path) -> None:
    onnx_file.with_suffix(".npz").unlink()
    assert "linear.npz" in _refusal(onnx_file).message
    np.savez(onnx_file.with_suffix(".npz"), inputs=np.zeros((2, 3)))
    assert "targets" in _refusal(onnx_file).message


def test_an_old_onnx_file_is_converted_first(onnx_file: Path) -> None:
    model = onnx.load(str(onnx_file))
    model.opset_import[0].version = 9  # type: ignore[attr-defined]
    onnx.save(model, str(onnx_file))
    exported = targets.find("onnxruntime").export(None, load_task(onnx_file), "int8")
    assert exported.facts["int8_share"] == 1.0


def test_an_onnx_file_with_an_unknown_operation_is_refused(onnx_file: Path) -> None:
    model = onnx.load(str(onnx_file))
    model.graph.node[0].op_type = "Nonsense"  # type: ignore[attr-defined]
    onnx.save(model, str(onnx_file))
    with pytest.raises(InvalidInput, match="Nonsense"):
        _ = load_task(onnx_file).signature


def test_a_broken_onnx_file_is_refused(onnx_file: Path) -> None:
    onnx_file.write_bytes(b"\x08\x09 nothing")
    assert "no ONNX model" in _refusal(onnx_file).message


def test_a_file_loaded_twice_has_one_set_of_classes(quadrants_path: Path, tmp_path: Path) -> None:
    first, second = load_task(quadrants_path), load_task(quadrants_path)
    assert type(first) is type(second)
    first.save(tmp_path / "weights")


@pytest.mark.parametrize("edit", ["", "\n# edited since\n"])
def test_weights_are_read_where_the_task_lies_elsewhere_or_was_edited(
    quadrants: Task, quadrants_path: Path, tmp_path: Path, edit: str
) -> None:
    files = quadrants.save(tmp_path / "stored")
    copy = tmp_path / quadrants_path.name
    copy.write_text(quadrants_path.read_text() + edit)
    code = (
        "import sys; from pathlib import Path; from shoal_optimizer import load_task\n"
        "task = load_task(sys.argv[1], weights=Path(sys.argv[2]), data=Path(sys.argv[3]))\n"
        "print(task.data_digest, task.signature.outputs[0].shape)"
    )
    command = [sys.executable, "-c", code, str(copy), str(files.weights), str(files.data)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert done.stdout.split()[0] == quadrants.data_digest
    assert type(load_task(copy)) is not type(quadrants)
    quadrants.save(tmp_path / "again")  # another copy in this process does not disturb it
