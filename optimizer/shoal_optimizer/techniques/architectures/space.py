"""What can be varied in a task's network, found once and kept by content."""

from __future__ import annotations

import copy
import json
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shoal_optimizer.techniques.architectures import blocks, surgery
from shoal_optimizer.techniques.architectures.blocks import Unit
from shoal_optimizer.techniques.masks import copied
from shoal_protos.bundle import canonical_json, digest_of
from shoal_protos.errors import ShoalError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from shoal_optimizer.task import Task

WIDTHS = (0.5, 0.25, 0.75, 0.375, 0.625)  # of equal ones the first is named
DEPTHS = (0.75, 0.5, 0.25, 0.0)
KERNELS = (5, 3, 1)
RESOLUTIONS = (0.75, 0.5)
ROUND_TO = 8
_VERSION = 1
_MACS = 2e10  # that one look may cost: half a second or so of one core
_MOST_ITEMS, _LEAST_ITEMS = 64, 8


@dataclass(frozen=True)
class ArchitectureSpace:
    """Values of each parameter of the technique `architecture` that make a difference, the original's first.

    Attributes:
        widths: shares of channels kept. depths: shares of the blocks that can go that are kept.
        kernels: largest kernel size, 0 = as it is. resolutions: shares of the input's sides.
        declared: the task builds the networks itself (`Task.architecture`).
        blocks: names of what can go, least harmful first.
        reasons: parameter -> why it offers nothing.
    """

    widths: tuple[float, ...] = (1.0,)
    depths: tuple[float, ...] = (1.0,)
    kernels: tuple[int, ...] = (0,)
    resolutions: tuple[float, ...] = (1.0,)
    declared: bool = False
    blocks: tuple[str, ...] = ()
    reasons: Mapping[str, str] = field(default_factory=dict)

    @property
    def options(self) -> dict[str, tuple[Any, ...]]:
        """Parameter -> its values, the neutral one first."""
        return {
            "width": self.widths,
            "depth": self.depths,
            "kernel": self.kernels,
            "resolution": self.resolutions,
        }

    @property
    def open(self) -> bool:
        """True if anything can be varied."""
        return any(len(values) > 1 for values in self.options.values())

    def size(self) -> int:
        """Number of different networks, the original among them."""
        count = 1
        for values in self.options.values():
            count *= len(values)
        return count

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> ArchitectureSpace:
        values = dict(raw)
        for name in ("widths", "depths", "kernels", "resolutions", "blocks"):
            values[name] = tuple(values[name])
        return cls(**values)


@dataclass(frozen=True)
class Plan:
    """The space of one network with what is needed to go anywhere in it.

    Attributes:
        units: what can go, least harmful first. harms: the share by which outputs change without each.
        coarser: resolution -> how it is reached ("pool" or "stride").
    """

    space: ArchitectureSpace
    units: tuple[Unit, ...] = ()
    harms: tuple[float, ...] = ()
    coarser: Mapping[str, str] = field(default_factory=dict)

    def gone(self, depth: float) -> tuple[Unit, ...]:
        """The units that a network of this depth does without."""
        return self.units[: len(self.units) - round(depth * len(self.units))]

    def to_json(self) -> dict[str, Any]:
        return {"version": _VERSION, **asdict(self)}

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Plan:
        return cls(
            ArchitectureSpace.from_json(raw["space"]),
            tuple(Unit(tuple(u["paths"]), bool(u["residual"])) for u in raw["units"]),
            tuple(raw["harms"]),
            dict(raw["coarser"]),
        )


def declares(task: Task) -> bool:
    """True if the task builds its smaller networks itself."""
    from shoal_optimizer.task import Task as Base

    return type(task).architecture is not Base.architecture


_plans: OrderedDict[tuple[type, str], Plan] = OrderedDict()  # by class too: its code may have no file
_REMEMBERED = 16


def plan_of(model: nn.Module, task: Task) -> Plan:
    """The plan for a model of this task; that of equal content is remembered, also in `task.cache_dir`."""
    key = _key(model, task)
    path = None if task.cache_dir is None else task.cache_dir / f"architecture-{key}.json"
    stored = path is not None and path.is_file()
    mine = (type(task), key)
    if mine not in _plans:
        _plans[mine] = (_read(path) if path is not None and stored else None) or _Look(model, task).plan()
        while len(_plans) > _REMEMBERED:
            _plans.popitem(last=False)
    if path is not None and not stored:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(_plans[mine].to_json()))
        partial.replace(path)
    return _plans[mine]


