from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal_agent.features import BUILD_TIME_MS
from shoal_agent.fs import RealFs
from shoal_agent.trust import SERVE, TRIAL, PinnedTrust, Refused
from shoal_protos import signing
from shoal_protos.errors import Denied, TamperedData
from shoal_protos.v1 import desired_pb2
from tests.agent.fakes import FakeClock

KEY = Ed25519PrivateKey.from_private_bytes(b"k" * 32)
BUNDLE = "sha256:" + "ab" * 32
OTHER = "sha256:" + "cd" * 32
NOW = 1_790_000_000_000


def state(**fields: Any) -> desired_pb2.DesiredState:
    defaults: dict[str, Any] = {
        "schema": 1, "fleet": "f", "device": "d", "epoch": 1, "generation": 5,
        "issued_at_ms": NOW, "not_after_ms": NOW + 1000,
        "placements": [desired_pb2.Placement(endpoint="e", bundle=BUNDLE, role=desired_pb2.ROLE_PRIMARY)],
    }  # fmt: skip
    return desired_pb2.DesiredState(**{**defaults, **fields})


def signed(key: Ed25519PrivateKey = KEY, **fields: Any) -> desired_pb2.Signed:
    return signing.sign(state(**fields).SerializeToString(), key)


def make(tmp_path: Path, clock: FakeClock | None = None) -> PinnedTrust:
    return PinnedTrust(
        tmp_path / "desired.bin",
        fleet="f",
        device="d",
        keys=[signing.public_bytes(KEY)],
        clock=clock or FakeClock(NOW),
        fs=RealFs(),
    )


def test_adopts_and_survives_a_restart(tmp_path: Path) -> None:
    adopted = make(tmp_path).admit(signed())
    again = make(tmp_path)
    again.load()
    assert again.state == adopted


def test_stored_as_carried_with_unknown_fields(tmp_path: Path) -> None:
    message = state().SerializeToString() + b"\xba\x3e\x05later"  # field 999, unknown here
    carried = signing.sign(message, KEY)
    trust = make(tmp_path)
    trust.admit(carried)
    stored = desired_pb2.Signed.FromString((tmp_path / "desired.bin").read_bytes())
    assert stored.payload == message
    assert trust.state is not None and b"later" in trust.state.SerializeToString()


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (signed(generation=4), "lower generation"),
        (signed(epoch=0, generation=99), "lower generation"),
        (signed(placements=[]), "same generation, other content"),
        (signed(generation=6, device="other"), "wrong device"),
        (signed(generation=6, fleet="other"), "wrong device"),
        (signed(Ed25519PrivateKey.generate(), generation=6), "bad signature"),
        (signing.sign(state(generation=6).SerializeToString(), KEY, b"other-domain\0"), "bad signature"),
        (signing.sign(b"\xff\xff", KEY), "malformed"),
        (signed(generation=6, schema=2), "unknown schema 2"),
        (
            signed(generation=6, requires=[desired_pb2.Requirement(feature="x.v9", since_version="9.1")]),
            "unknown feature x.v9, needs 9.1",
        ),
        (signed(generation=6, keep=["sha256:nonsense"]), "malformed digest"),
    ],
)
def test_refuses(tmp_path: Path, message: desired_pb2.Signed, reason: str) -> None:
    trust = make(tmp_path)
    adopted = trust.admit(signed())
    with pytest.raises(Refused) as refusal:
        trust.admit(message)
    assert refusal.value.reason == reason
    assert str(refusal.value)
    assert trust.state == adopted


def test_a_later_end_of_equal_content_is_taken_and_an_identical_copy_ignored(tmp_path: Path) -> None:
    trust = make(tmp_path)
    trust.admit(signed())
    before = (tmp_path / "desired.bin").stat().st_mtime_ns
    trust.admit(signed())
    assert (tmp_path / "desired.bin").stat().st_mtime_ns == before
    assert trust.admit(signed(issued_at_ms=NOW + 5, not_after_ms=NOW + 9000)).not_after_ms == NOW + 9000
    assert trust.admit(signed()).not_after_ms == NOW + 9000  # an older copy does not shorten it


