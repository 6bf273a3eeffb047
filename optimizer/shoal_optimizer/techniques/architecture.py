"""A smaller network of the model's own family, with inherited weights: width, depth, kernel, resolution."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from shoal_optimizer.techniques.architectures import blocks, surgery
from shoal_optimizer.techniques.architectures.inherit import inherit
from shoal_optimizer.techniques.architectures.space import (
    ArchitectureSpace,
    Plan,
    build,
    declares,
    narrow,
    plan_of,
)
from shoal_optimizer.techniques.base import Parameter, Technique, Work
from shoal_protos.errors import InvalidInput, Unsupported

if TYPE_CHECKING:
    from torch import nn

    from shoal_optimizer.task import Task

__all__ = ["Architecture", "ArchitectureSpace", "space_of"]

_NEUTRAL: Mapping[str, Any] = {"width": 1.0, "depth": 1.0, "kernel": 0, "resolution": 1.0}


def space_of(task: Task) -> ArchitectureSpace:
    """What can be varied in the task's network: only values that change something and that it bears.

    Costs some forward passes; kept in `task.cache_dir` by content.
    """
    if not task.has_module:
        reason = "The task is an ONNX file: there is no torch module to change."
        return ArchitectureSpace(reasons=dict.fromkeys(_NEUTRAL, reason))
    return plan_of(task.original, task).space


class Architecture(Technique):
    """Makes a smaller network of the same family and gives it the original's weights. Train it afterwards.

    In this order: blocks go, kernels are cut to their centres, the input gets coarser, the weakest
    channels go, and batch norms are settled on the training data. A task that declares
    `architecture(width, depth, kernel, resolution)` builds the network itself.
    """

    name: ClassVar[str] = "architecture"
    parameters: ClassVar[Mapping[str, Parameter]] = {
        "width": Parameter(1.0, 0.05, 1.0, help="share of channels kept, rounded to multiples of 8"),
        "depth": Parameter(1.0, 0.0, 1.0, help="share of the blocks kept that can go"),
        "kernel": Parameter(0, choices=(0, 1, 3, 5), help="largest kernel, 0 = as it is"),
        "resolution": Parameter(1.0, 0.1, 1.0, help="share of the input's height and width"),
    }

    def transform(self, work: Work, params: Mapping[str, Any]) -> Work:
        before = work.module()
        if all(params[name] == value for name, value in _NEUTRAL.items()):
            return work.note("architecture: as it is")
        count = sum(p.numel() for p in before.parameters())
        work.progress(self.name, 0.1, "looking at the network")
        model, how = _declared(work, params) if declares(work.task) else _derived(work, params)
        work.checkpoint()
        data = work.training or work.task.calibration_data()
        surgery.settle(model, work.task, data)
        after = sum(p.numel() for p in model.parameters())
        return replace(work, model=model.eval()).note(f"architecture: {how}; {count} -> {after} parameters")


def _declared(work: Work, params: Mapping[str, Any]) -> tuple[nn.Module, str]:
    """The network that the task builds, with what it can inherit."""
    import torch

    old = work.module()
    model = build(work.task, params)
    example = blocks.example_of(work.task)
    with torch.no_grad():
        wanted = old(example).shape
        got = work.task.guard("architecture()", lambda: model(example)).shape
    if got != wanted:
        raise InvalidInput(
            f"The network of architecture() gives {list(got)}, the original {list(wanted)}.",
            "Build one with the same outputs.",
        )
    share = inherit(model, old, example)
    return model, f"declared by the task, {share:.0%} of its weights inherited"


def _derived(work: Work, params: Mapping[str, Any]) -> tuple[nn.Module, str]:
    model = work.module()
    plan = plan_of(model, work.task)
    _require(plan.space, params)
    said = []
    gone = plan.gone(params["depth"])
    cuts = surgery.kernels_to_cut(model, plan.units, params["kernel"]) if params["kernel"] else []
    left = {path for path, _ in cuts} - {
        path for path, _ in cuts for unit in gone for name in unit.paths if f"{path}.".startswith(f"{name}.")
    }
    for path, size in cuts:
        if path in left:
            surgery.replace(model, path, surgery.cut(surgery.part(model, path), size))
    if left:
        said.append(f"{len(left)} kernels cut")
    if params["resolution"] != 1.0:
        said.append(_make_coarser(model, work.task, plan, params["resolution"]))
    if gone:
        surgery.without(model, gone)
        said.append(f"without {', '.join(unit.name for unit in gone)}")
    if params["width"] != 1.0:
        model = narrow(model, work.task, params["width"])
        said.append(f"{params['width']:g} of the channels")
    return model, ", ".join(said) or "as it is"


def _make_coarser(model: nn.Module, task: Task, plan: Plan, resolution: float) -> str:
    calls = blocks.calls_of(model, blocks.example_of(task))
    path = surgery.stem(model, calls)
    assert path is not None  # the plan found it
    how = plan.coarser[str(resolution)]
    new = surgery.coarser(surgery.part(model, path), calls[path].given or (), resolution, how)
    assert new is not None
    surgery.replace(model, path, new)
    return f"resolution {resolution:g} by {'a wider stride' if how == 'stride' else 'a resize'} at {path}"


def _require(space: ArchitectureSpace, params: Mapping[str, Any]) -> None:
    """Refuses what would change nothing or break the network, saying what can be had instead."""
    for name, values in space.options.items():
        value = params[name]
        if value == _NEUTRAL[name] or value in values:
            continue
        if len(values) > 1 and name in ("width", "depth"):
            continue  # any share will do
        offered = ", ".join(f"{v:g}" for v in values)
        raise Unsupported(
            f"architecture.{name} {value:g} is not to be had. {space.reasons.get(name, '')}".strip(),
            f"This network can have {name} {offered}.",
        )
