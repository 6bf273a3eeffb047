"""Storing trained modules whole, structure included: pruning changes structures."""

from __future__ import annotations

import pickle
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from shoal_protos.errors import InvalidInput, MissingExtra

if TYPE_CHECKING:
    from torch import nn


def require_torch() -> Any:
    """The torch package. Raises MissingExtra with the install line."""
    try:
        import torch
    except ImportError as error:
        raise MissingExtra("optimizer", "torch") from error
    return torch


def save_module(module: nn.Module, path: Path) -> None:
    """Stores a whole module; `load_module` reads it where the task file is loaded."""
    require_torch().save(module, path)


def load_module(path: Path) -> nn.Module:
    """Reads what `save_module` wrote. The task file must be loaded first, since it defines the classes.

    Raises:
        InvalidInput: the file is missing, damaged or of another task.
    """
    torch = require_torch()
    try:
        # Whole-module pickles run code: they are this task's own, and the task file is code too.
        module: nn.Module = torch.load(path, map_location="cpu", weights_only=False, pickle_module=_pickle)
    except Exception as error:
        raise InvalidInput(
            f"The weights '{path.name}' cannot be read: {type(error).__name__}: {error}.",
            "Push the task again.",
        ) from error
    return module


class _Unpickler(pickle.Unpickler):
    """Finds classes of a task file by the file's content, wherever it lies in this process."""

    def find_class(self, module: str, name: str) -> Any:
        from shoal_optimizer.loading import MODULE_PREFIX, module_like

        return super().find_class(module_like(module) if module.startswith(MODULE_PREFIX) else module, name)


# What torch.load takes as a pickle module.
_pickle = ModuleType("shoal_pickle")
_pickle.__dict__.update(vars(pickle), Unpickler=_Unpickler, __name__="shoal_pickle")
