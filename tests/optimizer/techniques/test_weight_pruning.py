from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper
from torch import Tensor, nn
from torch.nn.utils import prune

from shoal_optimizer import targets
from shoal_optimizer.evaluation import evaluate_model
from shoal_optimizer.recipe import Recipe, Step, apply
from shoal_optimizer.targets import ClassSpec
from shoal_optimizer.task import Task, load_module, load_task, save_module
from shoal_optimizer.techniques import Work, masks
from shoal_optimizer.techniques.weight_pruning import Schedule, WeightPruning
from shoal_protos.errors import InvalidInput, Unsupported

PRUNE = Step("weight_pruning", {"sparsity": 0.8, "epochs": 6, "learning_rate": 3e-3})


@pytest.fixture(scope="module")
def pruned(quadrants: Task) -> nn.Module:
    model = apply(Recipe((PRUNE,)), quadrants).model
    assert model is not None
    return model


def zeros(model: nn.Module) -> dict[str, Tensor]:
    return {weight.name: weight.tensor.detach() == 0 for weight in masks.weights(model)}


def test_as_many_weights_go_as_asked_and_accuracy_stays(quadrants: Task, pruned: nn.Module) -> None:
    assert masks.zero_share(pruned) == pytest.approx(0.8, abs=0.001)
    original = evaluate_model(quadrants, quadrants.original).value
    assert evaluate_model(quadrants, pruned).value >= original - 0.03
    for weight in masks.weights(pruned):
        assert bool((weight.tensor != 0).any()), weight.name


def test_the_note_gives_compressed_bytes_and_claims_no_speed(quadrants: Task) -> None:
    done = apply(Recipe((Step("weight_pruning", {"epochs": 0}),)), quadrants)
    (note,) = done.notes
    assert "80.0% of the weights are zero" in note and "not faster" in note
    before, after = (int(word) for word in note.split("compressed weights ")[1].split()[0::2][:2])
    assert after < 0.4 * before


def test_files_get_smaller_on_the_wire_also_as_int8(
    quadrants: Task, pruned: nn.Module, local_class: ClassSpec
) -> None:
    target = targets.find("onnxruntime")
    for precision in ("fp32", "int8"):
        dense = target.export(quadrants.original, quadrants, precision, class_spec=local_class)
        sparse = target.export(pruned, quadrants, precision, class_spec=local_class)
        assert sparse.wire_bytes < 0.6 * dense.wire_bytes
        assert sparse.size_bytes == pytest.approx(dense.size_bytes, rel=0.02)


def test_int8_keeps_the_zeros_exactly(quadrants: Task, pruned: nn.Module, local_class: ClassSpec) -> None:
    exported = targets.find("onnxruntime").export(pruned, quadrants, "int8", class_spec=local_class)
    graph = onnx.load_from_string(exported.files["model.onnx"]).graph
    stored = [numpy_helper.to_array(item) for item in graph.initializer]
    weights = [array for array in stored if array.dtype.name == "int8" and array.ndim >= 2]
    wanted = sum(int(mask.sum()) for mask in zeros(pruned).values())
    assert len(weights) == len(masks.weights(pruned))
    assert sum(int((array == 0).sum()) for array in weights) >= wanted


@pytest.mark.parametrize("step", [Step("distillation", {"epochs": 1}), PRUNE])
def test_later_training_keeps_the_zeros(quadrants: Task, pruned: nn.Module, step: Step) -> None:
    after = apply(Recipe((step,)), quadrants, teacher=pruned).model
    assert after is not None
    for name, mask in zeros(pruned).items():
        assert bool(zeros(after)[name][mask].all()), name


def test_zeros_are_kept_behind_channel_pruning_and_a_stored_file(
    quadrants: Task, pruned: nn.Module, tmp_path: Path
) -> None:
    save_module(pruned, tmp_path / "pruned.pt")
    steps = (Step("channel_pruning", {"ratio": 0.5}), Step("distillation", {"epochs": 1}))
    before = apply(Recipe(steps[:1]), quadrants, teacher=load_module(tmp_path / "pruned.pt")).model
    after = apply(Recipe(steps), quadrants, teacher=load_module(tmp_path / "pruned.pt")).model
    assert before is not None and after is not None
    assert masks.zero_share(before) > 0.3
    for name, mask in zeros(before).items():
        assert bool(zeros(after)[name][mask].all()), name


def test_the_schedule_is_cubic_and_starts_at_what_is_zero_already(quadrants: Task) -> None:
    schedule = Schedule(masks.copied(quadrants.original), 0.8, 0.5)
    assert [schedule.target(share) for share in (0.0, 0.25, 0.5, 1.0)] == pytest.approx([0, 0.7, 0.8, 0.8])
    half = masks.copied(quadrants.original)
    masks.apply(masks.weights(half), masks.by_magnitude(masks.weights(half), 0.5))
    assert Schedule(half, 0.8, 0.5).target(0) == pytest.approx(0.5, abs=0.01)
    assert Schedule(half, 0.1, 0.5).target(1) == pytest.approx(0.5, abs=0.01)


def test_a_second_start_of_training_forgets_the_masks_of_the_first(quadrants: Task) -> None:
    model = masks.copied(quadrants.original)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    schedule = Schedule(model, 0.8, 0.5)
    schedule(0.9)
    model.load_state_dict(state)
    schedule(0.01)
    assert masks.zero_share(model) < 0.1


