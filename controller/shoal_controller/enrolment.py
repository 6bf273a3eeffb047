"""Join tokens, joining and renewing. Functions over a session; the gateway and the API open it."""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Mapping, Sequence

from sqlalchemy import select
from sqlalchemy.orm import Session

from shoal_agent.profile import class_of
from shoal_controller import classes, identity
from shoal_controller.identity import Keys
from shoal_controller.settings import Settings
from shoal_controller.store.repositories import new_id, record
from shoal_controller.store.tables import Device, JoinToken
from shoal_protos import tokens
from shoal_protos.errors import Denied, InvalidInput
from shoal_protos.v1 import enrolment_pb2
from shoal_protos.v1.profile_pb2 import Profile

MAX_PROFILE_BYTES = 256 << 10
ID_ALPHABET = "abcdefghijkmnpqrstuvwxyz23456789"  # no l, o, 0, 1: ids are read aloud
NEW_TOKEN = "Ask for a new one: shoal token create --join"  # noqa: S105


# ---------------------------------------------------------------------------- tokens


def create_token(
    session: Session,
    *,
    uses: int,
    ttl_s: int,
    now_ms: int,
    labels: Mapping[str, str] | None = None,
    actor: str = "person:local",
) -> tuple[JoinToken, str]:
    """A new token and its secret, which is stored only as a hash: it cannot be shown again."""
    secret = secrets.token_urlsafe(24)
    row = JoinToken(
        id=new_id(session, "j"),
        secret_hash=hash_secret(secret),
        uses=uses,
        uses_left=uses,
        created_ms=now_ms,
        expires_ms=now_ms + ttl_s * 1000,
        labels=dict(labels or {}),
    )
    session.add(row)
    record(
        session,
        actor=actor,
        verb="created",
        kind="token",
        object=row.id,
        after={"uses": uses, "expires_ms": row.expires_ms},
    )
    return row, secret


def token_text(
    keys: Keys, secret: str, enrolment_addresses: Sequence[str], agent_addresses: Sequence[str]
) -> str:
    """What `shoal-agent join` takes."""
    return tokens.encode(
        tokens.JoinToken(
            fleet=keys.fleet,
            enrolment_addresses=tuple(enrolment_addresses),
            agent_addresses=tuple(agent_addresses),
            secret=secret,
            ca_der=keys.ca_der,
        )
    )


def revoke_token(session: Session, row: JoinToken, *, actor: str) -> JoinToken:
    """From now on nobody joins with it; devices that joined stay."""
    if not row.revoked:
        row.revoked = True
        record(session, actor=actor, verb="revoked", kind="token", object=row.id)
    return row


