"""What every target promises, run over every installed one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path

import numpy as np
import pytest

from shoal_agent import runtimes
from shoal_optimizer import targets
from shoal_optimizer.targets import ClassSpec, Exported, Target
from shoal_optimizer.targets.litert import has_tools
from shoal_optimizer.task import Task, load_task
from shoal_protos.bundle import BundleConfig, open_bundle, write_bundle
from shoal_protos.errors import InvalidInput, NotFound, Unsupported

NAMES = sorted(entry.name for entry in entry_points(group="shoal.targets"))

_exports: dict[str, dict[str, Exported]] = {}  # by target; converters take seconds


@pytest.mark.parametrize("name", NAMES)
class TestTarget:
    @pytest.fixture
    def target(self, name: str) -> Target:
        if name == "litert" and not has_tools():
            pytest.skip("litert-torch and ai-edge-quantizer are not installed")
        return targets.find(name)

    @pytest.fixture
    def exports(self, target: Target, quadrants: Task, local_class: ClassSpec) -> dict[str, Exported]:
        if target.name not in _exports:
            made = {}
            for precision in target.precisions:
                # Narrow weights that save nothing on a net this small are refused, and only those.
                with contextlib.suppress(*([Unsupported] if precision.endswith("_weights") else [])):
                    made[precision] = target.export(
                        quadrants.original, quadrants, precision, class_spec=local_class
                    )
            _exports[target.name] = made
        return _exports[target.name]

    def test_it_has_its_name_and_says_which_classes_it_serves(self, target: Target, name: str) -> None:
        assert target.name == name
        assert target.serves(ClassSpec.of("c", (), {name: "1.0"}))
        assert not target.serves(ClassSpec.of("c", (), {"another": "1.0"}))

    def test_the_signature_is_the_tasks_own(self, exports: dict[str, Exported], quadrants: Task) -> None:
        for precision, exported in exports.items():
            assert exported.signature == quadrants.signature
            assert exported.runtime.precision == exported.precision == precision
            assert exported.model_file in exported.files

    def test_a_bundle_of_it_loads_and_answers_any_batch(
        self, exports: dict[str, Exported], quadrants: Task, tmp_path: Path
    ) -> None:
        pixels = quadrants.required("evaluation").inputs
        wanted = quadrants.predict(quadrants.original, pixels[:7])
        for precision, shipped in exports.items():
            exported = shipped.twin or shipped  # a runtime that only devices have is stood in for
            layout = tmp_path / precision
            config = BundleConfig(exported.signature, exported.runtime)
            bundle = open_bundle(layout, write_bundle(layout, config, exported.files))
            with runtimes.find(exported.runtime.name).load(bundle) as instance:
                for count in (1, 7, 2):
                    got = instance.run({"pixels": pixels[:count]})["logits"]
                    assert got.shape == (count, 4)
                    assert np.mean(got.argmax(1) == wanted[:count].argmax(1)) == 1.0

    def test_parity_with_torch_is_in_the_facts(self, exports: dict[str, Exported]) -> None:
        facts = exports["fp32"].facts
        assert facts["parity_max"] < 1e-3
        assert facts["parity_agreement"] == 1.0
        assert facts["int8_share"] is None
        for precision, exported in exports.items():
            assert exported.facts["parity_agreement"] > 0.95
            if precision == "int8":
                assert exported.facts["int8_share"] == (None if exported.twin else 1.0)

    def test_a_file_that_was_not_run_says_so(self, exports: dict[str, Exported]) -> None:
        for exported in exports.values():
            if exported.twin is not None:
                assert "not run" in exported.facts["checked"]
                assert exported.facts["parity_on"] == exported.twin.runtime.name
                with pytest.raises(Unsupported):
                    targets.load_exported(exported)

    def test_a_narrower_precision_is_smaller(self, exports: dict[str, Exported]) -> None:
        for precision, exported in exports.items():
            share = {"fp32": 1.0, "fp16": 0.6}.get(precision, 0.5)
            assert exported.wire_bytes <= share * exports["fp32"].wire_bytes

    def test_equal_models_give_equal_bytes(
        self, target: Target, exports: dict[str, Exported], quadrants: Task, local_class: ClassSpec
    ) -> None:
        narrowest = [precision for precision in target.precisions if precision in exports][-1]
        again = target.export(quadrants.original, quadrants, narrowest, class_spec=local_class)
        assert again.files == exports[narrowest].files

    def test_an_unknown_precision_is_refused(self, target: Target, quadrants: Task) -> None:
        with pytest.raises(Unsupported, match="int3"):
            target.export(quadrants.original, quadrants, "int3")

    def test_a_model_that_answers_at_random_is_refused(
        self, target: Target, write_task: Callable[[str], Path]
    ) -> None:
        path = write_task(
            "import numpy as np, torch\n"
            "from torch import nn\n"
            "from shoal_optimizer import Task, TensorSpec\n"
            "class Dice(nn.Module):\n"
            "    def forward(self, x): return x[:, :2] + torch.rand_like(x[:, :2])\n"
            "class Random(Task):\n"
            "    input = TensorSpec('x', 'FP32', (-1, 3))\n"
            "    output_kind = 'logits'\n"
            "    def model(self): return Dice()\n"
            "    def evaluation(self): return np.zeros((9, 3), np.float32), np.zeros(9, np.int64)\n"
        )
        task = load_task(path)
        with pytest.raises(InvalidInput, match=r"answers differently|cannot convert"):
            target.export(task.original, task)


def test_an_unknown_target_lists_the_known_ones() -> None:
    with pytest.raises(NotFound, match="onnxruntime"):
        targets.find("abacus")


def test_available_targets_follow_the_runtimes_of_the_class(local_class: ClassSpec) -> None:
    assert [target.name for target in targets.available(local_class)] == ["onnxruntime", "openvino"]
    only = ClassSpec.of("c", (), {"openvino": "2026.4"})
    assert [target.name for target in targets.available(only)] == ["openvino"]
