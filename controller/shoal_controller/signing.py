"""Turns what a device should have into a signed message. The bytes are signed as carried."""

from __future__ import annotations

import hashlib

from shoal_controller.identity import Keys
from shoal_protos import signing
from shoal_protos.v1 import desired_pb2


def content_hash(state: desired_pb2.DesiredState) -> str:
    """Hex SHA-256 of a state without generation and dates: equal content, equal hash."""
    bare = desired_pb2.DesiredState()
    bare.CopyFrom(state)
    for field in ("epoch", "generation", "issued_at_ms", "not_after_ms"):
        bare.ClearField(field)  # type: ignore[arg-type]
    return hashlib.sha256(bare.SerializeToString(deterministic=True)).hexdigest()


def sign_desired(
    state: desired_pb2.DesiredState,
    keys: Keys,
    *,
    epoch: int,
    generation: int,
    issued_at_ms: int,
    not_after_ms: int,
) -> desired_pb2.Signed:
    """Signs `state` under this generation and these dates."""
    dated = desired_pb2.DesiredState()
    dated.CopyFrom(state)
    dated.epoch = epoch
    dated.generation = generation
    dated.issued_at_ms = issued_at_ms
    dated.not_after_ms = not_after_ms
    return signing.sign(dated.SerializeToString(deterministic=True), keys.desired_key)
