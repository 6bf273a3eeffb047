"""Targets: a runtime's format and precision to export to."""

from shoal_optimizer.targets.base import (
    Calibration,
    ClassSpec,
    Exported,
    Target,
    available,
    compressed_size,
    find,
    load_exported,
    load_twin,
    run_instance,
)

__all__ = [
    "Calibration",
    "ClassSpec",
    "Exported",
    "Target",
    "available",
    "compressed_size",
    "find",
    "load_exported",
    "load_twin",
    "run_instance",
]
