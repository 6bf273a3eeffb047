"""What inspecting a source found: one form for pictures, tables and arrays."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from shoal_protos.bundle import TensorSpec
from shoal_protos.errors import InvalidInput

EVALUATION_SHARE = 5  # every so-manieth item judges the model
FEW_ITEMS = 20  # of a class; below it figures say little
UNEVEN = 10.0  # largest class over smallest


@dataclass(frozen=True)
class Table:
    """How rows of a CSV become numbers. Columns are those that applications send, in their order.

    Attributes:
        fill: what stands for a missing value, one a column.
        categories: column number -> its texts, in the order of their codes.
    """

    columns: tuple[str, ...]
    fill: tuple[float, ...]
    categories: dict[int, tuple[str, ...]]

    @property
    def numbers(self) -> list[int]:
        """Columns that hold numbers, by position."""
        return [i for i in range(len(self.columns)) if i not in self.categories]

    @property
    def width(self) -> int:
        """Numbers that the network gets: one a number column, one a category."""
        return len(self.numbers) + sum(len(texts) for texts in self.categories.values())


@dataclass
class Found:
    """A source, read. `inputs` [n, ...] in the endpoint's dtype (a table's with NaN where a value is
    missing), `targets` [n, ...], `evaluation` [n] bool.

    `facts` are (what, figure) lines for people, `decided` and `warnings` whole sentences.
    """

    inputs: np.ndarray
    targets: np.ndarray
    evaluation: np.ndarray
    input: TensorSpec
    input_kind: str
    output_kind: str
    labels: tuple[str, ...] = ()
    color: str = ""
    resize: str = ""
    sample_rate: int = 0
    table: Table | None = None
    facts: list[tuple[str, str]] = field(default_factory=list)
    decided: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def outputs(self) -> int:
        """Numbers that the model gives an item."""
        if self.output_kind == "logits":
            return max(len(self.labels), int(self.targets.max()) + 1)
        return int(np.prod(self.targets.shape[1:], dtype=int))

    @property
    def training_inputs(self) -> np.ndarray:
        return np.asarray(self.inputs[~self.evaluation])

    @property
    def training_targets(self) -> np.ndarray:
        return np.asarray(self.targets[~self.evaluation])


def stable_split(keys: Sequence[str], classes: np.ndarray | None) -> np.ndarray:
    """Which items judge the model: about a fifth of each class (or of all), chosen by the keys' hashes,
    so the same item is on the same side whenever it is read again, and equal keys are on one side as
    far as that leaves items for both."""
    order = np.array([hashlib.sha256(key.encode(errors="surrogateescape")).digest()[:8] for key in keys])
    chosen = np.zeros(len(keys), bool)
    groups = np.zeros(len(keys), np.int64) if classes is None else classes
    for group in np.unique(groups):
        own = np.flatnonzero(groups == group)
        own = own[np.argsort(order[own], kind="stable")]
        count = max(1, round(len(own) / EVALUATION_SHARE)) if len(own) > 1 else 0
        chosen[own[: _between_keys(order[own], count)]] = True
    if not chosen.any():
        raise InvalidInput("There are too few items to judge a model by.", "Give at least two of each class.")
    return chosen


def _between_keys(ordered: np.ndarray, count: int) -> int:
    """The cut nearest below `count` that parts no equal keys; `count` where there is none."""
    cut = count
    while 0 < cut < len(ordered) and ordered[cut - 1] == ordered[cut]:
        cut -= 1
    return cut or count


def describe_classes(found: Found) -> None:
    """Adds what there is to say about a classification's classes. Raises InvalidInput for only one."""
    labels = found.labels or tuple(str(i) for i in range(found.outputs))
    counts = np.bincount(found.targets, minlength=len(labels))
    if int((counts > 0).sum()) < 2:
        only = labels[int(found.targets[0])]
        raise InvalidInput(
            f"All {len(found.targets)} items are of one class, '{only}'.",
            "A classifier needs at least two; add items of what it is not.",
        )
    found.facts.append(("classes", f"{len(labels)}: {shortened(labels)}"))
    order = np.argsort(-counts, kind="stable")
    balance = [f"{labels[i]} {counts[i]:,}" for i in order]
    found.facts.append(("balance", shortened(balance)))
    absent = [labels[i] for i in np.flatnonzero(counts == 0)]
    if absent:
        found.warnings.append(f"No item is of {shortened(absent)}: the model cannot be judged on it.")
    for part, chosen in (("training", ~found.evaluation), ("evaluation", found.evaluation)):
        here = np.bincount(found.targets[chosen], minlength=len(labels))
        missing = [labels[i] for i in np.flatnonzero((here == 0) & (counts > 0))]
        if missing:
            found.warnings.append(f"{shortened(missing)} never appears in the {part} data.")
    present = counts[counts > 0]
    if present.max() / present.min() > UNEVEN:
        share = present.max() / present.sum()
        found.warnings.append(
            f"The classes are uneven: always answering '{labels[int(order[0])]}' is right in {share:.0%} of "
            "cases. Judge by metric() if that misleads."
        )
    few = [labels[i] for i in np.flatnonzero((counts > 0) & (counts < FEW_ITEMS))]
    if few:
        found.warnings.append(f"Fewer than {FEW_ITEMS} items of {shortened(few)}: figures of it say little.")


def describe_items(found: Found) -> None:
    """Adds how many items there are and how they are split."""
    judged = int(found.evaluation.sum())
    found.facts.insert(
        0, ("items", f"{len(found.inputs):,}: {len(found.inputs) - judged:,} train, {judged:,} judge")
    )


def shortened(names: Sequence[Any], most: int = 8) -> str:
    """`a, b, c and 5 more`."""
    shown = ", ".join(str(name)[:40] for name in names[:most])
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown
