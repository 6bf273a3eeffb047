"""The channels of a torch model that can only go together, and removing them.

A `Unit` is such a set: a residual sum, a depthwise convolution behind another one and a concatenation tie
the channels of several layers. The dependency graph is torch-pruning's (Fang et al., "DepGraph: Towards
Any Structural Pruning", 2023); what is removed, how many, and what is left alone is decided here.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from shoal_optimizer.hooks import watching
from shoal_optimizer.techniques import importance as scores
from shoal_optimizer.techniques.outputs import head_layers, output_layers, where_it_fails
from shoal_protos.errors import InvalidInput, MissingExtra

if TYPE_CHECKING:
    from torch import Tensor, nn

REMEDY = "Avoid fixed sizes in forward() (reshape(-1, 512)); use flatten(1)."


@dataclass(frozen=True)
class Unit:
    """Channels that go together.

    Attributes:
        name: path of the first layer that makes them.
        width: how many there are.
        groups: they go in equal numbers from so many equal parts (grouped convolutions and norms, heads).
        outputs, inputs: layer path -> how many of its output and input channels these are.
    """

    name: str
    width: int
    groups: int
    outputs: Mapping[str, int]
    inputs: Mapping[str, int]

    def kept(self, ratio: float, round_to: int) -> int:
        """Channels that stay when `ratio` go: the nearest multiple of `round_to` and of the groups,
        one at least; all of them where they are fewer than that."""
        step = math.lcm(round_to, self.groups)
        return min(self.width, max(step, round(self.width * (1 - ratio) / step) * step))

    def widths(self, round_to: int, max_ratio: float = 1.0) -> tuple[int, ...]:
        """All widths it can have, its own first. At least 1 - `max_ratio` of the channels stay."""
        step = math.lcm(round_to, self.groups)
        least = max(step, math.ceil(self.width * (1 - max_ratio) / step - 1e-9) * step)
        return (self.width, *(w for w in range(self.width - 1, least - 1, -1) if w % step == 0))


@dataclass(frozen=True)
class Cost:
    """Multiply-adds of one item and weights of a convolution or linear layer, and its channels."""

    macs: int
    parameters: int
    outputs: int
    inputs: int  # 0 where they follow the outputs, as in depthwise convolutions


@dataclass(frozen=True)
class Costs:
    """What a network costs at given widths of its units; convolutions and linear layers count."""

    layers: Mapping[str, Cost]
    units: tuple[Unit, ...]

    def of(self, widths: Mapping[str, int], kind: str) -> float:
        """`kind`: "macs" or "parameters". Units that are not named keep their width."""
        gone_out: dict[str, float] = {}
        gone_in: dict[str, float] = {}
        for unit in self.units:
            share = 1 - widths.get(unit.name, unit.width) / unit.width
            for gone, members in ((gone_out, unit.outputs), (gone_in, unit.inputs)):
                for layer, count in members.items():
                    gone[layer] = gone.get(layer, 0.0) + share * count
        total = 0.0
        for name, cost in self.layers.items():
            left = 1 - gone_out.get(name, 0.0) / cost.outputs
            if cost.inputs:
                left *= 1 - gone_in.get(name, 0.0) / cost.inputs
            total += left * getattr(cost, kind)
        return total


@dataclass
class Channels:
    """A model with the units of channels that can be removed from it, in place."""

    model: nn.Module
    example: Tensor
    units: tuple[Unit, ...] = ()
    groups: dict[str, Any] = field(default_factory=dict)
    left_alone: dict[str, str] = field(default_factory=dict)  # unit -> why its channels stay

    @classmethod
    def of(cls, model: nn.Module, example: Tensor, left_alone: Mapping[str, str] | None = None) -> Channels:
        """Finds the units. The layers that make the model's outputs keep their channels, and so do those
        that make the heads of an attention: their number and size is often a constant in forward().

        Args:
            example: what the model gets, float32 [2, ...].
            left_alone: units that shall not be touched, with the reason.

        Raises:
            InvalidInput: the model cannot be traced.
        """
        for parameter in model.parameters():
            parameter.requires_grad_(True)  # tracing follows gradients
        found = cls(model, example, left_alone=dict(left_alone or {}))
        with _quiet():
            try:
                found._trace()
            except InvalidInput:
                raise
            except Exception as error:  # whatever a user's forward() raises
                raise InvalidInput(
                    f"The model cannot be pruned by channels: {where_it_fails(model, example)}"
                    f"{type(error).__name__}: {error}.",
                    "Make forward() traceable: tensors in, one tensor out, no control flow on values.",
                ) from error
        return found

    def _trace(self) -> None:
        try:
            import torch_pruning
        except ImportError as error:
            raise MissingExtra("optimizer", "torch-pruning") from error
        from torch import nn
        from torch.nn.modules.conv import _ConvNd

        names = {layer: name for name, layer in self.model.named_modules()}
        self.model.eval()
        graph = torch_pruning.DependencyGraph().build_dependency(self.model, self.example)
        fixed = [*output_layers(self.model, self.example), *head_layers(self.model, self.example)]
        units = []
        for group in graph.get_all_groups(ignored_layers=fixed, root_module_types=[_ConvNd, nn.Linear]):
            unit = _unit(graph, group, names)
            if unit is not None and unit.name not in self.left_alone:
                units.append(unit)
                self.groups[unit.name] = (graph, group)
        self.units = tuple(units)

    def ratios(self, widths: Mapping[str, int]) -> dict[str, float]:
        return {u.name: 1 - widths[u.name] / u.width for u in self.units if u.name in widths}

    def scores(self, unit: Unit, importance: str) -> Tensor:
        """Importance of each channel of a unit, float32 [width]."""
        return scores.of_group(self.groups[unit.name][1], unit.width, importance)

    def remove(self, widths: Mapping[str, int], importance: str = "magnitude") -> None:
        """Removes the least important channels until the units named have these widths.

        The units are used up by this: make new `Channels` to go on.

        Raises:
            InvalidInput: the model does not compute afterwards, or has another output; the model is
                then spoilt.
        """
        import torch

        with _quiet():
            with torch.no_grad():
                wanted = self.model(self.example).shape
            chosen = [
                (unit, weakest(self.scores(unit, importance), unit.groups, unit.width - widths[unit.name]))
                for unit in self.units
                if widths.get(unit.name, unit.width) < unit.width
            ]
            for unit, gone in chosen:
                self._cut(unit, gone)
            try:
                with torch.no_grad():
                    got = self.model(self.example).shape
            except Exception as error:
                raise InvalidInput(
                    f"The model does not compute after pruning: {where_it_fails(self.model, self.example)}"
                    f"{type(error).__name__}: {error}.",
                    REMEDY,
                ) from error
        if got != wanted:
            raise InvalidInput(
                f"Pruning changed the output from {list(wanted)} to {list(got)}.",
                "End the model with one linear or convolutional layer.",
            )

    def _cut(self, unit: Unit, gone: Sequence[int]) -> None:
        graph, whole = self.groups[unit.name]
        root = whole[0].dep
        group = graph.get_pruning_group(root.target.module, root.handler, list(gone))
        try:
            if not graph.check_pruning_group(group):
                return  # a layer would be left without channels
            group.prune()
        except Exception as error:
            raise InvalidInput(
                f"The channels of '{unit.name}' cannot be removed: {type(error).__name__}: {error}.",
                "Leave its size to other layers, or make it no multiple of a fixed number.",
            ) from error

    def costs(self) -> Costs:
        return Costs(_costs(self.model, self.example), self.units)


def pruned(
    model: nn.Module,
    example: Tensor,
    choose: Callable[[Channels], dict[str, int]],
    importance: str,
    left_alone: Mapping[str, str] | None = None,
) -> tuple[nn.Module, Channels]:
    """A model with fewer channels, and the units it had.

    Units that break forward() are found one by one and left as they are: see `Channels.left_alone`.

    Args:
        choose: from `Channels` to new widths, name -> channels.

    Raises:
        InvalidInput: it cannot be pruned; the message names the layer.
    """
    channels = Channels.of(model, example, left_alone)
    spare = copy.deepcopy(model)
    widths = choose(channels)
    try:
        channels.remove(widths, importance)
        return model, channels
    except InvalidInput as error:
        bad = _bad_units(spare, example, widths, left_alone or {})
        cured = set(bad) < {u.name for u in channels.units} and bad
        if not cured:
            raise _refusal(error, bad) from error
    channels = Channels.of(spare, example, {**(left_alone or {}), **bad})
    channels.remove(choose(channels), importance)
    return spare, channels


def _refusal(error: InvalidInput, bad: Mapping[str, str]) -> InvalidInput:
    if not bad:
        return InvalidInput(f"The model cannot be pruned by channels: {error.message}", error.remedy)
    name, why = next(iter(bad.items()))
    return InvalidInput(
        f"The model cannot be pruned by channels: without some of the channels of '{name}' {why}", REMEDY
    )


def _bad_units(
    model: nn.Module, example: Tensor, widths: Mapping[str, int], left_alone: Mapping[str, str]
) -> dict[str, str]:
    """Units whose pruning alone breaks the model -> why."""
    found = {}
    names = [u.name for u in Channels.of(copy.deepcopy(model), example, left_alone).units]
    for name in names:
        alone = Channels.of(copy.deepcopy(model), example, left_alone)
        unit = next((u for u in alone.units if u.name == name), None)
        if unit is None or widths.get(name, unit.width) >= unit.width:
            continue
        try:
            alone.remove({name: widths[name]})
        except InvalidInput as error:
            found[name] = error.message[:1].lower() + error.message[1:]
    return found


def weakest(scores: Tensor, groups: int, count: int) -> list[int]:
    """Indices of the `count` channels of least importance, equally many from each of the `groups`.

    Within grouped channels the same places go from every part, by their mean importance.
    """
    parts = scores.reshape(groups, -1)
    places = parts.mean(0).argsort(stable=True)[: count // groups]
    size = parts.shape[1]
    return sorted(int(place) + part * size for part in range(groups) for place in places)


def _unit(graph: Any, group: Any, names: Mapping[Any, str]) -> Unit | None:
    from torch import nn

    outputs: dict[str, int] = {}
    inputs: dict[str, int] = {}
    groups = 1
    root = group[0].dep.target.module
    width = len(group[0].idxs)
    for dep, idxs in group:
        layer = dep.target.module
        if layer not in names:
            continue
        pruner = graph.get_pruner_of_module(layer)
        out = graph.is_out_channel_pruning_fn(dep.handler)
        where = outputs if out else inputs
        where[names[layer]] = where.get(names[layer], 0) + len(idxs)
        parts = pruner.get_out_channel_groups(layer) if out else pruner.get_in_channel_groups(layer)
        if isinstance(layer, nn.MultiheadAttention):
            parts = layer.num_heads
        if parts > 1 and not _is_depthwise(layer):
            groups = math.lcm(groups, parts)
    makers = [name for layer, name in names.items() if name in outputs and not _is_depthwise(layer)]
    if width < 2 or width % groups:
        return None
    named = next((n for n in makers if n == names[root]), makers[0] if makers else names[root])
    return Unit(named, width, groups, outputs, inputs)


def _is_depthwise(layer: Any) -> bool:
    return getattr(layer, "groups", 1) > 1 and layer.groups == getattr(layer, "out_channels", 0)


def _costs(model: nn.Module, example: Tensor) -> dict[str, Cost]:
    import torch
    from torch import nn
    from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

    found: dict[str, Cost] = {}

    def hook(name: str) -> Any:
        def record(layer: Any, args: Any, output: Tensor) -> None:
            items, weight = len(example), layer.weight
            places = args[0].numel() if isinstance(layer, _ConvTransposeNd) else output.numel()
            outputs = getattr(layer, "out_channels", getattr(layer, "out_features", 0))
            inputs = getattr(layer, "in_channels", getattr(layer, "in_features", 0))
            macs = places // items * weight[0].numel()
            if name in found:  # used more than once
                macs += found[name].macs
            found[name] = Cost(macs, weight.numel(), outputs, 0 if _is_depthwise(layer) else inputs)

        return record

    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, (_ConvNd, nn.Linear))]
    with watching((layer, hook(name)) for name, layer in layers), torch.no_grad():
        model(example)
    return found


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
