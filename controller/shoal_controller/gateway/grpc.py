"""The two gRPC doors: 8442 for joining and renewing (server TLS), 8443 for agents (mutual TLS)."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import grpc

from shoal_controller import enrolment
from shoal_controller.gateway.admission import Admission, AdmissionInterceptor, mapped_errors
from shoal_controller.gateway.blobs import BlobsServicer
from shoal_controller.gateway.streams import AgentsServicer
from shoal_controller.http import bind_socket
from shoal_controller.services import Services
from shoal_protos.errors import Unavailable
from shoal_protos.v1 import agents_pb2_grpc, blobs_pb2_grpc, enrolment_pb2, enrolment_pb2_grpc

log = logging.getLogger("shoal.gateway")

STOP_SECONDS = 1.0
MAX_ENROLLING = 32  # joins and renewals at once; each costs a database transaction
MAX_ENROL_MESSAGE = 512 << 10


class EnrolmentServicer(enrolment_pb2_grpc.EnrolmentServicer):
    """Joining and renewing."""

    def __init__(self, services: Services) -> None:
        self._services = services

    async def Enroll(self, request: enrolment_pb2.EnrollRequest, context: Any) -> Any:  # noqa: N802
        services = self._services
        async with mapped_errors(context):
            return await services.store.submit(
                lambda session: enrolment.enroll(
                    session,
                    services.keys,
                    request,
                    settings=services.settings,
                    now_ms=services.clock(),
                    agent_addresses=services.door_addresses("agents"),
                )
            )

    async def Renew(self, request: enrolment_pb2.RenewRequest, context: Any) -> Any:  # noqa: N802
        services = self._services
        async with mapped_errors(context):
            return await services.store.submit(
                lambda session: enrolment.renew(
                    session,
                    services.keys,
                    request,
                    settings=services.settings,
                    now_ms=services.clock(),
                    agent_addresses=services.door_addresses("agents"),
                )
            )


class Gateway:
    """Both doors. `start` binds them; `ports` says where."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._servers: list[grpc.aio.Server] = []
        self._agents: AgentsServicer | None = None
        self.ports: dict[str, int] = {}

    async def start(self, enrolment_port: int, agents_port: int, host: str) -> None:
        """Opens both doors.

        Raises:
            Unavailable: a port is taken; the message names it and the option.
        """
        services = self._services
        services.connections.bind(asyncio.get_running_loop())
        try:
            self._bind_agents(host, agents_port)
            self._bind_enrolment(host, enrolment_port)
        except BaseException:
            await self.stop()
            raise
        for server in self._servers:
            await server.start()

    def _bind_agents(self, host: str, port: int) -> None:
        services = self._services
        self._agents = AgentsServicer(services)
        admission = Admission(services.keys.fleet, services.connections, services.clock)
        server = grpc.aio.server(
            interceptors=(AdmissionInterceptor(admission),),
            options=_options(services.settings.max_message_bytes),
        )
        self._agents.admission = admission
        self._servers.append(server)
        agents_pb2_grpc.add_AgentsServicer_to_server(self._agents, server)  # type: ignore[no-untyped-call]
        blobs = BlobsServicer(services, admission)
        blobs_pb2_grpc.add_BlobsServicer_to_server(blobs, server)  # type: ignore[no-untyped-call]
        self.ports["agents"] = _bind(server, host, port, self._credentials(mutual=True), "--agents-port")

    def _bind_enrolment(self, host: str, port: int) -> None:
        server = grpc.aio.server(options=_options(MAX_ENROL_MESSAGE), maximum_concurrent_rpcs=MAX_ENROLLING)
        self._servers.append(server)
        servicer = EnrolmentServicer(self._services)
        enrolment_pb2_grpc.add_EnrolmentServicer_to_server(servicer, server)  # type: ignore[no-untyped-call]
        self.ports["enrolment"] = _bind(
            server, host, port, self._credentials(mutual=False), "--enrolment-port"
        )

    def _credentials(self, *, mutual: bool) -> grpc.ServerCredentials:
        keys = self._services.keys
        return grpc.ssl_server_credentials(
            [(keys.door_key_pem, keys.door_pem + keys.ca_pem)],
            root_certificates=keys.ca_pem if mutual else None,
            require_client_auth=mutual,
        )

    async def stop(self) -> None:
        """Ends all streams, then the doors."""
        self._services.connections.end_all("the controller stops")
        await asyncio.gather(*(server.stop(STOP_SECONDS) for server in self._servers))
        if self._agents is not None:
            await self._agents.drain()
        self._servers = []


def _options(max_message_bytes: int) -> list[tuple[str, Any]]:
    return [
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.so_reuseport", 0),  # a second controller on the port must fail, not share it
        ("grpc.max_connection_age_ms", 12 * 3600 * 1000),  # a handshake now and then checks dates
        ("grpc.max_connection_age_grace_ms", 60 * 1000),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
        ("grpc.http2.bdp_probe", 0),
    ]


def _bind(
    server: grpc.aio.Server, host: str, port: int, credentials: grpc.ServerCredentials, option: str
) -> int:
    """Raises Unavailable, naming the port and the option."""
    bind_socket(host, port, option).close()  # says why it cannot; gRPC only logs it
    address = f"[{host}]" if ":" in host else host
    try:
        bound: int = server.add_secure_port(f"{address}:{port}", credentials)
    except RuntimeError as error:
        raise Unavailable(
            f"Port {port} on {host} cannot be used.",
            f"Stop what uses it, or choose another with {option} (0 = free).",
        ) from error
    return bound
