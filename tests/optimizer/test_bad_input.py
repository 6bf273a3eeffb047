"""What real ONNX files bring along, one test each: it works, or the refusal names what is to be done."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from shoal_optimizer import checking, onnx_branches, onnx_graph, packing, targets
from shoal_optimizer.evaluation import evaluate_exported, evaluate_model
from shoal_optimizer.onnx_task import OnnxTask
from shoal_optimizer.recipe import Recipe
from shoal_optimizer.targets.base import Exported, load_exported, run_instance
from shoal_optimizer.task import Task, load_task
from shoal_protos.errors import InvalidInput, ShoalError

RANDOM = np.random.default_rng(0)
WEIGHT = np.array([[1.0, -1.0], [0.5, 0.5], [-1.0, 1.0]], np.float32)
FLOAT, INT64, BOOL = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL
Value = tuple[str, int, Sequence[Any]]
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a model of nodes and its `.npz`; gives the ONNX file's path."""

    def make(
        nodes: list[Any],
        inputs: list[Value],
        outputs: list[Value],
        weights: dict[str, np.ndarray] | None = None,
        /,
        *,
        opset: int = 20,
        external: bool = False,
        metadata: dict[str, str] | None = None,
        **arrays: Any,
    ) -> Path:
        graph = helper.make_graph(
            nodes,
            "g",
            [helper.make_tensor_value_info(*value) for value in inputs],
            [helper.make_tensor_value_info(*value) for value in outputs],
            [numpy_helper.from_array(value, name) for name, value in (weights or {}).items()],
        )
        imports = [helper.make_opsetid("", opset), helper.make_opsetid("com.example", 1)]
        model = helper.make_model(graph, opset_imports=imports, ir_version=8)
        helper.set_model_props(model, metadata or {})
        path = tmp_path / "m.onnx"
        onnx.save(
            model, str(path), save_as_external_data=external, location="m.data" if external else None,
            size_threshold=0,
        )  # fmt: skip
        named = {key.replace("__", ":"): value for key, value in arrays.items()}
        np.savez(tmp_path / "m.npz", **named)
        return path

    return make


X = RANDOM.normal(size=(60, 3)).astype(np.float32)
LINEAR = helper.make_node("MatMul", ["x", "w"], ["y"], name="product")
ONE_IN: list[Value] = [("x", FLOAT, ["n", 3])]
ONE_OUT: list[Value] = [("y", FLOAT, ["n", 2])]


def linear(write: Write, **more: Any) -> Path:
    given = {"inputs": X, "targets": (X @ WEIGHT).argmax(1)} | more
    return write([LINEAR], ONE_IN, ONE_OUT, {"w": WEIGHT}, **given)


def refusal(path: Path) -> ShoalError:
    with pytest.raises(InvalidInput) as caught:
        _ = load_task(path).signature
    return caught.value


def exported(task: Task, runtime: str = "onnxruntime", precision: str = "fp32") -> Exported:
    return targets.find(runtime).export(None, task, precision)


def works(path: Path, tmp_path: Path) -> OnnxTask:
    """Converts for both runtimes, packs, stores and loads again; gives the task."""
    task = load_task(path)
    assert isinstance(task, OnnxTask)
    for runtime in ("onnxruntime", "openvino"):
        made = exported(task, runtime)
        assert evaluate_exported(task, made).value >= evaluate_model(task, None).value - 1e-6
    recipe = Recipe((), "plain")
    lineage = packing.lineage_of(task, recipe, made)
    packed = packing.pack(made, task, recipe, lineage, tmp_path / "bundle")
    assert packed.size_bytes > 0
    files = task.save(tmp_path / "stored")
    again = load_task(path, weights=files.weights, data=files.data)
    assert again.signature == task.signature and again.data_digest == task.data_digest
    return task


# ---------------------------------------------------------------------------- several inputs and outputs

PAIR = [
    helper.make_node("Gather", ["table", "ids"], ["found"], name="look"),
    helper.make_node("Concat", ["x", "found"], ["both"], axis=1, name="join"),
    helper.make_node("MatMul", ["both", "w"], ["y"], name="product"),
    helper.make_node("Sigmoid", ["y"], ["p"], name="squash"),
]
TABLE = RANDOM.normal(size=(5, 2)).astype(np.float32)
WIDE = RANDOM.normal(size=(5, 2)).astype(np.float32)
IDS = RANDOM.integers(0, 5, 60)
PAIR_IN: list[Value] = [("x", FLOAT, ["n", "width"]), ("ids", INT64, ["n"])]
PAIR_OUT: list[Value] = [("p", FLOAT, ["n", 2]), ("y", FLOAT, ["n", 2])]


