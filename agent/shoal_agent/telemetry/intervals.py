"""Intervals of shares, the one implementation for agent, optimizer and controller; no numpy."""

from __future__ import annotations

import math

Z95 = 1.959963984540054  # two-sided 95 %


def wilson(successes: float, n: float, z: float = Z95) -> tuple[float, float]:
    """Wilson's score interval of a share (E. B. Wilson, 1927); (0, 1) without data.

    The share itself always lies inside, which rounding alone would not grant at 0 and 1.
    `n` need not be whole: clustered observations count as fewer independent ones.
    """
    if n == 0:
        return 0.0, 1.0
    share, spread = min(1.0, successes / n), z * z / n  # rounding may pass 1 where n is not whole
    centre = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / n + spread / (4 * n))
    return max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half))
