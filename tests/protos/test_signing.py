"""Signatures over the bytes as carried."""

from __future__ import annotations

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from shoal_protos import signing
from shoal_protos.errors import TamperedData
from shoal_protos.v1 import desired_pb2

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
PUBLIC = signing.public_bytes(KEY)


@given(st.binary(max_size=300))
def test_the_payload_comes_back_exactly(payload: bytes) -> None:
    assert signing.verify(signing.sign(payload, KEY), [PUBLIC]) == payload


@given(st.binary(min_size=1, max_size=300), st.data())
def test_any_flipped_byte_is_refused(payload: bytes, data: st.DataObject) -> None:
    signed = signing.sign(payload, KEY)
    altered = bytearray(payload)
    altered[data.draw(st.integers(0, len(payload) - 1))] ^= data.draw(st.integers(1, 255))
    signed.payload = bytes(altered)
    with pytest.raises(TamperedData):
        signing.verify(signed, [PUBLIC])


def test_a_signature_of_another_domain_is_refused() -> None:
    signed = signing.sign(b"x", KEY, domain=b"shoal-other-v1\0")
    with pytest.raises(TamperedData):
        signing.verify(signed, [PUBLIC])


def test_an_unknown_key_is_refused() -> None:
    other = Ed25519PrivateKey.from_private_bytes(bytes(32))
    with pytest.raises(TamperedData, match="join again"):
        signing.verify(signing.sign(b"x", other), [PUBLIC])


def test_one_of_several_keys_is_enough() -> None:
    other = Ed25519PrivateKey.from_private_bytes(bytes(32))
    assert signing.verify(signing.sign(b"x", other), [PUBLIC, signing.public_bytes(other)]) == b"x"


def test_unknown_fields_survive_since_bytes_are_never_re_encoded() -> None:
    # A newer controller adds field 99; an older reader must still verify and keep it.
    newer = desired_pb2.DesiredState(device="d").SerializeToString() + b"\x9a\x06\x03new"
    payload = signing.verify(signing.sign(newer, KEY), [PUBLIC])
    state = desired_pb2.DesiredState.FromString(payload)
    assert state.device == "d"
    assert payload == newer
    assert b"new" in state.SerializeToString()
