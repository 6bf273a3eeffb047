"""Which of some downloaded wheels a device needs, and which are missing. Pure.

pip judges the markers of requirements (`python_version < '3.11'`) by the Python that it runs on, also when
it downloads for another one. So what a device needs is worked out again here, by the device's own facts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from shoal_controller.wheel_files import WheelFile

# Declared by a package, never imported by what an agent does with it; why stands in
# docs/decisions/0005-what-a-device-does-not-install.md.
NEVER_IMPORTED: Mapping[str, frozenset[str]] = {
    "onnxruntime": frozenset({"sympy", "coloredlogs"}),
}


@dataclass(frozen=True)
class Target:
    """The devices that a set is for."""

    platform: str  # aarch64, x86_64
    python: str  # 3.13
    glibc: tuple[int, int] = (2, 35)

    @property
    def tag(self) -> str:
        """cp313"""
        return "cp" + self.python.replace(".", "")

    @property
    def name(self) -> str:
        """aarch64-cp313: the set's folder."""
        return f"{self.platform}-{self.tag}"

    def markers(self, extra: str = "") -> dict[str, str]:
        """The environment that requirements are judged in."""
        return {
            "python_version": self.python,
            "python_full_version": f"{self.python}.0",
            "implementation_name": "cpython",
            "implementation_version": f"{self.python}.0",
            "platform_python_implementation": "CPython",
            "platform_machine": self.platform,
            "platform_system": "Linux",
            "platform_release": "",
            "platform_version": "",
            "sys_platform": "linux",
            "os_name": "posix",
            "extra": extra,
        }


@dataclass
class Closure:
    """`needed`: wheels by name. `missing`: requirements that no wheel answers. `left_out`: declared and
    downloaded, but never imported."""

    needed: dict[str, WheelFile] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    left_out: set[str] = field(default_factory=set)


def close(wheels: Iterable[WheelFile], roots: Iterable[str], target: Target) -> Closure:
    """Follows requirements from `roots` ("shoal[agent,client]", "pip") through the wheels."""
    by_name = {wheel.name: wheel for wheel in wheels}
    found = Closure()
    todo = [Requirement(root) for root in roots]
    seen: set[tuple[str, str]] = set()
    while todo:
        wanted = todo.pop()
        name = canonicalize_name(wanted.name)
        wheel = by_name.get(name)
        if wheel is None or not wanted.specifier.contains(wheel.version, prereleases=True):
            text = f"{wanted.name}{wanted.specifier}"
            if text not in found.missing:
                found.missing.append(text)
            continue
        found.needed[name] = wheel
        for extra in ["", *sorted(wanted.extras)]:
            if (name, extra) not in seen:
                seen.add((name, extra))
                todo += _requirements(wheel, extra, target, found)
    found.left_out -= set(found.needed)
    return found


def _requirements(wheel: WheelFile, extra: str, target: Target, found: Closure) -> list[Requirement]:
    wanted = []
    for text in wheel.requires:
        try:
            requirement = Requirement(text)
        except InvalidRequirement:  # a very old package; pip would not follow it either
            continue
        if requirement.marker and not requirement.marker.evaluate(target.markers(extra)):
            continue
        name = canonicalize_name(requirement.name)
        if name in NEVER_IMPORTED.get(wheel.name, ()):
            found.left_out.add(name)
        else:
            wanted.append(requirement)
    return wanted
