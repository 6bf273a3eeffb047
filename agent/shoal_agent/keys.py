"""Key and certificate operations. The only module of the agent that needs `cryptography` for identity;
the supervisor never imports it (see `vault.py`)."""

from __future__ import annotations

from collections.abc import Iterable

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from shoal_protos.errors import InvalidInput, TamperedData

RENEW_DOMAIN = b"shoal-renew-v1\0"
RENEW_AT = 2 / 3  # of the certificate's life


def new_key_pem() -> bytes:
    key = ec.generate_private_key(ec.SECP256R1())
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _key(pem: bytes) -> ec.EllipticCurvePrivateKey:
    try:
        key = serialization.load_pem_private_key(pem, None)
    except ValueError as error:
        raise TamperedData(
            "The device's key file is damaged.", "Join again: shoal-agent leave, then join."
        ) from error
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    return key


def csr_der(key_pem: bytes) -> bytes:
    """A certificate request; its subject is a placeholder, the controller chooses the device id."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "device")])
    request = x509.CertificateSigningRequestBuilder().subject_name(subject)
    return request.sign(_key(key_pem), hashes.SHA256()).public_bytes(serialization.Encoding.DER)


def renewal_proof(old_key_pem: bytes, request_der: bytes) -> bytes:
    """ECDSA-SHA256 by the old key over the domain prefix and the new request."""
    return _key(old_key_pem).sign(RENEW_DOMAIN + request_der, ec.ECDSA(hashes.SHA256()))


def pem(certificates_der: Iterable[bytes]) -> bytes:
    """DER certificates as one PEM file."""
    try:
        loaded = [x509.load_der_x509_certificate(der) for der in certificates_der]
    except ValueError as error:
        raise InvalidInput("A certificate is malformed.") from error
    return b"".join(item.public_bytes(serialization.Encoding.PEM) for item in loaded)


def der(certificate_pem: bytes) -> bytes:
    return x509.load_pem_x509_certificate(certificate_pem).public_bytes(serialization.Encoding.DER)


def belongs(key_pem: bytes, certificate_pem: bytes) -> bool:
    """Whether the certificate is for the key."""
    certificate = x509.load_pem_x509_certificate(certificate_pem)
    return bool(certificate.public_key() == _key(key_pem).public_key())


def life_ms(certificate_pem: bytes) -> tuple[int, int]:
    """(when to renew, when it expires), Unix time in ms."""
    certificate = x509.load_pem_x509_certificate(certificate_pem)
    start, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    renew = start + (end - start) * RENEW_AT
    return int(renew.timestamp() * 1000), int(end.timestamp() * 1000)
