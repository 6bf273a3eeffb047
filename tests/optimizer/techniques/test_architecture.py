from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from shoal_optimizer.analysis import analyse
from shoal_optimizer.modules import Resize
from shoal_optimizer.recipe import Recipe, Step, apply
from shoal_optimizer.targets import ClassSpec, find
from shoal_optimizer.targets.base import load_exported, run_instance
from shoal_optimizer.task import Task, load_module, load_task, save_module
from shoal_optimizer.techniques.architecture import Architecture, ArchitectureSpace, space_of
from shoal_optimizer.techniques.architectures import blocks, surgery
from shoal_optimizer.techniques.architectures import space as spaces_module
from shoal_optimizer.techniques.architectures.space import plan_of
from shoal_optimizer.techniques.base import Work
from shoal_protos.errors import InvalidInput, Unsupported
from tests.optimizer.techniques.families import FAMILIES, Pictures, ResNet, pictures, plain_chain


@pytest.fixture(scope="module")
def spaces() -> dict[str, tuple[Pictures, ArchitectureSpace]]:
    found = {name: pictures(name) for name in FAMILIES}
    return {name: (task, space_of(task)) for name, task in found.items()}


def made(task: Task, **params: float) -> nn.Module:
    model = Architecture().run(Work.start(task), params).model
    assert model is not None
    return model


def options(space: ArchitectureSpace) -> Iterator[tuple[str, float]]:
    for name, values in space.options.items():
        for value in values[1:]:
            yield name, value


# ---------------------------------------------------------------------------- any family


@pytest.mark.parametrize("family", FAMILIES)
def test_every_option_makes_a_smaller_network_that_answers(
    family: str, spaces: dict[str, tuple[Pictures, ArchitectureSpace]]
) -> None:
    task, space = spaces[family]
    whole = analyse(task)
    costs = {(whole.parameters, whole.macs)}
    inputs = task.required("evaluation").inputs[:4]
    for name, value in options(space):
        model = made(task, **{name: value})
        outputs = task.predict(model, inputs)
        assert outputs.shape == (4, 10) and np.isfinite(outputs).all()
        cost = analyse(task, model)
        assert cost.macs < whole.macs
        assert (cost.parameters, cost.macs) not in costs, f"{name} {value} changes nothing"
        costs.add((cost.parameters, cost.macs))
    for name, values in space.options.items():
        assert len(values) > 1 or space.reasons[name]
    smallest = made(task, **{name: values[-1] for name, values in space.options.items()})
    assert task.predict(smallest, inputs).shape == (4, 10)


def test_what_each_family_offers(spaces: dict[str, tuple[Pictures, ArchitectureSpace]]) -> None:
    found = {name: space for name, (_, space) in spaces.items()}
    assert set(found["resnet"].blocks) == {"layer1.0", "layer1.1", "layer2.1"}
    assert found["resnet"].kernels == (0, 1)
    assert found["resnet"].resolutions == (1.0, 0.75, 0.5)
    assert set(found["mobilenet"].blocks) == {f"features.{n}" for n in (1, 3, 5, 6, 8, 9, 10, 12, 13, 15, 16)}
    assert len(found["mobilenet"].widths) >= 4
    assert set(found["transformer"].blocks) == {"blocks.0", "blocks.1", "blocks.2"}
    assert found["transformer"].resolutions == (1.0,)  # as many places as patches
    assert set(found["perceptron"].blocks) == {"second", "third"}
    assert found["perceptron"].kernels == (0,) and found["perceptron"].resolutions == (1.0,)
    assert found["chain"].kernels == (0, 5, 3)
    assert found["branching"].blocks == ()  # cannot be traced: its inside stays as it is


def test_a_space_goes_through_json(spaces: dict[str, tuple[Pictures, ArchitectureSpace]]) -> None:
    for _, space in spaces.values():
        assert ArchitectureSpace.from_json(json.loads(json.dumps(space.to_json()))) == space
        assert space.size() >= len(list(options(space))) + 1


def test_a_smaller_network_is_stored_exported_and_answers_the_same(
    tmp_path: Path, local_class: ClassSpec
) -> None:
    task = pictures("resnet")
    model = made(task, width=0.5, depth=0.333, kernel=1, resolution=0.75)
    save_module(model, tmp_path / "model.pt")
    stored = load_module(tmp_path / "model.pt")
    inputs = task.required("evaluation").inputs[:6]
    wanted = task.predict(model, inputs)
    assert np.array_equal(task.predict(stored, inputs), wanted)
    for target in ("onnxruntime", "openvino"):
        exported = find(target).export(stored, task, "fp32", None, local_class)
        got = run_instance(load_exported(exported), task.signature, inputs)
        assert np.allclose(got, wanted, rtol=1e-3, atol=1e-4)
    find("coreml").export(stored, task, "fp32", None, local_class)
    find("tensorrt").export(stored, task, "fp32", None, local_class)


# ---------------------------------------------------------------------------- depth


