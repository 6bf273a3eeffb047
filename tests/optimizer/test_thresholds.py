"""Counting windows from each item's bin gives what sketching each window would."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from shoal_agent.telemetry.distances import largest
from shoal_agent.telemetry.sketches import sketch
from shoal_optimizer import packing

Make = Callable[[np.random.Generator], np.ndarray]
CASES: list[tuple[str, Make, tuple[float | None, float | None]]] = [
    ("image", lambda r: r.integers(0, 17, (300, 8, 8, 1)).astype(np.uint8), (0, 16)),
    ("logits", lambda r: r.normal(size=(300, 10)).astype(np.float32), (None, None)),
    ("series", lambda r: r.normal(size=(300, 64)).astype(np.float32), (None, None)),
    ("tensor", lambda r: r.normal(size=(300, 7)), (None, None)),
]


@pytest.mark.parametrize(("kind", "make", "bounds"), CASES, ids=[case[0] for case in CASES])
def test_thresholds_equal_those_of_sketched_windows(
    kind: str, make: Make, bounds: tuple[float | None, float | None]
) -> None:
    items = make(np.random.default_rng(0))
    reference, clean = sketch(kind, items[150:], *bounds), items[:150]
    random = np.random.default_rng(5)
    worst = {"psi": 0.0, "ks": 0.0}
    for _ in range(20):
        window = clean[random.choice(len(clean), 25, replace=False)]
        distance = largest(reference, sketch(kind, window, *bounds))
        worst = {name: max(worst[name], distance[name][0]) for name in worst}
    found = packing.window_thresholds(reference, clean, *bounds, sizes=(25,), windows=20, seed=5)
    assert found[25] == {
        name: pytest.approx(value * packing.MARGIN, rel=1e-3) for name, value in worst.items()
    }
