"""Who this device is: a P-256 key that never leaves it, and the certificate the controller gave.

Files (0600) under `identity/`: key.pem, cert.pem, ca.pem, join.json. While a certificate is renewed,
key.pem.new and cert.pem.new stand beside them; `load` takes whichever pair belongs together, so a
power cut between the two renames costs nothing.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from shoal_agent.fs import Fs, durable_write
from shoal_protos.errors import Conflict, InvalidInput, NotFound, TamperedData
from shoal_protos.tokens import JoinToken
from shoal_protos.v1 import enrolment_pb2

RENEW_DOMAIN = b"shoal-renew-v1\0"
RENEW_AT = 2 / 3  # of the certificate's life


@dataclass(frozen=True)
class Identity:
    """A joined device. Certificates and key are PEM, `desired_state_keys` raw Ed25519."""

    fleet: str
    device: str
    name: str
    agent_addresses: tuple[str, ...]
    enrolment_addresses: tuple[str, ...]
    desired_state_keys: tuple[bytes, ...]
    key_pem: bytes
    certificate_pem: bytes
    ca_pem: bytes

    def __repr__(self) -> str:
        return f"Identity(fleet={self.fleet!r}, device={self.device!r}, name={self.name!r})"

    @property
    def certificate(self) -> x509.Certificate:
        return x509.load_pem_x509_certificate(self.certificate_pem)

    @property
    def renew_at_ms(self) -> int:
        """Unix time in ms from which the certificate should be renewed."""
        certificate = self.certificate
        start, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
        return int((start + (end - start) * RENEW_AT).timestamp() * 1000)

    @property
    def expires(self) -> datetime:
        return self.certificate.not_valid_after_utc.astimezone(timezone.utc)


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


class IdentityStore:
    """The files of `identity/`."""

    def __init__(self, directory: Path, fs: Fs) -> None:
        self._directory, self._fs = directory, fs

    def _path(self, name: str) -> Path:
        return self._directory / name

    def exists(self) -> bool:
        return self._path("join.json").exists()

    def joining_key(self) -> bytes:
        """The key to join with: the one already there, so that joining twice is one device."""
        path = self._path("key.pem")
        with contextlib.suppress(FileNotFoundError):
            return self._fs.read(path)
        key_pem = new_key_pem()
        durable_write(self._fs, path, key_pem)
        return key_pem

    def check_fleet(self, fleet: str) -> None:
        """Raises Conflict if the directory belongs to another fleet."""
        if self.exists() and self.load().fleet != fleet:
            raise Conflict(
                f"This device belongs to the fleet '{self.load().fleet}', the token is for '{fleet}'.",
                "Run shoal-agent leave first, or use another --state-dir.",
            )

    def save_joined(self, token: JoinToken, key_pem: bytes, reply: enrolment_pb2.EnrollReply) -> Identity:
        """Stores what Enroll answered. join.json comes last: its presence means joined.

        Raises:
            TamperedData: the answer is not for this key or this fleet.
        """
        if reply.fleet != token.fleet:
            raise TamperedData(f"The controller answered for the fleet '{reply.fleet}'.")
        certificate_pem = pem([reply.certificate_der])
        if not _belongs(key_pem, certificate_pem):
            raise TamperedData("The controller's certificate is not for this device's key.")
        addresses = dict.fromkeys([*token.agent_addresses, *reply.agent_addresses])
        identity = Identity(
            fleet=reply.fleet,
            device=reply.device,
            name=reply.display_name,
            agent_addresses=tuple(addresses),
            enrolment_addresses=token.enrolment_addresses,
            desired_state_keys=tuple(reply.desired_state_keys),
            key_pem=key_pem,
            certificate_pem=certificate_pem,
            ca_pem=pem(reply.ca_certificates_der or [token.ca_der]),
        )
        durable_write(self._fs, self._path("cert.pem"), identity.certificate_pem)
        durable_write(self._fs, self._path("ca.pem"), identity.ca_pem)
        durable_write(self._fs, self._path("join.json"), _join_json(identity))
        return identity

    def load(self) -> Identity:
        """Reads the identity.

        Raises:
            NotFound: this device has not joined.
            TamperedData: the files are damaged.
        """
        try:
            facts = json.loads(self._fs.read(self._path("join.json")))
        except FileNotFoundError as error:
            raise NotFound(
                "This device has not joined a fleet.",
                "Get a token with `shoal token create --join`, then run: shoal-agent join --token-file FILE",
            ) from error
        except ValueError as error:
            raise TamperedData("identity/join.json is damaged.", _JOIN_AGAIN) from error
        key_pem, certificate_pem = self._matching_pair()
        try:
            return Identity(
                fleet=facts["fleet"],
                device=facts["device"],
                name=facts["name"],
                agent_addresses=tuple(facts["agent_addresses"]),
                enrolment_addresses=tuple(facts["enrolment_addresses"]),
                desired_state_keys=tuple(bytes.fromhex(key) for key in facts["desired_state_keys"]),
                key_pem=key_pem,
                certificate_pem=certificate_pem,
                ca_pem=self._fs.read(self._path("ca.pem")),
            )
        except (KeyError, TypeError, ValueError, OSError) as error:
            raise TamperedData("identity/ is damaged.", _JOIN_AGAIN) from error

    def _matching_pair(self) -> tuple[bytes, bytes]:
        for certificate_name in ("cert.pem.new", "cert.pem"):
            for key_name in ("key.pem.new", "key.pem"):
                with contextlib.suppress(OSError, ValueError, TamperedData):
                    key_pem = self._fs.read(self._path(key_name))
                    certificate_pem = self._fs.read(self._path(certificate_name))
                    if _belongs(key_pem, certificate_pem):
                        return key_pem, certificate_pem
        raise TamperedData("No key of this device belongs to its certificate.", _JOIN_AGAIN)

    def renewal_key(self) -> bytes:
        """The key to renew with, stored before it is sent, so that a lost answer can be asked for again."""
        path = self._path("key.pem.new")
        with contextlib.suppress(FileNotFoundError):
            return self._fs.read(path)
        key_pem = new_key_pem()
        durable_write(self._fs, path, key_pem)
        return key_pem

    def save_renewed(self, old: Identity, key_pem: bytes, reply: enrolment_pb2.EnrollReply) -> Identity:
        """Stores a renewed certificate. Raises TamperedData if it is not for this device and key."""
        certificate_pem = pem([reply.certificate_der])
        if reply.device != old.device or not _belongs(key_pem, certificate_pem):
            raise TamperedData("The renewed certificate is not for this device's key.")
        ca_pem = pem(reply.ca_certificates_der) if reply.ca_certificates_der else old.ca_pem
        renewed = replace(old, key_pem=key_pem, certificate_pem=certificate_pem, ca_pem=ca_pem)
        durable_write(self._fs, self._path("cert.pem.new"), certificate_pem)
        durable_write(self._fs, self._path("ca.pem"), ca_pem)
        self._fs.replace(self._path("key.pem.new"), self._path("key.pem"))
        self._fs.fsync_directory(self._directory)
        self._fs.replace(self._path("cert.pem.new"), self._path("cert.pem"))
        self._fs.fsync_directory(self._directory)
        return renewed

    def forget(self) -> None:
        """Removes key, certificate and everything else that makes this device a member."""
        for name in ("join.json", "cert.pem.new", "key.pem.new", "cert.pem", "key.pem", "ca.pem"):
            self._fs.unlink(self._path(name))
        self._fs.fsync_directory(self._directory)


_JOIN_AGAIN = "Join again: shoal-agent leave, then shoal-agent join with a new token."


def _join_json(identity: Identity) -> bytes:
    facts = {
        "fleet": identity.fleet,
        "device": identity.device,
        "name": identity.name,
        "agent_addresses": list(identity.agent_addresses),
        "enrolment_addresses": list(identity.enrolment_addresses),
        "desired_state_keys": [key.hex() for key in identity.desired_state_keys],
    }
    return json.dumps(facts, indent=2, sort_keys=True).encode()


def _belongs(key_pem: bytes, certificate_pem: bytes) -> bool:
    certificate = x509.load_pem_x509_certificate(certificate_pem)
    return bool(certificate.public_key() == _key(key_pem).public_key())