def test_the_block_that_does_least_goes_first() -> None:
    task = pictures("resnet")
    block = task.network.get_submodule("layer2.1")
    with torch.no_grad():
        block.bn2.weight.mul_(1e-3)  # type: ignore[union-attr,operator]
        block.bn2.bias.zero_()  # type: ignore[union-attr,operator]
    plan = plan_of(task.network, task)
    assert plan.units[0].name == "layer2.1"
    assert list(plan.harms) == sorted(plan.harms)
    assert plan.harms[0] < 1e-4
    inputs = task.required("evaluation").inputs
    without = copy.deepcopy(task.network)
    surgery.without(without, plan.gone(0.667))
    assert np.allclose(task.predict(without, inputs), task.predict(task.network, inputs), atol=0.05)


def test_a_shortcut_is_told_from_a_convolution_beside_one() -> None:
    network = ResNet().eval()
    assert blocks.has_shortcut(network.layer1[0])
    assert not blocks.has_shortcut(network.layer2[0])  # its shortcut is a convolution
    assert not blocks.has_shortcut(plain_chain())


def test_measured_once_and_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = pictures("resnet")
    task.cache_dir = tmp_path
    first = space_of(task)
    (stored,) = tmp_path.glob("architecture-*.json")
    with monkeypatch.context() as patch:
        patch.setattr(blocks, "units", lambda *args: pytest.fail("measured again"))
        assert space_of(task) == first
        spaces_module._plans.clear()  # as in another process
        assert space_of(task) == first
    spaces_module._plans.clear()
    stored.write_text('{"version": 0}')
    assert space_of(task) == first
    task.network.get_parameter("fc.weight").data.mul_(2)
    space_of(task)
    assert len(list(tmp_path.glob("architecture-*.json"))) == 2


# ---------------------------------------------------------------------------- kernels and resolution


@settings(max_examples=40, deadline=None)
@given(
    kernel=st.sampled_from([3, 5, 7]), size=st.sampled_from([1, 3, 5]), dilation=st.integers(1, 2),
    stride=st.integers(1, 2), groups=st.sampled_from([1, 4]), padding=st.integers(0, 6),
)  # fmt: skip
def test_a_cut_kernel_keeps_the_shape_and_the_centre(
    kernel: int, size: int, dilation: int, stride: int, groups: int, padding: int
) -> None:
    layer = nn.Conv2d(4, 8, kernel, stride, padding, dilation, groups)
    if not surgery.cuttable(layer, size):
        assert size >= kernel or padding < (kernel - size) // 2 * dilation
        return
    smaller = surgery.cut(layer, size)
    example = torch.randn(1, 4, 20, 20)
    with torch.no_grad():
        edge = (kernel - size) // 2
        layer.weight[..., :edge, :] = 0
        layer.weight[..., kernel - edge :, :] = 0
        layer.weight[..., :, :edge] = 0
        layer.weight[..., :, kernel - edge :] = 0
        assert torch.allclose(smaller(example), layer(example), atol=1e-5)


def test_a_coarser_picture_comes_from_a_resize_or_a_wider_stride() -> None:
    layer = nn.Conv2d(3, 8, 3, padding=1)
    example = torch.randn(2, 3, 32, 32)
    for resolution, how, side in ((0.5, "pool", 16), (0.75, "pool", 24), (0.5, "stride", 16)):
        new = surgery.coarser(layer, tuple(example.shape), resolution, how)
        assert new is not None
        assert new(example).shape == (2, 8, side, side)
    assert surgery.coarser(layer, tuple(example.shape), 0.75, "stride") is None
    assert surgery.coarser(layer, (2, 3, 12, 12), 0.5, "pool") is None  # too little would be left
    assert surgery.coarser(nn.Conv1d(1, 8, 9, padding=4), (2, 1, 64), 0.5, "pool") is not None


@given(st.integers(1, 40), st.integers(1, 40))
def test_resizing_keeps_what_is_even(given_side: int, side: int) -> None:
    even = torch.full((1, 2, given_side, 40), 3.0)
    made = Resize((given_side, 40), (side, 8))(even)
    assert made.shape == (1, 2, side, 8)
    assert torch.allclose(made, torch.tensor(3.0))


def test_resizing_is_linear_and_antialiased() -> None:
    picture = torch.rand(2, 3, 32, 32)
    wanted = nn.functional.interpolate(picture, (24, 16), mode="bilinear", antialias=True)
    assert torch.allclose(Resize((32, 32), (24, 16))(picture), wanted, atol=1e-5)
    assert "24" in repr(Resize((32, 32), (24, 24)))  # networks are told apart by their text


def test_batch_norms_are_settled_on_the_data() -> None:
    task = pictures("chain")
    norm = task.network.get_submodule("1")
    norm.running_mean.fill_(50.0)  # type: ignore[operator,union-attr]
    model = copy.deepcopy(task.network)
    assert surgery.settle(model, task, task.required("training")) == 4
    settled = model.get_submodule("1")
    assert float(settled.running_mean.abs().max()) < 5  # type: ignore[operator,union-attr]
    assert settled.momentum == norm.momentum and not settled.training


# ---------------------------------------------------------------------------- refusals


