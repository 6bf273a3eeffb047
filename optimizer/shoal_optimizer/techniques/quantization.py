"""Static int8: marks the precision and chooses calibration data; the target emits the graph."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from shoal_optimizer.targets.base import Calibration
from shoal_optimizer.techniques.base import Parameter, Technique, Work


class StaticQuantization(Technique):
    """Asks the target for static int8. Each runtime's own quantizer places the scales where that
    runtime fuses them; scales placed by torch leave most convolutions in float there."""

    name: ClassVar[str] = "quantization"
    quantizes: ClassVar[bool] = True
    parameters: ClassVar[Mapping[str, Parameter]] = {
        "samples": Parameter(200, 1, 100_000, help="calibration items"),
        "method": Parameter(
            "minmax", choices=("minmax", "percentile", "entropy"), help="how ranges are chosen"
        ),
    }

    def transform(self, work: Work, params: Mapping[str, Any]) -> Work:
        if work.calibration is not None:
            data = work.calibration.sample(params["samples"], work.seed)
        else:
            data = work.task.calibration_data(params["samples"])
        return replace(work, precision="int8", quantization=Calibration(data.inputs, params["method"]))
