"""`shoal optimize`: the optimizer's own command, without a controller."""

from __future__ import annotations

from shoal_protos.errors import MissingExtra

try:
    from shoal_optimizer.cli import optimize_command as optimize
except ModuleNotFoundError as error:
    raise MissingExtra("optimizer", error.name or "shoal_optimizer") from error

__all__ = ["optimize"]