def test_what_cannot_be_had_is_refused_with_what_can() -> None:
    task = pictures("perceptron")
    with pytest.raises(Unsupported, match="resolution") as caught:
        made(task, resolution=0.5)
    assert "resolution 1" in caught.value.remedy
    with pytest.raises(Unsupported, match="kernel"):
        made(task, kernel=3)


def test_as_it_is_nothing_is_changed(quadrants: Task) -> None:
    done = Architecture().run(Work.start(quadrants), {})
    assert done.notes == ("architecture: as it is",)


def test_an_onnx_file_has_no_space(tmp_path: Path, quadrants: Task) -> None:
    from shoal_optimizer.targets.onnx import float_graph

    (tmp_path / "model.onnx").write_bytes(float_graph(quadrants.original, quadrants))
    data = quadrants.required("evaluation")
    np.savez(tmp_path / "model.npz", inputs=data.inputs, targets=data.targets)
    space = space_of(load_task(tmp_path / "model.onnx"))
    assert not space.open and "ONNX" in space.reasons["width"]


# ---------------------------------------------------------------------------- declared by the task


class Declaring(Pictures):
    """Builds its smaller networks itself; the resolution it cannot change."""

    def architecture(self, width: float, depth: float, kernel: int, resolution: float) -> nn.Module:
        return ResNet(width=round(16 * width), blocks=1 + round(depth))


def test_a_declared_space_is_what_differs() -> None:
    space = space_of(Declaring(pictures("resnet").network))
    assert space.declared
    assert space.widths == (1.0, 0.75, 0.625, 0.5, 0.375, 0.25)
    assert space.depths == (1.0, 0.5)  # 0.25 and 0 build the same
    assert space.kernels == (0,) and space.resolutions == (1.0,)
    assert "kernel" in space.reasons


def test_a_declared_network_inherits_the_strongest_channels() -> None:
    network = pictures("resnet").network
    with torch.no_grad():  # the first half of the stem matters most little: prefixes would be wrong
        network.conv1.weight[:8] *= 1e-3  # type: ignore[union-attr,operator,index]
        network.bn1.weight[:8] *= 1e-3  # type: ignore[union-attr,operator,index]
        for block in network.layer1:  # type: ignore[union-attr]
            block.conv2.weight[:8] *= 1e-3
            block.bn2.weight[:8] *= 1e-3
    task = Declaring(network)
    done = Architecture().run(Work.start(task), {"width": 0.5, "depth": 0.0})
    assert "100% of its weights inherited" in done.notes[-1]
    assert done.model is not None
    stem = done.model.get_parameter("conv1.weight").detach()
    kept = network.get_parameter("conv1.weight").detach()[8:]
    assert torch.allclose(stem, kept)


def test_a_declared_network_with_other_outputs_is_refused() -> None:
    class Wrong(Declaring):
        def architecture(self, width: float, depth: float, kernel: int, resolution: float) -> nn.Module:
            return nn.Sequential(nn.Flatten(1), nn.Linear(3072, 7))

    with pytest.raises(InvalidInput, match=r"gives \[2, 7\]"):
        made(Wrong(pictures("resnet").network), width=0.5)


def test_architecture_that_raises_or_gives_no_module_is_refused() -> None:
    class Raising(Declaring):
        def architecture(self, width: float, depth: float, kernel: int, resolution: float) -> nn.Module:
            raise RuntimeError("no such width")

    class Nothing(Declaring):
        def architecture(self, width: float, depth: float, kernel: int, resolution: float) -> nn.Module:
            return None  # type: ignore[return-value]

    network = pictures("resnet").network
    assert not space_of(Raising(network)).open
    with pytest.raises(InvalidInput, match="no such width"):
        made(Raising(network), width=0.5)
    with pytest.raises(InvalidInput, match="NoneType"):
        made(Nothing(network), width=0.5)


# ---------------------------------------------------------------------------- with distillation


def test_a_smaller_network_learns_again_what_it_lost(quadrants: Task) -> None:
    data = quadrants.required("evaluation")

    def right(steps: tuple[Step, ...]) -> float:
        model = apply(Recipe(steps), quadrants).model
        assert model is not None
        outputs = quadrants.predict(model, data.inputs)
        return float((outputs.argmax(1) == data.targets).mean())

    step = Step("architecture", {"width": 0.5, "depth": 0.0})
    whole = right(())
    trained = right((step, Step("distillation", {"epochs": 8})))
    assert trained > 0.9 * whole
    assert trained >= right((step,))


def test_a_model_that_is_adapted_has_its_own_plan(quadrants: Task) -> None:
    """A recipe may start from another teacher than the task's original."""

    def identity(module: nn.Module) -> Tensor:
        return torch.cat([p.detach().flatten() for p in module.parameters()])

    teacher = copy.deepcopy(quadrants.original)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.mul_(1.5)
    model = apply(Recipe((Step("architecture", {"depth": 0.0}),)), quadrants, teacher=teacher).model
    assert model is not None
    assert torch.equal(identity(model[4]), identity(teacher[4]))  # type: ignore[index]
