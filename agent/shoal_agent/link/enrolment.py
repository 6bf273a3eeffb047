"""Door 8442: joining with a token, and renewing a certificate with the old key.

The server's name is always `controller.FLEET.shoal.internal`, checked under the fleet's own CA,
whatever address it is reached by.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

import grpc

from shoal_agent import keys
from shoal_agent.identity import Identity, IdentityStore
from shoal_agent.link.status import to_domain
from shoal_protos.errors import ShoalError, TamperedData, Unavailable
from shoal_protos.tokens import JoinToken, server_name
from shoal_protos.v1 import enrolment_pb2, enrolment_pb2_grpc, profile_pb2

TIMEOUT_S = 15.0


async def join(
    store: IdentityStore, token: JoinToken, profile: profile_pb2.Profile, name: str
) -> tuple[Identity, enrolment_pb2.EnrollReply]:
    """Joins with the key that is there, so that joining twice is one device, or with a new one.

    Returns:
        the stored identity and the controller's answer.

    Raises:
        as `enroll`; TamperedData: the answer is not for this key or this fleet.
    """
    key_pem = store.stored_key("key.pem")
    if key_pem is None:
        key_pem = keys.new_key_pem()
        store.store_key("key.pem", key_pem)
    reply = await enroll(token, key_pem, profile, name)
    if reply.fleet != token.fleet:
        raise TamperedData(f"The controller answered for the fleet '{reply.fleet}'.")
    identity = _identity(reply, key_pem, token.ca_der, token.enrolment_addresses, token.agent_addresses)
    store.save(identity)
    return identity, reply


async def renew_stored(store: IdentityStore) -> Identity:
    """Renews the stored identity's certificate under a new key. Raises as `renew`."""
    old = store.load()
    key_pem = store.stored_key("key.pem.new")
    if key_pem is None:
        key_pem = keys.new_key_pem()
        store.store_key("key.pem.new", key_pem)
    reply = await renew(old, key_pem)
    if (reply.fleet, reply.device) != (old.fleet, old.device):
        raise TamperedData("The renewed certificate is not for this device.")
    reply.display_name = reply.display_name or old.name
    ca_der = keys.der(old.ca_pem)
    identity = _identity(reply, key_pem, ca_der, old.enrolment_addresses, old.agent_addresses)
    store.save(identity)
    return identity


def _identity(
    reply: enrolment_pb2.EnrollReply,
    key_pem: bytes,
    ca_der: bytes,
    enrolment_addresses: Sequence[str],
    agent_addresses: Sequence[str],
) -> Identity:
    certificate_pem = keys.pem([reply.certificate_der])
    if not keys.belongs(key_pem, certificate_pem):
        raise TamperedData("The controller's certificate is not for this device's key.")
    renew_at_ms, expires_ms = keys.life_ms(certificate_pem)
    return Identity(
        fleet=reply.fleet,
        device=reply.device,
        name=reply.display_name,
        agent_addresses=tuple(dict.fromkeys([*agent_addresses, *reply.agent_addresses])),
        enrolment_addresses=tuple(enrolment_addresses),
        desired_state_keys=tuple(reply.desired_state_keys),
        key_pem=key_pem,
        certificate_pem=certificate_pem,
        ca_pem=keys.pem(reply.ca_certificates_der or [ca_der]),
        renew_at_ms=renew_at_ms,
        expires_ms=expires_ms,
    )


async def enroll(
    token: JoinToken, key_pem: bytes, profile: profile_pb2.Profile, name: str, timeout_s: float = TIMEOUT_S
) -> enrolment_pb2.EnrollReply:
    """Joins the token's fleet, trying its addresses in order.

    Raises:
        Denied: the token is wrong, used up, expired or revoked.
        Unavailable: no address answered; the message names each and what it answered.
    """
    request = enrolment_pb2.EnrollRequest(
        token_secret=token.secret, csr_der=keys.csr_der(key_pem), profile=profile, name=name
    )
    return await _first(
        token.enrolment_addresses,
        token.fleet,
        keys.pem([token.ca_der]),
        lambda stub: stub.Enroll(request, timeout=timeout_s),
    )


async def renew(old: Identity, new_key_pem: bytes, timeout_s: float = TIMEOUT_S) -> enrolment_pb2.EnrollReply:
    """Asks for a certificate for `new_key_pem`, proving the old key.

    Raises:
        Denied: the device was revoked, or its certificate expired beyond the grace period.
        Unavailable: no address answered.
    """
    request_der = keys.csr_der(new_key_pem)
    request = enrolment_pb2.RenewRequest(
        device=old.device,
        csr_der=request_der,
        old_certificate_der=keys.der(old.certificate_pem),
        proof=keys.renewal_proof(old.key_pem, request_der),
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
