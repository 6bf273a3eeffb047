from __future__ import annotations

import base64
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from shoal_agent.update import probe
from shoal_protos.bundle import Bundle
from shoal_protos.v1.agents_pb2 import ProbeReport
from shoal_protos.v1.desired_pb2 import Envelope, PlacementSettings
from tests.agent import bundles


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "WARM_UP_S", 0.01)
    monkeypatch.setattr(probe, "MEASURE_S", 0.05)


@pytest.mark.parametrize("make", [bundles.onnx_bundle, bundles.ir_bundle, bundles.int8_bundle])
def test_a_good_bundle_passes_with_its_figures(make: object, tmp_path: Path) -> None:
    bundle: Bundle = make(tmp_path)  # type: ignore[operator]
    report, reason = probe.probe(bundle, PlacementSettings())
    assert reason == ""
    assert report.ok
    assert 0 < report.latency_p50_ms <= report.latency_p95_ms
    assert report.agreement >= 0.95
    assert report.runs >= probe.MIN_RUNS
    assert report.runtime_version


def test_a_wrong_answer_is_a_golden_mismatch(tmp_path: Path) -> None:
    bundle = bundles.onnx_bundle(tmp_path, seed=1, golden=bundles.image_golden(0))
    report, reason = probe.probe(bundle, PlacementSettings())
    assert (report.ok, reason) == (False, "golden mismatch")
    assert report.agreement < 0.95


def test_silent_floating_point_is_refused(tmp_path: Path) -> None:
    bundle = bundles.onnx_bundle(tmp_path, precision="int8")
    report, reason = probe.probe(bundle, PlacementSettings(promised_int8_share=0.9))
    assert (report.ok, reason) == (False, "int8 share 0 below 0.9")


def test_a_corrupt_model_is_refused_with_the_runtimes_reason(tmp_path: Path) -> None:
    bundle = bundles.onnx_bundle(tmp_path)
    bundle.model_file.write_bytes(b"no model")
    report, reason = probe.probe(bundle, PlacementSettings())
    assert not report.ok
    assert reason.startswith("onnxruntime cannot load")


@pytest.mark.parametrize(
    ("report", "settings", "reason"),
    [
        ({"latency_p95_ms": 12.14}, {"latency_p95_ms": 5.0}, "latency 12.1 ms above 5.0 ms"),
        ({"latency_p95_ms": 12.14}, {"latency_p95_ms": 5.0, "latency_tolerance": 3.0}, ""),
        (
            {"latency_p95_ms": 0.3},
            {"latency_p95_ms": 0.05, "latency_tolerance": 2},
            "latency 0.3 ms above 0.1 ms",
        ),
        ({"memory_bytes": 300 << 20}, {"memory_bytes": 64 << 20}, "memory 300 MiB above 64 MiB"),
        ({"memory_bytes": 70 << 20}, {"memory_bytes": 64 << 20}, ""),
        ({"memory_bytes": 300 << 20}, {}, ""),
    ],
)
def test_the_envelope_is_held(report: dict[str, float], settings: dict[str, float], reason: str) -> None:
    found = ProbeReport(**report)  # type: ignore[arg-type]
    assert probe.judge(found, PlacementSettings(envelope=Envelope(**settings))) == reason  # type: ignore[arg-type]


def test_an_unmeasured_share_keeps_no_promise() -> None:
    report = ProbeReport(int8_share=math.nan)
    promised = PlacementSettings(promised_int8_share=0.5)
    assert probe.judge(report, promised) == "int8 share unmeasured below 0.5"
    assert probe.judge(report, PlacementSettings()) == ""


def test_the_process_prints_one_line(tmp_path: Path) -> None:
    bundle = bundles.onnx_bundle(tmp_path)
    code = "import sys; from shoal_agent.update.probe import main; sys.exit(main(sys.argv[1:]))"
    settings = PlacementSettings(envelope=Envelope(latency_p95_ms=1e-6))
    for option, exit_code, ok in (
        ([], 0, True),
        (["--settings", base64.b64encode(settings.SerializeToString()).decode()], 1, False),
    ):
        command = [sys.executable, "-c", code, "--store", str(bundle.path), "--bundle", bundle.digest]
        done = subprocess.run([*command, *option], capture_output=True, text=True, check=False)
        assert done.returncode == exit_code, done.stderr
        found = json.loads(done.stdout)
        assert found["ok"] is ok
        assert bool(found["reason"]) is not ok
        assert isinstance(found["memory_bytes"], int)
        assert found["int8_share"] is None


def test_a_bundle_that_is_not_there_is_refused(tmp_path: Path) -> None:
    written: list[str] = []
    code = probe.main(["--store", str(tmp_path), "--bundle", "sha256:" + "0" * 64], written.append)
    assert code == 1
    assert "missing" in json.loads(written[0])["reason"]
    assert probe.main(["--store", str(tmp_path), "--settings", "%%"]) == 2


def test_an_emulator_proves_answers_and_claims_no_figures(tmp_path: Path) -> None:
    bundle = bundles.int8_bundle(tmp_path)
    settings = PlacementSettings(
        promised_int8_share=0.9, envelope=Envelope(latency_p95_ms=1e-6, latency_tolerance=1, memory_bytes=1)
    )
    report, reason = probe.probe(bundle, settings, emulated=True)
    assert report.ok and reason == "" and report.unmeasured == "emulated"
    assert math.isnan(report.latency_p95_ms) and report.memory_bytes == 0
    assert report.int8_share == 1 and report.agreement >= 0.95
    wrong = bundles.onnx_bundle(tmp_path / "wrong", seed=1, golden=bundles.image_golden(0))
    report, reason = probe.probe(wrong, PlacementSettings(), emulated=True)
    assert (report.ok, reason) == (False, "golden mismatch")
    floating = bundles.onnx_bundle(tmp_path / "floating", precision="int8")
    report, reason = probe.probe(floating, PlacementSettings(promised_int8_share=0.9), emulated=True)
    assert (report.ok, reason) == (False, "int8 share 0 below 0.9")
