"""gRPC status -> domain error: the one place in the link where the two meet."""

from __future__ import annotations

import grpc

from shoal_protos import errors

_KINDS: dict[grpc.StatusCode, type[errors.ShoalError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: errors.InvalidInput,
    grpc.StatusCode.OUT_OF_RANGE: errors.InvalidInput,
    grpc.StatusCode.NOT_FOUND: errors.NotFound,
    grpc.StatusCode.FAILED_PRECONDITION: errors.Conflict,
    grpc.StatusCode.ALREADY_EXISTS: errors.Conflict,
    grpc.StatusCode.ABORTED: errors.Conflict,
    grpc.StatusCode.PERMISSION_DENIED: errors.Denied,
    grpc.StatusCode.UNAUTHENTICATED: errors.Denied,
    grpc.StatusCode.RESOURCE_EXHAUSTED: errors.Overloaded,
    grpc.StatusCode.DATA_LOSS: errors.TamperedData,
    grpc.StatusCode.UNIMPLEMENTED: errors.Unsupported,
}


def to_domain(error: grpc.aio.AioRpcError, address: str) -> errors.ShoalError:
    """The Shoal error for what `address` answered; anything unknown counts as unavailable."""
    details = error.details() or ""
    kind = _KINDS.get(error.code())
    if kind is not None:
        return kind(details or f"{address} refused: {error.code().name.lower()}.")
    return errors.Unavailable(f"{address}: {_reason(error.code(), details)}.")


# How the TLS library says that the server's certificate is not under our CA, or not for our name.
_NOT_OURS = ("certificate_verify_failed", "bad_signature", "hostname verification", "peer name", "unknown ca")


def _reason(code: grpc.StatusCode, details: str) -> str:
    text = details.lower()
    if any(sign in text for sign in _NOT_OURS):
        return "its certificate is not this fleet's (another controller answers there)"
    if "connection refused" in text:
        return "connection refused (is the controller running?)"
    if "dns" in text or "name resolution" in text or "domain name" in text:
        return "its name cannot be resolved"
    if code is grpc.StatusCode.DEADLINE_EXCEEDED or "timed out" in text or "timeout" in text:
        return "no answer in time"
    if "handshake" in text or "ssl" in text or "tsi" in text:
        return "the TLS handshake failed (a wrong port, or this device's certificate was refused)"
    return details.splitlines()[0][:200] if details else code.name.lower()
