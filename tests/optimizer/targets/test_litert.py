"""The LiteRT target: what it refuses and says without its tools, and what its files are like with them."""

from __future__ import annotations

import dataclasses
import stat
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from shoal_optimizer import jobs, targets
from shoal_optimizer.targets import Calibration, ClassSpec, litert, litert_steps
from shoal_optimizer.targets.litert import LiteRtTarget
from shoal_optimizer.task import Task
from shoal_protos.errors import InvalidInput, Unsupported

needs_tools = pytest.mark.skipif(
    not litert.has_tools(), reason="litert-torch and ai-edge-quantizer are not installed"
)


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine without LiteRT's tools."""
    monkeypatch.setattr(litert, "has_tools", lambda: False)
    monkeypatch.delenv(litert.PYTHON_VARIABLE, raising=False)


def interpreter(folder: Path, script: str) -> str:
    """A program that answers as LiteRT's Python would be asked to: `script` gets its arguments."""
    path = folder / "python"
    path.write_text(f"#!{sys.executable}\nimport sys, pathlib\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


class TestRefusals:
    def test_an_onnx_task_is_told_what_to_do(self, quadrants: Task) -> None:
        with pytest.raises(Unsupported, match="ONNX file") as refused:
            targets.find("litert").export(None, quadrants)
        assert "onnxruntime or openvino" in refused.value.remedy

    def test_other_calibrations_are_refused(self, quadrants: Task) -> None:
        calibration = Calibration(quadrants.required("evaluation").inputs[:4], "entropy")
        with pytest.raises(Unsupported, match="entropy"):
            LiteRtTarget().export(quadrants.original, quadrants, "int8", calibration)

    @pytest.mark.usefixtures("bare")
    def test_missing_tools_are_named_with_the_way_to_get_them(self, quadrants: Task) -> None:
        with pytest.raises(Unsupported, match="litert-torch") as refused:
            LiteRtTarget().export(quadrants.original, quadrants)
        assert "shoal[litert-export]" in refused.value.remedy
        assert litert.PYTHON_VARIABLE in refused.value.remedy

    @pytest.mark.usefixtures("bare")
    def test_without_tools_only_a_class_of_litert_alone_is_served(self) -> None:
        """It gets the refusal; others are not slowed by one for each network."""
        target = LiteRtTarget()
        assert target.serves(ClassSpec.of("c", (), {"litert": "2.3"}))
        assert not target.serves(ClassSpec.of("c", (), {"litert": "2.3", "onnxruntime": "1.32"}))
        assert not target.serves(ClassSpec.of("c", (), {"onnxruntime": "1.32"}))

    def test_a_python_without_the_tools_is_named(
        self, quadrants: Task, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        for path in (interpreter(tmp_path, "sys.exit(1)"), str(tmp_path / "nothing")):
            monkeypatch.setenv(litert.PYTHON_VARIABLE, path)
            with pytest.raises(Unsupported, match=litert.PYTHON_VARIABLE) as refused:
                LiteRtTarget().export(quadrants.original, quadrants)
            assert path in refused.value.remedy

    def test_what_the_tools_say_reaches_the_user(
        self, quadrants: Task, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        script = (
            "if sys.argv[1] == '-c': sys.exit(0)\n"
            "sys.stderr.write('I0000 a log line\\nRuntimeError: no lowering for aten::frob\\n')\n"
            "print('chatter')\n"
            "sys.exit(1)"
        )
        monkeypatch.setenv(litert.PYTHON_VARIABLE, interpreter(tmp_path, script))
        monkeypatch.setattr(litert, "_files", type(litert._files)())
        with pytest.raises(InvalidInput, match="convert the model: RuntimeError: no lowering for aten::frob"):
            LiteRtTarget().export(quadrants.original, quadrants)


def test_a_jobs_clean_environment_keeps_the_way_to_the_tools() -> None:
    kept = jobs.clean_environment({litert.PYTHON_VARIABLE: "/opt/litert/bin/python", "SECRET": "x"})
    assert kept[litert.PYTHON_VARIABLE] == "/opt/litert/bin/python"
    assert "SECRET" not in kept


def test_operations_belong_to_the_part_they_came_from() -> None:
    """Pixels are scaled in float, the last product is the model's though its output has another name."""

    def tensor(name: str) -> Any:
        return SimpleNamespace(name=name.encode())

    names = [
        "serving_default_args_0",
        "x.Pipeline/task.Scale_preprocess;2",
        "x.Pipeline/nn.Sequential_model/nn.Conv2d_0;",
        "x.Pipeline/nn.Sequential_model/nn.ReLU_1;;x.Pipeline/task.Scale_preprocess;3",
        "arith.constant",
        "turned",
        "x.Pipeline/nn.Sequential_model/nn.Linear_7;1",
        "serving_default_output_0_output",
        "x.Pipeline/nn.Softmax_postprocess;",
    ]
    operations = [((0,), 1), ((1, 2, -1), 3), ((3, 4), 5), ((5, 6), 7), ((7,), 8)]
    graph = SimpleNamespace(
        tensors=[tensor(name) for name in names],
        operators=[SimpleNamespace(inputs=i, outputs=(o,)) for i, o in operations],
        inputs=[0],
    )
    assert litert_steps._owners(cast(Any, graph)) == {
        1: "float",
        3: "model",
        5: "model",
        7: "model",
        8: "float",
    }


@needs_tools
class TestFiles:
    def test_both_kinds_of_int8_keep_the_answers_and_run_in_int8(self, quadrants: Task) -> None:
        inputs = quadrants.calibration_data().inputs
        for method in ("minmax", "dynamic"):
            made = LiteRtTarget().export(quadrants.original, quadrants, "int8", Calibration(inputs, method))
            assert made.facts["int8_share"] == 1.0
            assert made.facts["parity_agreement"] > 0.95
            assert made.facts["parity_max"] < 0.2 * made.facts["parity_scale"]
            assert made.facts["tools"]["litert-torch"]
            assert made.runtime.model_file == "model.tflite"
            assert made.runtime.isa == ()

    def test_the_ends_keep_the_endpoints_types_and_pixels_are_scaled_in_float(self, quadrants: Task) -> None:
        from ai_edge_litert.interpreter import Interpreter

        made = LiteRtTarget().export(quadrants.original, quadrants, "int8")
        interpreter = Interpreter(model_content=made.files["model.tflite"])
        runner = interpreter.get_signature_runner()
        assert runner.get_input_details()["pixels"]["dtype"] is np.uint8
        assert list(runner.get_input_details()["pixels"]["shape"]) == [1, 8, 8, 1]
        assert runner.get_output_details()["logits"]["dtype"] is np.float32
        kinds = [operation["op_name"] for operation in interpreter._get_ops_details()]
        assert kinds[:4] == ["CAST", "MUL", "SUB", "QUANTIZE"]
        assert kinds.count("QUANTIZE") == kinds.count("DEQUANTIZE") == 1
        assert kinds.count("CONV_2D") == 3
        assert kinds.count("TRANSPOSE") == 1  # before the flattening; convolutions take NHWC as it comes

    @pytest.mark.slow
    def test_equal_models_give_equal_bytes_in_another_process(
        self, quadrants: Task, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        first = LiteRtTarget().export(quadrants.original, quadrants, "int8")
        monkeypatch.setattr(litert, "_files", type(litert._files)())
        again = LiteRtTarget().export(quadrants.original, quadrants, "int8")
        assert dataclasses.asdict(first)["files"] == again.files
