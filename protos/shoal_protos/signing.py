"""Ed25519 signatures over the bytes as carried, with a domain prefix per message type.

A domain prefix keeps a signature made for one kind of message from being valid for another.
Ed25519: RFC 8032.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from shoal_protos.errors import TamperedData
from shoal_protos.v1 import desired_pb2

DESIRED_DOMAIN = b"shoal-desired-v1\0"


def public_bytes(key: Ed25519PrivateKey) -> bytes:
    """Raw 32-byte public key."""
    return key.public_key().public_bytes_raw()


def key_id(public_key: bytes) -> str:
    return hashlib.sha256(public_key).hexdigest()


def sign(payload: bytes, key: Ed25519PrivateKey, domain: bytes = DESIRED_DOMAIN) -> desired_pb2.Signed:
    """Signs `payload` exactly as given."""
    signature = desired_pb2.Signature(key_id=key_id(public_bytes(key)), value=key.sign(domain + payload))
    return desired_pb2.Signed(payload=payload, signatures=[signature])


def verify(signed: desired_pb2.Signed, public_keys: Iterable[bytes], domain: bytes = DESIRED_DOMAIN) -> bytes:
    """Returns the payload if any known key signed it.

    Args:
        public_keys: raw 32-byte Ed25519 public keys that are trusted.

    Raises:
        TamperedData: no trusted key made a valid signature over these bytes.
    """
    trusted = {key_id(raw): raw for raw in public_keys}
    for signature in signed.signatures:
        raw = trusted.get(signature.key_id)
        if raw is None:
            continue
        try:
            Ed25519PublicKey.from_public_bytes(raw).verify(signature.value, domain + signed.payload)
        except InvalidSignature:
            continue
        return signed.payload
    raise TamperedData("No trusted key signed this message.", "If the controller's key changed, join again.")
