"""What this agent implements, by name, with the Shoal version that first had it.

The controller publishes only what a device can do; a desired state that requires anything else is
refused with the version needed.
"""

from __future__ import annotations

from collections.abc import Mapping

FEATURES: Mapping[str, str] = {
    "bundle.v1": "0.1.0",
    "placements.v1": "0.1.0",
    "shadow.v1": "0.1.0",
    "trials.v1": "0.1.0",
    "requests.v1": "0.1.0",
    "samples.v1": "0.1.0",
}

# No signed time before this can be true: the floor for a device whose clock starts at 1970.
BUILD_TIME_MS = 1_780_000_000_000  # 2026-05-28
