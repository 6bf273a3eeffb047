"""What this kind of machine can run: interpreter, C library, runtimes that exist for it, heat."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from shoal_agent import children, processor, profile
from shoal_agent.checks import FAILED, OK, UNMEASURED, WARNING, Check
from shoal_agent.config import Config
from shoal_agent.processor import patience
from shoal_protos.errors import ShoalError

IMPORT_LIMIT_S = 3.5
HOT_CELSIUS = 80.0
_MODULES: Mapping[str, str] = {
    "onnxruntime": "import onnxruntime",
    "openvino": "import openvino",
    "litert": "try:\n import ai_edge_litert\nexcept ModuleNotFoundError:\n import tflite_runtime",
    "tensorrt": "import tensorrt",
    "coreml": "import coremltools",
}
# Raspberry Pi firmware, `get_throttled`: what is true now, and (16 bits higher) since the start.
_PI_BITS = {0: "under-voltage", 1: "frequency capped", 2: "throttled", 3: "soft temperature limit"}
_POWER = "Use the board's own power supply and a short cable; cool it."


# ---------------------------------------------------------------------------- interpreter


def interpreter() -> Check:
    """Python and the C library, against what the agent and its wheels need."""
    name, version = platform.libc_ver()
    libc = f"{name} {version}".strip() or "an unknown C library"
    found = f"Python {platform.python_version()}, {libc}, {processor.architecture()}"
    if sys.version_info < (3, 10):  # noqa: UP036  # said, not assumed
        return Check("python", FAILED, found, "The agent needs Python 3.10 or newer.")
    if sys.platform == "linux" and name != "glibc":
        remedy = "Runtimes come as wheels for glibc: use Debian, Ubuntu, Raspberry Pi OS or JetPack."
        return Check("python", WARNING, found, remedy)
    return Check("python", OK, found)


def _libc() -> tuple[int, ...]:
    numbers = re.findall(r"\d+", platform.libc_ver()[1])
    return tuple(int(number) for number in numbers[:2])


def fitting_extras(
    architecture: str, python: tuple[int, int], libc: tuple[int, ...], system: str = "linux"
) -> list[str]:
    """Extras of Shoal for which wheels exist on such a machine, best first. Pure."""
    if system != "linux":
        return ["onnxruntime"]
    if architecture not in ("x86_64", "aarch64") or libc < (2, 28):
        return []
    found = ["onnxruntime", "litert"]
    if architecture == "x86_64" or libc >= (2, 35):
        found.insert(1, "openvino")
    return found


# ---------------------------------------------------------------------------- runtimes


def runtimes(config: Config) -> list[Check]:
    """Installed runtimes, whether each can be imported, and what else fits this machine."""
    try:
        versions = profile.runtime_versions(config.runtimes)
    except ShoalError as error:
        return [Check("runtimes", FAILED, error.message, error.remedy)]
    system = sys.platform
    extras = fitting_extras(processor.architecture(), sys.version_info[:2], _libc(), system)
    if not versions:
        if not extras:
            found = "none is installed, and none has a wheel for this machine"
            return [Check("runtimes", FAILED, found, "Use a 64-bit system with glibc 2.28 or newer.")]
        remedy = f"Install one: {sys.executable} -m pip install 'shoal[{extras[0]}]'"
        return [Check("runtimes", FAILED, "none is installed, so no model can run", remedy)]
    more = [name for name in extras if name not in versions]
    hint = f"; also possible here: {', '.join(more)}" if more and config.runtimes is None else ""
    return _imported(versions, config, hint)


def _imported(versions: Mapping[str, str], config: Config, hint: str) -> list[Check]:
    started = {
        name: subprocess.Popen(
            [*children.interpreter(config.child_prefix), "-c", _MODULES[name]],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        )
        for name in versions
    }  # fmt: skip
    good, found = [], []
    for name, process in started.items():
        title = f"{name} {versions[name]}"
        try:
            _, errors = process.communicate(timeout=patience(IMPORT_LIMIT_S))
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            found.append(Check(name, UNMEASURED, f"{versions[name]}: importing it takes long here"))
            continue
        if process.returncode == 0:
            good.append(title)
            continue
        last = errors.decode(errors="replace").strip().splitlines()[-1:] or [
            f"exit code {process.returncode}"
        ]
        remedy = f"Install it again: {sys.executable} -m pip install --force-reinstall 'shoal[{name}]'"
        found.append(Check(name, FAILED, f"{versions[name]} cannot be imported: {last[0][:200]}", remedy))
    if good:
        found.insert(0, Check("runtimes", OK, ", ".join(good) + hint))
    return found


# ---------------------------------------------------------------------------- heat and power


def temperature(root: Path = Path("/")) -> list[Check]:
    """The hottest zone, and what the board's firmware says of heat and power."""
    celsius = [
        int(text) / 1000
        for zone in (root / "sys/class/thermal").glob("thermal_zone*/temp")
        if re.fullmatch(r"-?\d+", text := _read(zone))
    ]
    bits = throttled_bits(root)
    if not celsius and bits is None:
        return [Check("temperature", UNMEASURED, "this machine does not tell")]
    text = f"{max(celsius):.0f} °C" if celsius else "no sensor"
    now = [word for bit, word in _PI_BITS.items() if (bits or 0) & (1 << bit)]
    before = [word for bit, word in _PI_BITS.items() if (bits or 0) & (1 << (16 + bit))]
    if now:
        return [Check("temperature", WARNING, f"{text}, now: {', '.join(now)}", _POWER)]
    if before:
        return [Check("temperature", WARNING, f"{text}, since the start: {', '.join(before)}", _POWER)]
    if celsius and max(celsius) >= HOT_CELSIUS:
        return [Check("temperature", WARNING, text, "Cool it: a hot processor runs slower.")]
    return [Check("temperature", OK, text)]


def throttled_bits(root: Path = Path("/")) -> int | None:
    """Raspberry Pi's `get_throttled`, None on other machines."""
    text = _read(root / "sys/devices/platform/soc/soc:firmware/get_throttled")
    tool = shutil.which("vcgencmd")
    if not text and tool:
        try:
            result = subprocess.run([tool, "get_throttled"], capture_output=True, timeout=2, check=False)
            text = result.stdout.decode(errors="replace").strip().rpartition("=")[2]
        except (OSError, subprocess.TimeoutExpired):
            return None
    try:
        return int(text, 16)
    except ValueError:
        return None


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
