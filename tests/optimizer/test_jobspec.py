"""`job.json` and a job's lines: what is read, what is refused."""

from __future__ import annotations

import base64
import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal_optimizer import jobspec
from shoal_protos.errors import InvalidInput

BASE = Path("/job")
MINIMAL: dict[str, Any] = {"kind": "ingest", "id": "o-1", "source": "src", "task": "digits.py"}


def parse(**changes: Any) -> jobspec.JobSpec:
    return jobspec.parse(json.dumps({**MINIMAL, **changes}), BASE)


def test_a_full_job() -> None:
    spec = parse(
        kind="adapt",
        seed=3,
        threads=2,
        weights="w.pt",
        data="/blobs/data.npz",
        version={"model": "digits", "number": 2},
        objective="minimise size",
        classes=[
            {"name": "c+onnxruntime", "isa": ["avx2"], "runtimes": {"onnxruntime": "1.32.0"}, "local": True}
        ],
        budget={"minutes": 1.5, "trials": 4, "networks": 2},
        trial_results={"t-1": base64.b64encode(b"x").decode(), "t-2": None},
        field={"inputs": "field.bin", "samples": ["s.npz"]},
        recipes=[{"steps": []}],
        incumbents={"c": {"bundle": "sha256:1", "layout": "inc"}},
        something_newer={"ignored": True},
    )
    assert spec.weights == BASE / "w.pt" and spec.data == Path("/blobs/data.npz")
    assert spec.classes[0].runtimes == {"onnxruntime": "1.32.0"} and spec.classes[0].local
    assert spec.budget == jobspec.Budget(1.5, 4, 2)
    assert spec.trial_results == {"t-1": b"x", "t-2": None}
    assert spec.field_data.samples == (BASE / "s.npz",)
    assert spec.incumbents["c"] == jobspec.Incumbent("sha256:1", BASE / "inc")
    assert (spec.model, spec.version) == ("digits", 2)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"kind": "guess"}, "guess"),
        ({"task": 3}, "task"),
        ({"classes": [{}]}, "name"),
        ({"classes": ["x"]}, "classes[0]"),
        ({"budget": {"minutes": 0}}, "minutes"),
        ({"budget": {"minutes": "long"}}, "minutes"),
        ({"trial_results": {"t-1": "no base64!"}}, "t-1"),
        ({"incumbents": {"c": 1}}, "incumbents"),
        ({"threads": True}, "threads"),
    ],
)
def test_bad_fields_are_named(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidInput, match=r"job\.json") as caught:
        parse(**changes)
    assert named in str(caught.value)


@given(st.binary(max_size=200))
def test_any_bytes_give_a_spec_or_a_refusal(data: bytes) -> None:
    with pytest.raises(InvalidInput):
        jobspec.parse(data, BASE)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(
    st.dictionaries(
        st.sampled_from([*MINIMAL, "classes", "budget", "field", "recipes", "version"]), json_values
    )
)
def test_any_json_gives_a_spec_or_a_refusal(changes: dict[str, Any]) -> None:
    with contextlib.suppress(InvalidInput):
        assert isinstance(parse(**changes), jobspec.JobSpec)


def test_lines_go_round_and_hold_no_nan() -> None:
    line = jobspec.event_line("progress", step="plain", share=float("nan"), message="a\nb", path=Path("/x"))
    assert line.count("\n") == 1
    assert jobspec.parse_event(line) == {
        "event": "progress", "step": "plain", "share": None, "message": "a\nb", "path": "/x",
    }  # fmt: skip
    with pytest.raises(InvalidInput):
        jobspec.parse_event("Epoch 1/10")
    with pytest.raises(InvalidInput):
        jobspec.parse_event('{"event": "surprise"}')


def test_missing_job_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"job\.json"):
        jobspec.read(tmp_path)
