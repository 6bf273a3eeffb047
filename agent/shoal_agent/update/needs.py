"""Whether a device can run a bundle, by what the bundle needs, never by class name. Pure."""

from __future__ import annotations

import re

from shoal_protos.bundle import BundleConfig
from shoal_protos.errors import Unsupported
from shoal_protos.v1 import profile_pb2


def check(config: BundleConfig, profile: profile_pb2.Profile) -> None:
    """Passes if the profile has the bundle's runtime, in its version range, and its ISA features.

    Raises:
        Unsupported: names what is missing and what to do.
    """
    need = config.runtime
    versions = {runtime.name: runtime.version for runtime in profile.runtimes}
    if need.name not in versions:
        present = ", ".join(sorted(versions)) or "none"
        raise Unsupported(
            f"The bundle needs the runtime '{need.name}'; this device has {present}.",
            f"Install it with: pip install 'shoal[{need.name}]', or release a variant for this device.",
        )
    installed = versions[need.name]
    low, high = need.version_min, need.version_max
    if (low and _order(installed) < _order(low)) or (high and _order(installed) >= _order(high)):
        wanted = " and ".join(
            part for part in (f"at least {low}" if low else "", f"below {high}" if high else "") if part
        )
        raise Unsupported(
            f"The bundle needs {need.name} {wanted}; this device has {installed}.",
            "Update the runtime on the device, or optimize again for its version.",
        )
    missing = sorted(set(need.isa) - set(profile.isa_features))
    if missing:
        raise Unsupported(
            f"The bundle needs the CPU features {', '.join(missing)}, which this device lacks.",
            "Release a variant for this device's class.",
        )


def _order(version: str) -> tuple[int, ...]:
    """Numbers of a dotted version; a suffix such as `rc1` or `+cpu` does not count."""
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in match.group().split(".")) if match else (0,)
