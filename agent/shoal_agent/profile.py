"""What this machine is: measured, not configured, and the profile class that follows from it.

`measure` reads /proc, /sys and package metadata; it imports neither numpy nor any runtime (their
providers are asked for in a short child process). `class_of` is pure and has a rule version: the
controller computes classes with this very function. Rules for people: docs/profile-classes.md.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path

from shoal_agent import children, processor
from shoal_agent.features import FEATURES
from shoal_protos import __version__
from shoal_protos.errors import InvalidInput
from shoal_protos.v1 import profile_pb2

CLASS_RULE_VERSION = 1

# Best first: the first tier whose features are all present names the hardware part of the class.
_TIERS: Mapping[str, Sequence[tuple[str, frozenset[str]]]] = {
    "x86_64": (
        ("amx", frozenset({"amx_int8", "amx_tile"})),
        ("avx512vnni", frozenset({"avx512_vnni", "avx512vl"})),
        ("avxvnni", frozenset({"avx_vnni"})),
        ("avx512", frozenset({"avx512f", "avx512vl", "avx512bw"})),
        ("avx2", frozenset({"avx2"})),
    ),
    "aarch64": (
        ("i8mm", frozenset({"i8mm"})),
        ("dotprod", frozenset({"dotprod"})),
        ("neon", frozenset({"neon"})),
    ),
}

# runtime name -> distributions that provide it, and the Python expression that lists its providers.
_RUNTIMES: Mapping[str, tuple[tuple[str, ...], str]] = {
    "onnxruntime": (
        ("onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino"),
        "__import__('onnxruntime').get_available_providers()",
    ),
    "openvino": (("openvino",), "list(__import__('openvino').Core().available_devices)"),
    "litert": (("ai-edge-litert", "tflite-runtime"), "['CPU']"),
    "tensorrt": (("tensorrt",), "['CUDA']"),
    "coreml": (("coremltools",), "['CPU', 'GPU', 'ANE']"),
}
PROVIDER_TIMEOUT_S = 60


# ---------------------------------------------------------------------------- the class


def class_of(profile: profile_pb2.Profile) -> str:
    """The profile class: `ARCHITECTURE.TIER.CORESc[.ACCELERATOR...][+RUNTIME...]`.

    Pure, and stable for one `CLASS_RULE_VERSION`. Memory, operating system, versions and marketing
    names are no part of it: a bundle says what it needs of those.
    """
    architecture = _word(profile.architecture) or "unknown"
    features = frozenset(profile.isa_features)
    tier = next((name for name, needed in _TIERS.get(architecture, ()) if needed <= features), "base")
    parts = [architecture, tier, f"{max(1, profile.cores)}c"]
    accelerators = {f"{_word(item.vendor)}-{_word(item.kind)}" for item in profile.accelerators}
    runtimes = {_word(item.name) for item in profile.runtimes} - {""}
    return "+".join([".".join(parts + sorted(accelerators)), *sorted(runtimes)])


def _word(text: str) -> str:
    return re.sub(r"[^a-z0-9_]+", "-", text.lower()).strip("-")


# ---------------------------------------------------------------------------- measuring


def measure(
    runtimes: Sequence[str] | None = None, root: Path = Path("/"), *, prefix: str | None = None
) -> profile_pb2.Profile:
    """Measures this machine.

    Args:
        runtimes: restricts the runtimes reported (and so used); None = every installed one.
        root: where `proc`, `sys` and `etc` lie; another one only in tests.
        prefix: the setting `child_prefix`, as in `children.interpreter`.

    Raises:
        InvalidInput: a runtime that is unknown or not installed was asked for.
    """
    architecture, cpuinfo = processor.architecture(), _read(root / "proc/cpuinfo")
    emulated = processor.is_emulated(architecture, cpuinfo)
    model = processor.model(cpuinfo)
    return profile_pb2.Profile(
        architecture=architecture,
        cpu_model=f"emulated on {model}".strip() if emulated else model,
        isa_features=processor.features(architecture, root),
        cores=usable_cores(root),
        memory_bytes=usable_memory(root),
        accelerators=[] if emulated else accelerators(root),  # those of the machine below
        runtimes=installed_runtimes(runtimes, prefix=prefix),
        os=os_name(root),
        agent_version=__version__,
        features=sorted(FEATURES),
        hardware_part="" if emulated else _read(root / "proc/device-tree/model").strip("\0\n "),
        emulated=emulated,
        python_version=platform.python_version(),
    )


def usable_cores(root: Path = Path("/")) -> int:
    """Logical cores that this process may use: affinity, then the control group's quota."""
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        cores = os.cpu_count() or 1
    quotas = [_quota_v2(_read(path / "cpu.max")) for path in _groups(root, "")]
    quotas += [
        _quota_v1(_read(path / "cpu.cfs_quota_us"), _read(path / "cpu.cfs_period_us"))
        for path in _groups(root, "cpu")
    ]
    limits = [quota for quota in quotas if quota is not None]
    return max(1, min([cores, *(int(limit + 0.5) for limit in limits)]))


