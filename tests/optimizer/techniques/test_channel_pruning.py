from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from shoal_optimizer.recipe import Recipe, Step, apply
from shoal_optimizer.task import Task
from shoal_optimizer.techniques import Work
from shoal_optimizer.techniques.channel_pruning import ChannelPruning, output_layers
from shoal_protos.errors import InvalidInput


@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.5, 0.9])
def test_widths_are_rounded_and_the_output_is_kept(quadrants: Task, ratio: float) -> None:
    model = apply(Recipe((Step("channel_pruning", {"ratio": ratio}),)), quadrants).model
    assert model is not None
    widths = [layer.out_channels for layer in model.modules() if isinstance(layer, nn.Conv2d)]
    assert all(width % 8 == 0 for width in widths)
    assert quadrants.predict(model, quadrants.required("evaluation").inputs[:3]).shape == (3, 4)
    assert widths == [max(8, round(w * (1 - ratio) / 8) * 8) for w in (16, 16, 16, 32)]
    before = sum(p.numel() for p in quadrants.original.parameters())
    after = sum(p.numel() for p in model.parameters())
    assert (after == before) if ratio == 0 else (after < before)


def test_strongest_channels_stay(quadrants: Task) -> None:
    work = Work.start(quadrants)
    model = work.module()
    convolution = model[4]  # type: ignore[index]
    assert isinstance(convolution, nn.Conv2d)
    with torch.no_grad():
        convolution.weight[8:] *= 1e-3
    strongest = float(convolution.weight[:8].detach().flatten(1).norm(dim=1).max())
    pruned = ChannelPruning().run(work, {"ratio": 0.75}).module()[4]  # type: ignore[index]
    assert isinstance(pruned, nn.Conv2d)
    assert pruned.out_channels == 8
    # Inputs were pruned too, so norms shrink, but a weak channel's would be a thousandth.
    assert float(pruned.weight.detach().flatten(1).norm(dim=1).min()) > strongest / 100


def test_a_model_with_a_fixed_view_is_refused_with_a_remedy(quadrants: Task) -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Conv2d(1, 16, 3), nn.Linear(576, 4)

        def forward(self, inputs: Tensor) -> Tensor:
            out: Tensor = self.last(self.first(inputs).reshape(-1, 576))
            return out

    with pytest.raises(InvalidInput, match="cannot be pruned") as caught:
        apply(Recipe((Step("channel_pruning"),)), quadrants, teacher=Fixed().eval())
    assert "flatten" in caught.value.remedy


def test_every_layer_that_makes_outputs_keeps_its_width() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.one, self.two = nn.Linear(3, 16), nn.Linear(16, 4), nn.Linear(16, 4)

        def forward(self, inputs: Tensor) -> Tensor:
            hidden = torch.relu(self.stem(inputs))
            out: Tensor = self.one(hidden) + torch.softmax(self.two(hidden), 1)
            return out

    model = Sum()
    assert set(output_layers(model, torch.ones(2, 3))) == {model.one, model.two}
    frozen = copy.deepcopy(model).requires_grad_(False)
    assert set(output_layers(frozen, torch.ones(2, 3))) == {frozen.one, frozen.two}
