"""Instances that behave as a test needs; they implement the interface."""

from __future__ import annotations

import threading
from collections.abc import Mapping

from shoal_agent.runtimes.base import Facts, Instance
from shoal_protos.errors import InvalidInput
from tests.agent.bundles import Array


class Gated(Instance):
    """Runs another instance once `gate` is set; `entered` tells that somebody waits."""

    def __init__(self, inner: Instance) -> None:
        self.inner = inner
        self.gate, self.entered = threading.Event(), threading.Event()
        self.batches: list[int] = []

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        self.entered.set()
        assert self.gate.wait(30)
        self.batches.append(len(next(iter(inputs.values()))))
        return self.inner.run(inputs)

    def facts(self) -> Facts:
        return self.inner.facts()

    def close(self) -> None:
        self.inner.close()


class Doubling(Instance):
    """Doubles "x"; fails on a batch that holds a negative value."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        self.batches.append(len(inputs["x"]))
        if (inputs["x"] < 0).any():
            raise InvalidInput("negative")
        return {"y": inputs["x"] * 2}

    def facts(self) -> Facts:
        return Facts("fake", "1", "none", 1, float("nan"))

    def close(self) -> None:
        """Nothing to free."""
