"""What routers, runners and the gateway are given: the controller's parts, wired once in `app.py`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from shoal_controller.clock import Clock, now_ms
from shoal_controller.settings import Settings
from shoal_controller.store.repositories import Store

if TYPE_CHECKING:
    from shoal_controller.blobs import BlobStore
    from shoal_controller.devices import Fleet
    from shoal_controller.events import EventFeed
    from shoal_controller.gateway.connections import Connections
    from shoal_controller.identity import Keys
    from shoal_controller.intake import Intake
    from shoal_controller.metrics import Recent


@dataclass
class Services:
    settings: Settings
    store: Store
    keys: Keys
    blobs: BlobStore
    connections: Connections
    intake: Intake
    feed: EventFeed
    fleet: Fleet
    recent: Recent
    clock: Clock = now_ms
    # "enrolment", "agents" -> host:port that devices reach; empty until the doors are open
    addresses: dict[str, str] = field(default_factory=dict)
    # Every host that devices may reach this machine by, best first (addresses.py); hints, no identity.
    hosts: tuple[str, ...] = ()
    installer_port: int = 0  # of door 8441; 0 while it is closed

    def door_addresses(self, door: str) -> tuple[str, ...]:
        """All `host:port` of the door "enrolment" or "agents", best first; empty until it is open."""
        best = self.addresses.get(door, "")
        port = best.rpartition(":")[2]
        found = [f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host in self.hosts]
        if not best:
            return ()
        return tuple(dict.fromkeys(found)) or (best,)

    def publish(self, devices: Iterable[str] | None = None) -> list[str]:
        """Makes desired states follow the store; returns the devices whose state changed.

        Opens its own transactions: call it after yours has committed. The controller also calls it
        for every recorded event that can change a desired state, so forgetting it costs a moment,
        never correctness.
        """
        from shoal_controller.desired_publish import publish

        return publish(self.store, self.keys, self.connections, devices, clock=self.clock)
