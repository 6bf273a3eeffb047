"""One conformance class for every meter; what local and trial meters add."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from shoal_optimizer.jobspec import ProfileClass
from shoal_optimizer.local_meter import LocalMeter
from shoal_optimizer.meter import BundleRef, Measurement, Meter, Pending, TrialMeter
from shoal_protos.bundle import BundleConfig, RuntimeNeed, Signature, TensorSpec, write_bundle
from shoal_protos.errors import InvalidInput
from shoal_protos.v1.telemetry_pb2 import Series, TrialResult

HERE = ProfileClass("here+onnxruntime", ("avx2",), {"onnxruntime": "1"}, local=True)
ALSO_HERE = ProfileClass("here+onnxruntime+openvino", ("avx2",), {"onnxruntime": "1"}, local=True)
ELSEWHERE = ProfileClass("aarch64+onnxruntime", ("neon",), {"onnxruntime": "1"}, local=False)


def make_bundle(folder: Path, factor: float = 2.0) -> BundleRef:
    graph = helper.make_graph(
        [helper.make_node("Mul", ["x", "factor"], ["y"])],
        "double",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 4])],
        [helper.make_tensor("factor", TensorProto.FLOAT, [], [factor])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    signature = Signature((TensorSpec("x", "FP32", (-1, 4)),), (TensorSpec("y", "FP32", (-1, 4)),))
    onnx.checker.check_model(model)
    config = BundleConfig(signature, RuntimeNeed("onnxruntime", "model.onnx"))
    return BundleRef(write_bundle(folder, config, {"model.onnx": model.SerializeToString()}), folder)


@pytest.fixture
def bundle(tmp_path: Path) -> BundleRef:
    return make_bundle(tmp_path / "candidate")


def answer() -> bytes:
    result = TrialResult(trial="x", ok=True, context={"governor": "performance"})
    result.timing.candidate.CopyFrom(
        Series(
            rounds=20, runs=400, p50_ms=1.0, p50_low_ms=0.9, p50_high_ms=1.1,
            p95_ms=2.0, p95_low_ms=1.8, p95_high_ms=2.2, rss_bytes=5_000_000,
        )
    )  # fmt: skip
    result.timing.incumbent.CopyFrom(result.timing.candidate)
    result.timing.ratio, result.timing.ratio_low, result.timing.ratio_high = 0.5, 0.45, 0.55
    result.timing.winner, result.timing.int8_share = "candidate", float("nan")
    return result.SerializeToString()


def in_process(tmp_path: Path) -> Meter:
    return LocalMeter(in_process=True, seconds=0.1)


def by_child(tmp_path: Path) -> Meter:
    return LocalMeter(seconds=0.1, scratch=tmp_path)


class EveryAnswer(dict[str, bytes | None]):
    """The answers of a fleet in which every trial was answered."""

    def __contains__(self, key: object) -> bool:
        return True

    def __missing__(self, key: str) -> bytes:
        return answer()


def by_trial(tmp_path: Path) -> Meter:
    return TrialMeter("o-1", lambda fields: None, EveryAnswer())


@pytest.fixture(params=[in_process, by_child, by_trial])
def measuring(request: pytest.FixtureRequest, tmp_path: Path) -> Meter:
    made: Callable[[Path], Meter] = request.param
    return made(tmp_path)


class TestMeter:
    def test_timing_has_intervals_and_context(self, measuring: Meter, bundle: BundleRef) -> None:
        found = measuring.measure(bundle, HERE)
        assert isinstance(found, Measurement) and found.status == "measured"
        assert found.bundle == bundle.digest and found.profile_class == HERE.name
        for figure in (found.latency_p50, found.latency_p95):
            assert figure is not None and 0 < figure.low <= figure.value <= figure.high and figure.n > 1
        assert found.context

    def test_against_an_incumbent(self, measuring: Meter, bundle: BundleRef, tmp_path: Path) -> None:
        found = measuring.measure(bundle, HERE, incumbent=make_bundle(tmp_path / "incumbent", 3.0))
        assert isinstance(found, Measurement)
        assert found.ratio is not None and found.winner in ("candidate", "incumbent", "inconclusive")

    def test_the_same_question_has_the_same_answer(self, measuring: Meter, bundle: BundleRef) -> None:
        assert measuring.measure(bundle, HERE) == measuring.measure(bundle, HERE)

    def test_outputs_without_a_data_set_are_refused(self, measuring: Meter, bundle: BundleRef) -> None:
        with pytest.raises(InvalidInput, match="data set"):
            measuring.measure(bundle, HERE, "outputs")

    def test_it_survives_json(self, measuring: Meter, bundle: BundleRef) -> None:
        found = measuring.measure(bundle, HERE)
        assert isinstance(found, Measurement)
        assert Measurement.from_json(found.to_json()) == found


@pytest.mark.parametrize("made", [in_process, by_child])
def test_another_class_is_unmeasured(
    made: Callable[[Path], Meter], tmp_path: Path, bundle: BundleRef
) -> None:
    found = made(tmp_path).measure(bundle, ELSEWHERE)
    assert isinstance(found, Measurement)
    assert (found.status, found.latency_p95, found.memory) == ("unmeasured", None, None)


def test_local_classes_share_one_measurement(bundle: BundleRef) -> None:
    known: dict[str, Any] = {}
    local = LocalMeter(in_process=True, seconds=0.05, known=known)
    first, second = local.measure(bundle, HERE), local.measure(bundle, ALSO_HERE)
    assert len(known) == 1
    assert isinstance(first, Measurement) and isinstance(second, Measurement)
    assert first.latency_p95 == second.latency_p95 and second.profile_class == ALSO_HERE.name


def test_a_child_measures_memory_and_outputs(tmp_path: Path, bundle: BundleRef) -> None:
    local = by_child(tmp_path)
    timing = local.measure(bundle, HERE)
    assert isinstance(timing, Measurement) and timing.memory is not None and timing.memory.value > 0
    data = tmp_path / "inputs.npz"
    np.savez(data, x=np.ones((3, 4), np.float32))
    outputs = local.measure(bundle, HERE, "outputs", dataset=data)
    assert isinstance(outputs, Measurement) and outputs.status == "measured"
    with np.load(outputs.outputs) as stored:
        assert (stored["y"] == 2).all() and stored["y"].shape == (3, 4)


def test_a_model_that_fails_is_no_data_with_its_reason(tmp_path: Path) -> None:
    signature = Signature((TensorSpec("x", "FP32", (-1, 4)),), (TensorSpec("y", "FP32", (-1, 4)),))
    config = BundleConfig(signature, RuntimeNeed("onnxruntime", "model.onnx"))
    broken = BundleRef(write_bundle(tmp_path / "b", config, {"model.onnx": b"no model"}), tmp_path / "b")
    for local in (in_process(tmp_path), by_child(tmp_path)):
        found = local.measure(broken, HERE)
        assert isinstance(found, Measurement)
        assert found.status == "no data" and found.reason


def test_a_truncated_bundle_is_refused(tmp_path: Path, bundle: BundleRef) -> None:
    with pytest.raises(Exception, match="missing"):
        by_child(tmp_path).measure(BundleRef("sha256:" + "0" * 64, bundle.layout), HERE)


class TestTrialMeter:
    def test_it_asks_once_and_is_pending(self, bundle: BundleRef) -> None:
        asked: list[Mapping[str, Any]] = []
        fleet = TrialMeter("o-1", asked.append, {})
        first, second = fleet.measure(bundle, ELSEWHERE), fleet.measure(bundle, ELSEWHERE)
        assert isinstance(first, Pending) and first == second
        assert [a["id"] for a in asked] == [first.trial]
        assert asked[0]["class"] == ELSEWHERE.name and asked[0]["kind"] == "timing"

    def test_the_answer_comes_with_the_next_start(self, bundle: BundleRef) -> None:
        asked: list[Mapping[str, Any]] = []
        pending = TrialMeter("o-1", asked.append, {}).measure(bundle, ELSEWHERE)
        assert isinstance(pending, Pending)
        found = TrialMeter("o-1", asked.append, {pending.trial: answer()}).measure(bundle, ELSEWHERE)
        assert isinstance(found, Measurement) and found.source == "trial" and len(asked) == 1
        assert found.memory is not None and found.memory.value == 5_000_000 and found.int8_share is None

    def test_an_expired_trial_is_no_data(self, bundle: BundleRef) -> None:
        pending = TrialMeter("o-1", lambda f: None, {}).measure(bundle, HERE)
        assert isinstance(pending, Pending)
        found = TrialMeter("o-1", lambda f: None, {pending.trial: None}).measure(bundle, HERE)
        assert isinstance(found, Measurement) and found.status == "no data" and found.latency_p95 is None

    def test_an_emulated_device_has_answers_and_no_times(self, bundle: BundleRef, tmp_path: Path) -> None:
        data = tmp_path / "inputs.npz"
        np.savez(data, x=np.ones((3, 4), np.float32))
        timing, outputs = (
            TrialResult(trial="x", ok=True, context={"emulated": "yes"}, outputs_blob=blob)
            for blob in ("", "sha256:" + "a" * 64)
        )
        timing.timing.winner = "unmeasured"
        (tmp_path / f"{'a' * 64}.npz").write_bytes(data.read_bytes())
        answers: dict[str, bytes | None] = {}
        asking = TrialMeter("o-1", lambda f: None, answers, outputs=tmp_path)
        first = asking.measure(bundle, ELSEWHERE)
        second = asking.measure(bundle, ELSEWHERE, "outputs", dataset=data)
        assert isinstance(first, Pending) and isinstance(second, Pending)
        answers |= {first.trial: timing.SerializeToString(), second.trial: outputs.SerializeToString()}
        timed = asking.measure(bundle, ELSEWHERE)
        assert isinstance(timed, Measurement) and timed.latency_p95 is None and "emulated" in timed.reason
        assert (timed.status, timed.source, timed.winner) == (
            "unmeasured",
            "unmeasured (emulated)",
            "unmeasured",
        )
        answered = asking.measure(bundle, ELSEWHERE, "outputs", dataset=data)
        assert isinstance(answered, Measurement)
        assert (answered.status, answered.source) == ("measured", "emulated")
