"""The join token: everything a new device needs to find its fleet and to be let in.

Text form: `shj_` + base64url(JSON + CRC-32), one line, no padding. The checksum tells a mistyped
or cut token from a wrong one before anything is sent; it is no protection, the secret is.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
import zlib
from dataclasses import dataclass
from typing import Any

from shoal_protos.errors import InvalidInput

PREFIX = "shj_"
SCHEMA = 1
MAX_TEXT = 16 * 1024  # characters; a token holds a few addresses and one certificate

_FLEET = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?\Z")


@dataclass(frozen=True)
class JoinToken:
    """What `shoal token create --join` prints.

    `enrolment_addresses` (door 8442) and `agent_addresses` (door 8443) are `host:port`, tried in
    order. `secret` is what the controller counts. `ca_der` is the fleet's CA certificate: the only
    one that the device trusts.
    """

    fleet: str
    enrolment_addresses: tuple[str, ...]
    agent_addresses: tuple[str, ...]
    secret: str
    ca_der: bytes

    def __repr__(self) -> str:  # a secret must not reach a log through a traceback
        return f"JoinToken(fleet={self.fleet!r}, enrolment_addresses={self.enrolment_addresses!r})"


def server_name(fleet: str) -> str:
    """The one name that every door's certificate carries, whatever address it is reached by."""
    return f"controller.{fleet}.shoal.internal"


def check_fleet(fleet: str) -> str:
    """Returns the name unchanged. Raises InvalidInput unless it is a DNS label in lower case."""
    if not _FLEET.match(fleet):
        raise InvalidInput(
            f"'{fleet[:80]}' is not a fleet name.",
            "Use up to 63 lower-case letters, digits and hyphens, not starting or ending with a hyphen.",
        )
    return fleet


def check_address(address: str) -> str:
    """Returns the address unchanged. Raises InvalidInput unless it is `host:port`."""
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
        raise InvalidInput(f"'{address[:80]}' is not an address.", "Write it as host:port.")
    return address


def encode(token: JoinToken) -> str:
    """The token's text form. Raises InvalidInput for values that `decode` would refuse."""
    _check(token)
    body = {
        "v": SCHEMA,
        "fleet": token.fleet,
        "enrol": list(token.enrolment_addresses),
        "agents": list(token.agent_addresses),
        "secret": token.secret,
        "ca": base64.b64encode(token.ca_der).decode(),
    }
    data = json.dumps(body, sort_keys=True, separators=(",", ":")).encode()
    data += zlib.crc32(data).to_bytes(4, "big")
    return PREFIX + base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def decode(text: str) -> JoinToken:
    """Reads a token's text form; white space around and inside it (a wrapped line) is ignored.

    Raises:
        InvalidInput: not a join token, mistyped or cut, or made by a newer Shoal.
    """
    text = "".join(text.split())
    if not text.startswith(PREFIX):
        raise InvalidInput(
            "This is not a join token.",
            f"A join token starts with {PREFIX}; make one with: shoal token create --join",
        )
    body = _unpack(text)
    if body.get("v") != SCHEMA:
        raise InvalidInput("The join token was made by a newer Shoal.", "Update Shoal on this device.")
    try:
        token = JoinToken(
            fleet=_text(body["fleet"]),
            enrolment_addresses=tuple(_text(item) for item in body["enrol"]),
            agent_addresses=tuple(_text(item) for item in body["agents"]),
            secret=_text(body["secret"]),
            ca_der=base64.b64decode(body["ca"], validate=True),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidInput("The join token lacks a part.", _COPY_AGAIN) from error
    _check(token)
    return token


_COPY_AGAIN = "Copy it again, whole: one line, nothing left out."


def _unpack(text: str) -> dict[str, Any]:
    if len(text) > MAX_TEXT:
        raise InvalidInput("The join token is too long.", _COPY_AGAIN)
    encoded = text[len(PREFIX) :]
    try:
        data = base64.b64decode(encoded + "=" * (-len(encoded) % 4), altchars=b"-_", validate=True)
        body, checksum = data[:-4], data[-4:]
        if len(checksum) != 4 or zlib.crc32(body).to_bytes(4, "big") != checksum:
            raise InvalidInput("The join token is mistyped or cut: its checksum is wrong.", _COPY_AGAIN)
        value = json.loads(body)
    except (binascii.Error, ValueError) as error:
        raise InvalidInput("The join token is mistyped or cut.", _COPY_AGAIN) from error
    if not isinstance(value, dict):
        raise InvalidInput("The join token is mistyped or cut.", _COPY_AGAIN)
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{type(value).__name__} instead of text")
    return value


def _check(token: JoinToken) -> None:
    check_fleet(token.fleet)
    if not token.enrolment_addresses or not token.secret or not token.ca_der:
        raise InvalidInput("A join token needs an enrolment address, a secret and a CA certificate.")
    for address in (*token.enrolment_addresses, *token.agent_addresses):
        check_address(address)
