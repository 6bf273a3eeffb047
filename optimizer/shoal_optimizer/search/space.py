"""What a search may try for a task: networks (recipes that change the torch model) and their exports.

Training a network is dear and exporting it cheap, so the search samples networks only and exports
each for every target and precision that the classes can run. A network is of one family: `pruned`
(channels go), `student` (narrower, trained longer) or `architecture` (width, depth, kernel and
resolution of the model's own family); which parameters a network has depends on its family.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import TYPE_CHECKING, Any

from shoal_optimizer.jobspec import ProfileClass
from shoal_optimizer.recipe import Recipe, Step
from shoal_optimizer.search.exports import Export, class_spec, exports_for, more_exports

if TYPE_CHECKING:
    from shoal_optimizer.analysis import Analysis

__all__ = [
    "Export",
    "Params",
    "Space",
    "build",
    "class_spec",
    "complete",
    "exports_for",
    "more_exports",
    "network",
]

RATIOS = (0.25, 0.375, 0.5, 0.625, 0.75)
KNOWN_GOOD = 0.5  # pruned by half, then distilled: no loss in ten measured cases
NEXT_BEST = 0.625  # half as many multiply-adds again, half a point lost on the larger nets measured
EPOCHS = (6, 10, 16)
SPARSITIES = (0.8, 0.9, 0.0)  # of single weights, where bytes on the wire count; best guess first
MIN_CHANNELS = 8  # what widths are rounded to: below it nothing is saved
ROUND_TO = 8
LONGER = 2  # a student has more to learn than a pruned network: times the epochs
PRUNED, STUDENT, ARCHITECTURE = "pruned", "student", "architecture"
NEUTRAL: Mapping[str, Any] = {"width": 1.0, "depth": 1.0, "kernel": 0, "resolution": 1.0}
PATTERNS = ("2:4",)

Params = Mapping[str, Any]  # of one network: "family", its parameters, "teacher", "epochs", and what is open


@dataclass(frozen=True)
class Space:
    """The choices that are open. Empty `ratios` = the task cannot be trained: plain and int8 only.

    Attributes:
        sparsities: of single weights; a text is an N:M pattern that some class's hardware skips.
            Empty = single weights are not pruned.
        widths: of students; empty = there are none.
        architecture: parameter -> its values, as `techniques.architecture.space_of` found them.
        aware: weight bits of the training with int8 in mind; 0 = without it.
    """

    ratios: tuple[float, ...]
    teacher: tuple[bool, ...]  # fine-tune towards the original's outputs, or on targets alone
    epochs: tuple[int, ...]
    exports: tuple[Export, ...]
    sparsities: tuple[float | str, ...] = ()
    widths: tuple[float, ...] = ()
    architecture: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    aware: tuple[int, ...] = (0,)

    @property
    def families(self) -> dict[str, dict[str, tuple[Any, ...]]]:
        """Family -> its own parameters with their values."""
        if not self.ratios:
            return {}
        found: dict[str, dict[str, tuple[Any, ...]]] = {PRUNED: {"ratio": self.ratios}}
        if self.widths:
            found[STUDENT] = {"width": self.widths}
        if any(len(values) > 1 for values in self.architecture.values()):
            found[ARCHITECTURE] = dict(self.architecture)
        return found

    @property
    def shared(self) -> dict[str, tuple[Any, ...]]:
        """Parameters that every family has."""
        found: dict[str, tuple[Any, ...]] = {"epochs": self.epochs, "teacher": self.teacher}
        if self.sparsities:
            found["sparsity"] = self.sparsities
        if self.aware != (0,):
            found["aware"] = self.aware
        return found

    def known_good(self) -> list[Params]:
        """Networks to try first, best guess first."""
        if not self.ratios:
            return []
        ratios: list[float] = []
        for wanted in (KNOWN_GOOD, NEXT_BEST):
            _, nearest = min((abs(ratio - wanted), ratio) for ratio in self.ratios)
            if nearest not in ratios:
                ratios.append(nearest)
        return [{"family": PRUNED, "ratio": ratio, **self._usual} for ratio in ratios]

    def also_good(self) -> list[Params]:
        """One of each other kind, for searches that have time for more than the known-good ones."""
        found: list[Params] = []
        if self.ratios and self.aware != (0,):
            found.append({**self.known_good()[-1], "aware": self.aware[-1]})
        if ARCHITECTURE in self.families:
            chosen = {name: values[len(values) // 2] for name, values in self.architecture.items()}
            found.append({"family": ARCHITECTURE, **chosen, **self._usual})
        if STUDENT in self.families:
            _, width = min((abs(width - 0.375), width) for width in self.widths)
            found.append({"family": STUDENT, "width": width, **self._usual})
        return found

    @property
    def _usual(self) -> dict[str, Any]:
        epochs = 10 if 10 in self.epochs else self.epochs[0]
        usual: dict[str, Any] = {"teacher": True, "epochs": epochs}
        if self.sparsities:
            usual["sparsity"] = self.sparsities[0]
        if self.aware != (0,):
            usual["aware"] = 0
        return usual

    def every(self) -> Iterator[Params]:
        """All networks, in a fixed order."""
        for family, own in self.families.items():
            options = {**own, **self.shared}
            for values in product(*options.values()):
                params = {"family": family, **dict(zip(options, values, strict=True))}
                if self.holds(params):
                    yield params

    def holds(self, params: Params) -> bool:
        """True when the parameters name a network of this space that is not the original itself."""
        family = str(params.get("family", PRUNED))
        own = self.families.get(family)
        if own is None:
            return False
        options = {**own, **self.shared}
        if set(params) - {"family"} != set(options):
            return False
        if any(params[name] not in values for name, values in options.items()):
            return False
        return family != ARCHITECTURE or any(params[n] != NEUTRAL.get(n) for n in own)

    def size(self) -> int:
        """Number of different networks."""
        shared = 1
        for values in self.shared.values():
            shared *= len(values)
        count = 0
        for family, own in self.families.items():
            networks = 1
            for values in own.values():
                networks *= len(values)
            if family == ARCHITECTURE and all(NEUTRAL.get(n) in values for n, values in own.items()):
                networks -= 1  # the original
            count += networks * shared
        return count


def build(
    analysis: Analysis,
    classes: Sequence[ProfileClass],
    *,
    trainable: bool,
    sparse: bool = False,
    architecture: Mapping[str, tuple[Any, ...]] | None = None,
    wide: bool = False,
) -> Space:
    """The space for a task: ratios that leave every layer wide enough, the targets of the classes.

    Args:
        sparse: prune single weights too; only the compressed size gains from it.
        architecture: what `techniques.architecture.space_of` found; None = that is not looked at.
        wide: students and training with int8 in mind too, for budgets that reach that far.
    """
    ratios = _ratios(analysis) if trainable else ()
    patterns = _patterns(classes) if ratios else ()
    sparsities: tuple[float | str, ...] = SPARSITIES if sparse and trainable else ()
    if patterns:
        sparsities = (*(sparsities or (0.0,)), *patterns)
    exports = exports_for(classes)
    int8 = any(export.precision == "int8" for export in exports)
    return Space(
        ratios=ratios,
        teacher=(True, False),
        epochs=EPOCHS,
        exports=exports,
        sparsities=sparsities,
        widths=tuple(1 - ratio for ratio in ratios) if wide else (),
        architecture=architecture if architecture is not None and ratios else {},
        aware=(0, weight_bits(classes)) if wide and int8 and ratios else (0,),
    )


def weight_bits(classes: Sequence[ProfileClass]) -> int:
    """7 where some x86 class has no int8 dot products: its sums saturate with 8 (see `targets.onnx`)."""
    specs = [class_spec(c) for c in classes]
    return 7 if any(not spec.arm and not spec.vnni for spec in specs) else 8


def _patterns(classes: Sequence[ProfileClass]) -> tuple[str, ...]:
    return tuple(p for p in PATTERNS if any(class_spec(c).skips_zeros(p) for c in classes))


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


PLAIN = Recipe((), "plain")


def network(params: Params) -> Recipe:
    """The training part of a recipe: make the network smaller, fine-tune it, and what else is open."""
    family = str(params.get("family", PRUNED))
    epochs, alpha = int(params["epochs"]), 0.7 if params["teacher"] else 0.0
    if family == PRUNED:
        ratio = float(params["ratio"])
        steps = [Step("channel_pruning", {"ratio": ratio, "round_to": ROUND_TO})]
        name = f"pruned{ratio * 100:g}"
    elif family == STUDENT:
        width = float(params["width"])
        steps, name = [Step("architecture", {"width": width})], f"student{width * 100:g}"
        alpha = 0.9 if params["teacher"] else 0.0
    else:
        own = {key: params[key] for key in NEUTRAL if key in params}
        steps, name = [Step("architecture", own)], _architecture_name(own)
    trained = epochs * (LONGER if family == STUDENT else 1)
    steps.append(Step("distillation", {"epochs": trained, "alpha": alpha}))
    name += ("" if params["teacher"] else "-alone") + ("" if epochs == 10 else f"-e{epochs}")
    sparsity = params.get("sparsity", 0.0)
    if sparsity:
        how = {"pattern": sparsity} if isinstance(sparsity, str) else {"sparsity": float(sparsity)}
        steps.append(Step("weight_pruning", {**how, "epochs": epochs, "alpha": alpha}))
        name += (
            f"-{sparsity.replace(':', 'of')}" if isinstance(sparsity, str) else f"-zeros{sparsity * 100:g}"
        )
    bits = int(params.get("aware") or 0)
    if bits:
        bit = {} if bits == 8 else {"weight_bits": bits}
        steps.append(Step("quantization_aware", {"epochs": max(1, epochs // 3), "alpha": alpha, **bit}))
        name += "-aware"
    return Recipe(tuple(steps), name.replace(".", "_"))


def _architecture_name(own: Mapping[str, Any]) -> str:
    said = [
        f"{key[0]}{value * (1 if key == 'kernel' else 100):g}"
        for key, value in own.items()
        if value != NEUTRAL[key]
    ]
    return "architecture-" + "-".join(said or ["as-is"])


def complete(trained: Recipe, form: str | Export) -> Recipe:
    """The whole recipe of an export: the network's steps, and quantization for what is not fp32."""
    precision = form if isinstance(form, str) else form.precision
    if precision == "fp32" or trained.precision != "fp32":
        return trained
    params = form.params if isinstance(form, Export) else {} if form == "int8" else {"precision": form}
    return replace(trained, steps=(*trained.steps, Step("quantization", params)))
