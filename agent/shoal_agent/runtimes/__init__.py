"""Runtimes that load bundles; found through the entry points `shoal.runtimes`."""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Mapping
from importlib import metadata
from typing import TYPE_CHECKING

from shoal_protos.errors import MissingExtra, ShoalError, Unsupported

if TYPE_CHECKING:
    from shoal_agent.runtimes.base import Runtime, RuntimeInfo

# A source tree on the path has no entry points of its own.
_BUILT_IN: Mapping[str, str] = {
    "onnxruntime": "shoal_agent.runtimes.onnxruntime:OnnxRuntime",
    "openvino": "shoal_agent.runtimes.openvino:OpenVino",
}


def names() -> list[str]:
    """Every runtime with a plug-in, installed or not, sorted."""
    return sorted({*_BUILT_IN, *(point.name for point in metadata.entry_points(group="shoal.runtimes"))})


@functools.cache
def find(name: str) -> Runtime:
    """The runtime called `name`.

    Raises:
        Unsupported: no plug-in of this name.
        MissingExtra: the plug-in itself cannot be imported (numpy is missing).
    """
    path = _BUILT_IN.get(name, "")
    for point in metadata.entry_points(group="shoal.runtimes", name=name):
        path = point.value
    if not path:
        raise Unsupported(f"There is no runtime '{name[:40]}'.", f"Known are {', '.join(names())}.")
    module, _, attribute = path.partition(":")
    try:
        kind = getattr(importlib.import_module(module), attribute)
    except ImportError as error:
        raise MissingExtra("agent", error.name or module) from error
    runtime: Runtime = kind()
    return runtime


def installed() -> list[RuntimeInfo]:
    """The runtimes that can be used here, with versions and providers. Imports each of them."""
    found = []
    for name in names():
        with contextlib.suppress(ShoalError):
            found.append(find(name).info())
    return found
