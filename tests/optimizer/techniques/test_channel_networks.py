"""Channel pruning of residual, depthwise, grouped, concatenating and attending networks."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from shoal_optimizer import targets
from shoal_optimizer.recipe import Recipe, Step, apply
from shoal_optimizer.targets import ClassSpec
from shoal_optimizer.task import Task
from shoal_optimizer.techniques import Work
from shoal_optimizer.techniques.allocation import ALLOCATIONS
from shoal_optimizer.techniques.channels import Channels
from shoal_optimizer.techniques.importance import NAMES
from shoal_protos.errors import InvalidInput
from tests.optimizer.techniques.networks import NETWORKS, Attention, Transformer, concat, depthwise


@pytest.fixture(scope="module")
def example(quadrants: Task) -> Tensor:
    prepared: Tensor = quadrants.pre(torch.from_numpy(quadrants.required("evaluation").inputs[:2]))
    return prepared


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    return NETWORKS[name]().eval()


def pruned(task: Task, model: nn.Module, **params: object) -> nn.Module:
    found = apply(Recipe((Step("channel_pruning", params),)), task, teacher=model).model
    assert found is not None
    return found


def loss_of(task: Task, model: nn.Module) -> float:
    data = task.required("evaluation")
    outputs = torch.from_numpy(task.predict(model, data.inputs))
    return float(task.loss(outputs, torch.from_numpy(data.targets)))


@pytest.mark.parametrize("name", list(NETWORKS))
class TestNetwork:
    @pytest.mark.parametrize("allocation", ALLOCATIONS)
    def test_it_gets_smaller_computes_and_keeps_its_outputs(
        self, name: str, allocation: str, quadrants: Task, example: Tensor
    ) -> None:
        model = made(name)
        smaller = pruned(quadrants, model, ratio=0.5, allocation=allocation)
        assert smaller(example).shape == model(example).shape
        assert torch.isfinite(smaller(example)).all()
        before, after = (sum(p.numel() for p in m.parameters()) for m in (model, smaller))
        assert after < 0.7 * before
        for unit in Channels.of(smaller, example).units:
            assert unit.width % 8 == 0 and unit.width % unit.groups == 0, unit.name

    def test_after_one_short_training_the_loss_is_lower(self, name: str, quadrants: Task) -> None:
        steps = (
            Step("channel_pruning", {"ratio": 0.5}),
            Step("distillation", {"epochs": 3, "alpha": 0.0, "learning_rate": 1e-2}),
        )
        model = made(name)
        untrained = loss_of(quadrants, pruned(quadrants, model, ratio=0.5))
        trained = apply(Recipe(steps), quadrants, teacher=model).model
        assert trained is not None
        assert loss_of(quadrants, trained) < untrained

    def test_it_can_be_exported(self, name: str, quadrants: Task, local_class: ClassSpec) -> None:
        smaller = pruned(quadrants, made(name), ratio=0.5)
        exported = targets.find("onnxruntime").export(smaller, quadrants, "fp32", class_spec=local_class)
        assert exported.facts["parity_max"] < 1e-3

    @pytest.mark.parametrize("importance", NAMES)
    def test_every_importance_ranks_every_channel(
        self, name: str, importance: str, quadrants: Task, example: Tensor
    ) -> None:
        smaller = pruned(quadrants, made(name), ratio=0.5, importance=importance)
        assert smaller(example).shape == (2, 4)


def test_no_layer_of_a_depthwise_network_collapses(quadrants: Task, example: Tensor) -> None:
    """Ranked over all layers the narrow ones would vanish: `max_ratio` and `round_to` hold them."""
    for allocation in ALLOCATIONS:
        smaller = pruned(quadrants, depthwise(), ratio=0.85, allocation=allocation, max_ratio=0.75)
        for unit in Channels.of(smaller, example).units:
            assert unit.width >= 8
        convolutions = [m for m in smaller.modules() if isinstance(m, nn.Conv2d) and m.groups > 1]
        assert convolutions and all(m.groups == m.in_channels == m.out_channels for m in convolutions)
        assert all(m.groups >= 16 for m in convolutions)  # a quarter of 64


def test_channels_of_a_concatenation_are_those_of_its_branches(quadrants: Task) -> None:
    smaller = pruned(quadrants, concat(), ratio=0.5)
    inner = {n: m.out_channels for n, m in smaller.named_modules() if isinstance(m, nn.Conv2d)}
    outer = inner["body.0.0"] + inner["body.1.left.0"] + inner["body.1.right.0"]
    after = smaller.get_submodule("body.1.after.0")
    assert isinstance(after, nn.Conv2d) and after.in_channels == outer


def test_heads_of_an_attention_keep_their_size(quadrants: Task) -> None:
    attention = pruned(quadrants, Transformer(Attention(32, 4), 32), ratio=0.5).get_submodule("attention")
    assert isinstance(attention, Attention)
    assert (attention.qkv.out_features, attention.qkv.in_features) == (96, 16)
    assert (attention.proj.out_features, attention.proj.in_features) == (16, 32)


class Fixed(nn.Module):
    """One size is a constant of forward(): the channels before it cannot go."""

    def __init__(self, wide: int = 16) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, wide, 3, padding=1)
        self.narrow = nn.Conv2d(wide, 16, 3, padding=1)
        self.last = nn.Linear(16 * 64, 4)

    def forward(self, pixels: Tensor) -> Tensor:
        out: Tensor = self.last(self.narrow(torch.relu(self.stem(pixels))).reshape(-1, 1024))
        return out


def test_a_layer_that_a_constant_needs_is_left_alone_and_named(quadrants: Task) -> None:
    done = apply(Recipe((Step("channel_pruning", {"ratio": 0.5}),)), quadrants, teacher=Fixed(32).eval())
    assert done.model is not None
    assert (done.model.stem.out_channels, done.model.narrow.out_channels) == (16, 16)  # type: ignore[union-attr]
    assert any("'narrow' keeps its channels" in note and "after 'narrow'" in note for note in done.notes)


def test_a_model_in_which_nothing_can_go_is_refused_with_the_layer(quadrants: Task) -> None:
    class Only(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Conv2d(1, 16, 3), nn.Linear(576, 4)

        def forward(self, pixels: Tensor) -> Tensor:
            out: Tensor = self.last(self.first(pixels).reshape(-1, 576))
            return out

    with pytest.raises(InvalidInput, match="'first'") as caught:
        pruned(quadrants, Only().eval(), ratio=0.5)
    assert "flatten" in caught.value.remedy


def test_a_model_that_cannot_be_traced_is_refused_with_the_layer(quadrants: Task) -> None:
    class Broken(nn.Module):
        def forward(self, maps: Tensor) -> Tensor:
            return maps[:, :1] if maps.shape[0] == 2 and torch.is_grad_enabled() else maps @ torch.ones(3, 3)

    model = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), Broken(), nn.Flatten(1), nn.Linear(1024, 4))
    with pytest.raises(InvalidInput, match=r"cannot be pruned.*in '1'"):
        Channels.of(model, torch.ones(3, 1, 8, 8))


def test_rounds_train_in_between_and_end_at_the_same_widths(quadrants: Task) -> None:
    said: list[str] = []
    step = Step("channel_pruning", {"ratio": 0.75, "rounds": 3, "epochs": 1})
    done = apply(Recipe((step,)), quadrants, progress=lambda name, share, message: said.append(message)).model
    assert done is not None
    at_once = pruned(quadrants, quadrants.original, ratio=0.75)
    widths = [
        [m.out_channels for m in model.modules() if isinstance(m, nn.Conv2d)] for model in (done, at_once)
    ]
    assert widths[0] == widths[1]
    assert [n for n in (1, 2, 3) if any(f"after round {n} of 3" in message for message in said)] == [1, 2]
    assert loss_of(quadrants, done) < loss_of(quadrants, at_once)


@pytest.mark.parametrize("kind", ["macs", "parameters"])
@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_an_overall_share_is_reached(quadrants: Task, example: Tensor, kind: str, allocation: str) -> None:
    model = made("residual")
    whole = Channels.of(copy.deepcopy(model), example).costs()
    smaller = pruned(quadrants, model, ratio=0.6, of=kind, allocation=allocation, round_to=4)
    got = Channels.of(smaller, example).costs().of({}, kind) / whole.of({}, kind)
    assert 0.2 < got <= 0.4


def test_costs_of_widths_are_those_of_the_pruned_network(quadrants: Task, example: Tensor) -> None:
    for name in NETWORKS:
        channels = Channels.of(made(name), example)
        widths = {unit.name: unit.kept(0.5, 8) for unit in channels.units}
        wanted = [channels.costs().of(widths, kind) for kind in ("macs", "parameters")]
        channels.remove(widths)
        got = [Channels.of(channels.model, example).costs().of({}, kind) for kind in ("macs", "parameters")]
        assert got == pytest.approx(wanted), name


def test_taylor_keeps_what_the_loss_depends_on(quadrants: Task) -> None:
    """Weights of channels that nothing listens to are large, and go first."""
    work = Work.start(quadrants)
    model = work.module()
    first, later = model.get_submodule("4"), model.get_submodule("7")
    with torch.no_grad():
        first.weight.detach()[:16] *= 10  # type: ignore[union-attr,operator]
        later.weight.detach()[:, : 16 * 16] = 0  # type: ignore[union-attr,operator]
    kept = {}
    for importance in ("magnitude", "taylor"):
        smaller = pruned(quadrants, model, ratio=0.5, importance=importance).get_submodule("4")
        kept[importance] = float(smaller.weight.detach().abs().max())  # type: ignore[union-attr,operator,arg-type]
    assert kept["taylor"] < kept["magnitude"]


def test_equal_seeds_give_equal_networks(quadrants: Task) -> None:
    for importance in ("random", "taylor"):
        one, two = (
            quadrants.predict(
                pruned(quadrants, quadrants.original, ratio=0.5, importance=importance),
                quadrants.required("evaluation").inputs[:9],
            )
            for _ in range(2)
        )
        assert np.array_equal(one, two), importance
