from __future__ import annotations

import contextlib
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal_agent.runtimes.tensors import DTYPES
from shoal_agent.serving.wire import Codec, classify, pack_text, view_of
from shoal_protos.bundle import Signature, TensorSpec
from shoal_protos.errors import ShoalError
from tests.agent import bundles
from tests.agent.serving.raw import infer_body

TWO = Signature(
    inputs=(TensorSpec("a", "UINT8", (-1, 3)), TensorSpec("b", "FP32", (-1, 2))),
    outputs=(TensorSpec("y", "FP32", (-1, 2)), TensorSpec("z", "INT64", (-1,))),
)
ids = st.text(max_size=300)


def header(**more: Any) -> dict[str, Any]:
    a, b = np.arange(6, dtype=np.uint8).reshape(2, 3), np.ones((2, 2), np.float32)
    return {
        "inputs": [
            {"name": n, "datatype": t, "shape": list(v.shape), "parameters": {"binary_data_size": v.nbytes}}
            for n, t, v in (("a", "UINT8", a), ("b", "FP32", b))
        ],
        **more,
    }


VALUES = np.arange(6, dtype=np.uint8).tobytes() + np.ones((2, 2), np.float32).tobytes()


@given(st.binary(max_size=400), st.integers(-1, 500))
def test_any_bytes_end_in_a_request_or_a_refusal(body: bytes, length: int) -> None:
    with contextlib.suppress(ShoalError):
        Codec("m", "1", bundles.IMAGE).parse(body, None if length < 0 else length)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@given(st.sampled_from(["name", "datatype", "shape", "data", "parameters"]), json_values)
def test_any_json_value_in_any_field_ends_in_a_request_or_a_refusal(field: str, value: Any) -> None:
    tensor = {"name": "image", "datatype": "UINT8", "shape": [1, 8, 8, 1], "data": [1] * 64, field: value}
    with contextlib.suppress(ShoalError):
        Codec("m", "1", bundles.IMAGE).parse(json.dumps({"inputs": [tensor]}).encode(), None)


@given(ids)
def test_every_id_comes_back_and_changes_nothing_else(request_id: str) -> None:
    codec = Codec("m", "1", bundles.IMAGE)
    batch = bundles.images(1)
    for _ in range(2):  # parsed, then from the cache
        body, size = infer_body(batch, request_id)
        parsed = codec.parse(body, size)
        assert parsed.request_id == request_id
        np.testing.assert_array_equal(parsed.inputs["image"], batch)
        length, pieces = codec.answer(parsed.plan, request_id, {"logits": np.ones((1, 10), np.float32)})
        answer = json.loads(b"".join(pieces)[:length])
        assert answer.get("id", "") == request_id
        assert (answer["model_name"], answer["model_version"]) == ("m", "1")


def test_headers_are_parsed_once_whatever_their_id() -> None:
    codec = Codec("m", "1", bundles.IMAGE)
    plans = set()
    for number in range(20):
        body, size = infer_body(bundles.images(1, number), f"id-{number}")
        plans.add(codec.parse(body, size).plan)
    assert len(plans) == 1
    for number in range(200):
        body, size = infer_body(bundles.images(1), junk=str(number))
        codec.parse(body, size)
    assert len(codec._plans) <= 64


def test_several_inputs_and_outputs_in_any_order() -> None:
    codec = Codec("m", "1", TWO)
    text = json.dumps(
        header(
            outputs=[
                {"name": "z", "parameters": {"binary_data": True}},
                {"name": "y", "parameters": {"binary_data": False}},
            ]
        )
    ).encode()
    parsed = codec.parse(text + VALUES, len(text))
    assert parsed.inputs["b"].flags.aligned
    np.testing.assert_array_equal(parsed.inputs["a"], np.arange(6).reshape(2, 3))
    found = {"y": np.zeros((2, 2), np.float32), "z": np.asarray([3, 4])}
    size, pieces = codec.answer(parsed.plan, "", found)
    body = b"".join(pieces)
    z, y = json.loads(body[:size])["outputs"]
    assert z["parameters"]["binary_data_size"] == 16
    assert y["data"] == [0.0] * 4
    assert np.frombuffer(body[size:], np.int64).tolist() == [3, 4]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"inputs": header()["inputs"][:1]}, "'b' is missing"),
        ({"inputs": [header()["inputs"][0], {**header()["inputs"][1], "shape": [1, 2]}]}, "announces 16"),
    ],
)
def test_what_is_missing_or_inconsistent_is_named(change: dict[str, Any], words: str) -> None:
    text = json.dumps(header(**change)).encode()
    with pytest.raises(ShoalError, match=words):
        Codec("m", "1", TWO).parse(text + VALUES, len(text))


def test_batches_of_different_sizes_are_refused() -> None:
    changed = header()
    changed["inputs"][1].update(shape=[1, 2], parameters={"binary_data_size": 8})
    text = json.dumps(changed).encode()
    with pytest.raises(ShoalError, match="different batch sizes"):
        Codec("m", "1", TWO).parse(text + VALUES[:-8], len(text))


@pytest.mark.parametrize("name", sorted(DTYPES))
@pytest.mark.parametrize("offset", [0, 1, 3])
def test_views_hold_every_datatype_at_any_offset(name: str, offset: int) -> None:
    values = np.asarray([[0, 1], [1, 0]]).astype(DTYPES[name])
    found = view_of(b"\0" * offset + values.tobytes(), DTYPES[name], (2, 2), offset)
    np.testing.assert_array_equal(found, values)
    assert found.flags.aligned
    assert found.dtype == values.dtype


def test_a_byte_that_is_no_bool_becomes_one() -> None:
    assert view_of(b"\x07\x00", DTYPES["BOOL"], (2,)).tobytes() == b"\x01\x00"


def test_classes_are_packed_as_the_protocol_says() -> None:
    names = classify(np.asarray([[0.5, 2.0, 1.0]], np.float32), 2, ["a", "b"])
    assert names.tolist() == [["2.000000:1:b", "1.000000:2"]]
    assert pack_text(names)[:4] == b"\x0c\0\0\0"
