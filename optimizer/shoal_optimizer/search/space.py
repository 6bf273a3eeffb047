"""What a search may try for a task: networks (recipes that change the torch model) and their exports.

Training a network is dear and exporting it cheap, so the search samples networks only and exports
each for every target and precision that the classes can run.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from shoal_optimizer.jobspec import ProfileClass
from shoal_optimizer.recipe import Recipe, Step

if TYPE_CHECKING:
    from shoal_optimizer.analysis import Analysis

RATIOS = (0.25, 0.375, 0.5, 0.625, 0.75)
KNOWN_GOOD = 0.5  # pruned by half, then distilled: no loss in ten measured cases
NEXT_BEST = 0.625  # half as many multiply-adds again, half a point lost on the larger nets measured
EPOCHS = (6, 10, 16)
SPARSITIES = (0.8, 0.9, 0.0)  # of single weights, where bytes on the wire count; best guess first
MIN_CHANNELS = 8  # what widths are rounded to: below it nothing is saved
ROUND_TO = 8

Params = Mapping[str, Any]  # of one network: "ratio", "teacher", "epochs", and "sparsity" where it is open


@dataclass(frozen=True)
class Export:
    """One deployable form of a network: a runtime's format in a precision, for one instruction set."""

    target: str
    precision: str
    isa: tuple[str, ...]
    classes: tuple[ProfileClass, ...]  # that can run it

    @property
    def key(self) -> str:
        return f"{self.target}-{self.precision}-{'.'.join(self.isa)}"


@dataclass(frozen=True)
class Space:
    """The choices that are open. Empty `ratios` = the task cannot be trained: plain and int8 only."""

    ratios: tuple[float, ...]
    teacher: tuple[bool, ...]  # fine-tune towards the original's outputs, or on targets alone
    epochs: tuple[int, ...]
    exports: tuple[Export, ...]
    sparsities: tuple[float, ...] = ()  # empty = single weights are not pruned

    def known_good(self) -> list[Params]:
        """Networks to try first, best guess first."""
        if not self.ratios:
            return []
        epochs = 10 if 10 in self.epochs else self.epochs[0]
        ratios: list[float] = []
        for wanted in (KNOWN_GOOD, NEXT_BEST):
            _, nearest = min((abs(ratio - wanted), ratio) for ratio in self.ratios)
            if nearest not in ratios:
                ratios.append(nearest)
        sparse = {"sparsity": self.sparsities[0]} if self.sparsities else {}
        return [{"ratio": ratio, "teacher": True, "epochs": epochs, **sparse} for ratio in ratios]

    def size(self) -> int:
        """Number of different networks."""
        return len(self.ratios) * len(self.teacher) * len(self.epochs) * max(1, len(self.sparsities))


def build(
    analysis: Analysis, classes: Sequence[ProfileClass], *, trainable: bool, sparse: bool = False
) -> Space:
    """The space for a task: ratios that leave every layer wide enough, the targets of the classes.

    Args:
        sparse: prune single weights too; only the compressed size gains from it.
    """
    return Space(
        ratios=_ratios(analysis) if trainable else (),
        teacher=(True, False),
        epochs=EPOCHS,
        exports=exports_for(classes),
        sparsities=SPARSITIES if sparse and trainable else (),
    )


def _ratios(analysis: Analysis) -> tuple[float, ...]:
    """Ratios under which at least half of the layers' multiply-adds stay in layers of useful width."""
    widths = [(layer.output[0], layer.macs) for layer in analysis.layers if layer.macs and layer.output]
    total = sum(macs for _, macs in widths)
    if not total:
        return ()
    return tuple(
        ratio
        for ratio in RATIOS
        if 2 * sum(macs for width, macs in widths if width * (1 - ratio) >= MIN_CHANNELS) >= total
    )


def exports_for(
    classes: Sequence[ProfileClass], precisions: Iterable[str] = ("fp32", "int8", "fp16", "int8_weights")
) -> tuple[Export, ...]:
    """Every (target, precision, instruction set) that some class can run, each once.

    Classes that share them share the export: one bundle serves them all. A float file is the same
    for every instruction set; int8 types depend on it where the CPU computes.
    """
    from shoal_optimizer.targets.base import available, find

    grouped: dict[tuple[str, str, tuple[str, ...]], list[ProfileClass]] = {}
    for profile_class in classes:
        for target in available(class_spec(profile_class)):
            for precision in precisions:
                depends = precision == "int8" and target.isa_matters
                isa = tuple(sorted(profile_class.isa)) if depends else ()
                if precision in find(target.name).precisions:
                    grouped.setdefault((target.name, precision, isa), []).append(profile_class)
    return tuple(
        Export(target, precision, isa, tuple(members))
        for (target, precision, isa), members in grouped.items()
    )


def class_spec(profile_class: ProfileClass) -> Any:
    """The class as targets know it (`targets.base.ClassSpec`)."""
    from shoal_optimizer.targets.base import ClassSpec

    return ClassSpec.of(profile_class.name, profile_class.isa, profile_class.runtimes, profile_class.local)


PLAIN = Recipe((), "plain")


def network(params: Params) -> Recipe:
    """The training part of a recipe: prune channels, fine-tune, and prune weights where that is open."""
    ratio = float(params["ratio"])
    steps = [
        Step("channel_pruning", {"ratio": ratio, "round_to": ROUND_TO}),
        Step("distillation", {"epochs": int(params["epochs"]), "alpha": 0.7 if params["teacher"] else 0.0}),
    ]
    sparsity = float(params.get("sparsity", 0.0))
    if sparsity:
        steps.append(
            Step(
                "weight_pruning",
                {"sparsity": sparsity, "epochs": int(params["epochs"]), "alpha": steps[1].params["alpha"]},
            )
        )
    suffix = "" if params["teacher"] else "-alone"
    suffix += "" if int(params["epochs"]) == 10 else f"-e{params['epochs']}"
    suffix += f"-zeros{sparsity * 100:g}" if sparsity else ""
    return Recipe(tuple(steps), f"pruned{ratio * 100:g}{suffix}".replace(".", "_"))


def complete(trained: Recipe, precision: str) -> Recipe:
    """The whole recipe of an export: the network's steps, and quantization for what is not fp32."""
    if precision == "fp32" or trained.precision != "fp32":
        return trained
    params = {} if precision == "int8" else {"precision": precision}
    return replace(trained, steps=(*trained.steps, Step("quantization", params)))