def pair(write: Write, **more: Any) -> Path:
    truth = np.concatenate([X, TABLE[IDS]], 1) @ WIDE
    given: dict[str, Any] = {"inputs__x": X, "inputs__ids": IDS, "targets__y": truth} | more
    given = {name: value for name, value in given.items() if value is not None}
    return write(PAIR, PAIR_IN, PAIR_OUT, {"table": TABLE, "w": WIDE}, **given)


def test_several_inputs_and_outputs_work(write: Write, tmp_path: Path) -> None:
    """An integer input beside a float one with open sizes; the second output is the one that is judged."""
    task = works(pair(write), tmp_path)
    assert evaluate_model(task, None).value == pytest.approx(1.0)
    assert [(spec.name, spec.datatype, spec.shape) for spec in task.signature.inputs] == [
        ("x", "FP32", (-1, 3)), ("ids", "INT64", (-1,)),
    ]  # fmt: skip
    assert [spec.name for spec in task.signature.outputs] == ["y", "p"]
    assert any("Open sizes of 'x'" in note for note in task.notes)
    made = exported(task, precision="int8")
    assert evaluate_exported(task, made).value > 0.99


def test_an_input_without_data_is_named(write: Write) -> None:
    error = refusal(pair(write, inputs__ids=None))
    assert "'ids'" in error.message and "inputs:ids" in error.remedy and "fixed:ids" in error.remedy


def test_an_output_that_is_not_there(write: Write) -> None:
    error = refusal(pair(write, targets__y=None, targets__z=IDS))
    assert "'z'" in error.message and "p, y" in error.remedy


def test_data_of_another_size(write: Write) -> None:
    error = refusal(linear(write, inputs=np.ones((60, 4), np.float32)))
    assert "'x'" in error.message and "[60, 4]" in error.message


def test_whole_numbers_that_do_not_fit(write: Write) -> None:
    error = refusal(pair(write, inputs__ids=IDS + 0.5))
    assert "'ids'" in error.message and "INT64" in error.message


# ---------------------------------------------------------------------------- control flow and state


def branching(write: Write, **more: Any) -> Path:
    """y = x @ w, or its negative, by an input that never changes; an If in an If."""

    def branch(op: str, out: str) -> Any:
        value = helper.make_tensor_value_info(out, FLOAT, None)
        return helper.make_graph([helper.make_node(op, ["y0"], [out], name=op)], out, [], [value])

    inner = helper.make_node(
        "If", ["yes"], ["i"], name="inner", then_branch=branch("Neg", "a"), else_branch=branch("Abs", "b")
    )
    outer = helper.make_graph([inner], "outer", [], [helper.make_tensor_value_info("i", FLOAT, None)])
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["y0"], name="product"),
        helper.make_node("Equal", ["rate", "wanted"], ["yes"], name="compare"),
        helper.make_node(
            "If", ["yes"], ["y"], name="choose", then_branch=outer, else_branch=branch("Identity", "c")
        ),
    ]
    weights = {"w": WEIGHT, "wanted": np.array(16000)}
    given: dict[str, Any] = {"inputs__x": X, "targets": -(X @ WEIGHT), "fixed__rate": np.array(16000)} | more
    return write(nodes, [*ONE_IN, ("rate", INT64, [])], ONE_OUT, weights, **given)


def test_a_branch_on_a_fixed_input_is_decided(write: Write, tmp_path: Path) -> None:
    task = works(branching(write), tmp_path)
    assert evaluate_model(task, None).value == pytest.approx(1.0)
    kinds = {node.op_type for node in onnx.load(str(task.onnx_file)).graph.node}
    assert "If" not in kinds and len(task.signature.inputs) == 1
    assert evaluate_exported(task, exported(task, precision="int8")).value > 0.98


def test_a_branch_on_the_data_stays(write: Write, tmp_path: Path) -> None:
    """What only the input decides cannot be folded: float works, and items come one at a time."""
    path = branching(write, inputs__rate=np.full(60, 16000), fixed__rate=X[:0])
    model = onnx.load(str(path))
    assert onnx_branches.inlined(model)[1] == 0