def test_a_model_that_the_user_pruned_is_taken_as_it_is(quadrants: Task) -> None:
    """As in torch's own tutorial: the masks are still parametrizations when the model is handed over."""
    user = quadrants.network()  # type: ignore[attr-defined]
    for layer in user.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            prune.l1_unstructured(layer, "weight", amount=0.3)  # type: ignore[no-untyped-call]
            if layer.bias is not None:
                prune.random_unstructured(layer, "bias", amount=0.5)  # type: ignore[no-untyped-call]
    inputs = quadrants.required("evaluation").inputs[:9]
    wanted = quadrants.predict(user.eval(), inputs)
    done = apply(Recipe((Step("distillation", {"epochs": 1}),)), quadrants, teacher=user)
    assert done.model is not None and not any("_orig" in name for name in done.model.state_dict())
    assert any("_orig" in name for name in user.state_dict())  # the user's own is left alone
    assert masks.zero_share(done.model) == pytest.approx(0.3, abs=0.01)
    biases = [tensor for name, tensor in done.model.state_dict().items() if name == "0.bias"]
    assert [int((bias == 0).sum()) for bias in biases] == [8]
    plain = apply(Recipe(), quadrants, teacher=user).model
    assert plain is not None
    assert quadrants.predict(plain, inputs) == pytest.approx(wanted, abs=1e-6)


def test_a_task_may_give_a_pruned_model(write_task: Callable[[str], Path]) -> None:
    task = load_task(
        write_task(
            "import numpy as np\n"
            "from torch import nn\n"
            "from torch.nn.utils import prune\n"
            "from shoal_optimizer import Task, TensorSpec\n"
            "class Small(Task):\n"
            "    input = TensorSpec('x', 'FP32', (-1, 6))\n"
            "    output_kind = 'logits'\n"
            "    def model(self):\n"
            "        layer = nn.Linear(6, 4)\n"
            "        prune.l1_unstructured(layer, 'weight', amount=0.5)\n"
            "        return layer\n"
            "    def evaluation(self): return np.ones((9, 6), np.float32), np.zeros(9, np.int64)\n"
        )
    )
    assert masks.zero_share(task.original) == 0.5
    assert targets.find("onnxruntime").export(task.original, task).facts["parity_max"] < 1e-4


class TestPattern:
    SPARSE = ClassSpec.of("gpu", {"sparsity_2:4"}, {})

    def test_it_is_made_for_a_class_that_skips_zeros(self, quadrants: Task) -> None:
        done = apply(
            Recipe((Step("weight_pruning", {"pattern": "2:4", "epochs": 1}),)),
            quadrants,
            class_spec=self.SPARSE,
        )
        assert done.model is not None
        for name, mask in zeros(done.model).items():
            if mask.shape[1] % 4 == 0:
                groups = mask.movedim(1, -1).reshape(-1, 4).sum(1)
                assert bool((groups >= 2).all()), name
        assert any("not in the pattern 2:4: 0.weight" in note for note in done.notes)  # one input channel

    @pytest.mark.parametrize("spec", [None, ClassSpec.of("cpu", {"avx2"}, {}), SPARSE])
    def test_it_is_refused_with_the_reason_elsewhere(self, quadrants: Task, spec: ClassSpec | None) -> None:
        pattern = "1:4" if spec is self.SPARSE else "2:4"
        with pytest.raises(Unsupported, match="gain nothing") as caught:
            apply(Recipe((Step("weight_pruning", {"pattern": pattern}),)), quadrants, class_spec=spec)
        assert f"sparsity_{pattern}" in caught.value.remedy


def test_a_model_without_weights_is_refused(quadrants: Task) -> None:
    with pytest.raises(InvalidInput, match="no convolution"):
        WeightPruning().run(Work.start(quadrants, teacher=nn.Sequential(nn.ReLU(), nn.Flatten())), {})


def test_recurrent_and_shared_weights_are_found_once() -> None:
    first = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": first, "b": first, "c": nn.LSTM(4, 4), "d": nn.Embedding(4, 4)})
    assert [w.name for w in masks.weights(model)] == ["a.weight", "c.weight_ih_l0", "c.weight_hh_l0"]


@settings(max_examples=40, deadline=None)
@given(
    share=st.floats(0, 0.97),
    widths=st.lists(st.integers(1, 30), min_size=1, max_size=4),
    equal=st.booleans(),
)
def test_masks_meet_the_share_and_leave_every_layer_something(
    share: float, widths: list[int], equal: bool
) -> None:
    model = nn.Sequential(*[nn.Linear(5, width) for width in widths])
    if equal:
        for parameter in model.parameters():
            parameter.data.fill_(1.0)
    chosen = masks.weights(model)
    found = masks.by_magnitude(chosen, share)
    masks.apply(chosen, found)
    total = sum(weight.tensor.numel() for weight in chosen)
    kept = sum(max(1, round(masks.LEAST_KEPT * weight.tensor.numel())) for weight in chosen)
    assert int(sum((w.tensor == 0).sum() for w in chosen)) == min(round(share * total), total - kept)
    assert all(bool((weight.tensor != 0).any()) for weight in chosen)
    assert torch.isfinite(torch.cat([w.tensor.flatten() for w in chosen])).all()