def _quota_v2(text: str) -> float | None:
    fields = text.split()
    if len(fields) != 2 or fields[0] == "max":
        return None
    return int(fields[0]) / int(fields[1])


def _quota_v1(quota: str, period: str) -> float | None:
    if not quota.strip() or not period.strip() or int(quota) <= 0:
        return None
    return int(quota) / int(period)


def usable_memory(root: Path = Path("/")) -> int:
    """Bytes of memory that this process may use: the machine's, or its control group's limit."""
    match = re.search(r"^MemTotal:\s+(\d+) kB", _read(root / "proc/meminfo"), re.MULTILINE)
    limits = [int(match.group(1)) * 1024] if match else []
    for path in _groups(root, ""):
        limits += _numbers(_read(path / "memory.max"))
    for path in _groups(root, "memory"):
        limits += _numbers(_read(path / "memory.limit_in_bytes"))
    return min(limits, default=0)


def _numbers(text: str) -> list[int]:
    return [int(text)] if text.strip().isdigit() else []


def _groups(root: Path, controller: str) -> list[Path]:
    """Directories of our control group and its parents; `controller` "" = version 2."""
    mount = root / "sys/fs/cgroup" / controller
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if controller in controllers.split(",") if controller else controllers == "":
            group = mount / path.lstrip("/")
            return [group, *(parent for parent in group.parents if parent.is_relative_to(mount))]
    return [mount]


def accelerators(root: Path = Path("/")) -> list[profile_pb2.Accelerator]:
    """NVIDIA GPUs, Intel GPUs and Intel NPUs that the kernel's drivers show."""
    return [*_nvidia(root), *_intel_gpus(root), *_intel_npus(root)]


def _nvidia(root: Path) -> list[profile_pb2.Accelerator]:
    listing = _output(["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"])
    rows = [
        tuple(part.strip() for part in line.split(",", 1)) for line in listing.splitlines() if "," in line
    ]
    if not rows:  # no tool (Jetson, containers): the driver's own files
        version = re.search(r"Module\s+(?:for \S+\s+)?([\d.]+)", _read(root / "proc/driver/nvidia/version"))
        for path in sorted((root / "proc/driver/nvidia/gpus").glob("*/information")):
            model = re.search(r"^Model:\s*(.+)$", _read(path), re.MULTILINE)
            rows.append((model.group(1).strip() if model else "GPU", version.group(1) if version else ""))
    return [
        profile_pb2.Accelerator(vendor="nvidia", kind="gpu", name=name, driver_version=driver)
        for name, driver in rows
    ]


def _intel_gpus(root: Path) -> list[profile_pb2.Accelerator]:
    return [
        _intel("gpu", card)
        for card in sorted((root / "sys/class/drm").glob("card[0-9]*"))
        if "-" not in card.name and _read(card / "device/vendor").strip() == "0x8086"
    ]


def _intel_npus(root: Path) -> list[profile_pb2.Accelerator]:
    return [
        _intel("npu", path)
        for path in sorted((root / "sys/class/accel").glob("accel*"))
        if _read(path / "device/vendor").strip() == "0x8086"
    ]


def _intel(kind: str, path: Path) -> profile_pb2.Accelerator:
    driver = ""
    with contextlib.suppress(OSError):
        driver = os.path.basename(os.readlink(path / "device/driver"))
    name = f"Intel {kind.upper()} {_read(path / 'device/device').strip()}".strip()
    return profile_pb2.Accelerator(vendor="intel", kind=kind, name=name, driver_version=driver)