def test_a_fixed_value_that_is_no_input(write: Write) -> None:
    assert "'speed'" in refusal(branching(write, fixed__speed=np.array(3))).message


def recurrent(write: Write) -> Path:
    """An LSTM of 4 units over 6 steps; its state is given for a batch of one."""
    random = np.random.default_rng(1)
    weights = {
        "w": random.normal(0, 0.5, (1, 16, 3)).astype(np.float32),
        "r": random.normal(0, 0.5, (1, 16, 4)).astype(np.float32),
        "axes": np.array([1]),
        "out": random.normal(0, 1, (4, 2)).astype(np.float32),
    }
    nodes = [
        helper.make_node("Transpose", ["x"], ["steps"], perm=[1, 0, 2], name="turn"),
        helper.make_node(
            "LSTM", ["steps", "w", "r", "", "", "h"], ["", "last", ""], hidden_size=4, name="memory"
        ),
        helper.make_node("Squeeze", ["last", "zero"], ["flat"], name="flatten"),
        helper.make_node("MatMul", ["flat", "out"], ["y"], name="product"),
    ]
    items = random.normal(size=(40, 6, 3)).astype(np.float32)
    return write(
        nodes,
        [("x", FLOAT, ["n", "t", 3]), ("h", FLOAT, [1, "n", 4])],
        ONE_OUT,
        weights | {"zero": np.array([0])},
        inputs__x=items,
        fixed__h=np.zeros((1, 1, 4), np.float32),
        targets=np.arange(40) % 2,
    )


def test_state_that_is_fixed_makes_a_batch_of_one(write: Write, tmp_path: Path) -> None:
    task = works(recurrent(write), tmp_path)
    assert task.signature.inputs[0].shape == (1, 6, 3)
    assert any("batch is 1" in note for note in task.notes)
    inputs = task.required("evaluation").inputs[:5]
    instance = load_exported(exported(task, precision="int8"))
    try:
        assert run_instance(instance, task.signature, inputs).shape == (5, 2)
    finally:
        instance.close()


def test_a_loop_works(write: Write, tmp_path: Path) -> None:
    """y = x @ w, three times added to itself."""
    body = helper.make_graph(
        [
            helper.make_node("Add", ["sum", "y0"], ["next"], name="add"),
            helper.make_node("Identity", ["go"], ["on"], name="on"),
        ],
        "body",
        [
            helper.make_tensor_value_info("i", INT64, []),
            helper.make_tensor_value_info("go", BOOL, []),
            helper.make_tensor_value_info("sum", FLOAT, None),
        ],
        [helper.make_tensor_value_info("on", BOOL, []), helper.make_tensor_value_info("next", FLOAT, None)],
    )
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["y0"], name="product"),
        helper.make_node("Loop", ["times", "yes", "y0"], ["y"], name="again", body=body),
    ]
    weights = {"w": WEIGHT, "times": np.array(3), "yes": np.array(True)}
    path = write(nodes, ONE_IN, ONE_OUT, weights, inputs=X, targets=(X @ WEIGHT) * 4)
    assert evaluate_model(works(path, tmp_path), None).value == pytest.approx(1.0)


def test_answers_whose_size_depends_on_the_values_are_refused(write: Write) -> None:
    nodes = [
        helper.make_node("Relu", ["x"], ["kept"], name="clip"),
        helper.make_node("NonZero", ["kept"], ["places"], name="find"),
        helper.make_node("Transpose", ["places"], ["y"], name="turn"),
    ]
    path = write(nodes, ONE_IN, [("y", INT64, ["k", 2])], inputs=X, targets=np.zeros(60))
    error = refusal(path)
    assert "'find', NonZero" in error.message and "extract_model" in error.remedy


# ---------------------------------------------------------------------------- how files are written


def test_weights_of_constant_nodes_are_quantized(write: Write, tmp_path: Path) -> None:
    constant = helper.make_node("Constant", [], ["w"], value=numpy_helper.from_array(WEIGHT), name="c")
    path = write([constant, LINEAR], ONE_IN, ONE_OUT, inputs=X, targets=(X @ WEIGHT).argmax(1))
    task = works(path, tmp_path)
    assert exported(task, precision="int8").facts["int8_share"] == 1.0


def test_custom_metadata_is_kept(write: Write) -> None:
    task = load_task(linear(write, metadata={"character": "abc", "stride": "32"}))
    for precision in ("fp32", "int8"):
        content = exported(task, precision=precision).files["model.onnx"]
        assert onnx_graph.metadata(content) == {"character": "abc", "stride": "32"}


