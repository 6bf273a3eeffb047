"""Who this device is: a P-256 key that never leaves it, and the certificate the controller gave.

Files (0600) under `identity/`: key.pem, cert.pem, ca.pem, join.json. join.json names key and certificate
by digest, so writing it is the one moment at which an identity changes: while a certificate is renewed
key.pem.new and cert.pem.new stand beside the old ones, and `load` takes those that join.json names.
Imports no cryptography: the supervisor loads identities and stays small.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from shoal_agent.fs import Fs, durable_write
from shoal_protos.errors import Conflict, NotFound, TamperedData


@dataclass(frozen=True)
class Identity:
    """A joined device. Key and certificates are PEM, `desired_state_keys` raw Ed25519, times Unix ms."""

    fleet: str
    device: str
    name: str
    agent_addresses: tuple[str, ...]
    enrolment_addresses: tuple[str, ...]
    desired_state_keys: tuple[bytes, ...]
    key_pem: bytes
    certificate_pem: bytes
    ca_pem: bytes
    renew_at_ms: int
    expires_ms: int

    def __repr__(self) -> str:
        return f"Identity(fleet={self.fleet!r}, device={self.device!r}, name={self.name!r})"


class IdentityStore:
    """The files of `identity/`."""

    def __init__(self, directory: Path, fs: Fs) -> None:
        self._directory, self._fs = directory, fs

    def _path(self, name: str) -> Path:
        return self._directory / name

    def exists(self) -> bool:
        return self._path("join.json").exists()

    def stored_key(self, name: str) -> bytes | None:
        """A private key that is there already ("key.pem", or "key.pem.new" of a renewal under way)."""
        try:
            return self._fs.read(self._path(name))
        except FileNotFoundError:
            return None

    def store_key(self, name: str, key_pem: bytes) -> None:
        """Before the key is first used: a lost answer can then be asked for again with the same key."""
        durable_write(self._fs, self._path(name), key_pem)

    def check_fleet(self, fleet: str) -> None:
        """Raises Conflict if the directory belongs to another fleet."""
        if self.exists() and self.load().fleet != fleet:
            raise Conflict(
                f"This device belongs to the fleet '{self.load().fleet}', the token is for '{fleet}'.",
                "Run shoal-agent leave first, or use another --state-dir.",
            )

    def save(self, identity: Identity) -> None:
        """Stores a new or renewed identity; a power cut leaves the old or the new one, whole."""
        durable_write(self._fs, self._path("key.pem.new"), identity.key_pem)
        durable_write(self._fs, self._path("cert.pem.new"), identity.certificate_pem)
        durable_write(self._fs, self._path("ca.pem"), identity.ca_pem)
        durable_write(self._fs, self._path("join.json"), _join_json(identity))
        self._fs.replace(self._path("key.pem.new"), self._path("key.pem"))
        self._fs.replace(self._path("cert.pem.new"), self._path("cert.pem"))
        self._fs.fsync_directory(self._directory)

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
        try:
            return Identity(
                fleet=facts["fleet"],
                device=facts["device"],
                name=facts["name"],
                agent_addresses=tuple(facts["agent_addresses"]),
                enrolment_addresses=tuple(facts["enrolment_addresses"]),
                desired_state_keys=tuple(bytes.fromhex(key) for key in facts["desired_state_keys"]),
                key_pem=self._named("key.pem", facts["key_sha256"]),
                certificate_pem=self._named("cert.pem", facts["certificate_sha256"]),
                ca_pem=self._fs.read(self._path("ca.pem")),
                renew_at_ms=int(facts["renew_at_ms"]),
                expires_ms=int(facts["expires_ms"]),
            )
        except (KeyError, TypeError, ValueError, OSError) as error:
            raise TamperedData("identity/ is damaged.", _JOIN_AGAIN) from error

    def _named(self, name: str, digest: str) -> bytes:
        for candidate in (name, f"{name}.new"):
            with contextlib.suppress(FileNotFoundError):
                data = self._fs.read(self._path(candidate))
                if hashlib.sha256(data).hexdigest() == digest:
                    return data
        raise TamperedData(f"identity/{name} is damaged.", _JOIN_AGAIN)

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
        "key_sha256": hashlib.sha256(identity.key_pem).hexdigest(),
        "certificate_sha256": hashlib.sha256(identity.certificate_pem).hexdigest(),
        "renew_at_ms": identity.renew_at_ms,
        "expires_ms": identity.expires_ms,
    }
    return json.dumps(facts, indent=2, sort_keys=True).encode()
