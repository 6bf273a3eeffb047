"""The supervisor: wires link, trust, updates, trials and telemetry together and decides nothing.

Small on purpose (no numpy, no runtime, no web server): it must live on when everything else fails.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import logging
import os
import signal
import time
from collections import Counter
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

from shoal_agent import features, logs, memory, notify, profile, reporting, vault
from shoal_agent.clock import Clock, SystemClock
from shoal_agent.config import Config
from shoal_agent.fs import Fs, RealFs
from shoal_agent.identity import Identity, IdentityStore
from shoal_agent.link.base import Backoff, Content
from shoal_agent.link.grpc import GrpcLink
from shoal_agent.lock import locked
from shoal_agent.processes import ProcessProber, ServerProcess
from shoal_agent.reporting import Picture
from shoal_agent.requests import Requests
from shoal_agent.samples import SampleSender
from shoal_agent.telemetry import system
from shoal_agent.telemetry.spool import Spool
from shoal_agent.transitions import Transitions
from shoal_agent.trials import TrialRunner
from shoal_agent.trust import PinnedTrust, Refused
from shoal_agent.update.executor import Updates
from shoal_agent.update.store import Bandwidth, BundleStore
from shoal_protos import __version__
from shoal_protos.errors import ShoalError, Unavailable
from shoal_protos.v1 import agents_pb2, desired_pb2, profile_pb2, telemetry_pb2

log = logging.getLogger(__name__)

IDLE_WINDOW_S = 60.0  # without traffic a telemetry window is sent this often
REPORT_DEBOUNCE_S = 0.1
PROGRESS_S = 2.0  # how often a fetch under way is reported
HOUSEKEEPING_S = 300.0
MAX_REFUSALS = 8
RENEW_CHECK_S = 3600.0


class Supervisor:
    """One device. `run` ends only when cancelled, by a signal, or by a bug.

    Implements `link.base.Events`.
    """

    def __init__(self, config: Config, *, clock: Clock | None = None, fs: Fs | None = None) -> None:
        self._config, self._paths = config, config.paths
        self._clock, self._fs = clock or SystemClock(), fs or RealFs()
        self._identities = IdentityStore(self._paths.identity, self._fs)
        self._identity: Identity = self._identities.load()
        self._profile = profile.measure_cached(
            self._paths.profile_cache, config.runtimes, prefix=config.child_prefix
        )
        self._class, self._class_reason = profile.class_of(self._profile), ""
        self._boot_id = profile.boot_id()
        self._spool = Spool(
            self._paths.spool, fs=self._fs, clock=self._clock, max_bytes=config.spool_mb << 20
        )
        self._trust = PinnedTrust(
            self._paths.desired,
            fleet=self._identity.fleet,
            device=self._identity.device,
            keys=self._identity.desired_state_keys,
            clock=self._clock,
            fs=self._fs,
            verify=functools.partial(vault.verify, prefix=config.child_prefix),
        )
        self._link = GrpcLink(
            self._identity,
            self._identity.agent_addresses,
            self._spool,
            heartbeat_s=config.heartbeat_seconds,
            clock=self._clock,
        )
        self._server = ServerProcess(
            config, clock=self._clock, on_up=self._server_up, on_died=self._server_died
        )
        self._wire: Counter[str] = Counter()  # bytes by purpose since the last window
        self._bandwidth = Bandwidth(self._clock)
        self._store = BundleStore(
            self._paths.store,
            fs=self._fs,
            bandwidth=self._bandwidth,
            on_bytes=lambda count: self._wire.update(bundle=count),
        )
        self._failure: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._transitions = Transitions(self._paths.transitions)
        self._updates = Updates(
            self._paths.state / "placements.json",
            trust=self._trust,
            store=self._store,
            source=self._link,
            server=self._server.client,
            prober=ProcessProber(config),
            profile=lambda: self._profile,
            pull=self._pull,
            clock=self._clock,
            fs=self._fs,
            failure_logs=lambda: logs.report(self._paths.logs),
            on_change=self._report_soon,
            on_transition=self._note_transition,
            memory_available=system.memory_available,
            on_bug=self._bug,
        )
        self._trials = TrialRunner(
            config,
            self._paths.state / "trials.json",
            trust=self._trust,
            store=self._store,
            carrier=self._link,
            spool=self._spool,
            quiet=lambda: not self._updates.busy,
            measuring=self._updates.measuring,
            now_ms=self._trust.now_ms,
            clock=self._clock,
            fs=self._fs,
        )
        self._samples = SampleSender(
            self._paths.samples,
            take=self._server.client.samples,
            push=self._push_samples,
            spool=self._spool,
            clock=self._clock,
            max_bytes=config.samples_mb << 20,
        )
        self._requests = Requests(config, measure=self._measure_again, on_answer=self._report_soon)
        self._system = system.SystemFacts(self._paths.root, lambda: self._server.pid)
        self._pulling = asyncio.Lock()
        self._incoming: asyncio.Queue[desired_pb2.Signed] = asyncio.Queue(8)
        self._ready = asyncio.Event()  # the stored desired state was taken up
        self._window_start_ns = self._clock.monotonic_ns()
        self._telemetry_s = float(config.telemetry_seconds)
        self._news = asyncio.Event()  # something to report
        self._metrics_port = 0
        self._refusals: list[agents_pb2.Refusal] = []
        self._heartbeats = 0
        self._first_heartbeat_s: float | None = None
        self._last_problem = ""
        self._clock_offset_ms: int | None = None
        self._crash_logs = b""  # of the crash loop that goes on
        self._name = self._identity.name

    # ------------------------------------------------------------------ life

    async def run(self) -> None:
        """Runs the device.

        Raises:
            ShoalError: it cannot start (metrics port taken, ...).
        """
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        tasks = [loop.create_task(self._link.run(self))]  # first: the controller hears of us at once
        tasks += [loop.create_task(part) for part in self._parts()]
        stopped = loop.create_task(stop.wait())
        try:
            await asyncio.to_thread(self._trust.load)
            self._updates.start()
            self._adopt(self._trust.state)
            self._ready.set()
            notify.tell(notify.READY)
            watched: list[asyncio.Future[Any]] = [*tasks, stopped, self._failure]
            done, _ = await asyncio.wait(watched, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            await self._stop([*tasks, stopped])

    def _parts(self) -> list[Coroutine[Any, Any, None]]:
        return [
            self._server.run(),
            self._admissions(),
            self._reports(),
            self._telemetry(),
            self._samples.run(),
            self._trials.run(),
            self._renewals(),
            self._housekeeping(),
            self._metrics(),
            self._watchdog(),
        ]

    async def _stop(self, tasks: list[asyncio.Task[Any]]) -> None:
        log.info("stopping")
        notify.tell(notify.STOPPING)
        for task in tasks:
            task.cancel()
        # Together: what the server still carries out ends with the server.
        await asyncio.gather(self._updates.stop(), self._requests.stop(), *tasks, return_exceptions=True)
        if self._failure.done() and not self._failure.cancelled():
            self._failure.exception()

    def _bug(self, error: BaseException) -> None:
        log.critical("a bug in the agent; ending, so that it is started anew", exc_info=error)
        if not self._failure.done():
            self._failure.set_exception(error)

    # ------------------------------------------------------------------ link.base.Events

    def hello(self) -> agents_pb2.Hello:
        state = self._trust.state
        facts = profile_pb2.Profile()
        facts.CopyFrom(self._profile)
        facts.ports.CopyFrom(self._ports())
        return agents_pb2.Hello(
            agent_version=__version__,
            features=sorted(features.FEATURES),
            profile=facts,
            epoch=state.epoch if state else 0,
            generation=state.generation if state else 0,
            boot_id=self._boot_id,
            monotonic_ns=self._clock.monotonic_ns(),
        )

    def heartbeat(self) -> agents_pb2.Heartbeat:
        self._heartbeats += 1
        return agents_pb2.Heartbeat(
            boot_id=self._boot_id,
            monotonic_ns=self._clock.monotonic_ns(),
            wall_ms=self._clock.wall_ms(),
            number=self._heartbeats,
        )

    async def on_welcome(self, welcome: agents_pb2.Welcome) -> None:
        log.info("connected to the controller %s", welcome.controller_version)
        self._last_problem = ""
        self._name = welcome.display_name or self._name
        self._class = welcome.profile_class or self._class
        self._class_reason = welcome.class_reason
        self._heard_time(welcome.server_time_ms)
        self._report_soon()

    async def on_heartbeat(self, reply: agents_pb2.HeartbeatReply) -> None:
        self._heard_time(reply.server_time_ms)
        if self._first_heartbeat_s is None:
            self._first_heartbeat_s = round(_seconds_since_start(), 3)
            log.info("first heartbeat accepted %.2f s after the start", self._first_heartbeat_s)
            self._report_soon()

    def _heard_time(self, server_time_ms: int) -> None:
        before = self._trust.clock_wrong
        self._trust.note_controller_time(server_time_ms)
        if server_time_ms > 0:
            self._clock_offset_ms = self._clock.wall_ms() - server_time_ms
        if self._trust.clock_wrong != before:
            log.warning("this device's clock is %s", "wrong" if self._trust.clock_wrong else "right again")
            self._report_soon()

    async def on_desired(self, signed: desired_pb2.Signed) -> None:
        await self._incoming.put(signed)

    async def _admissions(self) -> None:
        """Apart from the link's reader: checking a signature must not hold up heartbeats."""
        await self._ready.wait()
        while True:
            await self._admit(await self._incoming.get())

    async def _admit(self, signed: desired_pb2.Signed) -> None:
        try:
            state = await asyncio.to_thread(self._trust.admit, signed)
        except Refused as refusal:
            log.warning("refused a desired state (%s): %s", refusal.reason, refusal)
            entry = agents_pb2.Refusal(
                epoch=refusal.epoch, generation=refusal.generation, reason=refusal.reason
            )
            if entry not in self._refusals:
                self._refusals = [*self._refusals, entry][-MAX_REFUSALS:]
            self._report_soon()
            return
        except OSError as error:
            log.error("the desired state cannot be stored (%s); keeping the old one", error)
            return
        except Unavailable as error:
            log.error("the desired state could not be checked (%s); keeping the old one", error)
            return
        self._adopt(state)

    def on_lost(self, reason: ShoalError) -> None:
        if str(reason) != self._last_problem:
            log.warning("no connection to the controller: %s", reason)
        self._last_problem = str(reason)
        self._news.set()  # for the status file

    # ------------------------------------------------------------------ desired state

    def _adopt(self, state: desired_pb2.DesiredState | None) -> None:
        """Makes every part head for an admitted state. Idempotent."""
        if state is None:
            return
        log.info("desired state %d.%d", state.epoch, state.generation)
        self._refusals = [
            item for item in self._refusals if (item.epoch, item.generation) > (state.epoch, state.generation)
        ]
        self._apply_settings(state.agent_settings)
        self._updates.apply(state)
        self._trials.apply(state)
        self._requests.apply(state, self._trust.now_ms())
        self._report_soon()

    def _apply_settings(self, settings: desired_pb2.AgentSettings) -> None:
        self._telemetry_s = float(settings.telemetry_seconds or self._config.telemetry_seconds)
        self._link.set_heartbeat(float(settings.heartbeat_seconds or self._config.heartbeat_seconds))
        self._bandwidth.set_rate(settings.bandwidth_bytes_per_s)
        self._link.set_addresses(
            reporting.grpc_addresses(settings.controllers, self._identity.agent_addresses)
        )

    async def _measure_again(self) -> profile_pb2.Profile:
        """Measures anew and says hello with it, so that the controller derives the class again."""
        self._paths.profile_cache.unlink(missing_ok=True)
        self._profile = await asyncio.to_thread(
            profile.measure_cached,
            self._paths.profile_cache,
            self._config.runtimes,
            prefix=self._config.child_prefix,
        )
        self._link.greet_again()
        return self._profile

    # ------------------------------------------------------------------ the server

    def _server_up(self) -> None:
        self._updates.server_up()
        self._report_soon()  # the ports are known now

    def _server_died(self) -> None:
        self._updates.server_died()
        self._note_crash_loop()
        self._report_soon()

    def _note_crash_loop(self) -> None:
        """A crash loop brings the last logs, as they were when it was noticed."""
        looping = bool(self._server.crash_loop)
        if looping != bool(self._crash_logs):
            self._crash_logs = logs.report(self._paths.logs) if looping else b""
            self._report_soon()

    def _note_transition(self, endpoint: str, before: str, after: str, reason: str) -> None:
        self._transitions.add(self._clock.wall_ms(), endpoint, before, after, reason)

    def _ports(self) -> profile_pb2.Ports:
        ports = self._server.ports() if self._server.up else profile_pb2.Ports(host=self._config.host)
        ports.metrics = self._metrics_port
        return ports

    # ------------------------------------------------------------------ reports

    def _report_soon(self) -> None:
        self._news.set()

    def _picture(self) -> Picture:
        state = self._trust.state
        return Picture(
            fleet=self._identity.fleet,
            device=self._identity.device,
            name=self._name,
            profile_class=self._class,
            connected=self._link.connected,
            address=self._link.address,
            last_problem=self._last_problem,
            epoch=state.epoch if state else 0,
            generation=state.generation if state else 0,
            placements=tuple(self._updates.statuses()),
            refusals=tuple(self._refusals),
            answers=self._requests.answers(),
            ports=self._ports(),
            bundles=tuple(self._store.bundles()),
            clock_wrong=self._trust.clock_wrong,
            server_up=self._server.up,
            crash_loop=self._server.crash_loop,
            first_heartbeat_s=self._first_heartbeat_s,
            crash_logs=self._crash_logs,
            class_reason=self._class_reason,
            clock_offset_ms=self._clock_offset_ms,
        )

    async def _reports(self) -> None:
        last = b""
        while True:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._news.wait(), PROGRESS_S if self._updates.busy else None)
            self._news.clear()
            await self._clock.sleep(REPORT_DEBOUNCE_S)
            picture = self._picture()
            message = reporting.reported(picture)
            data = message.SerializeToString(deterministic=True)
            if data != last:
                self._link.report(message)
                last = data
            self._write_status(picture)

    def _write_status(self, picture: Picture) -> None:
        path = self._paths.runtime / "status.json"
        value = reporting.status(picture, os.getpid(), self._clock.wall_ms())
        with contextlib.suppress(OSError):
            temporary = path.with_suffix(".tmp")
            temporary.write_text(json.dumps(value, indent=1))
            temporary.replace(path)

    # ------------------------------------------------------------------ telemetry

    async def _telemetry(self) -> None:
        while True:
            await self._clock.sleep(self._telemetry_s)
            await self._pull()
            self._note_crash_loop()
            if self._server.up:
                await self._samples.collect()
            memory.release()

    async def _pull(self) -> None:
        """Takes the server's counts; spools them if there was traffic, or a minute has passed."""
        async with self._pulling:
            window = telemetry_pb2.TelemetryWindow()
            if self._server.up:
                with contextlib.suppress(Unavailable):
                    window = await self._server.client.telemetry()
            self._updates.observe(window.placements)
            now = self._clock.monotonic_ns()
            idle_s = (now - self._window_start_ns) / 1e9
            if not reporting.has_traffic(window.placements) and idle_s < IDLE_WINDOW_S:
                return
            window.boot_id = self._boot_id
            window.monotonic_start_ns, window.monotonic_end_ns = self._window_start_ns, now
            window.wall_end_ms = self._clock.wall_ms()
            window.system.CopyFrom(self._system.read())
            for purpose, count in self._wire.items():
                window.wire_bytes[purpose] = count
            self._wire.clear()
            self._window_start_ns = now
            self._spool.add(window)
            self._wire["telemetry"] += window.ByteSize()

    async def _push_samples(self, content: Content, purpose: str) -> None:
        await self._link.push(content, purpose)
        self._wire[purpose] += content.size

    # ------------------------------------------------------------------ upkeep

    async def _renewals(self) -> None:
        """Renews the certificate at two thirds of its life; the old one serves until the new one does."""
        backoff = Backoff(first=10.0, limit=RENEW_CHECK_S)
        while True:
            left_s = (self._identity.renew_at_ms - self._trust.now_ms()) / 1000
            if left_s > 0:
                await self._clock.sleep(min(left_s, RENEW_CHECK_S))
                continue
            try:
                await self._renew()
                backoff.reset()
            except (ShoalError, OSError) as error:
                log.warning("the certificate could not be renewed yet: %s", error)
                await self._clock.sleep(1.0 + backoff.next())

    async def _renew(self) -> None:
        self._identity = await vault.renew(self._paths.identity, prefix=self._config.child_prefix)
        self._link.set_identity(self._identity)
        days = (self._identity.expires_ms - self._trust.now_ms()) / 86_400_000
        log.info("certificate renewed, valid for %.1f days", days)

    async def _watchdog(self) -> None:
        """Tells the service manager that the loop turns; one that hangs is started anew."""
        pause = notify.watchdog_s() / 3
        while pause:
            notify.tell(notify.ALIVE)
            await self._clock.sleep(pause)
        await asyncio.Event().wait()

    async def _housekeeping(self) -> None:
        while True:
            logs.trim(self._paths.logs)
            await self._clock.sleep(HOUSEKEEPING_S)

    async def _metrics(self) -> None:
        """Imported late and off the loop: connecting must not wait for it."""
        server = await asyncio.to_thread(self._start_metrics)
        self._metrics_port = server.port
        self._report_soon()
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.to_thread(server.close)

    def _start_metrics(self) -> Any:
        from shoal_agent import exposition

        collector = exposition.AgentCollector(self._facts, self._server.client)
        return exposition.MetricsServer(self._config.host, self._config.metrics_port, collector)

    def _facts(self) -> Any:
        from shoal_agent.exposition import Facts

        state = self._trust.state
        return Facts(
            fleet=self._identity.fleet,
            device=self._identity.device,
            version=__version__,
            profile_class=self._class,
            connected=self._link.connected,
            generation=state.generation if state else 0,
            spool_waiting=self._spool.waiting,
            spool_bytes=self._spool.size,
            server_up=self._server.up,
            server_restarts=self._server.restarts,
            rss_bytes=system.rss_bytes(None),
            placements=tuple(
                (
                    item.endpoint,
                    reporting.ROLE_NAMES.get(item.role, "?"),
                    reporting.STEP_NAMES.get(item.step, "?"),
                    item.serving,
                )
                for item in self._updates.statuses()
            ),
        )


def _seconds_since_start() -> float:
    """Seconds since this process was started, Python's own start included."""
    try:
        ticks = float(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, AttributeError):
        return time.process_time()


async def supervise(config: Config, *, quiet: bool = False) -> None:
    """`shoal-agent run`. `quiet`: the log goes to its file only.

    Raises:
        Conflict: another agent runs on the same state directory.
        NotFound: this device has not joined.
    """
    memory.restrict()
    config.paths.create()
    with locked(config.paths):
        logs.set_up(config.paths.logs, quiet=quiet)
        (config.paths.runtime / "status.json").unlink(missing_ok=True)  # an earlier process's
        await Supervisor(config).run()
