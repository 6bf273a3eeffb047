"""Training with int8 in mind: what is rounded, what is learned, and that it reaches the runtime's graph."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from shoal_optimizer import targets
from shoal_optimizer.evaluation import evaluate_exported
from shoal_optimizer.recipe import Recipe, Step, apply
from shoal_optimizer.targets import Calibration, ClassSpec, Exported
from shoal_optimizer.targets.onnx import Scheme, float_graph, quantized_graph
from shoal_optimizer.targets.pinned import tensor_ranges
from shoal_optimizer.task import Task, load_module, load_task, save_module
from shoal_optimizer.techniques import Work, find, ranges
from shoal_optimizer.techniques.fake_quantization import Grid, Simulated
from shoal_optimizer.techniques.quantization_aware import grid_of, settle
from shoal_protos.errors import Unsupported

AWARE = Step("quantization_aware", {"epochs": 2})


def activations(graph: bytes) -> dict[str, tuple[float, float]]:
    """Tensor -> (low, high) of every QuantizeLinear of an activation, from scale and zero point."""
    model = onnx.load_from_string(graph).graph
    constants = {item.name: onnx.numpy_helper.to_array(item) for item in model.initializer}
    found = {}
    for node in model.node:
        if node.op_type == "QuantizeLinear" and node.input[0] not in constants:
            scale, point = float(constants[node.input[1]]), int(constants[node.input[2]])
            name = node.input[0].removesuffix("_QuantizeLinear_Input")
            found[name] = (-point * scale, (255 - point) * scale)
    return found


@pytest.fixture(scope="module")
def trained(quadrants: Task) -> Any:
    return apply(Recipe((AWARE, Step("quantization", {"samples": 64}))), quadrants)


@pytest.fixture(scope="module")
def files(trained: Any, quadrants: Task, local_class: ClassSpec) -> Exported:
    return targets.find("onnxruntime").export(
        trained.model, quadrants, "int8", trained.calibration, local_class
    )


def test_every_range_of_the_runtimes_graph_is_the_one_that_training_learned(
    trained: Any, files: Exported, quadrants: Task
) -> None:
    learned = tensor_ranges(float_graph(trained.model, quadrants), trained.calibration.pinned)
    emitted = activations(files.files["model.onnx"])
    assert set(emitted) <= set(learned), "nothing was calibrated behind training's back"
    assert files.facts["pinned"] == len(learned)
    for name, (low, high) in emitted.items():
        step = (high - low) / 255
        assert (low, high) == pytest.approx(learned[name], abs=1.01 * step)
        assert high - low == pytest.approx(learned[name][1] - learned[name][0], rel=1e-5)


def test_as_much_runs_in_int8_as_without_training(
    files: Exported, quadrants: Task, local_class: ClassSpec
) -> None:
    plain = targets.find("onnxruntime").export(quadrants.original, quadrants, "int8", class_spec=local_class)
    assert files.facts["int8_share"] == plain.facts["int8_share"] == 1.0
    with targets.load_exported(files) as instance:
        assert instance.facts().int8_share == 1.0


def test_openvino_runs_it_in_int8_too(trained: Any, quadrants: Task, local_class: ClassSpec) -> None:
    made = targets.find("openvino").export(trained.model, quadrants, "int8", trained.calibration, local_class)
    assert made.facts["int8_share"] == 1.0


def test_what_training_saw_is_what_the_runtime_answers(trained: Any, quadrants: Task) -> None:
    """The simulation, with the learned ranges, gives the runtime's answers."""
    pixels = quadrants.required("evaluation").inputs[:64]
    simulated = Simulated(copy.deepcopy(trained.model), Grid())
    simulated.eval()
    inputs = quadrants.pre(torch.from_numpy(pixels))
    with torch.no_grad():
        simulated(inputs)  # makes the places of the ranges
        for key, place in simulated._places.items():
            known = [trained.calibration.pinned[n] for n in simulated._names[key]
                     if n in trained.calibration.pinned]  # fmt: skip
            if known:
                simulated.ranges[place] = torch.tensor(known[0])
        simulated.observing, simulated.rounding = False, True
        wanted = simulated(inputs).numpy()
    graph = float_graph(trained.model, quadrants)
    made = quantized_graph(graph, quadrants, trained.calibration, Scheme(False, False, ()))
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(made, options, providers=["CPUExecutionProvider"])
    got = session.run(None, {"pixels": pixels})[0]
    plain = trained.model(inputs).detach().numpy()
    assert np.abs(got - wanted).mean() < 0.2 * np.abs(got - plain).mean()


def test_training_regains_what_int8_loses(quadrants: Task, local_class: ClassSpec) -> None:
    """A net with channels of very different size inside: int8 of it guesses, trained it knows."""
    model: Any = copy.deepcopy(quadrants.original)
    with torch.no_grad():
        model[2].second.weight[0] *= 300
        model[2].second.bias[0] *= 300
        model[4].weight[:, 0] /= 300
    score = {}
    aware = Step("quantization_aware", {"epochs": 12, "learning_rate": 3e-3})
    for name, steps in {"plain": (), "aware": (aware,)}.items():
        applied = apply(Recipe((*steps, Step("quantization"))), quadrants, teacher=model)
        graph = quantized_graph(
            float_graph(applied.model, quadrants),
            quadrants,
            applied.calibration or Calibration(np.zeros(0)),
            Scheme.of(local_class),
        )
        made = targets.find("onnxruntime").export(applied.model, quadrants)
        int8 = Exported({"model.onnx": graph}, made.runtime, "int8", made.signature)
        score[name] = evaluate_exported(quadrants, int8).value
    assert score["plain"] < 0.9
    assert score["aware"] > score["plain"] + 0.05


