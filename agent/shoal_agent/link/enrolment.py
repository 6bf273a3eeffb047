"""Door 8442: joining with a token, and renewing a certificate with the old key.

The server's name is always `controller.FLEET.shoal.internal`, checked under the fleet's own CA,
whatever address it is reached by.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

import grpc
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from shoal_agent import identity as identities
from shoal_agent.link.status import to_domain
from shoal_protos.errors import ShoalError, Unavailable
from shoal_protos.tokens import JoinToken, server_name
from shoal_protos.v1 import enrolment_pb2, enrolment_pb2_grpc, profile_pb2

TIMEOUT_S = 15.0


async def enroll(
    token: JoinToken, key_pem: bytes, profile: profile_pb2.Profile, name: str, timeout_s: float = TIMEOUT_S
) -> enrolment_pb2.EnrollReply:
    """Joins the token's fleet, trying its addresses in order.

    Raises:
        Denied: the token is wrong, used up, expired or revoked.
        Unavailable: no address answered; the message names each and what it answered.
    """
    request = enrolment_pb2.EnrollRequest(
        token_secret=token.secret, csr_der=identities.csr_der(key_pem), profile=profile, name=name
    )
    return await _first(
        token.enrolment_addresses,
        token.fleet,
        identities.pem([token.ca_der]),
        lambda stub: stub.Enroll(request, timeout=timeout_s),
    )


async def renew(
    old: identities.Identity, new_key_pem: bytes, timeout_s: float = TIMEOUT_S
) -> enrolment_pb2.EnrollReply:
    """Asks for a certificate for `new_key_pem`, proving the old key.

    Raises:
        Denied: the device was revoked, or its certificate expired beyond the grace period.
        Unavailable: no address answered.
    """
    request_der = identities.csr_der(new_key_pem)
    certificate = x509.load_pem_x509_certificate(old.certificate_pem)
    request = enrolment_pb2.RenewRequest(
        device=old.device,
        csr_der=request_der,
        old_certificate_der=certificate.public_bytes(Encoding.DER),
        proof=identities.renewal_proof(old.key_pem, request_der),
    )
    return await _first(
        old.enrolment_addresses, old.fleet, old.ca_pem, lambda stub: stub.Renew(request, timeout=timeout_s)
    )


_Call = Callable[[enrolment_pb2_grpc.EnrolmentStub], Awaitable[enrolment_pb2.EnrollReply]]


async def _first(
    addresses: Sequence[str], fleet: str, ca_pem: bytes, call: _Call
) -> enrolment_pb2.EnrollReply:
    """The first address that answers decides; only unreachable ones are passed over."""
    failures: list[str] = []
    for address in addresses:
        credentials = grpc.ssl_channel_credentials(root_certificates=ca_pem)
        options = [("grpc.ssl_target_name_override", server_name(fleet)), ("grpc.enable_retries", 0)]
        async with grpc.aio.secure_channel(address, credentials, options) as channel:
            try:
                stub = enrolment_pb2_grpc.EnrolmentStub(channel)  # type: ignore[no-untyped-call]
                return await call(stub)
            except grpc.aio.AioRpcError as error:
                problem: ShoalError = to_domain(error, address)
                if not isinstance(problem, Unavailable):
                    raise problem from error
                failures.append(problem.message.rstrip("."))
    raise Unavailable(
        "No controller could be reached: " + "; ".join(failures) + ".",
        "Check the network and that the controller's enrolment door is open to this device.",
    )
