from __future__ import annotations

import base64
import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal_agent import bench
from shoal_agent.bench import Budget, execute, median_interval, quantile_interval, time_bundles, winner
from shoal_protos.bundle import Bundle, blob_path, digest_of
from shoal_protos.v1.desired_pb2 import TRIAL_KIND_OUTPUTS, TRIAL_KIND_TIMING, Trial
from shoal_protos.v1.telemetry_pb2 import TrialResult
from tests.agent import bundles

QUICK = Budget(seconds=0.1, round_seconds=0.002, warm_up_seconds=0.02)


def put(store: Path, arrays: dict[str, bundles.Array]) -> str:
    data = bundles.npz(arrays)
    digest = digest_of(data)
    blob_path(store, digest).write_bytes(data)
    return digest


def test_a_much_slower_bundle_loses(tmp_path: Path) -> None:
    fast = bundles.vector_bundle(tmp_path / "fast")
    slow = bundles.vector_bundle(tmp_path / "slow", width=1024, depth=6)
    result = time_bundles(fast, slow, budget=QUICK)
    assert result.winner == "candidate"
    assert result.ratio_low <= result.ratio <= result.ratio_high < 1
    assert result.candidate.rounds == result.incumbent.rounds >= bench.MIN_ROUNDS
    for series in (result.candidate, result.incumbent):
        assert 0 < series.p50_low_ms <= series.p50_ms <= series.p50_high_ms
        assert series.p50_ms <= series.p95_ms
        assert series.cpu_ms > 0
    assert time_bundles(slow, fast, budget=QUICK).winner == "incumbent"


def test_alone_there_is_no_winner(tmp_path: Path) -> None:
    result = time_bundles(bundles.int8_bundle(tmp_path), budget=QUICK)
    assert result.winner == "unmeasured"
    assert math.isnan(result.ratio)
    assert not result.HasField("incumbent")
    assert result.int8_share == 1.0


@pytest.mark.parametrize(
    ("ratio", "low", "high", "expected"),
    [
        (0.5, 0.4, 0.6, "candidate"),
        (1.5, 1.4, 1.6, "incumbent"),
        (0.98, 0.97, 0.99, "inconclusive"),  # certain, but no more than two loads of one file differ
        (0.8, 0.5, 1.1, "inconclusive"),
        (1.2, 0.9, 1.5, "inconclusive"),
    ],
)
def test_inside_the_noise_nobody_wins(ratio: float, low: float, high: float, expected: str) -> None:
    assert winner(ratio, low, high) == expected


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=60))
def test_a_medians_interval_holds_the_median(values: list[float]) -> None:
    low, high = median_interval(values)
    assert low <= float(np.median(values)) <= high


def test_a_medians_interval_has_its_confidence() -> None:
    random = np.random.default_rng(0)
    hits = 0
    for _ in range(2000):
        low, high = median_interval(random.normal(size=15).tolist())
        hits += low <= 0 <= high
    assert 0.94 <= hits / 2000 <= 0.99


def test_quantiles_resample_whole_rounds() -> None:
    random = np.random.default_rng(0)
    steady = [[1.0] * 20 for _ in range(20)]
    assert quantile_interval(steady, 0.5, random) == (1.0, 1.0, 1.0)
    drifting = [[float(round_)] * 20 for round_ in range(20)]
    value, low, high = quantile_interval(drifting, 0.5, random)
    assert low < value < high
    assert high - low > 4  # 400 equal readings a round are one reading, not 400


class TestTrials:
    @pytest.fixture
    def bundle(self, tmp_path: Path) -> Bundle:
        return bundles.onnx_bundle(tmp_path / "store")

    def test_timing_on_the_command_line(
        self, bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        trial = Trial(id="t-1", bundle=bundle.digest, kind=TRIAL_KIND_TIMING, incumbent=bundle.digest)
        argument = base64.b64encode(trial.SerializeToString()).decode()
        store, out = str(bundle.path), str(tmp_path / "out")
        written: list[str] = []
        code = bench.main([argument, "--store", store, "--out", out, "--seconds", "0.1"], written.append)
        assert code == 0
        result = TrialResult.FromString(base64.b64decode(json.loads(written[-1])["result"]))
        assert result.ok
        assert result.trial == "t-1"
        assert result.timing.candidate.runs > 0
        assert {"runtime_version", "governor", "load", "threads", "cores"} <= set(result.context)

    def test_outputs_are_the_models_own_in_order(self, bundle: Bundle, tmp_path: Path) -> None:
        batch = bundles.images(70)
        dataset = put(bundle.path, {"image": batch})
        trial = Trial(id="t", bundle=bundle.digest, kind=TRIAL_KIND_OUTPUTS, dataset=dataset)
        result = execute(trial, bundle.path, tmp_path / "out")
        assert result.ok, result.error
        path = tmp_path / "out" / "outputs.npz"
        assert digest_of(path.read_bytes()) == result.outputs_blob
        with np.load(path) as archive:
            np.testing.assert_allclose(archive["logits"], bundles.expected(batch), atol=1e-4)

    def test_what_cannot_run_is_a_result_with_the_reason(self, bundle: Bundle, tmp_path: Path) -> None:
        store, out = bundle.path, tmp_path / "out"
        small = put(store, {"image": bundles.images(40)})
        wrong = put(store, {"picture": bundles.images(4)})
        digest, kind = bundle.digest, TRIAL_KIND_OUTPUTS
        for trial, word in (
            (Trial(bundle=digest, kind=kind, dataset=small, max_bytes=100), "exceed 100 bytes"),
            (Trial(bundle=digest, kind=kind, dataset=wrong), "no input 'picture'"),
            (Trial(bundle=digest, kind=kind, dataset="sha256:" + "0" * 64), "not a readable"),
            (Trial(bundle="sha256:" + "0" * 64, kind=TRIAL_KIND_TIMING), "missing"),
            (Trial(bundle=bundle.digest), "no trial of kind"),
        ):
            result = execute(trial, store, out, QUICK)
            assert not result.ok
            assert word in result.error
        assert not (out / "outputs.npz").exists()

    def test_an_argument_that_is_no_trial_is_refused(self, tmp_path: Path) -> None:
        assert bench.main(["%%%", "--store", str(tmp_path), "--out", str(tmp_path)]) == 2


def test_an_emulator_answers_at_once_that_it_cannot_time(tmp_path: Path) -> None:
    bundle = bundles.vector_bundle(tmp_path)
    trial = Trial(id="t", bundle=bundle.digest, kind=TRIAL_KIND_TIMING, incumbent="sha256:" + "0" * 64)
    result = execute(trial, bundle.path, tmp_path / "out", emulated=True)
    assert result.ok and result.context["emulated"] == "yes"
    assert result.timing.winner == "unmeasured" and math.isnan(result.timing.ratio)
    assert result.timing.candidate.runs == 0  # not even started


def test_outputs_of_an_emulator_count_and_are_marked(tmp_path: Path) -> None:
    bundle = bundles.vector_bundle(tmp_path)
    spec = bundle.config.signature.inputs[0]
    inputs = np.zeros((3, *spec.shape[1:]), np.float32)
    trial = Trial(
        id="t", bundle=bundle.digest, kind=TRIAL_KIND_OUTPUTS, dataset=put(bundle.path, {spec.name: inputs})
    )
    result = execute(trial, bundle.path, tmp_path / "out", emulated=True)
    assert result.ok and result.outputs_blob and result.context["emulated"] == "yes"
    assert "emulated" not in execute(trial, bundle.path, tmp_path / "out", emulated=False).context
