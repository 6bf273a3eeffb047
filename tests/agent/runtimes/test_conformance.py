"""One class over every runtime: what the probe, the bench and the server rely on."""

from __future__ import annotations

import builtins
import dataclasses
import importlib.util
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shoal_agent import runtimes
from shoal_agent.runtimes import base
from shoal_agent.runtimes.base import Options
from shoal_agent.runtimes.golden import check_golden, example_inputs, golden_cases
from shoal_protos.bundle import Bundle, Signature, TensorSpec, blob_path
from shoal_protos.errors import InvalidInput, MissingExtra, Unavailable, Unsupported
from tests.agent import bundles, tflite

HAS_LITERT = importlib.util.find_spec("ai_edge_litert") is not None
needs_litert = pytest.mark.skipif(not HAS_LITERT, reason="ai-edge-litert is not installed")


@pytest.fixture(
    params=[
        "onnxruntime",
        "openvino",
        "openvino-ir",
        pytest.param("litert", marks=needs_litert),
        pytest.param("litert-single", marks=needs_litert),
    ]
)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def make(kind: str, folder: Path, **more: Any) -> Bundle:
    if kind.startswith("litert"):
        return tflite.bundle(folder, single=kind == "litert-single", **more)
    if kind == "openvino-ir":
        return bundles.ir_bundle(folder, **more)
    return bundles.onnx_bundle(folder, runtime=kind, **more)


