"""Runtimes that load bundles; found through the entry points `shoal.runtimes`."""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
from collections.abc import Mapping
from importlib import metadata
from typing import TYPE_CHECKING

from shoal_protos.errors import MissingExtra, ShoalError, Unsupported

if TYPE_CHECKING:
    from shoal_agent.runtimes.base import Runtime, RuntimeInfo

# A supervisor told to use some runtimes only tells its children here.
RUNTIMES_VARIABLE = "SHOAL_RUNTIMES"
# A source tree on the path has no entry points of its own.
_BUILT_IN: Mapping[str, str] = {
    "litert": "shoal_agent.runtimes.litert:LiteRt",
    "onnxruntime": "shoal_agent.runtimes.onnxruntime:OnnxRuntime",
    "openvino": "shoal_agent.runtimes.openvino:OpenVino",
}


def names() -> list[str]:
    """Every runtime with a plug-in, installed or not, sorted."""
    return sorted({*_BUILT_IN, *(point.name for point in metadata.entry_points(group="shoal.runtimes"))})


def find(name: str) -> Runtime:
    """The runtime called `name`.

    Raises:
        Unsupported: no plug-in of this name, or one that this agent is told not to use.
        MissingExtra: the plug-in itself cannot be imported (numpy is missing).
    """
    allowed = os.environ.get(RUNTIMES_VARIABLE, "")
    if allowed and name not in allowed.split(","):
        raise Unsupported(
            f"This agent is set up without the runtime '{name[:40]}'.", f"Its runtimes are {allowed}."
        )
    return _plug_in(name)


@functools.cache
def _plug_in(name: str) -> Runtime:
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
