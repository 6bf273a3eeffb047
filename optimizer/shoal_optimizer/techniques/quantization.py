"""Static int8: marks the precision and chooses calibration data; the target emits the graph."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from shoal_optimizer.targets.base import Calibration
from shoal_optimizer.techniques.base import Parameter, Technique, Work
from shoal_protos.errors import InvalidInput


class StaticQuantization(Technique):
    """Asks the target for static int8. Each runtime's own quantizer places the scales where that
    runtime fuses them; scales placed by torch leave most convolutions in float there."""

    name: ClassVar[str] = "quantization"
    quantizes: ClassVar[bool] = True
    parameters: ClassVar[Mapping[str, Parameter]] = {
        "samples": Parameter(200, 1, 100_000, help="calibration items"),
        "exclude": Parameter("", help="modules of the model that stay fp32, separated by commas: '0,4.conv'"),
        "method": Parameter(
            "minmax", choices=("minmax", "percentile", "entropy"), help="how ranges are chosen"
        ),
    }

    def transform(self, work: Work, params: Mapping[str, Any]) -> Work:
        if work.calibration is not None:
            data = work.calibration.sample(params["samples"], work.seed)
        else:
            data = work.task.calibration_data(params["samples"])
        exclude = tuple(name.strip() for name in params["exclude"].split(",") if name.strip())
        if work.model is not None:
            known = dict(work.model.named_modules())
            unknown = [name for name in exclude if name not in known]
            if unknown:
                raise InvalidInput(
                    f"quantization.exclude names '{unknown[0]}', which the model does not have.",
                    f"Its modules are {', '.join(name for name in known if name)}."[:400],
                )
        settings = Calibration(data.inputs, params["method"], exclude)
        return replace(work, precision="int8", quantization=settings)