def test_higher_epoch_wins_over_generation(tmp_path: Path) -> None:
    trust = make(tmp_path)
    trust.admit(signed())
    assert trust.admit(signed(epoch=2, generation=1)).epoch == 2


@settings(max_examples=60, deadline=None)
@given(position=st.integers(0, 10_000), bit=st.integers(0, 7))
def test_any_flipped_bit_is_refused(tmp_path_factory: Any, position: int, bit: int) -> None:
    trust = make(tmp_path_factory.mktemp("t"))
    good = signed()
    data = bytearray(good.payload)
    data[position % len(data)] ^= 1 << bit
    with pytest.raises(Refused):
        trust.admit(desired_pb2.Signed(payload=bytes(data), signatures=good.signatures))
    value = bytearray(good.signatures[0].value)
    value[position % len(value)] ^= 1 << bit
    forged = desired_pb2.Signature(key_id=good.signatures[0].key_id, value=bytes(value))
    with pytest.raises(Refused):
        trust.admit(desired_pb2.Signed(payload=good.payload, signatures=[forged]))
    assert trust.state is None


@settings(max_examples=40, deadline=None)
@given(order=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=12))
def test_epoch_and_generation_never_go_down(tmp_path_factory: Any, order: list[tuple[int, int]]) -> None:
    folder = tmp_path_factory.mktemp("t")
    highest = (-1, -1)
    for epoch, generation in order:
        trust = make(folder)  # a restart before each
        try:
            trust.admit(signed(epoch=epoch, generation=generation))
            assert (epoch, generation) >= highest
        except Refused:
            assert (epoch, generation) < highest
        highest = max(highest, (epoch, generation))
        assert trust.state is not None and (trust.state.epoch, trust.state.generation) == highest


def test_damaged_storage_counts_as_none(tmp_path: Path) -> None:
    make(tmp_path).admit(signed())
    data = bytearray((tmp_path / "desired.bin").read_bytes())
    data[20] ^= 1
    (tmp_path / "desired.bin").write_bytes(data)
    trust = make(tmp_path)
    trust.load()
    assert trust.state is None


def test_bundles_by_use_and_expiry(tmp_path: Path) -> None:
    clock = FakeClock(NOW)
    trust = make(tmp_path, clock)
    with pytest.raises(Denied):
        trust.admit_bundle(BUNDLE, SERVE)
    trust.admit(signed(trials=[desired_pb2.Trial(id="t", bundle=OTHER)]))
    trust.admit_bundle(BUNDLE, SERVE)
    trust.admit_bundle(OTHER, TRIAL)
    with pytest.raises(Denied):
        trust.admit_bundle(OTHER, SERVE)  # a trial's bundle never answers a request
    clock.advance(2)
    with pytest.raises(Denied, match="expired"):
        trust.admit_bundle(BUNDLE, SERVE)
    trust.admit(signed(trials=[desired_pb2.Trial(id="t", bundle=OTHER)], not_after_ms=NOW + 60_000))
    trust.admit_bundle(BUNDLE, SERVE)


def test_time_is_never_below_build_and_highest_signed_time(tmp_path: Path) -> None:
    clock = FakeClock(0)  # 1970
    trust = make(tmp_path, clock)
    assert trust.now_ms() == BUILD_TIME_MS
    trust.admit(signed())
    assert trust.now_ms() == NOW


def test_a_clock_ahead_does_not_lock_out_once_the_controller_is_heard(tmp_path: Path) -> None:
    clock = FakeClock(NOW + 10**12)  # decades ahead
    trust = make(tmp_path, clock)
    trust.admit(signed())
    with pytest.raises(Denied):
        trust.admit_bundle(BUNDLE, SERVE)
    trust.note_controller_time(NOW)
    trust.admit_bundle(BUNDLE, SERVE)
    assert trust.clock_wrong
    clock.wall = NOW
    assert not trust.clock_wrong


def test_vault_agrees_with_the_library(tmp_path: Path) -> None:
    from shoal_agent import vault

    message, keys = signed(), [signing.public_bytes(KEY)]
    assert vault.verify(message, keys) == message.payload
    message.payload += b"\0"
    with pytest.raises(TamperedData):
        vault.verify(message, keys)
