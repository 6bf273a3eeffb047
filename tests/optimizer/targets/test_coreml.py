from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("coremltools.proto", exc_type=ImportError)

from shoal_optimizer import packing, targets
from shoal_optimizer.recipe import Recipe
from shoal_optimizer.targets import Exported, coreml_spec
from shoal_optimizer.targets.coreml import MODEL_FILE, rounded
from shoal_optimizer.task import Task, load_task
from shoal_protos.bundle import Signature
from shoal_protos.errors import InvalidInput, Unsupported

PARTS = (coreml_spec.SPEC, coreml_spec.WEIGHTS, coreml_spec.MANIFEST)


@pytest.fixture(scope="module")
def exported(quadrants: Task) -> Exported:
    return targets.find("coreml").export(quadrants.original, quadrants, "int8_weights")


def parts(exported: Exported) -> list[bytes]:
    with zipfile.ZipFile(io.BytesIO(exported.files[MODEL_FILE])) as archive:
        return [archive.read(name) for name in PARTS]


def test_the_facts_tell_what_is_in_it_and_that_it_was_not_run(exported: Exported) -> None:
    facts = exported.facts
    assert facts["run_on_device"] is False
    assert facts["parity_on"] == "onnxruntime"
    assert facts["ops"]["conv"] == 4
    assert facts["ops"]["constexpr_affine_dequantize"] == 4  # the smallest stays in fp16
    assert facts["weights"]["int8"] > 20 * facts["weights"]["float16"]
    assert facts["int8_share"] is None


def test_int8_weights_are_those_of_the_twin(exported: Exported, quadrants: Task) -> None:
    spec, weights, _ = parts(exported)
    wanted = {
        tuple(value.shape): value.detach().numpy()
        for value in rounded(quadrants.original).state_dict().values()
        if value.ndim in (2, 4)
    }
    found = [
        dequantized(operation, weights)
        for operation in coreml_spec._operations(coreml_spec.parse(spec))
        if operation.type == "constexpr_affine_dequantize"
    ]
    linear = next(value for value in found if value.ndim == 2)
    np.testing.assert_allclose(linear, wanted[linear.shape], atol=2e-3 * np.abs(linear).max())


def dequantized(operation: Any, weights: bytes) -> np.ndarray:
    """Weights of a constexpr_affine_dequantize along axis 0, from the weight file."""

    def blob(name: str, kind: type) -> np.ndarray:
        value = operation.attributes[name]
        shape = [size.constant.size for size in value.type.tensorType.dimensions]
        if value.WhichOneof("value") == "immediateValue":
            return np.frombuffer(value.immediateValue.tensor.bytes.values, kind).reshape(shape)
        start, count = struct.unpack_from("<Q", weights, value.blobFileValue.offset + 16)[0], np.prod(shape)
        return np.frombuffer(weights, kind, int(count), start).reshape(shape)

    codes, scale = blob("quantized_data", np.int8), blob("scale", np.float16)
    return codes * scale.astype(np.float32).reshape(-1, *[1] * (codes.ndim - 1))


@pytest.mark.parametrize(
    ("name", "value"), [("pixel", (-1, 8, 8, 1)), ("pixels", (-1, 9, 8, 1)), ("pixels", (-1, 8, 8))]
)
def test_another_signature_is_refused(
    exported: Exported, name: str, value: tuple[int, ...], quadrants: Task
) -> None:
    from dataclasses import replace

    spec = replace(quadrants.signature.inputs[0], name=name, shape=value)
    signature: Signature = replace(quadrants.signature, inputs=(spec,))
    with pytest.raises(InvalidInput, match=r"input|take"):
        coreml_spec.check(exported.files[MODEL_FILE], signature, "int8_weights")


def test_wider_weights_than_asked_are_refused(quadrants: Task) -> None:
    wide = targets.find("coreml").export(quadrants.original, quadrants, "fp32").files[MODEL_FILE]
    with pytest.raises(InvalidInput, match="wider than fp16"):
        coreml_spec.check(wide, quadrants.signature, "fp16")
    with pytest.raises(Unsupported, match="none becomes int8"):
        coreml_spec.check(wide, quadrants.signature, "int8_weights")


def test_damaged_packages_are_refused(exported: Exported, quadrants: Task) -> None:
    spec, weights, manifest = parts(exported)
    damaged = {
        "packed mlpackage": b"no zip",
        "misses weights": coreml_spec.pack(spec, weights[: len(weights) // 2], manifest),
        "corrupt": coreml_spec.pack(b"\xff" * 9, weights, manifest),
        "no mlprogram": coreml_spec.pack(b"\x08\x08", weights, manifest),
    }
    for message, content in damaged.items():
        with pytest.raises(InvalidInput, match=message):
            coreml_spec.check(content, quadrants.signature, "int8_weights")


def test_a_bundle_has_golden_cases_of_the_twin(exported: Exported, quadrants: Task, tmp_path: Path) -> None:
    recipe = Recipe()
    packed = packing.pack(
        exported, quadrants, recipe, packing.lineage_of(quadrants, recipe, exported), tmp_path / "b"
    )
    assert packed.config.runtime.name == "coreml"
    assert packed.config.golden is not None
    assert packed.config.golden.rtol >= 0.02


def test_types_that_core_ml_lacks_are_refused() -> None:
    with pytest.raises(Unsupported, match="BYTES"):
        coreml_spec.array_type("BYTES")


def test_an_onnx_task_is_refused(quadrants: Task, tmp_path: Path, quadrants_path: Path) -> None:
    target = targets.find("coreml")
    with pytest.raises(Unsupported, match="made from PyTorch"):
        target.convert(None, load_task(quadrants_path), "fp32", None, targets.ClassSpec("mac"))


def test_a_branch_on_values_is_refused(write_task: Callable[[str], Path]) -> None:
    path = write_task(
        "import numpy as np, torch\n"
        "from torch import nn\n"
        "from shoal_optimizer import Task, TensorSpec\n"
        "class Branch(nn.Module):\n"
        "    def forward(self, x): return x if float(x.sum()) > 0 else x * 3 + 1\n"
        "class Branching(Task):\n"
        "    input = TensorSpec('x', 'FP32', (-1, 3))\n"
        "    output_kind = 'logits'\n"
        "    def model(self): return Branch()\n"
        "    def evaluation(self):\n"
        "        items = np.ones((20, 3), np.float32)\n"
        "        items[10:] = -1\n"
        "        return items, np.zeros(20, np.int64)\n"
    )
    task = load_task(path)
    with pytest.raises(InvalidInput, match="traced model answers differently"):
        targets.find("coreml").export(task.original, task)
