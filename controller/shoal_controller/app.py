"""Wires everything: one controller on one data directory, in one asyncio loop."""

from __future__ import annotations

import asyncio
import dataclasses
import fcntl
import importlib
import json
import logging
import os
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import IO, Any, Protocol

from shoal_controller import audit, identity, maintenance
from shoal_controller.addresses import AddressKeeper, Hosts, of_this_machine
from shoal_controller.blobs import BlobStore
from shoal_controller.clock import Clock, now_ms
from shoal_controller.desired_inputs import PublishedSettings
from shoal_controller.devices import Fleet
from shoal_controller.events import EventFeed
from shoal_controller.gateway.connections import Connections
from shoal_controller.gateway.grpc import Gateway
from shoal_controller.http import HttpDoor
from shoal_controller.intake import Intake
from shoal_controller.maintenance import Maintenance
from shoal_controller.metrics import Recent
from shoal_controller.services import Services
from shoal_controller.settings import Settings, prepare_home
from shoal_controller.store.repositories import Store, get_meta, set_meta
from shoal_protos.errors import Conflict, ShoalError

log = logging.getLogger("shoal.controller")

# Runners that other rooms bring: module, class. Each takes the services, and has `async start()`
# and `async stop()`.
RUNNERS = (
    ("shoal_controller.rollouts.runner", "RolloutRunner"),
    ("shoal_controller.loop.runner", "LoopRunner"),
    ("shoal_controller.trials", "TrialRunner"),
)


class Runner(Protocol):
    async def start(self) -> None: ...
    async def stop(self) -> None: ...


class Controller:
    """The controller process. `open()` takes the data directory, `start()` opens the doors too.

    `services` is what routers and runners work with; `ports` what is bound ("http", "enrolment",
    "agents" and, with `lan`, "installer"). `hosts` finds the addresses that devices are told.
    """

    def __init__(self, settings: Settings, clock: Clock = now_ms, hosts: Hosts | None = None) -> None:
        self.settings = settings
        self.clock = clock
        self.ports: dict[str, int] = {}
        self._hosts = hosts or self._own_hosts
        self.stopping = asyncio.Event()  # streams end when it is set
        self._services: Services | None = None
        self._lock: IO[str] | None = None
        self._undo: list[Callable[[], Awaitable[object]]] = []  # what `stop` does, last one first

    @property
    def services(self) -> Services:
        assert self._services is not None, "the controller is not open"
        return self._services

    @property
    def store(self) -> Store:
        return self.services.store

    @property
    def keys(self) -> identity.Keys:
        return self.services.keys

    @property
    def blobs(self) -> BlobStore:
        return self.services.blobs

    @property
    def connections(self) -> Connections:
        return self.services.connections

    @property
    def intake(self) -> Intake:
        return self.services.intake

    def publish(self, devices: Iterable[str] | None = None) -> list[str]:
        """See Services.publish."""
        return self.services.publish(devices)

    # ------------------------------------------------------------------ opening

    def open(self) -> Services:
        """Takes the data directory: lock, identity, store, blobs. Idempotent.

        Raises:
            Denied: others can read the directory.
            Conflict: another controller has it, or it belongs to another fleet.
            Unavailable, Unsupported: the database cannot be used.
        """
        if self._services is not None:
            return self._services
        for library in ("alembic", "httpx"):  # they report each step at INFO
            logging.getLogger(library).setLevel(logging.WARNING)
        prepare_home(self.settings)
        self._lock = take_lock(self.settings.run_dir / "controller.lock")
        try:
            self._services = self._wire()
        except BaseException:
            self._release()
            raise
        return self._services

    def _wire(self) -> Services:
        keys = identity.init(self.settings.home, self.settings.fleet)
        self.settings = settings = dataclasses.replace(self.settings, fleet=keys.fleet)
        store = Store.open(settings.database_url, clock=self.clock)
        try:
            with store.write() as session:
                _check_fleet(session, keys.fleet)
                maintenance.reset_presence(session)
            connections = Connections()
            with store.read() as session:
                connections.load(session)
        except BaseException:
            store.close()
            raise
        return Services(
            settings=settings,
            store=store,
            keys=keys,
            blobs=BlobStore(settings.blobs_dir, clock=self.clock, lease_seconds=settings.blob_lease_seconds),
            connections=connections,
            intake=Intake(self.clock),
            feed=EventFeed(store),
            fleet=Fleet(store, settings, connections, self.clock),
            recent=Recent(store, self.clock),
            clock=self.clock,
        )

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def close(self) -> None:
        """Undoes `open`: for a controller that was never started."""
        if self._services is not None:
            self._services.store.close()
            self._services = None
        self._release()

    # ------------------------------------------------------------------ running

    async def start(self) -> None:
        """Opens the doors and starts the runners. After an error nothing is left open.

        Raises:
            Unavailable: a port is taken.
        """
        self.stopping.clear()
        services = self.open()
        try:
            await self._start(services)
        except BaseException:
            await self.stop()
            raise

    async def _start(self, services: Services) -> None:
        settings, wanted = self.settings, _wanted_ports(self.settings)
        await services.feed.start()
        self._undo.append(services.feed.stop)
        services.feed.listen(audit.log_events)
        gateway = Gateway(services)
        self._undo.append(gateway.stop)
        await _with_fallback(
            lambda ports: gateway.start(ports["enrolment"], ports["agents"], settings.doors_host),
            wanted,
            settings,
        )
        self.ports.update(gateway.ports)
        self._publish_settings(services)
        services.addresses = {name: f"{settings.host}:{self.ports[name]}" for name in ("enrolment", "agents")}
        addresses = AddressKeeper(services, self._hosts)
        await addresses.start()
        self._undo.append(addresses.stop)
        await self._open_installer(services, wanted)
        keeper = Maintenance(services)
        await keeper.start()
        self._undo.append(keeper.stop)
        await self._start_runners()
        door = HttpDoor(self._application())
        self._undo.append(door.stop)
        self.ports["http"] = await _with_fallback(
            lambda ports: door.start(settings.host, ports["http"]), wanted, settings
        )
        write_ports(settings.ports_file, {**self.ports, "host": settings.host, "hosts": services.hosts})
        log.info("The controller of fleet '%s' is up: %s", settings.fleet, self.ports)

    def _own_hosts(self) -> tuple[str, ...]:
        found = of_this_machine() if self.settings.lan else (self.settings.host,)
        return tuple(dict.fromkeys((*self.settings.extra_hosts, *found)))

    async def _open_installer(self, services: Services, wanted: dict[str, int]) -> None:
        """Door 8441, only with `lan`."""
        settings = self.settings
        if not settings.lan:
            return
        from shoal_controller.gateway import installer  # the web stack, as below

        door = HttpDoor(
            installer.create(settings.wheels_dir), "--installer-port", connections=installer.MAX_CONNECTIONS
        )
        self._undo.append(door.stop)
        self.ports["installer"] = await _with_fallback(
            lambda ports: door.start(settings.doors_host, ports["installer"]), wanted, settings
        )
        services.installer_port = self.ports["installer"]

    def _publish_settings(self, services: Services) -> None:
        settings = self.settings
        with services.store.write() as session:
            PublishedSettings(
                addresses=PublishedSettings.load(session).addresses,
                telemetry_seconds=settings.telemetry_seconds,
                heartbeat_seconds=settings.heartbeat_seconds,
                desired_seconds=settings.desired_seconds,
            ).save(session)

    async def _start_runners(self) -> None:
        for module, name in RUNNERS:
            kind = getattr(optional(module), name, None)
            if kind is not None:
                runner: Runner = kind(self.services)
                self._undo.append(runner.stop)
                await runner.start()

    def _application(self) -> Any:
        from shoal_controller.api.app import create_api  # the web stack: only where doors open

        return create_api(self)

    async def stop(self) -> None:
        """Stops everything in reverse order; what was acknowledged is on disk already. Idempotent."""
        self.stopping.set()
        while self._undo:
            undo = self._undo.pop()
            try:
                await undo()
            except Exception:
                log.exception("A part of the controller did not stop cleanly")
        await asyncio.to_thread(self.close)