def hash_secret(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def _usable_token(session: Session, secret: str, now_ms: int) -> JoinToken:
    row = session.scalar(select(JoinToken).where(JoinToken.secret_hash == hash_secret(secret)))
    if row is None:
        raise Denied("This controller does not know the join token.", f"Is it this fleet's? {NEW_TOKEN}")
    if row.revoked:
        raise Denied(f"The join token {row.id} was revoked.", NEW_TOKEN)
    if now_ms >= row.expires_ms:
        raise Denied(f"The join token {row.id} has expired.", NEW_TOKEN)
    if row.uses_left <= 0:
        raise Denied(f"The join token {row.id} is used up ({row.uses} of {row.uses} uses).", NEW_TOKEN)
    return row


# ---------------------------------------------------------------------------- joining


def enroll(
    session: Session,
    keys: Keys,
    request: enrolment_pb2.EnrollRequest,
    *,
    settings: Settings,
    now_ms: int,
    agent_addresses: Sequence[str] = (),
) -> enrolment_pb2.EnrollReply:
    """Lets a device in. The same key again gets the same device and costs no further use.

    Raises:
        Denied: the token is unknown, revoked, expired or used up, or the key's device is revoked.
        InvalidInput: malformed CSR or profile.
    """
    profile = request.profile
    if profile.ByteSize() > MAX_PROFILE_BYTES:
        raise InvalidInput("The profile is too large.")
    key = identity.key_hash(identity.csr_key(request.csr_der))
    device = session.scalar(select(Device).where(Device.public_key_hash == key))
    if device is None:
        token = _usable_token(session, request.token_secret, now_ms)
        token.uses_left -= 1
        device = _new_device(session, request, key, token, now_ms)
    else:
        _known_token(session, request.token_secret)
        _check_not_revoked(device)
        device.profile = profile.SerializeToString(deterministic=True)
        device.profile_class = class_of(profile)
    return _issue(session, keys, device, request.csr_der, settings, now_ms, agent_addresses)


def renew(
    session: Session,
    keys: Keys,
    request: enrolment_pb2.RenewRequest,
    *,
    settings: Settings,
    now_ms: int,
    agent_addresses: Sequence[str] = (),
) -> enrolment_pb2.EnrollReply:
    """A new certificate for a device that proves its old key, also a while after expiry.

    Raises:
        Denied: foreign or too old certificate, wrong proof, unknown or revoked device.
    """
    old = keys.read_certificate(request.old_certificate_der)
    identity.check_proof(request.old_certificate_der, request.csr_der, request.proof)
    device = session.get(Device, old.device)
    if device is None or old.device != request.device:
        raise Denied("This fleet does not know the device.", f"Join again. {NEW_TOKEN}")
    _check_not_revoked(device)
    if old.key_hash not in (device.public_key_hash, device.previous_key_hash):
        raise Denied("The certificate was replaced by a newer one.", f"Join again. {NEW_TOKEN}")
    if now_ms > old.not_after_ms + settings.renewal_grace_seconds * 1000:
        raise Denied("The certificate expired too long ago to be renewed.", f"Join again. {NEW_TOKEN}")
    key = identity.key_hash(identity.csr_key(request.csr_der))
    if key != device.public_key_hash:
        taken = session.scalar(select(Device.id).where(Device.public_key_hash == key))
        if taken is not None:
            raise Denied("Another device has this key.", "Make a new key and renew again.")
        device.previous_key_hash, device.public_key_hash = old.key_hash, key
    reply = _issue(session, keys, device, request.csr_der, settings, now_ms, agent_addresses)
    record(
        session,
        project=device.project,
        actor=f"device:{device.id}",
        verb="renewed",
        kind="device",
        object=device.id,
        after={"certificate_not_after_ms": device.certificate_not_after_ms},
    )
    return reply


def _known_token(session: Session, secret: str) -> None:
    """A device that joins again may hold a token that is used up meanwhile, but not none at all."""
    known = session.scalar(select(JoinToken.id).where(JoinToken.secret_hash == hash_secret(secret)))
    if known is None:
        raise Denied("This controller does not know the join token.", f"Is it this fleet's? {NEW_TOKEN}")


def _check_not_revoked(device: Device) -> None:
    if device.revoked:
        raise Denied(
            f"The device {device.name} was revoked.",
            "To let the machine in again, run `shoal-agent leave` on it and join with a new token.",
        )


def _new_device(
    session: Session, request: enrolment_pb2.EnrollRequest, key: str, token: JoinToken, now_ms: int
) -> Device:
    device = Device(
        id=_random_id(session),
        project=token.project,
        name=unique_name(session, request.name),
        profile_class=class_of(request.profile),
        profile=request.profile.SerializeToString(deterministic=True),
        labels=dict(token.labels),
        public_key_hash=key,
        certificate_serial="",
        certificate_not_after_ms=0,
        joined_ms=now_ms,
        agent_version=request.profile.agent_version,
        features=list(request.profile.features),
        reported=None,
    )
    session.add(device)
    record(
        session,
        project=device.project,
        actor=f"device:{device.id}",
        verb="joined",
        kind="device",
        object=device.id,
        after={"name": device.name, "profile_class": device.profile_class, "token": token.id},
    )
    return device


def _random_id(session: Session) -> str:
    """Random, not counted: after a restored backup no new device may get an old one's identity."""
    while True:
        found = "d-" + "".join(secrets.choice(ID_ALPHABET) for _ in range(8))
        if session.get(Device, found) is None:
            return found


def clean_name(text: str) -> str:
    """A device name people can type: lower-case letters, digits, dots, dashes, underscores."""
    name = re.sub(r"[^a-z0-9_.-]+", "-", text.strip().lower()).strip("-._")[:50]
    return name or "device"


def unique_name(session: Session, wanted: str, *, but: str = "") -> str:
    """`wanted` made typeable and, where another device has it, numbered: cam, cam-2, cam-3..."""
    base = clean_name(wanted)
    rows = session.execute(
        select(Device.name, Device.id).where(Device.name.startswith(base, autoescape=True))
    )
    taken = {name for name, device in rows if device != but}
    if base not in taken:
        return base
    number = 2
    while f"{base}-{number}" in taken:
        number += 1
    return f"{base}-{number}"


def _issue(
    session: Session,
    keys: Keys,
    device: Device,
    csr_der: bytes,
    settings: Settings,
    now_ms: int,
    agent_addresses: Sequence[str],
) -> enrolment_pb2.EnrollReply:
    certificate = keys.issue(csr_der, device.id, now_ms, settings.certificate_seconds)
    device.certificate_serial = identity.serial_of(certificate)
    device.certificate_not_after_ms = int(certificate.not_valid_after_utc.timestamp() * 1000)
    session.flush()
    return enrolment_pb2.EnrollReply(
        fleet=keys.fleet,
        device=device.id,
        certificate_der=identity.der(certificate),
        ca_certificates_der=[keys.ca_der],
        desired_state_keys=[keys.desired_public],
        profile_class=device.profile_class,
        agent_addresses=list(agent_addresses),
        server_time_ms=now_ms,
        display_name=device.name,
        class_reason=classes.class_reason(Profile.FromString(device.profile), device.profile_class),
    )
