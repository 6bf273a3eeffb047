"""`Agents.Leave`: the device shuts itself out, under its own certificate."""

from __future__ import annotations

from collections.abc import Sequence

import grpc

from shoal_agent.identity import Identity
from shoal_agent.link.status import to_domain
from shoal_protos.errors import Unavailable
from shoal_protos.tokens import server_name
from shoal_protos.v1 import agents_pb2, agents_pb2_grpc

TIMEOUT_S = 10.0


async def leave(
    identity: Identity, addresses: Sequence[str], reason: str = "", timeout_s: float = TIMEOUT_S
) -> None:
    """Revokes this device. Idempotent; the first address that answers decides.

    Raises:
        Unavailable: no address answered; the message names each and what it answered.
        Denied: the controller refuses the certificate.
    """
    failures: list[str] = []
    credentials = grpc.ssl_channel_credentials(identity.ca_pem, identity.key_pem, identity.certificate_pem)
    options = [
        ("grpc.ssl_target_name_override", server_name(identity.fleet)),
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.enable_retries", 0),
    ]
    for address in addresses:
        async with grpc.aio.secure_channel(address, credentials, options) as channel:
            stub = agents_pb2_grpc.AgentsStub(channel)  # type: ignore[no-untyped-call]
            try:
                await stub.Leave(agents_pb2.LeaveRequest(reason=reason), timeout=timeout_s)
                return
            except grpc.aio.AioRpcError as error:
                problem = to_domain(error, address)
                if not isinstance(problem, Unavailable):
                    raise problem from error
                failures.append(problem.message.rstrip("."))
    raise Unavailable("No controller could be reached: " + "; ".join(failures) + ".")
