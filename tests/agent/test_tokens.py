from __future__ import annotations

import contextlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal_protos import tokens
from shoal_protos.errors import InvalidInput
from shoal_protos.tokens import JoinToken, decode, encode

TOKEN = JoinToken("acme", ("10.0.0.1:8442", "[::1]:8442"), ("10.0.0.1:8443",), "s3cret", b"\x30der")


def test_round_trip_also_wrapped_over_lines() -> None:
    text = encode(TOKEN)
    assert text.startswith("shj_") and decode(text) == TOKEN
    assert decode(f"  {text[:40]}\n{text[40:]}\n") == TOKEN


def test_secret_is_in_no_representation() -> None:
    assert "s3cret" not in repr(TOKEN)


@given(position=st.integers(0, 10_000), letter=st.sampled_from("abcXYZ019-_"))
def test_any_mistyped_letter_is_noticed(position: int, letter: str) -> None:
    text = encode(TOKEN)
    at = len("shj_") + position % (len(text) - len("shj_"))
    changed = text[:at] + letter + text[at + 1 :]
    with contextlib.suppress(InvalidInput):
        assert decode(changed) == TOKEN  # the last letter has bits that carry nothing


@given(st.text(max_size=300))
def test_any_text_is_a_token_or_a_clear_refusal(text: str) -> None:
    for candidate in (text, "shj_" + text):
        with pytest.raises(InvalidInput):
            decode(candidate)


@pytest.mark.parametrize(
    "change",
    [{"fleet": "Ac me"}, {"enrolment_addresses": ()}, {"secret": ""}, {"enrolment_addresses": ("nowhere",)}],
)
def test_what_cannot_be_a_token_is_not_encoded(change: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput):
        encode(JoinToken(**{**vars(TOKEN), **change}))


def test_the_one_name() -> None:
    assert tokens.server_name("acme") == "controller.acme.shoal.internal"
