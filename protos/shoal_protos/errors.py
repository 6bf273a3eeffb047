"""Domain errors shared by all rooms. None knows a transport: edges map them once
(gRPC status, HTTP problem, exit code)."""

from __future__ import annotations


class ShoalError(Exception):
    """Something Shoal refuses or cannot do.

    `message` says what is wrong, `remedy` what to do next; both are for people.
    """

    code = "error"

    def __init__(self, message: str, remedy: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.message} {self.remedy}".strip()


class InvalidInput(ShoalError):
    """A value that can never be accepted: wrong name, type, shape, range or format."""

    code = "invalid"


class NotFound(ShoalError):
    """The named object does not exist."""

    code = "not_found"


class Conflict(ShoalError):
    """The request contradicts the object's present state."""

    code = "conflict"


class Denied(ShoalError):
    """Identity, token or permission is missing, wrong, used up, expired or revoked."""

    code = "denied"


class Overloaded(ShoalError):
    """A bounded queue, quota or rate is full; the same request may succeed later."""

    code = "overloaded"


class Unavailable(ShoalError):
    """The other side cannot be reached or is not ready yet."""

    code = "unavailable"


class TamperedData(ShoalError):
    """Bytes do not match the digest or signature that names them."""

    code = "tampered"


class Unsupported(ShoalError):
    """The other side, device or installation lacks a needed feature, runtime or version."""

    code = "unsupported"


class MissingExtra(Unsupported):
    """An optional part of Shoal is not installed."""

    code = "missing_extra"

    def __init__(self, extra: str, module: str) -> None:
        super().__init__(
            f"The Python package '{module}' is not installed.",
            f"Install it with: pip install 'shoal[{extra}]'",
        )
        self.extra = extra