def os_name(root: Path = Path("/")) -> str:
    """Kernel, distribution and C library: "linux 6.1.0 debian 12 glibc 2.36"."""
    release = dict(line.split("=", 1) for line in _read(root / "etc/os-release").splitlines() if "=" in line)
    distribution = [release.get(key, "").strip('"') for key in ("ID", "VERSION_ID")]
    words = [platform.system().lower(), platform.release(), *distribution, *platform.libc_ver()]
    return " ".join(word for word in words if word)


# ---------------------------------------------------------------------------- runtimes


def runtime_versions(only: Sequence[str] | None = None) -> dict[str, str]:
    """Installed runtimes that have a Shoal plug-in (entry points `shoal.runtimes`), with their versions.

    From package metadata alone: nothing is imported.

    Raises:
        InvalidInput: `only` names a runtime that is unknown or not installed.
    """
    plugged = {point.name for point in metadata.entry_points(group="shoal.runtimes")}
    found = {}
    for name, (distributions, _) in _RUNTIMES.items():
        for distribution in distributions if name in plugged else ():
            with contextlib.suppress(metadata.PackageNotFoundError):
                found[name] = metadata.version(distribution)
                break
    if only is None:
        return found
    for name in only:
        if name not in found:
            raise InvalidInput(
                f"The runtime '{name}' is not installed here.",
                f"Installed: {', '.join(sorted(found)) or 'none'}. "
                f"Install it with: pip install 'shoal[{name}]'",
            )
    return {name: version for name, version in found.items() if name in only}


def installed_runtimes(
    only: Sequence[str] | None = None,
    ask: Callable[[Iterable[str]], Mapping[str, list[str]]] | None = None,
    *,
    prefix: str | None = None,
) -> list[profile_pb2.Runtime]:
    """Installed runtimes with versions and providers, sorted by name."""
    versions = runtime_versions(only)
    providers = ask(versions) if ask is not None else _ask_providers(versions, prefix)
    return [
        profile_pb2.Runtime(name=name, version=versions[name], providers=providers.get(name, []))
        for name in sorted(versions)
        if name in providers  # a package that cannot even be imported is no runtime
    ]


def _ask_providers(names: Iterable[str], prefix: str | None = None) -> dict[str, list[str]]:
    """Imports each runtime in a throwaway process: a broken package must not take the agent down."""
    running = {
        name: subprocess.Popen(
            [*children.interpreter(prefix), "-c", f"import json; print(json.dumps({_RUNTIMES[name][1]}))"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        for name in names
    }
    answers: dict[str, list[str]] = {}
    for name, process in running.items():
        try:
            output, _ = process.communicate(timeout=PROVIDER_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            continue
        with contextlib.suppress(ValueError, IndexError):
            answers[name] = [str(item) for item in json.loads(output.splitlines()[-1])]
    return answers


# ---------------------------------------------------------------------------- keeping it


def boot_id() -> str:
    """Changes at each boot; "" where the system does not tell."""
    return _read(Path("/proc/sys/kernel/random/boot_id")).strip()


def measure_cached(
    cache: Path, runtimes: Sequence[str] | None = None, *, prefix: str | None = None
) -> profile_pb2.Profile:
    """`measure`, remembered in `cache` for as long as boot, runtimes' versions and agent are the same.

    Asking runtimes for their providers takes a second or more; a start must not wait for that.
    """
    key = json.dumps(
        [boot_id(), __version__, runtime_versions(runtimes), usable_cores(), CLASS_RULE_VERSION],
        sort_keys=True,
    )
    with contextlib.suppress(OSError, ValueError, KeyError):
        stored = json.loads(cache.read_bytes())
        if stored["key"] == key:
            return profile_pb2.Profile.FromString(bytes.fromhex(stored["profile"]))
    profile = measure(runtimes, prefix=prefix)
    with contextlib.suppress(OSError):  # a cache; never worth failing for
        temporary = cache.with_name(cache.name + ".tmp")
        temporary.write_text(json.dumps({"key": key, "profile": profile.SerializeToString().hex()}))
        temporary.replace(cache)
    return profile


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def _output(command: Sequence[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
