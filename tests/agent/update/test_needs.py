from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from shoal_agent.update import needs
from shoal_protos.bundle import open_bundle
from shoal_protos.errors import Unsupported
from shoal_protos.v1 import profile_pb2
from tests.agent.fakes import make_bundle

PROFILE = profile_pb2.Profile(
    isa_features=["avx2"], runtimes=[profile_pb2.Runtime(name="onnxruntime", version="1.22.1+cpu")]
)


@pytest.mark.parametrize(
    ("change", "missing"),
    [
        ({}, ""),
        ({"version_min": "1.22", "version_max": "1.23"}, ""),
        ({"version_min": "1.22.1", "isa": ("avx2",)}, ""),
        ({"name": "openvino"}, "openvino"),
        ({"version_min": "1.22.2"}, "at least 1.22.2"),
        ({"version_max": "1.22.1"}, "below 1.22.1"),
        ({"isa": ("avx2", "avx512_vnni")}, "avx512_vnni"),
    ],
)
def test_needs(tmp_path: Path, change: dict[str, Any], missing: str) -> None:
    config = open_bundle(tmp_path, make_bundle(tmp_path)).config
    config = replace(config, runtime=replace(config.runtime, **change))
    if not missing:
        needs.check(config, PROFILE)
        return
    with pytest.raises(Unsupported, match=missing) as error:
        needs.check(config, PROFILE)
    assert error.value.remedy
