"""At the edge of every call: who calls, may it, and how a domain error leaves.

gRPC ends neither open connections nor their calls when a certificate is revoked or expires, so
every call is checked here, by the certificate it came with.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any
from urllib.parse import unquote

import grpc
from cryptography import x509

from shoal_controller import identity
from shoal_controller.clock import Clock
from shoal_controller.gateway.connections import Connections
from shoal_protos import errors

log = logging.getLogger("shoal.gateway")

# A device that was shut out may ask again to be shut out: the answer to its first call may be lost.
OPEN_TO_REVOKED = frozenset({"/shoal.v1.Agents/Leave"})
CODES = {
    errors.InvalidInput: grpc.StatusCode.INVALID_ARGUMENT,
    errors.NotFound: grpc.StatusCode.NOT_FOUND,
    errors.Conflict: grpc.StatusCode.FAILED_PRECONDITION,
    errors.Denied: grpc.StatusCode.PERMISSION_DENIED,
    errors.Overloaded: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.Unavailable: grpc.StatusCode.UNAVAILABLE,
    errors.TamperedData: grpc.StatusCode.DATA_LOSS,
    errors.Unsupported: grpc.StatusCode.UNIMPLEMENTED,
}


@dataclass(frozen=True)
class Peer:
    """The device at the other end, by its certificate."""

    device: str
    serial: str
    not_after_ms: int
    address: str = ""  # IP address


def status_code(error: errors.ShoalError) -> grpc.StatusCode:
    for kind in type(error).__mro__:
        if kind in CODES:
            return CODES[kind]
    return grpc.StatusCode.UNKNOWN


@asynccontextmanager
async def mapped_errors(context: Any) -> AsyncIterator[None]:
    """Turns domain errors into gRPC statuses, and anything unexpected into INTERNAL without its text."""
    try:
        yield
    except errors.ShoalError as error:
        metadata = (("shoal-code", error.code),)
        await context.abort(status_code(error), str(error)[:1000], metadata)
    except grpc.aio.AbortError:
        raise
    except Exception:
        log.exception("A call failed")
        await context.abort(grpc.StatusCode.INTERNAL, "The controller failed; its log says why.")


@lru_cache(maxsize=16384)
def _read_pem(pem: bytes, fleet: str) -> identity.DeviceCertificate:
    return identity.describe(x509.load_pem_x509_certificate(pem), fleet)


class Admission:
    """Knows who calls and refuses the revoked and the expired."""

    def __init__(self, fleet: str, connections: Connections, clock: Clock) -> None:
        self._fleet, self._connections, self._clock = fleet, connections, clock

    def peer(self, context: Any, *, revoked: bool = False) -> Peer:
        """The calling device. With `revoked` also one that was shut out.

        Raises:
            Denied: no device certificate of this fleet, expired, or revoked.
        """
        pems = context.auth_context().get("x509_pem_cert") or []
        if not pems:
            raise errors.Denied("This call carries no device certificate.", "Join the device first.")
        try:
            found = _read_pem(bytes(pems[0]), self._fleet)
        except ValueError as error:
            raise errors.Denied(
                "This certificate names no device of this fleet.", "Join this fleet."
            ) from error
        if self._clock() > found.not_after_ms:
            raise errors.Denied("The device's certificate has expired.", "Renew it on the enrolment door.")
        if not revoked:
            self._connections.check(found.device, found.serial)
        return Peer(found.device, found.serial, found.not_after_ms, _ip(context.peer()))


def _ip(peer: str) -> str:
    """`ipv4:10.0.0.7:5555` -> `10.0.0.7`, `ipv6:%5B::1%5D:5555` -> `::1`."""
    address = unquote(peer).partition(":")[2].rpartition(":")[0]
    return address.strip("[]")


class AdmissionInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Checks every call of the mutual-TLS door before its handler sees it."""

    def __init__(self, admission: Admission) -> None:
        self._admission = admission

    async def intercept_service(self, continuation: Any, details: Any) -> Any:
        handler = await continuation(details)
        if handler is None:
            return None
        return self._guarded(handler, revoked=details.method in OPEN_TO_REVOKED)

    def _guarded(self, handler: Any, *, revoked: bool) -> Any:
        """The same handler behind a check, for each of gRPC's four kinds."""
        kind = "stream" if handler.request_streaming else "unary"
        kind += "_stream" if handler.response_streaming else "_unary"
        inner = getattr(handler, kind)
        make: Callable[..., Any] = getattr(grpc, f"{kind}_rpc_method_handler")
        guard = self._stream(inner) if handler.response_streaming else self._unary(inner, revoked)
        return make(
            guard,
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )

    def _unary(self, inner: Any, revoked: bool) -> Any:
        async def call(request: Any, context: Any) -> Any:
            async with mapped_errors(context):
                self._admission.peer(context, revoked=revoked)
                return await inner(request, context)

        return call

    def _stream(self, inner: Any) -> Any:
        async def call(request: Any, context: Any) -> AsyncIterator[Any]:
            async with mapped_errors(context):
                self._admission.peer(context)
                async for message in inner(request, context):
                    yield message

        return call
