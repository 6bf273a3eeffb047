"""Facts about the machine for each telemetry window: CPU, memory, temperature, throttling, disk."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path

import psutil

from shoal_protos.v1 import telemetry_pb2

# Raspberry Pi firmware: bits 0-3 = under-voltage, frequency capped, throttled, soft temperature limit, now.
_PI_THROTTLED_NOW = 0xF


class SystemFacts:
    """Reads the machine; CPU shares are since the last reading.

    Args:
        disk: directory whose file system is looked at.
        server_pid: process id of the server, None while there is none.
        root: where `sys` lies; another one only in tests.
    """

    def __init__(self, disk: Path, server_pid: Callable[[], int | None], root: Path = Path("/")) -> None:
        self._disk, self._server_pid, self._root = disk, server_pid, root
        self._throttle_count = self._throttles()
        psutil.cpu_percent(None)  # the first reading only marks the start

    def read(self) -> telemetry_pb2.System:
        throttles = self._throttles()
        throttled = throttles > self._throttle_count or self._pi_throttled()
        self._throttle_count = throttles
        return telemetry_pb2.System(
            cpu_share=psutil.cpu_percent(None) / 100,
            memory_used_bytes=_memory_used(),
            agent_rss_bytes=rss_bytes(None),
            server_rss_bytes=rss_bytes(pid) if (pid := self._server_pid()) else 0,
            temperature_celsius=self._temperature(),
            throttled=throttled,
            disk_free_bytes=psutil.disk_usage(str(self._disk)).free,
        )

    def _temperature(self) -> float:
        """The hottest thermal zone in degrees Celsius, NaN where there is none."""
        values = []
        for zone in (self._root / "sys/class/thermal").glob("thermal_zone*/temp"):
            text = _read(zone)
            if re.fullmatch(r"-?\d+", text):
                values.append(int(text) / 1000)
        return max(values, default=math.nan)

    def _throttles(self) -> int:
        """How often x86 processors throttled so far, over all cores."""
        pattern = "sys/devices/system/cpu/cpu[0-9]*/thermal_throttle/core_throttle_count"
        return sum(int(text) for path in self._root.glob(pattern) if (text := _read(path)).isdigit())

    def _pi_throttled(self) -> bool:
        text = _read(self._root / "sys/devices/platform/soc/soc:firmware/get_throttled")
        try:
            return bool(int(text, 16) & _PI_THROTTLED_NOW)
        except ValueError:
            return False


def rss_bytes(pid: int | None) -> int:
    """Resident memory of a process, 0 if it is gone; None = this one."""
    try:
        return int(psutil.Process(pid).memory_info().rss)
    except psutil.Error:
        return 0


def memory_available() -> int:
    """Bytes that a new process could take without swapping."""
    return int(psutil.virtual_memory().available)


def _memory_used() -> int:
    memory = psutil.virtual_memory()
    return int(memory.total - memory.available)


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
