"""Int8 that keeps its accuracy: layers go back to float, by accuracy regained per microsecond lost.

Accuracy is the task's metric on labelled data in the runtime itself, with its graph optimization.
Microseconds come from the runtime's own profile of the whole file, so they hold what stands between int8 and
float as well. Each layer's own figures are taken first (that layer alone in float), then layers are put back
one after the other, the best bargain first, until the loss is small enough.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from shoal_optimizer.inputs import by_name, step_of
from shoal_optimizer.targets import qdq
from shoal_optimizer.targets.base import Calibration, Exported, load_exported, run_instance
from shoal_protos.bundle import RuntimeNeed
from shoal_protos.errors import InvalidInput, Unsupported

if TYPE_CHECKING:
    from shoal_optimizer.task import Task

MOST_UNITS = 40  # layers tried one by one; deeper networks go back in runs of neighbours
PROFILED = 40  # passes of which the least time of each kernel counts
_LEAST_US = 0.1  # what a profile can tell apart


@dataclass(frozen=True)
class Figures:
    """One file: its metric, its outputs' mean distance from float's (relative), and time in microseconds."""

    value: float
    error: float
    microseconds: float


@dataclass(frozen=True)
class Reverted:
    """Layers that stay in float, what that regained (of the metric) and cost (microseconds a call)."""

    layers: tuple[str, ...]
    regained: float
    microseconds: float

    def to_json(self) -> dict[str, Any]:
        return {
            "layers": list(self.layers),
            "regained": round(self.regained, 5),
            "microseconds": round(self.microseconds, 1),
        }


Measure = Callable[[tuple[str, ...]], Figures]


def units_of(
    layers: Sequence[str], after: Mapping[str, Sequence[str]], most: int = MOST_UNITS
) -> list[tuple[str, ...]]:
    """What may go back to float together: each layer, and each layer with all that read what it wrote
    (only then the tensor between them is in float). Networks with more than `most` layers: runs of
    neighbours instead.
    """
    if len(layers) > most:
        parts = np.array_split(np.arange(len(layers)), most)
        return [tuple(layers[place] for place in part) for part in parts]
    known = set(layers)
    units: list[tuple[str, ...]] = [(name,) for name in layers]
    for name in layers:
        readers = tuple(reader for reader in after.get(name, ()) if reader in known)
        if readers:
            units.append((name, *readers))
    return units


def ranked(int8: Figures, alone: Mapping[tuple[str, ...], Figures]) -> list[tuple[str, ...]]:
    """Units by accuracy regained per microsecond lost; among equals by distance regained per microsecond.

    A small set of items can't tell most single layers apart by the metric, the outputs' distance can.
    """

    def bargain(unit: tuple[str, ...]) -> tuple[float, float]:
        found = alone[unit]
        cost = max(found.microseconds - int8.microseconds, _LEAST_US)
        return max(found.value - int8.value, 0.0) / cost, (int8.error - found.error) / cost

    return sorted(alone, key=bargain, reverse=True)


def chosen(
    units: Sequence[tuple[str, ...]], int8: Figures, float_value: float, max_drop: float, measure: Measure
) -> list[Reverted]:
    """What must stay in float so that the metric loses at most `max_drop` against `float_value`.

    Args:
        measure: figures of the file in which the given layers are in float.

    Raises:
        Unsupported: that would be every layer.
    """
    alone = {unit: measure(unit) for unit in units}
    every = {layer for unit in units for layer in unit}
    taken: list[tuple[str, ...]] = []
    now = int8
    for unit in ranked(int8, alone):
        if float_value - now.value <= max_drop:
            break
        added = tuple(layer for layer in unit if layer not in _all(taken))
        if not added:
            continue
        then = measure((*_all(taken), *added))
        if then.value < now.value or (then.value == now.value and then.error >= now.error):
            continue  # no bargain beside those that were put back before
        taken.append(added)
        now = then
    if float_value - now.value > max_drop or len(_all(taken)) == len(every):
        raise Unsupported(
            f"int8 loses more than {max_drop:g} of the metric ({float_value:.4g} in float, {int8.value:.4g} "
            "in int8) until every layer is back in float.",
            "Use the step quantization_aware before it, another method, a larger max_drop, or fp32.",
        )
    return _told(_needed(taken, float_value - max_drop, measure), int8, measure)


def _needed(taken: list[tuple[str, ...]], least: float, measure: Measure) -> list[tuple[str, ...]]:
    """Without units that a later one made superfluous, unless they cost no time."""
    for unit in list(taken):
        rest = [other for other in taken if other != unit]
        without, now = measure(_all(rest)), measure(_all(taken))
        if without.value >= least and without.microseconds < now.microseconds:
            taken = rest
    return taken


def _told(taken: Sequence[tuple[str, ...]], int8: Figures, measure: Measure) -> list[Reverted]:
    """What each unit regained and cost beside those before it."""
    steps, now = list[Reverted](), int8
    for place, unit in enumerate(taken):
        then = measure(_all(taken[: place + 1]))
        steps.append(Reverted(unit, then.value - now.value, then.microseconds - now.microseconds))
        now = then
    return steps


def _all(units: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
    return tuple(layer for unit in units for layer in unit)


def within(
    graph: bytes,
    task: Task,
    calibration: Calibration,
    runtime: str,
    emit: Callable[[Calibration], bytes],
) -> tuple[Calibration, dict[str, Any]]:
    """The calibration whose `keep_float` holds `max_drop`, and what is to be told of it.

    Args:
        graph: float ONNX. `emit` makes the int8 file of it.
        runtime: name of the one that judges.

    Returns:
        Facts: "reverted" (a list: layers, regained, microseconds), "drop_before", "drop", "judged_items",
        "judged_on" (the split).

    Raises:
        InvalidInput: there are no labelled data to judge by.
        Unsupported: nothing would be left in int8.
    """
    judged = calibration.judged
    if judged is None:
        raise InvalidInput("max_drop needs labelled data.", "Apply it through the step quantization.")
    judge = Judge(task, runtime, judged.inputs, judged.targets)
    reference = judge.outputs(graph, "fp32")
    float_value = task.measured(reference, judged.targets)
    known: dict[tuple[str, ...], Figures] = {}

    def measure(layers: tuple[str, ...]) -> Figures:
        key = tuple(sorted(layers))
        if key not in known:
            kept = (*calibration.keep_float, *layers)
            known[key] = judge.figures(emit(dataclasses.replace(calibration, keep_float=kept)), reference)
        return known[key]

    int8 = measure(())
    layers = [name for name in qdq.weighted_nodes(graph) if name not in calibration.keep_float]
    steps = list[Reverted]()
    if float_value - int8.value > calibration.max_drop:
        steps = chosen(
            units_of(layers, qdq.next_layers(graph)), int8, float_value, calibration.max_drop, measure
        )
    back = tuple(name for step in steps for name in step.layers)
    facts = {
        "reverted": [step.to_json() for step in steps],
        "drop_before": float_value - int8.value,
        "drop": float_value - measure(back).value,
        "judged_items": len(judged),
        "judged_on": calibration.judged_on,
    }
    return dataclasses.replace(calibration, keep_float=(*calibration.keep_float, *back)), facts


class Judge:
    """Runs files in one runtime on labelled data, and takes the runtime's profile of them."""

    def __init__(self, task: Task, runtime: str, inputs: np.ndarray, targets: np.ndarray) -> None:
        self._task = task
        self._runtime = runtime
        self._inputs = inputs
        self._targets = targets

    def outputs(self, graph: bytes, precision: str) -> np.ndarray:
        """Endpoint outputs [n, ...] of an ONNX file."""
        from shoal_optimizer.targets.onnx import MODEL_FILE, strip

        need = RuntimeNeed(self._runtime, MODEL_FILE, precision=precision)
        exported = Exported({MODEL_FILE: strip(graph)}, need, precision, self._task.signature)
        instance = load_exported(exported)
        try:
            return run_instance(instance, self._task.signature, self._inputs)
        finally:
            instance.close()

    def figures(self, graph: bytes, reference: np.ndarray) -> Figures:
        """Metric, distance from the float outputs, and profiled time of one int8 file."""
        got = self.outputs(graph, "int8")
        scale = float(np.mean(np.abs(reference))) or 1.0
        error = float(np.mean(np.abs(got.astype(np.float64) - reference))) / scale
        signature = self._task.signature
        feed = by_name(self._inputs[: step_of(signature, 1)], signature)
        profile = PROFILES.get(self._runtime, profile_onnxruntime)
        return Figures(self._task.measured(got, self._targets), error, profile(graph, feed))