def test_external_weights_come_inside(write: Write, tmp_path: Path) -> None:
    path = linear(write, external=True)
    assert (tmp_path / "m.data").is_file()
    works(path, tmp_path)
    (tmp_path / "m.data").unlink()
    error = refusal(path)
    assert "'w'" in error.message and "'m.data'" in error.message and "onnx.save" in error.remedy


@pytest.mark.parametrize("opset", [9, 11, 13])
def test_old_opsets_are_converted(write: Write, tmp_path: Path, opset: int) -> None:
    task = works(linear(write, opset=opset), tmp_path)
    assert onnx.load(str(task.onnx_file)).opset_import[0].version >= onnx_graph.OLDEST_OPSET
    assert exported(task, precision="int8").facts["int8_share"] == 1.0


def test_an_operator_of_nobody_is_named(write: Write) -> None:
    node = helper.make_node("Magic", ["x"], ["y"], name="trick", domain="com.example")
    path = write([node], ONE_IN, ONE_OUT, inputs=X, targets=np.zeros(60, int))
    error = refusal(path)
    assert "'trick'" in error.message and "'Magic'" in error.message and "com.example" in error.message
    report = checking.check(path)
    assert not report.ok and any("trick" in item.found for item in report.items)


def test_texts_cannot_be_sent(write: Write) -> None:
    node = helper.make_node("Identity", ["x"], ["y"], name="same")
    path = write(
        [node], [("x", TensorProto.STRING, ["n", 1])], [("y", TensorProto.STRING, ["n", 1])],
        inputs=X, targets=np.zeros(60, int),
    )  # fmt: skip
    assert "'x'" in refusal(path).message


# ---------------------------------------------------------------------------- data


@pytest.mark.parametrize("place", ["inputs", "calibration"])
def test_nan_in_the_data_names_the_array(write: Write, place: str) -> None:
    broken = X.copy()
    broken[7, 1] = np.nan
    error = refusal(linear(write, **{place: broken}))
    assert f"'{place}'" in error.message and "NaN" in error.message


def test_too_few_items_to_calibrate_and_judge(write: Write) -> None:
    error = refusal(linear(write, inputs=X[:1], targets=np.array([0])))
    assert "1 items" in error.message and "calibration" in error.remedy


def test_rows_that_do_not_pair(write: Write) -> None:
    error = refusal(linear(write, targets=np.zeros(59, int)))
    assert "60 rows" in error.message and "59" in error.message


def test_class_numbers_beyond_the_logits(write: Write) -> None:
    assert "2 logits" in refusal(linear(write, targets=np.full(60, 5))).message


def test_classes_of_every_position(write: Write, tmp_path: Path) -> None:
    """A reader of text: logits [n, positions, classes], one class number a position."""
    node = helper.make_node("Identity", ["x"], ["y"], name="same")
    items = RANDOM.normal(size=(60, 4, 3)).astype(np.float32)
    shape = ["n", 4, 3]
    path = write([node], [("x", FLOAT, shape)], [("y", FLOAT, shape)], inputs=items, targets=items.argmax(-1))
    task = works(path, tmp_path)
    assert task.output_kind == "logits" and evaluate_model(task, None).value == 1.0


def test_the_check_reports_it_all(write: Write) -> None:
    report = checking.check(pair(write))
    assert report.ok, [(i.name, i.state, i.found) for i in report.items]
    text = " ".join(item.found for item in report.items)
    assert "ids" in text and "Open sizes of 'x'" in text


def test_intervals_of_large_answers_are_those_of_small_ones(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    """R squared of resamples by sums of squares is R squared: maps of 100 000 numbers took minutes."""
    from shoal_optimizer import evaluation

    task = load_task(linear(write, targets=X @ WEIGHT))
    wrong = X @ WEIGHT + RANDOM.normal(0, 0.1, (60, 2)).astype(np.float32)
    slow = evaluation.score(task, wrong, X @ WEIGHT)
    monkeypatch.setattr(evaluation, "LARGE_ANSWERS", 1)
    fast = evaluation.score(task, wrong, X @ WEIGHT)
    assert (fast.value, fast.low, fast.high) == pytest.approx((slow.value, slow.low, slow.high), rel=1e-6)
    assert slow.low < slow.value < slow.high
