"""Agents on other machines: what their packages resolve to, wheels only, and what docs/platforms.md says."""

from __future__ import annotations

import pytest
from packaging.version import InvalidVersion, Version

from tests.deploy import resolving
from tests.deploy.resolving import EXTRAS, GLIBCS, PYTHONS, PYTHONS_32, RUNTIMES, Wheel

AGENT = ("cryptography", "grpcio", "httptools", "numpy", "protobuf", "psutil", "uvicorn", "uvloop")


def resolve(
    *wanted: str, python: str, glibc: int, machine: str = "aarch64", alone: bool = False
) -> list[Wheel] | None:
    try:
        return resolving.resolve(wanted, python, glibc, machine, alone=alone)
    except resolving.Unreachable as reason:
        pytest.skip(f"the package registry does not answer: {reason}")


def test_the_tables_are_of_what_pyproject_asks_for() -> None:
    digest, rows = resolving.written()
    assert digest == resolving.digest(), "run: python -m tests.deploy.resolving"
    assert {f"`{extra}`" for extra in EXTRAS} <= set(rows) and len(rows["`agent`"]) == len(PYTHONS)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("glibc", GLIBCS)
@pytest.mark.parametrize("python", PYTHONS)
def test_every_agent_extra_resolves_from_wheels_for_aarch64(python: str, glibc: int) -> None:
    wanted = [line for extra in ("agent", "client") for line in resolving.of_extra(extra)]
    found = resolve(*sorted(set(wanted)), python=python, glibc=glibc)
    assert found is not None
    assert {wheel.name for wheel in found} >= {*AGENT, "pillow"}
    assert not {"torch", "fastapi", "sqlalchemy"} & {wheel.name for wheel in found}
    tag = "cp" + python.replace(".", "")
    assert any(tag in wheel.file and "aarch64" in wheel.file for wheel in found)
    _, rows = resolving.written()
    for runtime in RUNTIMES:
        packages = resolve(*resolving.of_extra(runtime), python=python, glibc=glibc)
        assert packages is not None, f"{runtime} has no wheel for Python {python} and glibc 2.{glibc}"
        said = rows[f"`{runtime}`"][PYTHONS.index(python)].split(",")[0]
        name = {"litert": "ai-edge-litert"}.get(runtime, runtime)
        (version,) = (wheel.version for wheel in packages if wheel.name == name)
        assert Version(version) >= Version(said), f"docs/platforms.md says {said}, found {version}"


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("python", PYTHONS_32)
def test_32_bit_arm_gets_no_agent_and_the_page_says_exactly_why(python: str) -> None:
    _, rows = resolving.written()
    missing = set()
    for requirement in resolving.packages_32():
        name = resolving.name_of(requirement)
        found = resolve(requirement, python=python, glibc=GLIBCS[-1], machine="armv7l", alone=True)
        said = rows[name][PYTHONS_32.index(python)]
        if found is None:
            missing.add(name)
        assert (found is None) == (said == "no"), f"{name}: docs/platforms.md says {said}"
        if found is not None:
            assert version_of(found[0].version) >= version_of(said)
    # What an agent cannot do without: it is not supported there, and nobody has to guess.
    assert missing & set(AGENT)


def version_of(text: str) -> Version:
    try:
        return Version(text)
    except InvalidVersion:
        return Version("0")
