"""Int8: marks the precision and chooses calibration data; the target emits the graph."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from shoal_optimizer.analysis import analyse
from shoal_optimizer.targets.base import Calibration
from shoal_optimizer.techniques.base import Parameter, Technique, Work
from shoal_protos.errors import Unsupported

MOST_CONVOLUTION = 0.1  # of the multiply-adds, for dynamic int8


class Quantization(Technique):
    """Asks the target for int8, with ranges from calibration data or (dynamic) taken at each call.

    Each runtime's own quantizer places the scales where that runtime fuses them; scales placed by torch
    leave most convolutions in float there.
    """

    name: ClassVar[str] = "quantization"
    quantizes: ClassVar[bool] = True
    parameters: ClassVar[Mapping[str, Parameter]] = {
        "samples": Parameter(200, 1, 100_000, help="calibration items"),
        "method": Parameter(
            "minmax",
            choices=("minmax", "percentile", "entropy", "dynamic"),
            help="how ranges are chosen; dynamic: at each call, for linear and LSTM layers",
        ),
    }

    def transform(self, work: Work, params: Mapping[str, Any]) -> Work:
        if params["method"] == "dynamic":
            refuse_convolutions(work)
        if work.calibration is not None:
            data = work.calibration.sample(params["samples"], work.seed)
        else:
            data = work.task.calibration_data(params["samples"])
        return replace(work, precision="int8", quantization=Calibration(data.inputs, params["method"]))


def refuse_convolutions(work: Work) -> None:
    """Raises Unsupported where most of the gain would be lost: dynamic int8 leaves convolutions in float."""
    share = analyse(work.task, work.model).conv_share
    if share > MOST_CONVOLUTION:
        raise Unsupported(
            f"{share:.0%} of the multiply-adds are in convolutions, and dynamic int8 is not for those.",
            "Use the method minmax.",
        )