def _read(path: Path) -> Plan | None:
    """A stored plan; None if it is damaged or of another version."""
    try:
        raw = json.loads(path.read_text())
        return Plan.from_json(raw) if raw["version"] == _VERSION else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _key(model: nn.Module, task: Task) -> str:
    from shoal_optimizer.targets.onnx import fingerprint

    content = [fingerprint(model, task), task.data_digest, task.seed, declares(task)]
    return digest_of(canonical_json(content))[7:39]


class _Look:
    """One look at a model: tries each change on a copy, and measures what it does to the outputs."""

    def __init__(self, model: nn.Module, task: Task) -> None:
        from shoal_optimizer.analysis import analyse

        self.task = task
        self.model = copied(model).eval()
        self.example = blocks.example_of(task)
        self.cost = analyse(task, self.model)
        count = int(min(_MOST_ITEMS, max(_LEAST_ITEMS, _MACS / max(self.cost.macs, 1))))
        self.data = task.calibration_data(count)
        self.batches = self._prepared()
        self.wanted = surgery.outputs_of(self.model, self.batches)
        self.reasons: dict[str, str] = {}

    def _prepared(self) -> list[Tensor]:
        import numpy as np
        import torch

        with torch.no_grad():
            return [
                self.task.pre(torch.from_numpy(np.ascontiguousarray(self.data.inputs[start : start + 16])))
                for start in range(0, len(self.data), 16)
            ]

    def plan(self) -> Plan:
        if declares(self.task):
            return Plan(self._declared())
        units, harms = self._units()
        depths = self._depths(units)
        coarser = self._resolutions()
        space = ArchitectureSpace(
            self._widths(),
            depths,
            self._kernels(units),
            (1.0, *(float(value) for value in coarser)),
            blocks=tuple(unit.name for unit in units),
            reasons=self.reasons,
        )
        return Plan(space, tuple(units), tuple(harms), coarser)

    # ------------------------------------------------------------------ measuring

    def harm(self, model: nn.Module) -> float | None:
        """Share of the outputs' spread by which they change; None if the model bears the change not."""
        import torch

        try:
            outputs = surgery.outputs_of(model, self.batches)
        except Exception:  # whatever a user's forward() raises on other shapes
            return None
        if outputs.shape != self.wanted.shape or not bool(torch.isfinite(outputs).all()):
            return None
        spread = (self.wanted - self.wanted.mean(0)).square().sum().item()
        return float((outputs - self.wanted).square().sum().item() / max(spread, 1e-12))

    # ------------------------------------------------------------------ one parameter each

    def _units(self) -> tuple[list[Unit], list[float]]:
        measured = []
        for unit in blocks.units(self.model, self.example):
            old = surgery.without(self.model, [unit])
            harm = self.harm(self.model)
            surgery.put_back(self.model, old)
            if harm is not None:
                measured.append((harm, unit))
        measured.sort(key=lambda pair: pair[0])
        return [unit for _, unit in measured], [harm for harm, _ in measured]

    def _depths(self, units: Sequence[Unit]) -> tuple[float, ...]:
        found, kept = [1.0], {len(units)}
        for depth in DEPTHS:
            count = round(depth * len(units))
            if count in kept:
                continue
            old = surgery.without(self.model, units[: len(units) - count])
            works = self.harm(self.model) is not None
            surgery.put_back(self.model, old)
            if works:
                kept.add(count)
                found.append(round(count / len(units), 3))
        if len(found) == 1:
            self.reasons["depth"] = "No block has an output of its input's shape."
        return tuple(found)

    def _widths(self) -> tuple[float, ...]:
        found: dict[int, float] = {self.cost.parameters: 1.0}
        for width in WIDTHS:
            try:
                narrower = narrow(copy.deepcopy(self.model), self.task, width)
            except ShoalError as error:
                self.reasons["width"] = error.message
                break
            count = sum(p.numel() for p in narrower.parameters())
            if count < self.cost.parameters and count not in found and self.harm(narrower) is not None:
                found[count] = width
        if len(found) == 1:
            self.reasons.setdefault("width", f"No {ROUND_TO} channels can go from any layer.")
        return tuple(sorted(found.values(), reverse=True))

    def _kernels(self, units: Sequence[Unit]) -> tuple[int, ...]:
        found: list[int] = [0]
        seen: set[tuple[tuple[str, int], ...]] = {()}
        for kernel in KERNELS:
            cuts = tuple(surgery.kernels_to_cut(self.model, units, kernel))
            if cuts in seen:
                continue
            seen.add(cuts)
            smaller = copy.deepcopy(self.model)
            for path, size in cuts:
                surgery.replace(smaller, path, surgery.cut(surgery.part(smaller, path), size))
            if self.harm(smaller) is not None:
                found.append(kernel)
        if len(found) == 1:
            self.reasons["kernel"] = (
                "No kernel is larger than 3, and no residual block has a second dense 3x3 convolution."
            )
        return tuple(found)

    def _resolutions(self) -> dict[str, str]:
        calls = blocks.calls_of(self.model, self.example)
        path = surgery.stem(self.model, calls)
        if path is None:
            self.reasons["resolution"] = "The model does not begin with one convolution."
            return {}
        found = {}
        for resolution in RESOLUTIONS:
            best: tuple[float, str] | None = None
            for how in ("pool", "stride"):
                harm = self._coarser(path, calls[path].given or (), resolution, how)
                if harm is not None and (best is None or harm < best[0]):
                    best = harm, how
            if best is not None:
                found[str(resolution)] = best[1]
        if not found:
            self.reasons["resolution"] = (
                "The model takes no smaller input: its maps would vanish, or a layer has a fixed size."
            )
        return found

    def _coarser(self, path: str, given: tuple[int, ...], resolution: float, how: str) -> float | None:
        model = copy.deepcopy(self.model)
        new = surgery.coarser(surgery.part(model, path), given, resolution, how)
        if new is None:
            return None
        surgery.replace(model, path, new)
        if self.harm(model) is None:
            return None
        maps = [
            min(call.made[2:])
            for name, call in blocks.calls_of(model, self.example).items()
            if call.made is not None
            and len(call.made) > 2
            and hasattr(surgery.part(model, name), "kernel_size")
        ]
        if maps and min(maps) < surgery.LEAST_MAP:
            return None
        surgery.settle(model, self.task, self.data)
        return self.harm(model)

    # ------------------------------------------------------------------ declared by the task

    def _declared(self) -> ArchitectureSpace:
        from shoal_optimizer.analysis import analyse

        neutral = {"width": 1.0, "depth": 1.0, "kernel": 0, "resolution": 1.0}
        whole = self._cost_of(neutral, analyse)
        found: dict[str, tuple[Any, ...]] = {}
        for name, values in (
            ("width", WIDTHS), ("depth", DEPTHS), ("kernel", KERNELS), ("resolution", RESOLUTIONS)
        ):  # fmt: skip
            costs, kept = [whole], []
            for value in values:
                cost = self._cost_of(neutral | {name: value}, analyse)
                if cost is not None and cost not in costs:
                    costs.append(cost)
                    kept.append(value)
            found[name] = (neutral[name], *sorted(kept, reverse=True))
            if not kept:
                self.reasons[name] = f"architecture() makes the same network of every {name}, or none."
        return ArchitectureSpace(
            found["width"], found["depth"], found["kernel"], found["resolution"], True, (), self.reasons
        )

    def _cost_of(self, params: Mapping[str, Any], analyse: Callable[..., Any]) -> tuple[int, int] | None:
        try:
            model = build(self.task, params)
        except ShoalError:
            return None
        if self.harm(model) is None:
            return None
        cost = analyse(self.task, model)
        return cost.parameters, cost.macs


def narrow(model: nn.Module, task: Task, width: float) -> nn.Module:
    """`model` with `width` of its channels, the strongest, in place: as channel pruning does it."""
    from shoal_optimizer.techniques.base import Work
    from shoal_optimizer.techniques.channel_pruning import ChannelPruning

    work = Work.start(task, teacher=model)
    return ChannelPruning().run(work, {"ratio": 1 - width, "round_to": ROUND_TO}).module()


def build(task: Task, params: Mapping[str, Any]) -> nn.Module:
    """The network that the task declares for these parameters, in evaluation mode.

    Raises:
        InvalidInput: `Task.architecture` raises or gives no module.
    """
    from torch import nn

    from shoal_optimizer.task import seeded
    from shoal_protos.errors import InvalidInput

    with seeded(task.seed):
        module = task.guard(
            "architecture()",
            lambda: task.architecture(
                width=params["width"],
                depth=params["depth"],
                kernel=params["kernel"],
                resolution=params["resolution"],
            ),
        )
    if not isinstance(module, nn.Module):
        raise InvalidInput(
            f"{type(task).__name__}.architecture() gives {type(module).__name__}, not a torch.nn.Module.",
            "Return an untrained module of the same family.",
        )
    return module.float().eval()
