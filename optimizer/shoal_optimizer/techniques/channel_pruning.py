"""Structured pruning: whole channels go, through the dependency graph of torch-pruning."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from shoal_optimizer.techniques import allocation, importance
from shoal_optimizer.techniques.base import Parameter, Technique, Work
from shoal_optimizer.techniques.channels import Channels, pruned
from shoal_optimizer.techniques.outputs import output_layers
from shoal_optimizer.techniques.training import TrainingPlan, fine_tune
from shoal_protos.errors import InvalidInput

if TYPE_CHECKING:
    from torch import nn

    from shoal_optimizer.sensitivity import SensitivityMap

__all__ = ["ChannelPruning", "layer_ratios", "output_layers"]


class ChannelPruning(Technique):
    """Removes the least important channels. Always fine-tune afterwards: accuracy collapses.

    Channel counts are rounded to a multiple of `round_to`, one at least: kernels run full vectors, and
    unrounded nets were measured slower than unpruned ones. The layer that makes the outputs keeps
    its width; pre- and postprocessing are outside the module and untouched.
    """

    name: ClassVar[str] = "channel_pruning"
    parameters: ClassVar[Mapping[str, Parameter]] = {
        "ratio": Parameter(0.5, 0.0, 0.95, help="share removed: of each layer's channels, or see `of`"),
        "round_to": Parameter(8, 1, 256, help="channel counts become multiples of this"),
        "allocation": Parameter(
            "uniform",
            choices=allocation.ALLOCATIONS,
            help="uniform = the same share everywhere; sensitivity = most where it was measured to harm "
            "least; global = the least important channels of all layers together",
        ),
        "of": Parameter(
            "channels",
            choices=allocation.KINDS,
            help="what `ratio` is a share of: each layer's channels, or all multiply-adds or parameters",
        ),
        "max_ratio": Parameter(0.9, 0.0, 0.99, help="no layer loses a larger share of its channels"),
        "importance": Parameter("magnitude", choices=importance.NAMES, help="which channels go first"),
        "rounds": Parameter(1, 1, 20, help="prune in so many parts, with fine-tuning between them"),
        "epochs": Parameter(1, 1, 100, help="passes of fine-tuning between two rounds"),
        "learning_rate": Parameter(2e-3, 1e-6, 1.0, help="peak of the schedule between two rounds"),
        "alpha": Parameter(0.7, 0.0, 1.0, help="weight of the teacher between two rounds"),
    }

    def transform(self, work: Work, params: Mapping[str, Any]) -> Work:
        from shoal_optimizer.task import seeded
        from shoal_optimizer.techniques.architectures.blocks import example_of

        model = work.module()
        example = example_of(work.task)
        work.task.guard("model()", lambda: model.eval()(example))
        before = sum(p.numel() for p in model.parameters())
        choice = _Choice(work, params, model)
        rounds = int(params["rounds"])
        if rounds > 1:
            work.training_data()  # refuses before anything is pruned
        notes: list[str] = []
        for number in range(1, rounds + 1):
            work.checkpoint()
            choice.part = number / rounds
            with seeded(work.seed):
                model, channels = pruned(model, example, choice, params["importance"], choice.left_alone)
            choice.left_alone = channels.left_alone
            model.zero_grad(set_to_none=True)
            if number < rounds:
                self._recover(work, model, params, number, notes)
        after = sum(p.numel() for p in model.parameters())
        done = replace(work, model=model.eval()).note(f"channel pruning: {before} -> {after} parameters")
        for text in (*choice.notes, *notes):
            done = done.note(f"channel pruning: {text}")
        for name, why in choice.left_alone.items():
            done = done.note(f"channel pruning: '{name}' keeps its channels, since without some {why}")
        return done

    def _recover(
        self, work: Work, model: nn.Module, params: Mapping[str, Any], number: int, notes: list[str]
    ) -> None:
        rounds = int(params["rounds"])
        plan = TrainingPlan(
            epochs=params["epochs"],
            learning_rate=params["learning_rate"],
            alpha=params["alpha"],
            seed=work.seed + number,
        )
        fine_tune(
            work,
            model,
            plan,
            lambda share, message: work.progress(
                self.name, (number - 1 + share) / rounds, f"after round {number} of {rounds}, {message}"
            ),
            note=notes.append,
            seconds=work.seconds_left(1 / (rounds - number + 1)),
        )


class _Choice:
    """New widths for the units of a model; the last ones are decided once, on the model as it came."""

    def __init__(self, work: Work, params: Mapping[str, Any], model: nn.Module) -> None:
        self.work, self.params = work, params
        self.part = 1.0
        self.left_alone: dict[str, str] = {}
        self.notes: list[str] = []
        self._original = copy.deepcopy(model)
        self._whole: dict[str, int] = {}
        self._last: dict[str, int] = {}
        self._excluded: frozenset[str] | None = None

    def __call__(self, channels: Channels) -> dict[str, int]:
        if not channels.units:
            raise InvalidInput(
                "The model cannot be pruned by channels: it has no layer whose channels could go.",
                "Leave channel_pruning out of the recipe.",
            )
        if self.params["importance"] == "taylor":
            data = self.work.training or self.work.task.calibration_data()
            importance.gradients(channels.model, self.work.task, data, self.work.seed)
        if self._excluded != frozenset(channels.left_alone):  # the first round, or one layer fewer
            self._excluded = frozenset(channels.left_alone)
            self._whole = {unit.name: unit.width for unit in channels.units}
            self._last = self._decide(channels)
        return allocation.between(self._whole, self._last, self.part, channels.units, self.params["round_to"])

    def _decide(self, channels: Channels) -> dict[str, int]:
        ratio, round_to = self.params["ratio"], self.params["round_to"]
        kind, most = self.params["of"], self.params["max_ratio"]
        even = allocation.uniform(channels.units, ratio, round_to, most)
        if self.params["allocation"] == "uniform" and kind == "channels":
            return even
        costs = channels.costs()
        if self.params["allocation"] == "uniform":
            return allocation.reaching(costs, ratio, kind, round_to, most)
        if kind == "channels":  # as many multiply-adds as a uniform network would have
            kind, limit = "macs", costs.of(even, "macs")
        else:
            limit = (1 - ratio) * costs.of({}, kind)
        loss = self._measured() if self.params["allocation"] == "sensitivity" else self._judged(channels)
        widths = allocation.least_loss(costs, limit, kind, loss, round_to, most)
        self.notes = [_said(channels, widths)]
        return widths

    def _measured(self) -> allocation.Loss:
        found = self.map()
        return lambda unit, width: found.loss(unit.name, 1 - width / unit.width)

    def map(self) -> SensitivityMap:
        from shoal_optimizer.sensitivity import channel_map

        work = self.work
        return channel_map(
            work.task,
            model=self._original,
            importance=self.params["importance"],
            progress=lambda share, message: work.progress(ChannelPruning.name, share / 2, message),
            cancelled=work.cancelled,
        )

    def _judged(self, channels: Channels) -> allocation.Loss:
        """Sums of the importances of the channels that go, their mean being 1 in every unit but for
        lamp, which compares layers by itself."""
        sums: dict[str, list[float]] = {}
        for unit in channels.units:
            found = channels.scores(unit, self.params["importance"])
            if self.params["importance"] != "lamp":
                found = found / found.mean().clamp(min=1e-12)
            running = found.sort().values.cumsum(0).tolist()
            sums[unit.name] = [0.0, *running]
        return lambda unit, width: sums[unit.name][unit.width - width]


def _said(channels: Channels, widths: Mapping[str, int]) -> str:
    shown = [f"{u.name} {u.width} -> {widths[u.name]}" for u in channels.units]
    return "widths " + ", ".join(shown[:40]) + ("..." if len(shown) > 40 else "")


def layer_ratios(model: Any, ratio: float, round_to: int) -> dict[Any, float]:
    """layer -> the share to remove so that a multiple of `round_to` channels stays, one at least."""
    from torch import nn

    found = {}
    for layer in model.modules():
        width = getattr(layer, "out_channels", getattr(layer, "out_features", None))
        if not isinstance(layer, nn.Module) or not isinstance(width, int):
            continue
        kept = min(width, max(round_to, round(width * (1 - ratio) / round_to) * round_to))
        found[layer] = 0.0 if kept == width else 1 - kept / width
    return found