def optional(module: str) -> Any:
    """A room's module, or None where that room is not part of this installation."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name and module.startswith(error.name):
            return None
        raise


def take_lock(path: Path) -> IO[str]:
    """Holds the data directory while the file is open. Raises Conflict naming the holder."""
    stream = path.open("a+")
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        stream.seek(0)
        holder = stream.read().strip() or "unknown"
        stream.close()
        raise Conflict(
            f"Another controller (process {holder}) uses {path.parent.parent}.",
            "Stop it first, or name another directory with --home.",
        ) from None
    stream.seek(0)
    stream.truncate()
    stream.write(str(os.getpid()))
    stream.flush()
    return stream


def _check_fleet(session: Any, fleet: str) -> None:
    known = get_meta(session, "fleet")
    if known and known != fleet:
        raise Conflict(
            f"The database belongs to the fleet '{known}', the identity to '{fleet}'.",
            "Restore identity and database of the same fleet.",
        )
    if not known:
        set_meta(session, "fleet", fleet)


# ---------------------------------------------------------------------------- ports


def _wanted_ports(settings: Settings) -> dict[str, int]:
    """Ports to try first: where 0 means a free one, the one of last time, which agents know."""
    try:
        before = json.loads(settings.ports_file.read_text())
    except (OSError, ValueError):
        before = {}
    return {
        name: asked or int(before.get(name) or 0)
        for name, asked in (
            ("http", settings.http_port),
            ("enrolment", settings.enrolment_port),
            ("agents", settings.agents_port),
            ("installer", settings.installer_port),
        )
    }


async def _with_fallback(
    open_door: Callable[[dict[str, int]], Awaitable[Any]], wanted: dict[str, int], settings: Settings
) -> Any:
    """Tries the wanted ports; where a free one was asked for, any free one will do."""
    asked = {
        "http": settings.http_port,
        "enrolment": settings.enrolment_port,
        "agents": settings.agents_port,
        "installer": settings.installer_port,
    }
    try:
        return await open_door(wanted)
    except ShoalError:
        if wanted == asked:
            raise
    return await open_door(asked)


def write_ports(path: Path, ports: dict[str, Any]) -> None:
    """Writes what is bound, whole or not at all."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(ports))
    temporary.replace(path)
