"""Who may use the HTTP door. Loopback only until operators can sign in: then what protects the API is
that no web page of somebody else's can reach it through a browser on this machine."""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit

from shoal_protos.errors import Denied

LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})


def check_host(host_header: str) -> None:
    """Refuses names that are not this machine's: DNS rebinding makes a stranger's name resolve here.

    Raises:
        Denied: the Host header names something else.
    """
    name = _host_name(host_header)
    if name not in LOOPBACK_NAMES and not _is_loopback(name):
        raise Denied(
            f"The controller does not answer to the name '{name[:80]}'.",
            "Use http://127.0.0.1 or http://localhost with the port that `shoal up` printed.",
        )


def check_origin(method: str, host_header: str, origin: str | None, fetch_site: str | None) -> None:
    """Refuses changes that another site's page asks for (CSRF).

    Raises:
        Denied: the request comes from a page of another origin.
    """
    if method in SAFE_METHODS:
        return
    if origin is not None and origin != "null":
        if urlsplit(origin).netloc == host_header:
            return
    elif origin is None and fetch_site in (None, "same-origin", "none"):
        return
    raise Denied("A page of another site asked for this change.", "Open the dashboard's own address.")


def _is_loopback(name: str) -> bool:
    """A literal address is no name that could be made to resolve here."""
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def _host_name(host_header: str) -> str:
    if host_header.startswith("["):
        return host_header[1:].partition("]")[0].lower()
    return host_header.rpartition(":")[0].lower() if ":" in host_header else host_header.lower()
