"""Who is at the other end of a connection: only a user of this machine may share memory with us."""

from __future__ import annotations

import contextlib
import ipaddress
import socket
import struct
import urllib.parse
from pathlib import Path
from typing import Any

from shoal_protos.errors import Denied

_TABLES = (Path("/proc/net/tcp"), Path("/proc/net/tcp6"))
_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid


class Peer:
    """One connection's other end. What it costs to find out is paid when it is asked for."""

    def __init__(self, unix: socket.socket | None = None, remote: tuple[str, int] | None = None) -> None:
        self._unix, self._remote = unix, remote
        self._user: int | None = None

    def user(self) -> int:
        """The peer's user id.

        Raises:
            Denied: the peer is on another machine, or this one does not say whose it is.
        """
        if self._user is None:
            self._user = self._find()
        return self._user

    def _find(self) -> int:
        if self._unix is not None:
            data = self._unix.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
            return int(_CREDENTIALS.unpack(data)[1])
        if self._remote is None or not _is_loopback(self._remote[0]):
            raise Denied("Shared memory is open to programs on this device only.", "Send the tensors.")
        user = _owner(self._remote)
        if user is None:
            raise Denied("It cannot be told which user is asking for shared memory.", "Send the tensors.")
        return user


def of_transport(transport: Any) -> Peer:
    """The peer of an asyncio transport."""
    found = transport.get_extra_info("socket")
    if found is not None and found.family == socket.AF_UNIX:
        return Peer(unix=found)
    return of_address(transport.get_extra_info("peername"))


def of_address(name: Any) -> Peer:
    """The peer at a socket's (address, port, ...)."""
    if isinstance(name, (tuple, list)) and len(name) >= 2:
        return Peer(remote=(str(name[0]), int(name[1])))
    return Peer()


def of_grpc(text: str) -> Peer:
    """The peer as gRPC writes it: "ipv4:127.0.0.1:5000" or "ipv6:[::1]:5000" (perhaps %-quoted)."""
    kind, _, rest = urllib.parse.unquote(text).partition(":")
    host, _, port = rest.rpartition(":")
    if kind in ("ipv4", "ipv6") and port.isdigit():
        return Peer(remote=(host.strip("[]"), int(port)))
    return Peer()


def _is_loopback(host: str) -> bool:
    with contextlib.suppress(ValueError):
        address = ipaddress.ip_address(host.partition("%")[0])
        mapped = getattr(address, "ipv4_mapped", None)
        return bool((mapped or address).is_loopback)
    return False


def _owner(remote: tuple[str, int]) -> int | None:
    """The user of the socket bound to this loopback address, from the kernel's table."""
    wanted = {f"{text}:{remote[1]:04X}" for text in _kernel_forms(remote[0])}
    for table in _TABLES:
        try:
            lines = table.read_text().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            fields = line.split()
            # Connected sockets only ("01"): a lingering one of an earlier user has no owner any more.
            if len(fields) > 7 and fields[1] in wanted and fields[3] == "01" and fields[7].isdigit():
                return int(fields[7])
    return None


def _kernel_forms(host: str) -> list[str]:
    """An address as /proc/net/tcp and tcp6 write it: words of 4 bytes in the machine's order."""
    address = ipaddress.ip_address(host.partition("%")[0])
    mapped = getattr(address, "ipv4_mapped", None)
    if mapped is not None:
        address = mapped
    packed = [address.packed]
    if address.version == 4:
        packed.append(b"\0" * 10 + b"\xff\xff" + address.packed)
    return ["".join(f"{word:08X}" for word in struct.unpack(f"={len(p) // 4}I", p)) for p in packed]
