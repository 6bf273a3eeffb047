"""Quantization: marks the precision and chooses data for it; the target emits the graph."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from shoal_optimizer.analysis import analyse
from shoal_optimizer.targets.base import Calibration
from shoal_optimizer.techniques import ranges
from shoal_optimizer.techniques.base import Parameter, Technique, Work
from shoal_protos.errors import InvalidInput, Unsupported

if TYPE_CHECKING:
    from shoal_optimizer.data import TaskData

MOST_CONVOLUTION = 0.1  # of the multiply-adds, for dynamic int8
FEW_ITEMS = 32  # with fewer calibration items the ranges are often too narrow
MOST_JUDGED = 2000  # items that decide which layers go back to float
FEWEST_JUDGED = 16


class Quantization(Technique):
    """Asks the target for a narrower precision.

    int8 takes ranges from calibration data or (dynamic) at each call. Each runtime's own quantizer places
    the scales where that runtime fuses them; scales placed by torch leave most convolutions in float there.
    The other precisions only store weights so, or compute in them where the target says it.
    """

    name: ClassVar[str] = "quantization"
    quantizes: ClassVar[bool] = True
    parameters: ClassVar[Mapping[str, Parameter]] = {
        "precision": Parameter(
            "int8",
            choices=("int8", "fp16", "int8_weights", "int4_weights"),
            help="int8 computes in int8; *_weights only stores weights so",
        ),
        "samples": Parameter(200, 1, 100_000, help="calibration items; int8 only"),
        "method": Parameter(
            "minmax",
            choices=("minmax", "percentile", "entropy", "dynamic"),
            help="how int8 ranges are chosen; dynamic: at each call, for linear and LSTM layers",
        ),
        "max_drop": Parameter(
            1.0, 0.0, 1.0, help="of the metric, against float: above it layers go back to float; 1 = never"
        ),
    }

    def transform(self, work: Work, params: Mapping[str, Any]) -> Work:
        if params["precision"] != "int8":
            refuse_int8_options(params)
            return replace(work, precision=params["precision"])
        if params["method"] == "dynamic":
            refuse_convolutions(work)
        if work.calibration is not None:
            data = work.calibration.sample(params["samples"], work.seed)
        else:
            data = work.task.calibration_data(params["samples"])
        calibration = Calibration(data.inputs, params["method"], ranges.pinned(work.model))
        if params["max_drop"] < 1:
            judged, source = judging_data(work, data)
            calibration = replace(calibration, max_drop=params["max_drop"], judged=judged, judged_on=source)
            if source == "evaluation":
                work = work.note(
                    f"Which layers stay in float is decided on {len(judged)} of the evaluation items: the "
                    "accuracy reported on those is a little too good. training() would be judged on instead."
                )
        for note in notes_on(work, data, params):
            work = work.note(note)
        return replace(work, precision="int8", quantization=calibration)


def notes_on(work: Work, data: TaskData, params: Mapping[str, Any]) -> list[str]:
    """What a reader of the result must know about its ranges."""
    found = []
    if params["method"] != "dynamic" and len(data) < FEW_ITEMS:
        found.append(
            f"int8 ranges come from {len(data)} items only; with fewer than {FEW_ITEMS} they are often too "
            "narrow. Give more calibration data."
        )
    if params["method"] != "dynamic" and _recurrent(work):
        found.append(
            "Recurrent layers stay in float with calibrated ranges; ONNX Runtime has them in int8 with the "
            "method dynamic."
        )
    if ranges.outdated(work.model):
        found.append(
            "The weights changed after quantization_aware: its ranges are void. Make it the last step before "
            "quantization."
        )
    return found


def _recurrent(work: Work) -> bool:
    if work.model is not None:
        from torch import nn

        return any(isinstance(module, nn.RNNBase) for module in work.model.modules())
    import onnx

    nodes = onnx.load(str(work.task.onnx_file), load_external_data=False).graph.node
    return any(node.op_type in ("LSTM", "GRU", "RNN") for node in nodes)


def judging_data(work: Work, calibration: TaskData) -> tuple[TaskData, str]:
    """Labelled data that decide which layers go back to float, and where they come from.

    Items that ranges came from look better in int8 than others, so they are left out where there are more.

    Raises:
        Unsupported: there are too few labelled items.
    """
    task = work.task
    sources = [("training", work.training), ("evaluation", task.required("evaluation"))]
    if task.has_module:  # the calibration items of an ONNX file have no labels
        sources.insert(1, ("calibration", work.calibration or task.data("calibration")))
    for source, data in sources:
        rest = None if data is None else without(data, calibration)
        if rest is not None and len(rest) >= FEWEST_JUDGED:
            return rest.sample(MOST_JUDGED, work.seed + 1), source
    raise Unsupported(
        f"max_drop needs {FEWEST_JUDGED} labelled items that no range came from.",
        "Write training() or give more evaluation data, or leave max_drop out.",
    )


def without(data: TaskData, other: TaskData) -> TaskData:
    """The items of `data` whose inputs are not among `other`'s."""
    known = {_bytes(item) for item in other.inputs}
    kept = [place for place, item in enumerate(data.inputs) if _bytes(item) not in known]
    return data.take(np.array(kept, np.int64))


def _bytes(item: np.ndarray) -> bytes:
    return np.ascontiguousarray(item).tobytes()


def refuse_int8_options(params: Mapping[str, Any]) -> None:
    """Raises InvalidInput where an option of int8 is set for another precision."""
    if params["method"] != "minmax" or params["max_drop"] < 1:
        raise InvalidInput(
            f"quantization.method and max_drop are for int8, the precision is {params['precision']}.",
            "Leave them out, or use the precision int8.",
        )


def refuse_convolutions(work: Work) -> None:
    """Raises Unsupported where most of the gain would be lost: dynamic int8 leaves convolutions in float."""
    share = analyse(work.task, work.model).conv_share
    if share > MOST_CONVOLUTION:
        raise Unsupported(
            f"{share:.0%} of the multiply-adds are in convolutions, and dynamic int8 is not for those.",
            "Use the method minmax.",
        )
