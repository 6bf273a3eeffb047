"""How much each layer's channels matter: measured once per model and data, and kept by content."""

from __future__ import annotations

import copy
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shoal_optimizer.techniques.base import Cancelled
from shoal_protos.bundle import canonical_json, digest_of
from shoal_protos.errors import InvalidInput, Unsupported

if TYPE_CHECKING:
    from torch import Tensor, nn

    from shoal_optimizer.data import TaskData
    from shoal_optimizer.task import Task
    from shoal_optimizer.techniques.channels import Channels, Unit

RATIOS = (0.25, 0.5, 0.75)
ITEMS = (64, 512)  # at least, at most
MAC_BUDGET = 6e11  # multiply-adds of a whole map: a minute or so of one core
_VERSION = 2


@dataclass(frozen=True)
class SensitivityMap:
    """What pruning one layer alone costs, before any fine-tuning.

    Attributes:
        layers: layer -> ratio -> lost of the task's metric. A layer stands for all that are pruned with it.
        distances: the same for the outputs: mean square of their change over that of the outputs.
        widths: layer -> channels.
        metric, baseline, items: what was measured, its value unpruned, on how many items (not those that
            networks are judged on).
    """

    layers: Mapping[str, Mapping[float, float]]
    distances: Mapping[str, Mapping[float, float]]
    widths: Mapping[str, int]
    metric: str
    baseline: float
    items: int

    def loss(self, layer: str, ratio: float) -> float:
        """Expected loss, between measured ratios linear, never less than at a smaller ratio.

        A hundredth of the outputs' change is added: it orders layers whose loss is too small to show.
        Layers that were not measured count like the most sensitive one.
        """
        if ratio <= 0:
            return 0.0
        if layer not in self.layers:
            return max((self.loss(name, ratio) for name in self.layers), default=ratio)
        known = [(0.0, 0.0)]
        for at in sorted(self.layers[layer]):
            value = max(0.0, self.layers[layer][at]) + 0.01 * min(self.distances[layer][at], 2.0)
            known.append((at, max(value, known[-1][1])))
        for (low, below), (high, above) in pairwise(known):
            if ratio <= high:
                return below + (above - below) * (ratio - low) / (high - low)
        (low, below), (high, above) = known[-2:]
        return above + (above - below) * (ratio - high) / (high - low)

    def to_json(self) -> dict[str, Any]:
        def table(found: Mapping[str, Mapping[float, float]]) -> dict[str, dict[str, float]]:
            return {n: {f"{r:g}": round(v, 6) for r, v in row.items()} for n, row in found.items()}

        return {
            "layers": table(self.layers),
            "distances": table(self.distances),
            "widths": dict(self.widths),
            "metric": self.metric,
            "baseline": self.baseline,
            "items": self.items,
        }

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> SensitivityMap:
        """Raises InvalidInput when it is not what `to_json` gives."""
        try:
            tables = [
                {str(n): {float(r): float(v) for r, v in row.items()} for n, row in raw[key].items()}
                for key in ("layers", "distances")
            ]
            widths = {str(n): int(w) for n, w in raw["widths"].items()}
            return cls(
                tables[0], tables[1], widths, str(raw["metric"]), float(raw["baseline"]), int(raw["items"])
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InvalidInput(f"This is no sensitivity map: {error!r}.", "Measure it again.") from error


def channel_map(
    task: Task,
    *,
    model: nn.Module | None = None,
    data: TaskData | None = None,
    ratios: Sequence[float] = RATIOS,
    round_to: int = 1,
    importance: str = "magnitude",
    progress: Callable[[float, str], None] = lambda share, message: None,
    cancelled: Callable[[], bool] = lambda: False,
) -> SensitivityMap:
    """Prunes each layer alone, on a copy, and measures what is lost.

    Batch norms are settled on the data after each cut, which tells better how a network will do after
    fine-tuning (Li et al., "EagleEye: Fast Sub-net Evaluation for Efficient Neural Network Pruning", 2020).

    With `task.cache_dir` each layer's figures are kept there as they come, by content of model, code and
    data: a second call, also of another process at the same time or after a kill, measures what is missing.

    Args:
        model: None = the task's original. data: to measure on; None = calibration data.

    Raises:
        Unsupported: the task is an ONNX file.
        InvalidInput: the model cannot be pruned by channels.
        Cancelled: `cancelled` said so.
    """
    from shoal_optimizer.techniques.architectures.blocks import example_of
    from shoal_optimizer.techniques.channels import Channels

    if not task.has_module:
        raise Unsupported(
            "This task is an ONNX file: its channels cannot be pruned.", "Push a Python task with its module."
        )
    original = task.original if model is None else model
    example = example_of(task)
    whole = Channels.of(copy.deepcopy(original), example)
    if not whole.units:
        raise InvalidInput(
            "The model has no channels that could be removed.", "Leave channel_pruning out of the recipe."
        )
    chosen = _data(task, data, whole, len(ratios))
    store = _Store.of(task, original, chosen, ratios, round_to, importance)
    measure = _Measure(task, original, example, chosen, ratios, round_to, importance, cancelled)
    layers: dict[str, dict[float, float]] = {}
    distances: dict[str, dict[float, float]] = {}
    for number, unit in enumerate(_rotated(whole.units)):
        if cancelled():
            raise Cancelled("The work was cancelled.", "Start it again to continue.")
        progress(number / len(whole.units), f"how much {unit.name} matters")
        row = store.read(unit.name)
        if row is None:
            row = measure.row(unit)
            store.write(unit.name, row)
        layers[unit.name] = {ratio: lost for ratio, lost, _ in row}
        distances[unit.name] = {ratio: away for ratio, _, away in row}
    progress(1.0, "")
    order = [unit.name for unit in whole.units]
    return SensitivityMap(
        {name: layers[name] for name in order if layers[name]},
        {name: distances[name] for name in order if layers[name]},
        {unit.name: unit.width for unit in whole.units},
        task.metric_name,
        measure.baseline,
        len(chosen),
    )


def _data(task: Task, data: TaskData | None, whole: Channels, ratios: int) -> TaskData:
    """As many items as the budget of multiply-adds allows: the same on every machine."""
    macs = max(1.0, whole.costs().of({}, "macs"))
    fitting = MAC_BUDGET / (2 * macs * max(1, len(whole.units) * ratios))
    count = int(min(max(fitting, ITEMS[0]), ITEMS[1]))
    return task.calibration_data(count) if data is None else data.sample(count, task.seed)


def _rotated(units: Sequence[Unit]) -> list[Unit]:
    """Another start in each process: two that measure the same map share the work."""
    start = os.getpid() % len(units)
    return [*units[start:], *units[:start]]


Row = list[tuple[float, float, float]]  # ratio, loss, distance


@dataclass
class _Measure:
    task: Task
    original: nn.Module
    example: Tensor
    data: TaskData
    ratios: Sequence[float]
    round_to: int
    importance: str
    cancelled: Callable[[], bool]

    def __post_init__(self) -> None:
        self._reference = self.task.predict(self.original, self.data.inputs)
        self.baseline = self.task.measured(self._reference, self.data.targets)

    def row(self, unit: Unit) -> Row:
        """A layer that cannot be pruned without breaking the model gets no figures."""
        found, seen = [], {unit.width}
        for ratio in self.ratios:
            width = unit.kept(ratio, self.round_to)
            if width in seen:
                continue
            seen.add(width)
            if self.cancelled():
                raise Cancelled("The work was cancelled.", "Start it again to continue.")
            try:
                lost, away = self._without(unit.name, width)
            except InvalidInput:
                return []
            found.append((round(1 - width / unit.width, 4), lost, away))
        return found

    def _without(self, name: str, width: int) -> tuple[float, float]:
        import numpy as np

        from shoal_optimizer.techniques import importance
        from shoal_optimizer.techniques.architectures import surgery
        from shoal_optimizer.techniques.channels import Channels

        model = copy.deepcopy(self.original)
        channels = Channels.of(model, self.example)
        if self.importance == "taylor":
            importance.gradients(model, self.task, self.data, self.task.seed)
        channels.remove({name: width}, self.importance)
        surgery.settle(model, self.task, self.data)
        outputs = self.task.predict(model, self.data.inputs)
        if not np.isfinite(outputs).all():
            return self.baseline, 2.0
        power = float(np.mean(np.square(self._reference, dtype=np.float64)))
        change = float(np.mean(np.square(outputs.astype(np.float64) - self._reference)))
        away = change / power if power else change
        return self.baseline - self.task.measured(outputs, self.data.targets), away


@dataclass(frozen=True)
class _Store:
    """One small file a layer, written whole or not at all."""

    folder: Path | None

    @classmethod
    def of(
        cls, task: Task, model: nn.Module, data: TaskData, ratios: Sequence[float], round_to: int,
        importance: str,
    ) -> _Store:  # fmt: skip
        if task.cache_dir is None:
            return cls(None)
        from shoal_optimizer.targets.onnx import fingerprint

        content = [_VERSION, fingerprint(model, task), data.digest, list(ratios), round_to, importance]
        key = digest_of(canonical_json(content))[7:39]
        folder = task.cache_dir / f"sensitivity-{key}"
        folder.mkdir(parents=True, exist_ok=True)
        return cls(folder)

    def _path(self, name: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{digest_of(name.encode())[7:23]}.json"

    def read(self, name: str) -> Row | None:
        if self.folder is None or not self._path(name).is_file():
            return None
        try:
            row = [(float(r), float(v), float(d)) for r, v, d in json.loads(self._path(name).read_text())]
        except (OSError, ValueError, TypeError):
            return None  # damaged: measured again
        return row if all(math.isfinite(v) for entry in row for v in entry) else None

    def write(self, name: str, row: Row) -> None:
        if self.folder is None:
            return
        path = self._path(name)
        partial = path.with_suffix(f".{os.getpid()}.partial")
        partial.write_text(json.dumps(row))
        partial.replace(path)
