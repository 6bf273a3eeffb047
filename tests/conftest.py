"""Settings every test shares."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

# One thread per process: two test workers share two cores, and barriers would wait on each other.
for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(name, "1")

# A busy machine must not fail a property test by its deadline.
settings.register_profile("shoal", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("shoal")
