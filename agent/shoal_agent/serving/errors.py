"""The one place where domain errors become HTTP statuses and gRPC codes of the data plane."""

from __future__ import annotations

import json

from shoal_protos.errors import (
    Conflict,
    Denied,
    InvalidInput,
    NotFound,
    Overloaded,
    ShoalError,
    TamperedData,
    Unavailable,
    Unsupported,
)

RETRY_AFTER_S = 1


class TooLarge(InvalidInput):
    """A body beyond the limit."""

    code = "too_large"


class ModelFailed(ShoalError):
    """The runtime failed on a request that fits the signature."""

    code = "model_failed"


# error -> (HTTP status, name of the gRPC code); the first match counts.
_TABLE: tuple[tuple[type[ShoalError], int, str], ...] = (
    (TooLarge, 413, "INVALID_ARGUMENT"),
    (InvalidInput, 400, "INVALID_ARGUMENT"),
    (NotFound, 404, "NOT_FOUND"),
    (Conflict, 409, "FAILED_PRECONDITION"),
    (Denied, 403, "PERMISSION_DENIED"),
    (Overloaded, 503, "UNAVAILABLE"),
    (Unavailable, 503, "UNAVAILABLE"),
    (TamperedData, 400, "DATA_LOSS"),
    (Unsupported, 501, "UNIMPLEMENTED"),
    (ModelFailed, 500, "INTERNAL"),
)


def as_shoal(error: BaseException) -> ShoalError:
    """The error itself, or a ShoalError that tells its kind only: internals are for the log."""
    if isinstance(error, ShoalError):
        return error
    return ShoalError(f"The server failed: {type(error).__name__}.", "Its log has the details.")


def http_status(error: ShoalError) -> int:
    return next((status for kind, status, _ in _TABLE if isinstance(error, kind)), 500)


def grpc_code(error: ShoalError) -> str:
    return next((name for kind, _, name in _TABLE if isinstance(error, kind)), "INTERNAL")


def http_body(error: ShoalError) -> bytes:
    """Triton's error object, which its clients print."""
    return json.dumps({"error": str(error)}).encode()


def short_reason(error: ShoalError) -> str:
    """For grouping in telemetry: never text that a client chose."""
    return error.code
