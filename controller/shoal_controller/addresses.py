"""By which addresses devices reach this controller: a list of hints, best first.

The laptop's address may change at any time. What identifies the controller is the fleet's CA, so every
address may be tried and none has to be right; a device that can still reach one learns the new ones.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import re
import socket
from collections.abc import Callable, Sequence
from dataclasses import replace

import psutil

from shoal_controller.desired_inputs import PublishedSettings
from shoal_controller.services import Services

log = logging.getLogger("shoal.controller")

LOOK_SECONDS = 60.0
MAX_HOSTS = 8  # a token is typed and scanned: it must not grow with every bridge of a container engine
LOOPBACK = "127.0.0.1"
# Interfaces that lead to containers and virtual machines of this machine, not to devices.
INSIDE = re.compile(r"(docker|br-|veth|virbr|cni|flannel|podman|lxc|lxd|vmnet|vboxnet|kube|cali)")
ROUTED = ("192.0.2.1", 9)  # TEST-NET-1: nothing is sent to it, only the route is asked for

Hosts = Callable[[], tuple[str, ...]]


def order(found: Sequence[tuple[str, str]], default: str, name: str) -> tuple[str, ...]:
    """The hosts to hand out, best first. Pure.

    Args:
        found: interface and IPv4 address, as the machine lists them.
        default: the address that the default route uses, "" without one.
        name: the machine's host name.

    Returns:
        the default route's address, other addresses of the network, NAME.local, and loopback last, for an
        agent on this very machine that outlives a change of network.
    """
    usable = [address for interface, address in found if not INSIDE.match(interface) and _usable(address)]
    first = [default] if default in usable else []
    label = name.partition(".")[0].lower()
    local = [f"{label}.local"] if re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", label) else []
    hosts = dict.fromkeys([*first, *usable])
    return (*list(hosts)[: MAX_HOSTS - 2], *(local if label != "localhost" else []), LOOPBACK)


def _usable(address: str) -> bool:
    try:
        found = ipaddress.IPv4Address(address)
    except ValueError:
        return False
    return not (found.is_loopback or found.is_link_local or found.is_unspecified or found.is_multicast)


def of_this_machine() -> tuple[str, ...]:
    """`order` of what this machine says now."""
    found = [
        (interface, entry.address)
        for interface, entries in psutil.net_if_addrs().items()
        for entry in entries
        if entry.family == socket.AF_INET
    ]
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(ROUTED)
        return order(found, probe.getsockname()[0], socket.gethostname())
    return order(found, "", socket.gethostname())


def bracketed(host: str) -> str:
    """The host as it stands before `:PORT`."""
    return f"[{host}]" if ":" in host else host


class AddressKeeper:
    """Tells devices where the controller is, at start and whenever that changes."""

    def __init__(self, services: Services, hosts: Hosts) -> None:
        self._services = services
        self._hosts = hosts
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self.refresh()
        self._task = asyncio.create_task(self._watch(), name="addresses")

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None

    def refresh(self) -> bool:
        """Looks once; publishes the list if it is another one. True if it was."""
        services = self._services
        services.hosts = self._hosts()
        services.addresses = {
            door: f"{bracketed(services.hosts[0])}:{address.rpartition(':')[2]}"
            for door, address in services.addresses.items()
        }
        addresses = services.door_addresses("agents")
        with services.store.write() as session:
            known = PublishedSettings.load(session)
            if known.addresses == addresses:
                return False
            replace(known, addresses=addresses).save(session)
        log.info("Devices are told to find this controller at %s", ", ".join(addresses))
        services.publish()
        return True

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            try:
                await asyncio.to_thread(self.refresh)
            except Exception:
                log.exception("The addresses of this machine could not be published")
