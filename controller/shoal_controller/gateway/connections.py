"""The live streams of devices: who is connected, under which certificate, and who may be.

Touched only from the event loop; `send_desired` and `abort` may be called from any thread.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from sqlalchemy import select
from sqlalchemy.orm import Session

from shoal_controller.store.tables import Device
from shoal_protos.errors import Denied

log = logging.getLogger("shoal.gateway")


@dataclass(eq=False)
class Connection:
    """One device's open stream. `news` is set when its desired state may have changed."""

    device: str
    serial: str
    since_ms: int
    end: Callable[[str], None]  # ends the stream with this reason
    news: asyncio.Event = field(default_factory=asyncio.Event)
    last_heard_ms: int = 0
    address: str = ""  # IP that it came from


class Connections:
    """Registry of streams and the in-memory set of revoked devices."""

    def __init__(self) -> None:
        self._by_device: dict[str, Connection] = {}
        self._revoked_devices: set[str] = set()
        self._revoked_serials: set[str] = set()
        self._loop: asyncio.AbstractEventLoop | None = None

    def bind(self, loop: asyncio.AbstractEventLoop) -> None:
        """Says which loop the streams live in."""
        self._loop = loop

    def load(self, session: Session) -> None:
        """Reads who is revoked. Call at start and after a `revoked` event of another process."""
        rows = session.execute(
            select(Device.id, Device.certificate_serial).where(Device.revoked.is_(True))
        ).all()
        self._revoked_devices.update(row[0] for row in rows)
        self._revoked_serials.update(row[1] for row in rows)

    # ------------------------------------------------------------------ admission

    def check(self, device: str, serial: str) -> None:
        """Every call passes here. Raises Denied for a revoked device or certificate."""
        if device in self._revoked_devices or serial in self._revoked_serials:
            raise Denied("This device was revoked.", "Join again with a new token.")

    def revoke(self, device: str, serial: str) -> None:
        """Refuses the device from now on and ends its streams. From any thread."""
        self._revoked_devices.add(device)
        if serial:
            self._revoked_serials.add(serial)
        self._call(lambda: self._end(lambda c: c.device == device or c.serial == serial, "revoked"))

    def abort(self, serial: str) -> None:
        """Ends the streams that this certificate opened. From any thread."""
        self._call(lambda: self._end(lambda c: c.serial == serial, "certificate refused"))

    def _end(self, condition: Callable[[Connection], bool], reason: str) -> None:
        for connection in [c for c in self._by_device.values() if condition(c)]:
            connection.end(reason)

    # ------------------------------------------------------------------ streams

    def add(self, connection: Connection) -> None:
        """Registers; an older stream of the same device ends, since a device has one."""
        before = self._by_device.get(connection.device)
        self._by_device[connection.device] = connection
        if before is not None:
            before.end("replaced by a newer connection")

    def remove(self, connection: Connection) -> bool:
        """True if this was the device's current stream."""
        if self._by_device.get(connection.device) is connection:
            del self._by_device[connection.device]
            return True
        return False

    def is_connected(self, device: str) -> bool:
        return device in self._by_device

    def connected(self) -> list[str]:
        return list(self._by_device)

    def address(self, device: str) -> str:
        """IP address that the device's open stream came from, "" if it has none."""
        connection = self._by_device.get(device)
        return "" if connection is None else connection.address

    def last_heard(self, device: str) -> int:
        """Unix ms of the last message on the device's open stream, 0 if it has none."""
        connection = self._by_device.get(device)
        return 0 if connection is None else connection.last_heard_ms

    def heard(self) -> dict[str, int]:
        """Device -> Unix ms of its last message, for every open stream."""
        return {device: connection.last_heard_ms for device, connection in list(self._by_device.items())}

    def __len__(self) -> int:
        return len(self._by_device)

    def send_desired(self, device: str) -> None:
        """Tells the device's stream to look for a newer desired state. From any thread."""
        self._call(lambda: self._tell(device))

    def send_desired_all(self, devices: Iterable[str]) -> None:
        """The same for several devices."""
        wanted = list(devices)
        self._call(lambda: self._tell(*wanted))

    def _tell(self, *devices: str) -> None:
        for device in devices:
            connection = self._by_device.get(device)
            if connection is not None:
                connection.news.set()

    def end_all(self, reason: str) -> None:
        for connection in list(self._by_device.values()):
            connection.end(reason)

    def _call(self, action: Callable[[], object]) -> None:
        loop = self._loop
        if loop is None or loop.is_closed():
            return
        try:
            running = asyncio.get_running_loop()
        except RuntimeError:
            running = None
        if running is loop:
            action()
        else:
            loop.call_soon_threadsafe(action)