# ---------------------------------------------------------------------------- profiles


def profile_onnxruntime(graph: bytes, feed: Mapping[str, np.ndarray]) -> float:
    """Microseconds of one call on one thread: each kernel's least time, summed, by ONNX Runtime's profile."""
    import onnxruntime

    with tempfile.TemporaryDirectory(prefix="shoal-profile-") as name:
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = settings.inter_op_num_threads = 1
        settings.log_severity_level = 3
        settings.enable_profiling = True
        settings.profile_file_prefix = str(Path(name) / "profile")
        session = onnxruntime.InferenceSession(graph, settings, providers=["CPUExecutionProvider"])
        for _ in range(PROFILED):
            session.run(None, dict(feed))
        events = json.loads(Path(session.end_profiling()).read_text())
    return kernel_time(events)


def kernel_time(events: Sequence[Mapping[str, Any]]) -> float:
    """Microseconds of ONNX Runtime's profile: each kernel's least duration, summed."""
    times: dict[str, list[float]] = defaultdict(list)
    for event in events:
        if event.get("cat") == "Node" and str(event.get("name", "")).endswith("_kernel_time"):
            times[str(event["name"])].append(float(event["dur"]))
    return sum(min(durations) for durations in times.values())


def profile_openvino(graph: bytes, feed: Mapping[str, np.ndarray]) -> float:
    """Microseconds of one call on one thread: the sum of each node's least time, by OpenVINO's counters."""
    import openvino

    core = openvino.Core()
    settings = {"PERF_COUNT": "YES", "INFERENCE_NUM_THREADS": "1", "INFERENCE_PRECISION_HINT": "f32"}
    request = core.compile_model(core.read_model(graph, b""), "CPU", settings).create_infer_request()
    times: dict[str, list[float]] = defaultdict(list)
    for _ in range(PROFILED):
        request.infer(dict(feed))
        for entry in request.profiling_info:
            times[entry.node_name].append(entry.real_time.total_seconds() * 1e6)
    return sum(min(durations) for durations in times.values())


PROFILES: Mapping[str, Callable[[bytes, Mapping[str, np.ndarray]], float]] = {
    "onnxruntime": profile_onnxruntime,
    "openvino": profile_openvino,
}
