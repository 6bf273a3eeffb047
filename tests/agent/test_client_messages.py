"""What the client reads of answers' headers, and what it may keep of them."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from shoal_agent import imaging
from shoal_agent.client import _corners, messages


def answer(request_id: str, *, model: str = "m", data: list[float] | None = None) -> bytes:
    output: dict[str, Any] = {"name": "y", "datatype": "FP32", "shape": [1, 2]}
    output |= {"data": data} if data else {"parameters": {"binary_data_size": 8}}
    message: dict[str, Any] = {"model_name": model, "model_version": "1"}
    message |= {"id": request_id} if request_id else {}
    return json.dumps({**message, "outputs": [output]}, separators=(",", ":")).encode()


@pytest.mark.parametrize("request_id", ["a-1", "a-2", "", 'quo"te', "a" * 300])
def test_a_header_known_or_new_reads_as_json(request_id: str) -> None:
    for model in ("m", "n", 'back\\slash"'):
        text = answer(request_id, model=model)
        for _ in range(2):
            assert messages._header(text) == json.loads(text)


def test_values_in_json_are_read_each_time() -> None:
    for value in (1.0, 2.0):
        text = answer("x", data=[value, 0.0])
        assert messages._header(text)["outputs"][0]["data"] == [value, 0.0]


def test_an_id_deeper_inside_stays_there() -> None:
    text = b'{"model_name":"m","model_version":"1","parameters":{"id":"x","a":1},"outputs":[]}'
    assert messages._header(text) == json.loads(text)


def test_what_is_kept_is_bounded() -> None:
    for number in range(3 * messages._MAX_HEADERS):
        messages._header(answer("x", model=f"m{number}"))
    assert len(messages._headers) <= messages._MAX_HEADERS


def test_few_boxes_lie_where_many_lie() -> None:
    random = np.random.default_rng(3)
    for _ in range(50):
        size = (int(random.integers(1, 900)), int(random.integers(1, 900)))
        scale = (float(random.uniform(0.1, 3)), float(random.uniform(0.1, 3)))
        offset = (float(random.integers(-50, 50)), float(random.integers(-50, 50)))
        placed = imaging.Placed(np.zeros((240, 320, 3), np.uint8), scale, offset, size)
        boxes = random.uniform(-0.2, 1.2, (5, 4)).astype(np.float32)
        assert _corners(boxes, placed) == placed.to_picture(boxes).tolist()
