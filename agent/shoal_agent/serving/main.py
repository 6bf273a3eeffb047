"""`shoal-agent serve`: the process that answers applications.

Managed by a supervisor it starts empty and is told over its private socket what to load; standing
alone it serves one bundle. It keeps nothing on disk but sample files, each written whole, so it may be
killed at any moment.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ctypes
import ipaddress
import json
import logging
import os
import signal
import ssl
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from shoal_protos.bundle import Bundle, open_bundle
from shoal_protos.errors import Denied, InvalidInput, MissingExtra, ShoalError
from shoal_protos.v1.desired_pb2 import PlacementSettings, RuntimeOptions

log = logging.getLogger("shoal.serving")

HTTP_PORT, GRPC_PORT, METRICS_PORT = 8000, 8001, 8002
GRACE_S = 8.0  # less than a supervisor waits before it kills
MAX_BODY = 64 << 20
WAIT_VARIABLE = "SHOAL_LABEL_WAIT_S"


@dataclass(frozen=True)
class Settings:
    """What the command line says. `metrics_port` None = no listener for metrics."""

    bundle: Path | None
    digest: str
    name: str
    state: Path | None
    host: str
    http_port: int
    grpc_port: int
    metrics_port: int | None
    tls: tuple[Path, Path] | None
    max_body: int
    max_queue: int
    threads: int
    label_wait_s: float

    @property
    def managed(self) -> bool:
        return self.state is not None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="shoal-agent serve", description="Serves models over the Open Inference Protocol."
    )
    parser.add_argument("bundle", nargs="?", type=Path, help="a bundle's directory; outside of a fleet")
    parser.add_argument("--digest", default="", help="which bundle of the directory, if it holds several")
    parser.add_argument("--name", default="", help="name to serve under [the model's own, else 'model']")
    parser.add_argument("--host", default="127.0.0.1", help="address to bind [%(default)s]")
    parser.add_argument("--http-port", type=int, default=HTTP_PORT, help="0 = a free one [%(default)s]")
    parser.add_argument("--grpc-port", type=int, default=GRPC_PORT, help="0 = a free one [%(default)s]")
    parser.add_argument(
        "--metrics-port", type=int, default=None, help=f"0 = a free one [{METRICS_PORT}; managed: none]"
    )
    parser.add_argument("--tls-cert", type=Path, help="certificate chain, PEM; needed off loopback")
    parser.add_argument("--tls-key", type=Path, help="its private key, PEM")
    parser.add_argument("--managed", action="store_true", help="driven by a supervisor; needs --state")
    parser.add_argument("--state", type=Path, help="the agent's state directory")
    parser.add_argument("--max-body", type=int, default=MAX_BODY, help="bytes of a request [%(default)s]")
    parser.add_argument("--max-queue", type=int, default=256, help="waiting requests a model [%(default)s]")
    parser.add_argument("--threads", type=int, default=1, help="of the runtime [%(default)s]")
    parser.add_argument(
        "--label-wait",
        type=float,
        default=float(os.environ.get(WAIT_VARIABLE) or 3600.0),
        metavar="SECONDS",
        help=f"how long a sampled input waits for its label [%(default)s; ${WAIT_VARIABLE}]",
    )
    return parser


def parse_arguments(argv: Sequence[str]) -> Settings:
    """Raises InvalidInput or Denied for arguments that contradict each other."""
    found = _parser().parse_args(list(argv))
    if found.managed != (found.state is not None):
        raise InvalidInput("--managed and --state belong together.", "Give both or neither.")
    if found.managed == (found.bundle is not None):
        raise InvalidInput("Either a bundle or --managed must be given.", "Try: shoal-agent serve BUNDLE")
    for option in ("http_port", "grpc_port", "metrics_port"):
        port = getattr(found, option)
        if port is not None and not 0 <= port <= 65535:
            raise InvalidInput(f"--{option.replace('_', '-')} {port} is not a port.", "Use 0 to 65535.")
    if (found.tls_cert is None) != (found.tls_key is None):
        raise InvalidInput("--tls-cert and --tls-key belong together.", "Give both or neither.")
    tls = None if found.tls_cert is None else (found.tls_cert, found.tls_key)
    if tls is None and not is_loopback(found.host):
        raise Denied(
            f"Serving on {found.host} without TLS would let others on the network read and use it.",
            "Give --tls-cert and --tls-key, or keep to --host 127.0.0.1.",
        )
    metrics_port = found.metrics_port
    if metrics_port is None and not found.managed:
        metrics_port = METRICS_PORT
    return Settings(
        bundle=found.bundle,
        digest=found.digest,
        name=found.name,
        state=found.state,
        host=found.host,
        http_port=found.http_port,
        grpc_port=found.grpc_port,
        metrics_port=metrics_port,
        tls=tls,
        max_body=max(1, found.max_body),
        max_queue=max(1, found.max_queue),
        threads=found.threads,
        label_wait_s=max(0.0, found.label_wait),
    )


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return False


def _tune_allocator() -> None:
    """Keeps request buffers of some hundred kilobytes on the heap: a fresh mapping with page faults
    for each one doubles the latency of large inputs (glibc only)."""
    trim_threshold, mmap_threshold = -1, -3
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(mmap_threshold, 32 << 20)
        mallopt(trim_threshold, 512 << 20)


class Server:
    """The listeners around one data plane."""

    def __init__(self, settings: Settings) -> None:
        from shoal_agent.serving.dataplane import DataPlane
        from shoal_agent.serving.workers import Workers

        self._settings = settings
        workers = os.cpu_count() or 1
        self._executor = Workers(workers)
        self.plane = DataPlane(
            asyncio.get_running_loop(),
            self._executor,
            workers=workers,
            max_queue=settings.max_queue,
            wait_s=settings.label_wait_s,
        )
        self._listeners: list[object] = []
        self._grpc: object | None = None

    async def start(self) -> dict[str, object]:
        """Binds everything; returns the bound ports. Raises Conflict when one is in use."""
        from shoal_agent.serving.asgi import App
        from shoal_agent.serving.grpc import GrpcServer
        from shoal_agent.serving.http import listen_tcp, listen_unix

        settings = self._settings
        public = App(self.plane, max_body=settings.max_body)
        tls, pem = _load_tls(settings.tls)
        http = await listen_tcp(public, settings.host, settings.http_port, tls)
        self._listeners.append(http)
        server = GrpcServer(
            self.plane,
            settings.host,
            settings.grpc_port,
            max_message=settings.max_body,
            max_queue=settings.max_queue,
            tls=pem,
        )
        self._grpc = server
        metrics_port = 0
        if settings.metrics_port is not None:
            metrics = await listen_tcp(public, settings.host, settings.metrics_port, tls)
            self._listeners.append(metrics)
            metrics_port = metrics.port
        server.start()
        ports = {"http": http.port, "grpc": server.port, "metrics": metrics_port, "host": settings.host}
        if settings.state is not None:
            folder = settings.state / "run"
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            _write_ports(folder / "ports.json", ports)
            self._listeners.append(await listen_unix(public, folder / "app.sock", 0o660))
            # Last: once it answers, the supervisor reads the ports.
            private = App(self.plane, private=True, max_body=settings.max_body)
            self._listeners.append(await listen_unix(private, folder / "private.sock", 0o600))
        return ports

    async def stop(self, grace_s: float = GRACE_S) -> None:
        """Ends gracefully: no new connections, running requests are answered."""
        from shoal_agent.serving.grpc import GrpcServer
        from shoal_agent.serving.http import Listener

        loop = asyncio.get_running_loop()
        ends = [part.close(grace_s) for part in self._listeners if isinstance(part, Listener)]
        if isinstance(self._grpc, GrpcServer):
            await asyncio.gather(loop.run_in_executor(None, self._grpc.stop, grace_s), *ends)
        else:
            await asyncio.gather(*ends)
        self._executor.shutdown()
        self.plane.regions.close()


def _load_tls(files: tuple[Path, Path] | None) -> tuple[ssl.SSLContext | None, tuple[bytes, bytes] | None]:
    if files is None:
        return None, None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(*files)
        return context, (files[0].read_bytes(), files[1].read_bytes())
    except (OSError, ssl.SSLError) as error:
        raise InvalidInput(f"The TLS files cannot be used: {error}.") from error


async def _serve(settings: Settings, write: Callable[[str], object]) -> None:
    loop = asyncio.get_running_loop()
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    server = Server(settings)
    try:
        if settings.bundle is not None:
            await loop.run_in_executor(None, _load_alone, server, settings, write)
        ports = await server.start()
        if not settings.managed:
            write(json.dumps(ports) + "\n")
            sys.stdout.flush()
        await stopping.wait()
    finally:
        await server.stop()


def _load_alone(server: Server, settings: Settings, write: Callable[[str], object]) -> None:
    assert settings.bundle is not None
    bundle: Bundle = open_bundle(settings.bundle, settings.digest)
    lineage = bundle.config.lineage
    name = settings.name or lineage.model or "model"
    write(f"{name}: bundle {bundle.digest}\n")
    write("Outside of a fleet nothing is signed: only the digests of the bundle's files are checked.\n")
    options = RuntimeOptions(threads=settings.threads)
    server.plane.load(
        name,
        settings.bundle,
        bundle.digest,
        version=str(lineage.model_version or 1),
        settings=PlacementSettings(options=options),
        verify=False,
    )


def _write_ports(target: Path, ports: dict[str, object]) -> None:
    temporary = target.with_suffix(".tmp")
    temporary.write_text(json.dumps(ports))
    temporary.replace(target)


def main(argv: Sequence[str], write: Callable[[str], object] = sys.stdout.write) -> int:
    """Serves until SIGTERM or SIGINT. Exit codes: 0 stopped, 1 refused (the reason is on stderr)."""
    logging.basicConfig(
        level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)  # a client's malformed request is no warning
    _tune_allocator()
    try:
        settings = parse_arguments(argv)
        try:
            import uvloop
        except ImportError as error:
            raise MissingExtra("agent", "uvloop") from error
        loop = uvloop.new_event_loop()
        try:
            asyncio.set_event_loop(loop)
            loop.run_until_complete(_serve(settings, write))
            loop.run_until_complete(loop.shutdown_default_executor())
        finally:
            asyncio.set_event_loop(None)
            loop.close()
    except ShoalError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    except ImportError as error:
        sys.stderr.write(f"{MissingExtra('agent', error.name or str(error))}\n")
        return 1
    return 0
