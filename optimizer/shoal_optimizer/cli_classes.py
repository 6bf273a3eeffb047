"""Profile classes by name: this machine's own, and others by what their names say."""

from __future__ import annotations

from collections.abc import Sequence

from shoal_optimizer.jobspec import ProfileClass
from shoal_protos.errors import InvalidInput

_ISA = {
    "avx2": ("avx2",),
    "avxvnni": ("avx2", "avx_vnni"),
    "avx512": ("avx2", "avx512f", "avx512bw", "avx512vl"),
    "avx512vnni": ("avx2", "avx512f", "avx512bw", "avx512vl", "avx512_vnni"),
    "amx": ("avx2", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "amx_tile", "amx_int8"),
    "neon": ("neon",),
    "dotprod": ("neon", "dotprod"),
    "i8mm": ("neon", "dotprod", "i8mm"),
}


def machine_classes(names: Sequence[str], isa: Sequence[str] = ()) -> list[ProfileClass]:
    """The named classes, or this machine's with every runtime it has.

    Raises:
        InvalidInput: a class without a runtime, of an unknown kind, or no runtime is installed here.
    """
    from shoal_agent import profile

    machine = profile.measure()
    own = profile.class_of(machine)
    hardware = own.partition("+")[0]
    versions = {runtime.name: runtime.version for runtime in machine.runtimes}
    if not names and not versions:
        raise InvalidInput(
            "No runtime is installed on this machine.", "Install one with: pip install 'shoal[onnxruntime]'"
        )
    found = []
    for name in names or [own]:
        kind, _, runtimes = name.partition("+")
        wanted = [part for part in runtimes.split("+") if part]
        if not wanted:
            raise InvalidInput(f"The class '{name}' names no runtime.", f"Write it like {own}.")
        same = kind == hardware and not isa
        features = tuple(machine.isa_features) if same else tuple(isa) or _features(kind, name)
        found.append(
            ProfileClass(
                name,
                features,
                {runtime: versions.get(runtime, "") for runtime in wanted},
                local=same and set(wanted) <= set(versions),
            )
        )
    return found


def _features(hardware: str, name: str) -> tuple[str, ...]:
    tier = hardware.split(".")[1] if "." in hardware else ""
    if tier not in _ISA and tier != "base":
        raise InvalidInput(
            f"The class '{name}' has an unknown instruction set '{tier}'.",
            f"Known are {', '.join(_ISA)}; or name the features with --isa.",
        )
    return _ISA.get(tier, ())
