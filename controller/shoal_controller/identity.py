"""The fleet's keys and certificates.

`identity/` in the data directory (every file 0600):

    fleet.json                  fleet name, when it was made
    ca.pem, ca_key.pem          certificate authority, ECDSA P-256 (gRPC's TLS refuses Ed25519)
    door.pem, door_key.pem      certificate of the doors 8442 and 8443
    desired_key.pem             Ed25519, signs desired states

CA and door certificates are valid from 1970 to 9999: a device whose clock is wrong must still be able
to ask for the right time. Device certificates are short and dated by this controller's clock only.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from shoal_agent.fs import RealFs
from shoal_controller.settings import check_private
from shoal_protos.errors import Conflict, Denied, InvalidInput
from shoal_protos.signing import public_bytes
from shoal_protos.tokens import server_name

FIRST = datetime(1970, 1, 1, tzinfo=UTC)
LAST = datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC)
BACKDATE = timedelta(minutes=5)  # a device's certificate starts a little before now
RENEW_DOMAIN = b"shoal-renew-v1\0"
MAX_CSR_BYTES = 16 << 10
DEFAULT_FLEET = "shoal"


@dataclass(frozen=True)
class DeviceCertificate:
    """What a device certificate says, once it is known to be ours."""

    device: str
    serial: str  # lower-case hex
    not_after_ms: int
    key_hash: str  # SHA-256 of the public key's DER


@dataclass(frozen=True)
class Keys:
    """The loaded identity. `repr` shows no key."""

    home: Path  # the data directory they came from
    fleet: str
    ca: x509.Certificate
    ca_key: ec.EllipticCurvePrivateKey
    door_pem: bytes
    door_key_pem: bytes
    desired_key: Ed25519PrivateKey

    def __repr__(self) -> str:
        return f"Keys(fleet={self.fleet!r})"

    @property
    def ca_der(self) -> bytes:
        return der(self.ca)

    @property
    def ca_pem(self) -> bytes:
        return self.ca.public_bytes(serialization.Encoding.PEM)

    @property
    def desired_public(self) -> bytes:
        """Raw 32-byte Ed25519 public key that devices pin."""
        return public_bytes(self.desired_key)

    def issue(self, csr_der: bytes, device: str, now_ms: int, seconds: int) -> x509.Certificate:
        """A client certificate for the CSR's key. The CSR's subject is ignored.

        Raises:
            InvalidInput: not a CSR, wrongly signed, or not a P-256 key.
        """
        key = csr_key(csr_der)
        now = datetime.fromtimestamp(now_ms / 1000, UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, device)]))
            .issuer_name(self.ca.subject)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - BACKDATE)
            .not_valid_after(now + timedelta(seconds=seconds))
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(ca=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False)
            .add_extension(
                x509.SubjectAlternativeName(
                    [x509.UniformResourceIdentifier(f"spiffe://{self.fleet}/device/{device}")]
                ),
                critical=False,
            )
            .add_extension(_authority(self.ca_key), critical=False)
        )
        return builder.sign(self.ca_key, hashes.SHA256())

    def read_certificate(self, der: bytes) -> DeviceCertificate:
        """Reads a device certificate and checks that this fleet's CA issued it; dates are not checked.

        Raises:
            Denied: malformed, or issued by somebody else.
        """
        try:
            certificate = x509.load_der_x509_certificate(der)
            certificate.verify_directly_issued_by(self.ca)
            return describe(certificate, self.fleet)
        except (ValueError, TypeError, InvalidSignature) as error:
            raise Denied(
                "This certificate was not issued by this fleet.", "Join the device to this fleet again."
            ) from error


def describe(certificate: x509.Certificate, fleet: str) -> DeviceCertificate:
    """Raises ValueError unless it is a device certificate of `fleet`."""
    names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    device = str(names[0].value) if names else ""
    try:
        extension = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
        uris = extension.value.get_values_for_type(x509.UniformResourceIdentifier)
    except x509.ExtensionNotFound:
        uris = []
    if not device or f"spiffe://{fleet}/device/{device}" not in uris:
        raise ValueError("no device of this fleet is named in it")
    return DeviceCertificate(
        device=device,
        serial=serial_of(certificate),
        not_after_ms=int(certificate.not_valid_after_utc.timestamp() * 1000),
        key_hash=key_hash(certificate.public_key()),
    )


def der(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.DER)


def serial_of(certificate: x509.Certificate) -> str:
    return f"{certificate.serial_number:x}"


def key_hash(key: object) -> str:
    """Hex SHA-256 of a public key's SubjectPublicKeyInfo."""
    digest = hashes.Hash(hashes.SHA256())
    digest.update(
        key.public_bytes(  # type: ignore[attr-defined]
            serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
        )
    )
    return digest.finalize().hex()


def csr_key(csr_der: bytes) -> ec.EllipticCurvePublicKey:
    """The P-256 key that asks for a certificate. Raises InvalidInput."""
    if len(csr_der) > MAX_CSR_BYTES:
        raise InvalidInput("The certificate request is too large.")
    try:
        csr = x509.load_der_x509_csr(csr_der)
        signed = csr.is_signature_valid
        key = csr.public_key()
    except Exception as error:  # cryptography raises many kinds for hostile bytes
        raise InvalidInput("The certificate request is malformed.", "Send a PKCS#10 CSR as DER.") from error
    if not signed:
        raise InvalidInput("The certificate request is not signed by its own key.")
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise InvalidInput("The device's key must be ECDSA P-256.", "Make a new key with shoal-agent join.")
    return key


