"""The fleet's keys, tokens, joining and renewing: every refusal with its own reason."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import select

from shoal_controller import enrolment, identity
from shoal_controller.identity import Keys
from shoal_controller.settings import Settings
from shoal_controller.store.repositories import Store
from shoal_controller.store.tables import Device, JoinToken
from shoal_protos import tokens
from shoal_protos.errors import Conflict, Denied, InvalidInput
from shoal_protos.v1 import enrolment_pb2

from .conftest import FakeClock, csr_of, profile_of


def test_an_identity_is_made_once_with_private_files(home: Path) -> None:
    keys = identity.init(home, "test")
    again = identity.init(home)
    assert again.fleet == "test" and again.ca_der == keys.ca_der
    for path in (home / "identity").iterdir():
        assert path.stat().st_mode & 0o777 == 0o600, path
    assert "PRIVATE" not in repr(keys) and "key" not in repr(keys)
    with pytest.raises(Conflict, match="fleet 'test', not 'other'"):
        identity.init(home, "other")


def test_a_readable_directory_is_refused(home: Path) -> None:
    identity.init(home, "test")
    (home / "identity").chmod(0o750)
    with pytest.raises(Denied, match="chmod 700"):
        identity.load(home)


def test_a_damaged_or_missing_file_is_named(home: Path) -> None:
    identity.init(home, "test")
    (home / "identity" / "door.pem").unlink()
    with pytest.raises(Denied, match=r"door.pem is missing.*shoal controller init"):
        identity.load(home)
    (home / "identity" / "ca_key.pem").write_text("nonsense")
    with pytest.raises(Denied, match="damaged"):
        identity.load(home)


def test_a_crash_in_the_middle_leaves_no_half_identity(home: Path) -> None:
    (home / "identity.new").mkdir(mode=0o700)
    (home / "identity.new" / "ca_key.pem").write_text("half")
    keys = identity.init(home, "test")
    assert keys.fleet == "test"


def test_doors_are_valid_for_any_clock_and_carry_the_fixed_name(keys: Keys) -> None:
    door = x509.load_pem_x509_certificate(keys.door_pem)
    assert door.not_valid_before_utc == datetime(1970, 1, 1, tzinfo=UTC)
    assert door.not_valid_after_utc.year == 9999
    names = door.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["controller.test.shoal.internal"]
    assert names.get_values_for_type(x509.UniformResourceIdentifier) == ["spiffe://test/controller"]
    door.verify_directly_issued_by(keys.ca)


def test_device_certificates_name_the_device_and_end_soon(keys: Keys, clock: FakeClock) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = keys.issue(csr_of(key), "d-7", clock(), 3600)
    found = keys.read_certificate(identity.der(certificate))
    assert found.device == "d-7" and found.not_after_ms == clock() + 3_600_000
    assert found.key_hash == identity.key_hash(key.public_key())


@pytest.mark.parametrize("csr", [b"", b"nonsense", b"\x30\x03\x02\x01\x01", b"x" * 20_000])
def test_malformed_requests_are_refused(csr: Any) -> None:
    with pytest.raises(InvalidInput):
        identity.csr_key(csr)


@given(st.binary(max_size=400))
def test_no_bytes_crash_the_reader(csr: Any) -> None:
    with pytest.raises(InvalidInput):
        identity.csr_key(csr)


@pytest.mark.parametrize(
    "make", [lambda: ec.generate_private_key(ec.SECP384R1()), Ed25519PrivateKey.generate]
)
def test_only_p256_keys_get_certificates(make: Any) -> None:
    key = make()
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "d")])
    algorithm = hashes.SHA256() if isinstance(key, ec.EllipticCurvePrivateKey) else None
    csr = x509.CertificateSigningRequestBuilder().subject_name(name).sign(key, algorithm)
    with pytest.raises(InvalidInput, match="P-256"):
        identity.csr_key(csr.public_bytes(serialization.Encoding.DER))


# ---------------------------------------------------------------------------- joining


class Door:
    """The enrolment functions with everything but the request filled in."""

    def __init__(self, store: Store, keys: Keys, settings: Settings, clock: FakeClock) -> None:
        self.store, self.keys, self.settings, self.clock = store, keys, settings, clock

    def token(self, uses: int = 1, ttl_s: int = 60, **labels: str) -> tuple[str, str]:
        with self.store.write() as session:
            row, secret = enrolment.create_token(
                session, uses=uses, ttl_s=ttl_s, now_ms=self.clock(), labels=labels
            )
            return row.id, secret

    def join(self, secret: str, key: Any = None, name: str = "cam", profile: Any = None) -> Any:
        key = key or ec.generate_private_key(ec.SECP256R1())
        request = enrolment_pb2.EnrollRequest(
            token_secret=secret, csr_der=csr_of(key), profile=profile or profile_of(), name=name
        )
        with self.store.write() as session:
            return enrolment.enroll(session, self.keys, request, settings=self.settings, now_ms=self.clock())

    def renew(
        self, reply: Any, old_key: Any, new_key: Any = None, proof_key: Any = None, device: str = ""
    ) -> Any:
        csr = csr_of(new_key or old_key)
        proof = (proof_key or old_key).sign(identity.RENEW_DOMAIN + csr, ec.ECDSA(hashes.SHA256()))
        request = enrolment_pb2.RenewRequest(
            device=device or reply.device, csr_der=csr, old_certificate_der=reply.certificate_der, proof=proof
        )
        with self.store.write() as session:
            return enrolment.renew(session, self.keys, request, settings=self.settings, now_ms=self.clock())

    def uses_left(self, token: str) -> int:
        with self.store.read() as session:
            return session.get_one(JoinToken, token).uses_left


@pytest.fixture
def door(store: Store, keys: Keys, settings: Settings, clock: FakeClock) -> Door:
    return Door(store, keys, settings, clock)


def test_a_device_joins_and_a_use_is_gone(door: Any, store: Store) -> None:
    token, secret = door.token(uses=2, site="lab")
    reply = door.join(secret, name="Front Door Cam")
    assert reply.fleet == "test" and reply.display_name == "front-door-cam"
    assert door.keys.read_certificate(reply.certificate_der).device == reply.device
    assert list(reply.desired_state_keys) == [door.keys.desired_public]
    assert door.uses_left(token) == 1
    with store.read() as session:
        device = session.get_one(Device, reply.device)
        assert device.labels == {"site": "lab"}
        assert device.certificate_not_after_ms == door.clock() + door.settings.certificate_seconds * 1000


def test_the_same_key_is_the_same_device_and_one_use(door: Any) -> None:
    token, secret = door.token(uses=1)
    key = ec.generate_private_key(ec.SECP256R1())
    first, second = door.join(secret, key), door.join(secret, key, name="renamed")
    assert first.device == second.device and second.display_name == "cam"
    assert door.uses_left(token) == 0
    with pytest.raises(Denied, match="does not know"):
        door.join("wrong", key)


def test_names_are_unique(door: Any) -> None:
    _, secret = door.token(uses=4)
    names = [door.join(secret, name=name).display_name for name in ("cam", "cam", "CAM", "!!")]
    assert names == ["cam", "cam-2", "cam-3", "device"]


def test_each_bad_token_has_its_own_refusal(door: Any, store: Store) -> None:
    with pytest.raises(Denied, match=r"does not know the join token.*shoal token create"):
        door.join("never-given")
    _, used = door.token(uses=1)
    door.join(used)
    with pytest.raises(Denied, match=r"used up \(1 of 1 uses\)"):
        door.join(used)
    _, old = door.token(ttl_s=10)
    door.clock.advance(10)
    with pytest.raises(Denied, match="has expired"):
        door.join(old)
    token, revoked = door.token()
    with store.write() as session:
        enrolment.revoke_token(session, session.get_one(JoinToken, token), actor="person:test")
    with pytest.raises(Denied, match="was revoked"):
        door.join(revoked)


def test_a_refused_join_leaves_nothing(door: Any, store: Store) -> None:
    token, secret = door.token()
    with pytest.raises(InvalidInput):
        door.join(secret, profile=profile_of(*[f"runtime{n}" * 1000 for n in range(60)]))
    assert door.uses_left(token) == 1
    with store.read() as session:
        assert session.scalars(select(Device)).all() == []


def test_secrets_are_stored_as_hashes_only(door: Any, home: Path) -> None:
    _, secret = door.token()
    door.join(secret)
    door.store.close()
    for path in home.rglob("shoal.db*"):
        assert secret.encode() not in path.read_bytes()


def test_the_token_text_holds_what_a_device_needs(door: Any) -> None:
    _, secret = door.token()
    text = enrolment.token_text(door.keys, secret, ["127.0.0.1:8442"], ["127.0.0.1:8443"])
    token = tokens.decode(text)
    assert token.secret == secret and token.ca_der == door.keys.ca_der and token.fleet == "test"


# ---------------------------------------------------------------------------- renewing


def test_a_certificate_is_renewed_with_a_new_key(door: Any) -> None:
    _, secret = door.token()
    old, new = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    joined = door.join(secret, old)
    door.clock.advance(20 * 86400)
    renewed = door.renew(joined, old, new)
    found = door.keys.read_certificate(renewed.certificate_der)
    assert found.device == joined.device and found.key_hash == identity.key_hash(new.public_key())
    # The answer got lost: the device asks again with its old key.
    assert door.renew(joined, old, new).device == joined.device
    # Once the new one is used to renew, the oldest key is done.
    newest = ec.generate_private_key(ec.SECP256R1())
    door.renew(renewed, new, newest)
    with pytest.raises(Denied, match="replaced by a newer one"):
        door.renew(joined, old, new)


def test_renewals_that_prove_nothing_are_refused(door: Any, store: Store, tmp_path: Path) -> None:
    _, secret = door.token(uses=2)
    key, other = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    joined, neighbour = door.join(secret, key), door.join(secret, other, name="two")
    with pytest.raises(Denied, match="not signed by the old key"):
        door.renew(joined, key, proof_key=other)
    with pytest.raises(Denied, match="does not know the device"):
        door.renew(joined, key, device=neighbour.device)
    with pytest.raises(Denied, match="Another device has this key"):
        door.renew(joined, key, new_key=other)
    stranger = tmp_path / "stranger"
    stranger.mkdir(mode=0o700)
    foreign = enrolment_pb2.EnrollReply(device=joined.device)
    foreign.certificate_der = identity.der(
        identity.init(stranger, "test").issue(csr_of(key), joined.device, door.clock(), 60)
    )
    with pytest.raises(Denied, match="not issued by this fleet"):
        door.renew(foreign, key)


def test_an_expired_certificate_is_renewed_within_the_grace_only(door: Any) -> None:
    _, secret = door.token()
    key = ec.generate_private_key(ec.SECP256R1())
    joined = door.join(secret, key)
    door.clock.advance(door.settings.certificate_seconds + 3600)
    renewed = door.renew(joined, key)
    door.clock.advance(door.settings.certificate_seconds + door.settings.renewal_grace_seconds + 1)
    with pytest.raises(Denied, match="expired too long ago"):
        door.renew(renewed, key)


def test_a_revoked_device_neither_renews_nor_joins_again(door: Any, store: Store) -> None:
    from shoal_controller import devices

    _, secret = door.token(uses=5)
    key = ec.generate_private_key(ec.SECP256R1())
    joined = door.join(secret, key)
    with store.write() as session:
        devices.revoke(session, session.get_one(Device, joined.device), actor="person:test")
    with pytest.raises(Denied, match="was revoked"):
        door.renew(joined, key)
    with pytest.raises(Denied, match="was revoked"):
        door.join(secret, key)


def test_the_fleet_is_in_a_file_people_can_read(home: Path) -> None:
    identity.init(home, "test")
    assert json.loads((home / "identity" / "fleet.json").read_text()) == {"fleet": "test"}
