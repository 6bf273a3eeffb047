"""A smaller network of the model's own family, with inherited weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from shoal_optimizer.techniques.base import Parameter, Technique, Work
from shoal_protos.errors import Unsupported


class Architecture(Technique):
    """Scales width, depth, kernel and resolution."""

    name: ClassVar[str] = "architecture"
    parameters: ClassVar[Mapping[str, Parameter]] = {
        "width": Parameter(0.5, 0.05, 1.0, help="share of channels kept"),
    }

    def transform(self, work: Work, params: Mapping[str, Any]) -> Work:
        raise Unsupported("Not yet.")
