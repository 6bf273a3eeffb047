"""LiteRT: what the conformance class does not say."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from shoal_agent import profile, runtimes
from shoal_agent.runtimes.base import Options
from shoal_agent.runtimes.golden import check_golden
from shoal_agent.serving.describe import platform_of
from shoal_protos.errors import InvalidInput
from shoal_protos.v1 import profile_pb2
from tests.agent import bundles, tflite

if importlib.util.find_spec("ai_edge_litert") is None:
    pytest.skip("ai-edge-litert is not installed", allow_module_level=True)


def test_xnnpack_runs_the_model_unless_it_is_switched_off(tmp_path: Path) -> None:
    bundle, runtime = tflite.bundle(tmp_path), runtimes.find("litert")
    batch = bundles.images(3)
    for value, provider in (("1", "XNNPACK"), ("0", "CPU")):
        with runtime.load(bundle, Options(extra={"xnnpack": value})) as instance:
            assert instance.facts().provider == provider
            found = instance.run({"image": batch})["logits"]
            np.testing.assert_allclose(found, bundles.expected(batch), atol=1e-4)


def test_an_unknown_option_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="no option 'gpu'"):
        runtimes.find("litert").load(tflite.bundle(tmp_path), Options(extra={"gpu": "1"}))


@pytest.mark.parametrize("xnnpack", ["1", "0"])
def test_int8_answers_like_the_original(tmp_path: Path, xnnpack: str) -> None:
    bundle = tflite.int8_bundle(tmp_path)
    with runtimes.find("litert").load(bundle, Options(extra={"xnnpack": xnnpack})) as instance:
        report = check_golden(bundle, instance)
        found = instance.run({"image": bundles.images(64)})["logits"]
    assert report.agreement >= 0.9
    wanted = bundles.expected(bundles.images(64))
    assert np.abs(found - wanted).max() < 0.05 * np.abs(wanted).max()


def test_weights_that_are_made_float_first_are_no_int8(tmp_path: Path) -> None:
    bundle = bundles.write(
        tmp_path, {tflite.FILE: tflite.weight_only_model()}, runtime="litert", precision="int8"
    )
    with runtimes.find("litert").load(bundle) as instance:
        assert instance.facts().int8_share == 0.0


def test_int8_weights_with_float_inputs_are_int8(tmp_path: Path) -> None:
    """Dynamic int8: the kernel quantizes its inputs itself."""
    bundle = bundles.write(
        tmp_path, {tflite.FILE: tflite.weight_only_model(dynamic=True)}, runtime="litert", precision="int8"
    )
    with runtimes.find("litert").load(bundle) as instance:
        assert instance.facts().int8_share == 1.0
        assert not math.isnan(float(instance.run({"image": bundles.images(5)})["logits"].sum()))


def test_a_wrong_dtype_is_refused_and_the_next_request_is_answered(tmp_path: Path) -> None:
    batch = bundles.images(2)
    with runtimes.find("litert").load(tflite.bundle(tmp_path)) as instance:
        with pytest.raises(InvalidInput, match="litert refused the request"):
            instance.run({"image": batch.astype(np.float32)})
        found = instance.run({"image": batch})["logits"]
    np.testing.assert_allclose(found, bundles.expected(batch), atol=1e-4)


def test_names_come_from_the_tensors_where_the_file_has_no_signature(tmp_path: Path) -> None:
    content = tflite.image_model(named=False)
    bundle = bundles.write(tmp_path, {tflite.FILE: content}, runtime="litert")
    with pytest.raises(InvalidInput, match="outputs are \\['sums'\\]"):
        runtimes.find("litert").load(bundle)


def test_the_class_and_the_platform_name_it(tmp_path: Path) -> None:
    assert "litert" in profile.runtime_versions()
    found = profile_pb2.Profile(
        architecture="aarch64",
        isa_features=["neon"],
        cores=4,
        runtimes=profile.installed_runtimes(["litert"]),
    )
    assert profile.class_of(found) == "aarch64.neon.4c+litert"
    assert found.runtimes[0].version == runtimes.find("litert").version()
    loaded = cast(Any, SimpleNamespace(bundle=tflite.bundle(tmp_path)))
    assert platform_of(loaded) == "litert_tflite"