def check_proof(old_certificate_der: bytes, csr_der: bytes, proof: bytes) -> None:
    """Raises Denied unless the old certificate's key signed this renewal."""
    try:
        key = x509.load_der_x509_certificate(old_certificate_der).public_key()
        assert isinstance(key, ec.EllipticCurvePublicKey)
        key.verify(proof, RENEW_DOMAIN + csr_der, ec.ECDSA(hashes.SHA256()))
    except (ValueError, AssertionError, InvalidSignature) as error:
        raise Denied("The renewal is not signed by the old key.", "Join again with a token.") from error


# ---------------------------------------------------------------------------- making and loading


def init(home: Path, fleet: str = "") -> Keys:
    """Makes the identity of a new fleet, or loads the one that is there. Never half of one.

    Raises:
        Conflict: the directory belongs to a fleet of another name.
        Denied: others can read the directory.
    """
    directory = home / "identity"
    if not (directory / "fleet.json").exists():
        _create(directory, fleet or DEFAULT_FLEET)
    keys = load(home)
    if fleet and fleet != keys.fleet:
        raise Conflict(
            f"{home} belongs to the fleet '{keys.fleet}', not '{fleet}'.",
            "Name another directory with --home, or leave --fleet out.",
        )
    return keys


def load(home: Path) -> Keys:
    """Raises Denied if the identity is missing, damaged or readable by others."""
    directory = home / "identity"
    try:
        check_private(directory)
        fleet = json.loads((directory / "fleet.json").read_text())["fleet"]
        ca_key = serialization.load_pem_private_key((directory / "ca_key.pem").read_bytes(), None)
        desired = serialization.load_pem_private_key((directory / "desired_key.pem").read_bytes(), None)
        assert isinstance(ca_key, ec.EllipticCurvePrivateKey)
        assert isinstance(desired, Ed25519PrivateKey)
        return Keys(
            home=home,
            fleet=fleet,
            ca=x509.load_pem_x509_certificate((directory / "ca.pem").read_bytes()),
            ca_key=ca_key,
            door_pem=(directory / "door.pem").read_bytes(),
            door_key_pem=(directory / "door_key.pem").read_bytes(),
            desired_key=desired,
        )
    except FileNotFoundError as error:
        raise Denied(
            f"{home} holds no fleet identity ({error.filename} is missing).",
            "Make one with: shoal controller init",
        ) from error
    except (ValueError, KeyError, AssertionError) as error:
        raise Denied(
            f"The fleet identity in {directory} is damaged.", "Restore the directory from a backup."
        ) from error


def _create(directory: Path, fleet: str) -> None:
    """Writes all files beside, then renames: after a crash there is a whole identity or none."""
    ca_key = ec.generate_private_key(ec.SECP256R1())
    door_key = ec.generate_private_key(ec.SECP256R1())
    ca = _ca_certificate(ca_key, fleet)
    files = {
        "fleet.json": json.dumps({"fleet": fleet}).encode(),
        "ca.pem": ca.public_bytes(serialization.Encoding.PEM),
        "ca_key.pem": _private_pem(ca_key),
        "door.pem": _door_certificate(door_key, ca, ca_key, fleet).public_bytes(serialization.Encoding.PEM),
        "door_key.pem": _private_pem(door_key),
        "desired_key.pem": _private_pem(Ed25519PrivateKey.generate()),
    }
    fresh = directory.with_name("identity.new")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(mode=0o700, parents=True)
    for name, data in files.items():
        descriptor = os.open(fresh / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
    RealFs().fsync_directory(fresh)
    fresh.replace(directory)
    RealFs().fsync_directory(directory.parent)


def _private_pem(key: ec.EllipticCurvePrivateKey | Ed25519PrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _ca_certificate(key: ec.EllipticCurvePrivateKey, fleet: str) -> x509.Certificate:
    name = x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, fleet),
            x509.NameAttribute(NameOID.COMMON_NAME, "Shoal fleet CA"),
        ]
    )
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(FIRST)
        .not_valid_after(LAST)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(ca=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )


def _door_certificate(
    key: ec.EllipticCurvePrivateKey, ca: x509.Certificate, ca_key: ec.EllipticCurvePrivateKey, fleet: str
) -> x509.Certificate:
    host = server_name(fleet)
    return (
        x509.CertificateBuilder()
        # The name is in the SAN; a CN of this length may pass the 64 characters X.509 allows.
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Shoal controller")]))
        .issuer_name(ca.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(FIRST)
        .not_valid_after(LAST)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(ca=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(
            x509.SubjectAlternativeName(
                [x509.DNSName(host), x509.UniformResourceIdentifier(f"spiffe://{fleet}/controller")]
            ),
            critical=False,
        )
        .add_extension(_authority(ca_key), critical=False)
        .sign(ca_key, hashes.SHA256())
    )


def _authority(ca_key: ec.EllipticCurvePrivateKey) -> x509.AuthorityKeyIdentifier:
    return x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key())


def _key_usage(*, ca: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not ca,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=ca,
        crl_sign=ca,
        encipher_only=False,
        decipher_only=False,
    )
