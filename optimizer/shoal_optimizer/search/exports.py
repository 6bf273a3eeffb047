"""In which forms a network can be deployed: runtime's format, precision and way of quantizing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from shoal_optimizer.jobspec import ProfileClass
from shoal_optimizer.objective import ACCURACY, Objective

if TYPE_CHECKING:
    from shoal_optimizer.analysis import Analysis

STORED = ("fp16", "int8_weights", "int4_weights")  # smaller files; some runtimes compute so too
MOST_CONVOLUTION = 0.1  # share of multiply-adds above which dynamic int8 loses (measured: 0.1 to 0.5x)
DEFAULT_DROP = 0.005  # of accuracy that int8 may cost where the objective leaves no more room
FP32, INT8 = "fp32", "int8"


@dataclass(frozen=True)
class Export:
    """One deployable form of a network, for one instruction set.

    Attributes:
        classes: that can run it.
        method: how int8 ranges come about, as `quantization.method`; "" = the default, static.
        max_drop: accuracy that int8 may lose before layers go back to float; 1 = never.
    """

    target: str
    precision: str
    isa: tuple[str, ...]
    classes: tuple[ProfileClass, ...]
    method: str = ""
    max_drop: float = 1.0

    @property
    def key(self) -> str:
        return f"{self.target}-{self.form}-{'.'.join(self.isa)}"

    @property
    def form(self) -> str:
        """Precision and quantizer, for names: "int8", "int8_dynamic", "int8_aware"."""
        more = f"_{self.method}" if self.method else ""
        return f"{self.precision}{more}{'_aware' if self.max_drop < 1 else ''}"

    @property
    def quantizer(self) -> str:
        """What the priors tell apart: "static", "dynamic", "percentile", "aware", or the precision."""
        if self.precision != INT8:
            return self.precision
        return "aware" if self.max_drop < 1 else self.method or "static"

    @property
    def params(self) -> dict[str, Any]:
        """Parameters of the step `quantization`."""
        found: dict[str, Any] = {} if self.precision == INT8 else {"precision": self.precision}
        if self.method:
            found["method"] = self.method
        if self.max_drop < 1:
            found["max_drop"] = self.max_drop
        return found


def exports_for(
    classes: Sequence[ProfileClass], precisions: Iterable[str] = (FP32, INT8, *STORED)
) -> tuple[Export, ...]:
    """Every (target, precision, instruction set) that some class can run, each once.

    Classes that share them share the export: one bundle serves them all. A float file is the same
    for every instruction set; int8 types depend on it where the CPU computes. Where a target has int8,
    precisions that only store less are left to `more_exports`.
    """
    from shoal_optimizer.targets.base import find

    def wanted(target: str) -> list[str]:
        offered = find(target).precisions
        return [p for p in precisions if p in offered and (p not in STORED or INT8 not in offered)]

    return _grouped(classes, lambda target: [(p, "", 1.0) for p in wanted(target)])


def more_exports(
    classes: Sequence[ProfileClass], analysis: Analysis, objective: Objective, room: float | None = None
) -> tuple[Export, ...]:
    """Forms beyond the usual ones, for searches with time: other quantizers, and what stores less.

    Args:
        room: accuracy that the float model has above the objective's bound; None = unknown or no bound.
    """
    from shoal_optimizer.targets.base import find

    careful = objective.bounds(ACCURACY) or bool(objective.labels)
    drop = min(0.05, max(DEFAULT_DROP, room or 0.0))

    def forms(name: str) -> list[tuple[str, str, float]]:
        target = find(name)
        found: list[tuple[str, str, float]] = []
        if INT8 in target.precisions:
            if careful:
                found.append((INT8, "", round(drop, 4)))
            if target.dynamic and analysis.conv_share <= MOST_CONVOLUTION:
                found.append((INT8, "dynamic", 1.0))
            found.append((INT8, "percentile", 1.0))
            found += [(p, "", 1.0) for p in STORED if p in target.precisions]
        return found

    return _grouped(classes, forms)


def _grouped(classes: Sequence[ProfileClass], forms: Any) -> tuple[Export, ...]:
    from shoal_optimizer.targets.base import available

    grouped: dict[tuple[str, str, tuple[str, ...], str, float], list[ProfileClass]] = {}
    for profile_class in classes:
        for target in available(class_spec(profile_class)):
            for precision, method, drop in forms(target.name):
                depends = precision == INT8 and target.isa_matters
                isa = tuple(sorted(profile_class.isa)) if depends else ()
                grouped.setdefault((target.name, precision, isa, method, drop), []).append(profile_class)
    return tuple(
        Export(target, precision, isa, tuple(members), method, drop)
        for (target, precision, isa, method, drop), members in grouped.items()
    )


def class_spec(profile_class: ProfileClass) -> Any:
    """The class as targets know it (`targets.base.ClassSpec`)."""
    from shoal_optimizer.targets.base import ClassSpec

    return ClassSpec.of(profile_class.name, profile_class.isa, profile_class.runtimes, profile_class.local)
