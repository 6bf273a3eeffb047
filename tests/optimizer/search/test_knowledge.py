"""What jobs learn is added to the keeper's file once, and no broken file stops a search."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from shoal_optimizer.search import knowledge
from shoal_optimizer.search.kernels import Kernel
from shoal_optimizer.search.knowledge import Knowledge
from shoal_optimizer.search.prior import Key

KEY = Key("static", "onnx", "onnxruntime", "avx2", "dense")
NETWORK = (Kernel("gemm", (1, 64), (1, 10), macs=640, weight_bytes=2560, reads=64),)


def learned(folder: Path, job: str) -> Path:
    known = Knowledge()
    known.learned_priors.observe(KEY, 0.5)
    known.learned_latency.observe("here", "onnxruntime", NETWORK, 1.5)
    path = folder / f"{job}.json"
    known.write_learned(path, job)
    return path


def test_each_job_is_added_once(tmp_path: Path) -> None:
    keeper = tmp_path / "kept" / "knowledge.json"
    first = learned(tmp_path, "o-1")
    assert knowledge.merge(keeper, first) and not knowledge.merge(keeper, first)
    assert knowledge.merge(keeper, learned(tmp_path, "o-2"))
    found = Knowledge.read(keeper)
    ratio = found.priors.get(KEY)
    assert ratio is not None and ratio.n == 2
    assert len(found.latency) >= 1 and len(found.learned_latency) == 0 and len(found.learned_priors) == 0


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"schema": 99}', b'{"schema": 1, "latency": 3}'])
def test_a_broken_file_is_no_knowledge(content: bytes, tmp_path: Path) -> None:
    keeper = tmp_path / "knowledge.json"
    keeper.write_bytes(content)
    assert len(Knowledge.read(keeper).priors) == 0
    assert knowledge.merge(keeper, learned(tmp_path, "o-1"))
    assert json.loads(keeper.read_bytes())["jobs"] == ["o-1"]
    assert not knowledge.merge(keeper, tmp_path / "missing.json")
