"""What the devices of a profile class share, and whether a bundle can run on all of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from shoal_controller.store.tables import Device
from shoal_protos.bundle import RuntimeNeed
from shoal_protos.v1.profile_pb2 import Profile


@dataclass(frozen=True)
class ClassFacts:
    """What every device of a class has."""

    name: str
    architecture: str
    isa: frozenset[str]
    runtimes: Mapping[str, str]  # name -> version, the oldest of the class
    emulated: bool = False  # every device of it is, so none can be timed
    providers: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # of each runtime

    @property
    def hardware(self) -> str:
        return self.name.split("+", 1)[0]


def facts_of(profile: Profile, name: str) -> ClassFacts:
    return ClassFacts(
        name,
        profile.architecture,
        frozenset(profile.isa_features),
        {runtime.name: runtime.version for runtime in profile.runtimes},
        profile.emulated,
        {runtime.name: tuple(runtime.providers) for runtime in profile.runtimes},
    )


def class_facts(devices: Iterable[Device]) -> dict[str, ClassFacts]:
    """Class -> what all of its devices share."""
    found: dict[str, ClassFacts] = {}
    for device in devices:
        new = facts_of(Profile.FromString(device.profile), device.profile_class)
        old = found.get(new.name)
        if old is not None:
            shared = {
                name: min(version, new.runtimes[name], key=version_key)
                for name, version in old.runtimes.items()
                if name in new.runtimes
            }
            emulated = old.emulated and new.emulated
            both = {
                name: tuple(p for p in old.providers.get(name, ()) if p in new.providers.get(name, ()))
                for name in shared
            }
            new = ClassFacts(new.name, new.architecture, old.isa & new.isa, shared, emulated, both)
        found[new.name] = new
    return found


def version_key(text: str) -> tuple[int, ...]:
    """Numbers of a version, for comparing: "1.32.0rc1" -> (1, 32, 0)."""
    numbers = []
    for part in text.split("."):
        digits = ""
        for letter in part:
            if not letter.isdigit():
                break
            digits += letter
        if not digits:
            break
        numbers.append(int(digits))
    return tuple(numbers)


def fits(need: RuntimeNeed, facts: ClassFacts) -> bool:
    """Whether a bundle can run on every device of a class: runtime, version range, ISA features."""
    version = facts.runtimes.get(need.name)
    if version is None or not frozenset(need.isa) <= facts.isa:
        return False
    if need.version_min and version_key(version) < version_key(need.version_min):
        return False
    return not (need.version_max and version_key(version) >= version_key(need.version_max))


def class_reason(profile: Profile, profile_class: str) -> str:
    """Why a device is of its class, in words."""
    runtimes = ", ".join(f"{runtime.name} {runtime.version}" for runtime in profile.runtimes) or "no runtime"
    accelerators = ", ".join(item.name or item.kind for item in profile.accelerators)
    parts = [
        f"{profile.architecture} with {profile.cores} usable cores",
        f"instructions {', '.join(profile.isa_features) or 'of the base set'}",
        *([f"accelerators {accelerators}"] if accelerators else []),
        f"runtimes {runtimes}",
    ]
    return f"{profile_class}: {'; '.join(parts)}."