class TestRuntime:
    def test_it_reproduces_the_reference(self, kind: str, tmp_path: Path) -> None:
        bundle = make(kind, tmp_path)
        with runtimes.find(bundle.config.runtime.name).load(bundle) as instance:
            for count in (1, 3, 1, 17):
                batch = bundles.images(count)
                found = instance.run({"image": batch})["logits"]
                np.testing.assert_allclose(found, bundles.expected(batch), atol=1e-4)
                assert found.dtype == np.float32

    def test_outputs_belong_to_the_caller(self, kind: str, tmp_path: Path) -> None:
        bundle = make(kind, tmp_path)
        with runtimes.find(bundle.config.runtime.name).load(bundle) as instance:
            first = instance.run({"image": bundles.images(2, 1)})["logits"]
            kept = first.copy()
            instance.run({"image": bundles.images(2, 2)})
            np.testing.assert_array_equal(first, kept)
            first[:] = 0  # writable

    def test_it_takes_read_only_views_of_request_bytes(self, kind: str, tmp_path: Path) -> None:
        bundle = make(kind, tmp_path)
        batch = bundles.images(2)
        view = np.frombuffer(b"x" + batch.tobytes(), np.uint8, offset=1).reshape(batch.shape)
        with runtimes.find(bundle.config.runtime.name).load(bundle) as instance:
            found = instance.run({"image": view})["logits"]
            np.testing.assert_allclose(found, bundles.expected(batch), atol=1e-4)

    def test_threads_may_share_an_instance(self, kind: str, tmp_path: Path) -> None:
        bundle = make(kind, tmp_path)
        batches = [bundles.images(1 + seed % 3, seed) for seed in range(40)]
        with (
            runtimes.find(bundle.config.runtime.name).load(bundle) as instance,
            ThreadPoolExecutor(4) as pool,
        ):
            answers = pool.map(lambda batch: instance.run({"image": batch})["logits"], batches)
            for batch, found in zip(batches, answers, strict=True):
                np.testing.assert_allclose(found, bundles.expected(batch), atol=1e-4)

    def test_facts(self, kind: str, tmp_path: Path) -> None:
        bundle = make(kind, tmp_path)
        runtime = runtimes.find(bundle.config.runtime.name)
        with runtime.load(bundle, Options(threads=2)) as instance:
            facts = instance.facts()
        assert facts.runtime == runtime.name
        assert facts.version == runtime.version()
        assert facts.threads == 2
        assert math.isnan(facts.int8_share)  # nothing is promised

    def test_golden_cases_pass_and_a_wrong_model_fails_them(self, kind: str, tmp_path: Path) -> None:
        good = make(kind, tmp_path / "good")
        bad = make(kind, tmp_path / "bad", seed=1, golden=bundles.image_golden(0))
        runtime = runtimes.find(good.config.runtime.name)
        with runtime.load(good) as instance:
            report = check_golden(good, instance)
        assert report.ok
        assert report.agreement == 1.0
        assert report.max_abs_error < 1e-3
        with runtime.load(bad) as instance:
            assert not check_golden(bad, instance).ok

    def test_a_closed_instance_says_so(self, kind: str, tmp_path: Path) -> None:
        bundle = make(kind, tmp_path)
        instance = runtimes.find(bundle.config.runtime.name).load(bundle)
        instance.close()
        instance.close()
        with pytest.raises(Unavailable, match="unloaded"):
            instance.run({"image": bundles.images(1)})

    @pytest.mark.parametrize("damage", ["garbage", "truncated", "empty"])
    def test_a_hostile_model_file_is_refused_with_the_reason(
        self, kind: str, tmp_path: Path, damage: str
    ) -> None:
        bundle = make(kind, tmp_path)
        data = bundle.model_file.read_bytes()
        broken = {"garbage": b"\x00\xff" * 500, "truncated": data[: len(data) // 2], "empty": b""}[damage]
        bundle.model_file.write_bytes(broken)
        runtime = runtimes.find(bundle.config.runtime.name)
        with pytest.raises(InvalidInput, match=rf"{runtime.name} cannot load|The model's"):
            runtime.load(bundle)

    def test_another_signature_is_refused(self, kind: str, tmp_path: Path) -> None:
        bundle = make(kind, tmp_path)
        runtime = runtimes.find(bundle.config.runtime.name)
        spec = bundles.IMAGE.inputs[0]
        for changed, word in (
            (dataclasses.replace(spec, name="picture"), "picture"),
            (dataclasses.replace(spec, datatype="FP32"), "FP32"),
            (dataclasses.replace(spec, shape=(-1, 9, 8, 1)), r"9, 8, 1"),
        ):
            signature = dataclasses.replace(bundles.IMAGE, inputs=(changed,))
            wrong = dataclasses.replace(
                bundle, config=dataclasses.replace(bundle.config, signature=signature)
            )
            with pytest.raises(InvalidInput, match=word):
                runtime.load(wrong)

    def test_requirements_are_judged_by_what_the_bundle_says(self, kind: str, tmp_path: Path) -> None:
        for need, word in (
            ({"version_min": "9999"}, "9999 or newer"),
            ({"version_max": "1.0"}, "older than 1.0"),
            ({"isa": ("avx1024_dream",)}, "avx1024_dream"),
        ):
            bundle = make(kind, tmp_path / word.split()[0], **need)
            with pytest.raises(Unsupported, match=word):
                runtimes.find(bundle.config.runtime.name).load(bundle)

    def test_a_bundle_of_another_runtime_is_refused(self, kind: str, tmp_path: Path) -> None:
        bundle = make(kind, tmp_path)
        other = "openvino" if bundle.config.runtime.name == "onnxruntime" else "onnxruntime"
        with pytest.raises(Unsupported, match="needs the runtime"):
            runtimes.find(other).load(bundle)

    def test_a_missing_package_names_the_extra(
        self, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        bundle = make(kind, tmp_path)
        name = bundle.config.runtime.name
        real = builtins.__import__

        def without(module: str, *rest: Any, **more: Any) -> Any:
            if module == name or (name == "litert" and module in ("ai_edge_litert", "tflite_runtime")):
                raise ImportError(f"No module named '{name}'", name=name)
            return real(module, *rest, **more)

        monkeypatch.setattr(builtins, "__import__", without)
        with pytest.raises(MissingExtra, match=rf"pip install 'shoal\[{name}\]'"):
            runtimes.find(name).load(bundle)


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino", pytest.param("litert", marks=needs_litert)])
class TestInt8:
    def test_the_share_comes_from_the_optimized_graph(self, runtime: str, tmp_path: Path) -> None:
        if runtime == "litert":
            bundle = tflite.int8_bundle(tmp_path)
        else:
            bundle = bundles.int8_bundle(tmp_path, runtime=runtime)
        with runtimes.find(runtime).load(bundle) as instance:
            assert instance.facts().int8_share == 1.0

    def test_silent_floating_point_is_seen(self, runtime: str, tmp_path: Path) -> None:
        bundle = make(runtime, tmp_path, precision="int8")
        with runtimes.find(runtime).load(bundle) as instance:
            assert instance.facts().int8_share == 0.0


def test_equal_bytes_get_equal_answers_from_variants_of_different_inner_layouts(tmp_path: Path) -> None:
    first, second = bundles.onnx_bundle(tmp_path / "a"), bundles.ir_bundle(tmp_path / "b")
    assert first.config.signature == second.config.signature
    data = bundles.images(5).tobytes()
    answers = []
    for bundle in (first, second):
        spec = bundle.config.signature.inputs[0]
        batch = np.frombuffer(data, np.uint8).reshape(-1, *spec.shape[1:])
        with runtimes.find(bundle.config.runtime.name).load(bundle) as instance:
            answers.append(instance.run({spec.name: batch})["logits"])
    np.testing.assert_allclose(answers[0], answers[1], atol=1e-4)


def test_runtimes_are_found_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {"onnxruntime", "openvino"} | ({"litert"} if HAS_LITERT else set())
    assert {info.name for info in runtimes.installed()} == known
    with pytest.raises(Unsupported, match="no runtime 'abacus'"):
        runtimes.find("abacus")
    monkeypatch.setenv(runtimes.RUNTIMES_VARIABLE, "openvino")
    assert [info.name for info in runtimes.installed()] == ["openvino"]
    with pytest.raises(Unsupported, match="set up without"):
        runtimes.find("onnxruntime")


def test_versions_compare_by_number() -> None:
    assert base.version_key("1.9") < base.version_key("1.32.0")
    assert base.version_key("2026.4.1-22200-abc") == (2026, 4, 1)
    assert base.version_key("1.0.0") == base.version_key("1")
    with pytest.raises(InvalidInput):
        base.version_key("new")


def test_threads_out_of_range_are_refused(tmp_path: Path) -> None:
    bundle = bundles.onnx_bundle(tmp_path)
    with pytest.raises(InvalidInput, match="out of range"):
        runtimes.find("onnxruntime").load(bundle, Options(threads=-1))


class TestGolden:
    def test_inputs_are_made_up_inside_the_declared_range(self, tmp_path: Path) -> None:
        bundle = bundles.onnx_bundle(tmp_path, golden=None)
        assert golden_cases(bundle)[2] == 0
        for inputs in example_inputs(bundle):
            assert inputs["image"].shape == (1, 8, 8, 1)
            assert inputs["image"].max() <= 16

    @pytest.mark.parametrize(
        "golden",
        [
            {"input:image": bundles.images(4)[:, :7], "output:logits": np.zeros((4, 10), np.float32)},
            {"input:image": bundles.images(4), "output:logits": np.zeros((3, 10), np.float32)},
            {"input:image": bundles.images(4)},
            {"input:image": bundles.images(4), "output:other": np.zeros((4, 10), np.float32)},
        ],
    )
    def test_cases_that_do_not_fit_are_refused(self, tmp_path: Path, golden: dict[str, Any]) -> None:
        bundle = bundles.onnx_bundle(tmp_path, golden=golden)
        with pytest.raises(InvalidInput):
            golden_cases(bundle)

    def test_a_pickle_is_refused(self, tmp_path: Path) -> None:
        bundle = bundles.onnx_bundle(tmp_path)
        path = blob_path(bundle.path, bundle.manifest.layer("golden.npz").digest)
        with path.open("wb") as stream:
            np.savez(stream, **{"input:image": np.asarray([{"a": 1}], dtype=object)})  # type: ignore[arg-type]
        with pytest.raises(InvalidInput, match="not a readable"):
            golden_cases(bundle)

    def test_outputs_that_are_no_classes_need_the_tolerance(self, tmp_path: Path) -> None:
        signature = Signature(
            inputs=(TensorSpec("x", "FP32", (-1, 64)),), outputs=(TensorSpec("y", "FP32", (-1, 10)),)
        )
        inputs = np.random.default_rng(0).normal(size=(4, 64)).astype(np.float32)
        plain = bundles.write(
            tmp_path / "plain",
            {"model.onnx": bundles.vector_graph().SerializeToString()},
            signature=signature,
        )
        with runtimes.find("onnxruntime").load(plain) as instance:
            right = instance.run({"x": inputs})["y"]
            for shift, ok in ((0.0, True), (0.5, False)):
                bundle = bundles.write(
                    tmp_path / str(shift),
                    {"model.onnx": bundles.vector_graph().SerializeToString()},
                    signature=signature,
                    golden={"input:x": inputs, "output:y": right + np.float32(shift)},
                )
                assert check_golden(bundle, instance).ok is ok


def test_a_provider_that_this_machine_lacks_is_refused_and_the_cpu_is_the_default() -> None:
    options = Options(2, {"provider": "GPU.7", "session.x": "1"})
    with pytest.raises(Unsupported, match=r"cannot compute on GPU\.7 here.*It has CPU"):
        options.provider("CPU", ("CPU",))
    assert options.provider("CPU", ("CPU", "GPU.7")) == "GPU.7"
    assert options.passed == {"session.x": "1"} and Options().provider("CPU", ()) == "CPU"
