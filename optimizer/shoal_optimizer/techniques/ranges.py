"""Ranges that training learned, kept with the module: they go along when it is copied or stored.

They hold for the weights that they were learned with. A step that changes the weights afterwards makes them
void, which the digest of the weights shows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import nn

MARK = "pinned_ranges"

Ranges = Mapping[str, tuple[float, float]]


def pin(model: nn.Module, ranges: Ranges) -> None:
    """Remembers `ranges`: module path, or path and ":input" -> (low, high) of the tensor."""
    model.__dict__[MARK] = {"ranges": dict(ranges), "weights": _digest(model)}


def pinned(model: nn.Module | None) -> dict[str, tuple[float, float]]:
    """What `pin` remembered, if the weights are still the same; else nothing."""
    kept = getattr(model, MARK, None)
    if model is None or not kept or kept["weights"] != _digest(model):
        return {}
    return dict(kept["ranges"])


def outdated(model: nn.Module | None) -> bool:
    """True when ranges were learned and the weights have changed since."""
    return bool(getattr(model, MARK, None)) and not pinned(model)


def _digest(model: nn.Module) -> str:
    state = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        state.update(name.encode())
        state.update(np.ascontiguousarray(tensor.detach().cpu().numpy()).tobytes())
    return state.hexdigest()
