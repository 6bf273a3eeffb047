"""Looking at the layers of a torch model while it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


@contextmanager
def watching(
    hooks: Iterable[tuple[nn.Module, Callable[..., None]]], *, with_kwargs: bool = False
) -> Iterator[None]:
    """Calls each hook after its module ran, inside the block only: `hook(module, args, output)`, or
    `hook(module, args, kwargs, output)`."""
    handles: list[Any] = []
    try:
        for module, hook in hooks:
            handles.append(module.register_forward_hook(hook, with_kwargs=with_kwargs))
        yield
    finally:
        for handle in handles:
            handle.remove()