# ---------------------------------------------------------------------------- ranges and modules


def test_ranges_go_along_with_a_stored_module_and_die_with_its_weights(
    trained: Any, quadrants: Task, tmp_path: Path
) -> None:
    save_module(trained.model, tmp_path / "model.pt")
    model = load_module(tmp_path / "model.pt")
    assert ranges.pinned(model) == dict(trained.calibration.pinned)
    again = apply(Recipe((Step("quantization"),)), quadrants, teacher=model)
    assert again.calibration is not None
    assert again.calibration.pinned == trained.calibration.pinned
    with torch.no_grad():
        next(model.parameters()).add_(0.01)
    assert ranges.outdated(model) and not ranges.pinned(model)
    late = apply(Recipe((Step("quantization"),)), quadrants, teacher=model)
    assert late.calibration is not None and not late.calibration.pinned
    assert any("void" in note for note in late.notes)


def test_equal_seeds_give_equal_weights_and_ranges(trained: Any, quadrants: Task) -> None:
    again = apply(Recipe((AWARE,)), quadrants)
    assert ranges.pinned(again.model) == dict(trained.calibration.pinned)


def test_the_module_is_left_without_hooks(trained: Any) -> None:
    for module in trained.model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks


def test_what_goes_into_the_ranges_stops_half_way(quadrants: Task) -> None:
    simulated = Simulated(copy.deepcopy(quadrants.original), Grid())
    simulated.train()
    norm = next(m for m in simulated.modules() if isinstance(m, nn.BatchNorm2d))
    settle(simulated, 0.4)
    assert simulated.observing and norm.training
    settle(simulated, 0.6)
    assert not simulated.observing and not norm.training
    settle(simulated, 0.1)  # it started over after a divergence
    assert simulated.observing and norm.training


@pytest.mark.parametrize(
    ("name", "isa", "wanted"),
    [
        ("x86_64.avx512vnni", ["avx2", "avx512_vnni"], Grid(8, False)),
        ("x86_64.avx2", ["avx2"], Grid(7, False)),
        ("aarch64.dotprod", ["neon"], Grid(8, True)),
    ],
)
def test_a_known_class_decides_the_types(name: str, isa: list[str], wanted: Grid) -> None:
    assert grid_of(ClassSpec.of(name, isa, {})) == wanted
    assert grid_of(None, 7) == Grid(7)


# ---------------------------------------------------------------------------- what is rounded


class Shared(nn.Module):
    """One ReLU module for two places, an in-place one, a functional sum, a concatenation: as people write."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 4, 1), nn.Conv2d(4, 4, 1)
        self.norm = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.last = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        a = self.relu(self.norm(self.first(x)))
        b = self.relu(self.second(a) + a)
        return self.last(torch.cat([a, b], 1).mean((2, 3)))  # type: ignore[no-any-return]


def test_only_names_without_doubt_are_learned() -> None:
    simulated = Simulated(Shared().eval(), Grid())
    with torch.no_grad():
        simulated(torch.randn(4, 2, 3, 3))
    assert "relu" not in simulated.learned(), "a module of two places names neither"
    assert {"first:input", "second:input", "second", "last:input", "last"} <= set(simulated.learned())
    assert "first" not in simulated.learned() and "norm" not in simulated.learned(), "fused, never in int8"


def test_rounding_leaves_values_within_half_a_step_and_weights_on_the_grid() -> None:
    values = torch.linspace(-1, 3, 1000)
    assert (Grid().round(values, -1.0, 3.0) - values).abs().max() <= 4 / 255 * 0.51
    symmetric = Grid(symmetric=True).round(values, -1.0, 3.0)
    assert (symmetric - values).abs().max() <= 3 / 127 * 0.51
    weight = torch.randn(4, 3, 2, 2)
    for bits, limit in ((8, 127), (7, 64)):
        rounded = Grid(bits).round_weight(weight, 0)
        step = weight.abs().amax((1, 2, 3), keepdim=True) / limit
        assert torch.allclose(rounded / step, (rounded / step).round(), atol=1e-3)
        assert int((rounded / step).round().abs().max()) == limit


def test_gradients_pass_inside_the_range_only() -> None:
    values = torch.tensor([-2.0, 0.5, 5.0], requires_grad=True)
    Grid().round(values, 0.0, 1.0).sum().backward()  # type: ignore[no-untyped-call]
    assert values.grad is not None and values.grad.tolist() == [0.0, 1.0, 0.0]


def test_a_model_with_nothing_to_round_is_refused(write_task: Callable[[str], Path]) -> None:
    path = write_task(
        "import numpy as np, torch\n"
        "from torch import nn\n"
        "from shoal_optimizer import Task, TensorSpec\n"
        "class Scaled(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.factor = nn.Parameter(torch.ones(3))\n"
        "    def forward(self, x): return torch.tanh(x) / self.factor\n"
        "class Given(Task):\n"
        "    input = TensorSpec('x', 'FP32', (-1, 3))\n"
        "    output_kind = 'logits'\n"
        "    def model(self): return Scaled()\n"
        "    def training(self): return self.evaluation()\n"
        "    def evaluation(self): return np.eye(9, 3, dtype=np.float32), np.zeros(9, np.int64)\n"
    )
    with pytest.raises(Unsupported, match="No convolution"):
        find("quantization_aware").run(Work.start(load_task(path)), {})
