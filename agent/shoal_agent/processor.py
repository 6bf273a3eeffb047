"""The processor under this process: architecture, instruction set features, and whether it is emulated."""

from __future__ import annotations

import contextlib
import functools
import platform
import re
import struct
from collections.abc import Mapping
from pathlib import Path

# /proc/cpuinfo flag -> our feature name. x86 lists them under "flags", Arm under "Features".
_ISA: Mapping[str, str] = {
    "avx2": "avx2",
    "avx512f": "avx512f",
    "avx512vl": "avx512vl",
    "avx512bw": "avx512bw",
    "avx512_vnni": "avx512_vnni",
    "avx_vnni": "avx_vnni",
    "amx_tile": "amx_tile",
    "amx_int8": "amx_int8",
    "amx_bf16": "amx_bf16",
    "asimd": "neon",
    "neon": "neon",
    "asimddp": "dotprod",
    "i8mm": "i8mm",
    "sve": "sve",
    "sve2": "sve2",
}

EMULATED_PATIENCE = 10

# Feature -> (type of the auxiliary vector's entry, bit) on aarch64; see Linux' asm/hwcap.h.
_HWCAP, _HWCAP2 = 16, 26
_AUXILIARY: Mapping[str, tuple[int, int]] = {
    "neon": (_HWCAP, 1),
    "dotprod": (_HWCAP, 20),
    "sve": (_HWCAP, 22),
    "sve2": (_HWCAP2, 1),
    "i8mm": (_HWCAP2, 13),
}


def architecture() -> str:
    """What this interpreter is built for. A 32-bit system may run on a 64-bit kernel, whose name
    `uname` gives (Raspberry Pi OS, 32-bit)."""
    machine = platform.machine().lower()
    found = {"amd64": "x86_64", "arm64": "aarch64"}.get(machine, machine)
    if struct.calcsize("P") == 4:
        return {"x86_64": "i686", "aarch64": "armv7l"}.get(found, found)
    return found


def features(architecture: str, root: Path = Path("/")) -> list[str]:
    """Instruction set features of this machine, sorted. On aarch64 from the auxiliary vector, which the
    kernel (or an emulator) gives each process, while an emulated /proc/cpuinfo shows another processor."""
    if architecture == "aarch64":
        with contextlib.suppress(OSError):
            return auxiliary_features((root / "proc/self/auxv").read_bytes())
    cpuinfo = _read(root / "proc/cpuinfo")
    return [] if _foreign(architecture, cpuinfo) else isa_features(cpuinfo)


def auxiliary_features(vector: bytes) -> list[str]:
    """Features in a 64-bit little-endian auxiliary vector of aarch64, sorted; [] when it is damaged."""
    size = len(vector) // 16 * 16
    entries = dict(struct.iter_unpack("<QQ", vector[:size]))
    return sorted(name for name, (kind, bit) in _AUXILIARY.items() if entries.get(kind, 0) >> bit & 1)


def isa_features(cpuinfo: str) -> list[str]:
    """Instruction set features that change which model is the fastest, sorted. Only those that
    every core has: a thread may run on any of them."""
    cores = [
        frozenset(line.partition(":")[2].split())
        for line in cpuinfo.splitlines()
        if line.partition(":")[0].strip() in ("flags", "Features")
    ]
    common = frozenset.intersection(*cores) if cores else frozenset()
    return sorted({_ISA[flag] for flag in common if flag in _ISA})


def model(cpuinfo: str) -> str:
    """Marketing name, for people only."""
    for key in ("model name", "Model", "Hardware"):
        match = re.search(rf"^{key}\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
        if match:
            return match.group(1).strip()
    return ""


def is_emulated(architecture: str, cpuinfo: str) -> bool:
    """True where the processor behind /proc/cpuinfo is not of the architecture that runs us
    (qemu-user shows the host's), or names itself as an emulator."""
    names_itself = re.search(r"^model name\s*:.*(QEMU|TCG)", cpuinfo, re.MULTILINE | re.IGNORECASE)
    return _foreign(architecture, cpuinfo) or bool(names_itself)


def _foreign(architecture: str, cpuinfo: str) -> bool:
    fields = {line.partition(":")[0].strip() for line in cpuinfo.splitlines()}
    return (architecture == "aarch64" and "vendor_id" in fields) or (
        architecture == "x86_64" and "CPU implementer" in fields
    )


@functools.lru_cache(maxsize=1)
def emulated_here() -> bool:
    """Whether this process runs in an emulator: what it times says nothing about a device."""
    return is_emulated(architecture(), _read(Path("/proc/cpuinfo")))


def patience(seconds: float) -> float:
    """A time limit for this machine: an emulated one is given ten times as long."""
    return seconds * (EMULATED_PATIENCE if emulated_here() else 1)


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
