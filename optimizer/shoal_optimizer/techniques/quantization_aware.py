"""Quantization-aware training: fine-tunes with fake-quantization and pins the ranges it learned."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from shoal_optimizer.techniques.base import Parameter, Technique, Work
from shoal_protos.errors import Unsupported


class QuantizationAware(Technique):
    """Trains float weights that keep their accuracy in int8."""

    name: ClassVar[str] = "quantization_aware"
    parameters: ClassVar[Mapping[str, Parameter]] = {
        "epochs": Parameter(3, 1, 1000, help="passes over the training data"),
    }

    def transform(self, work: Work, params: Mapping[str, Any]) -> Work:
        raise Unsupported("Not yet.")
