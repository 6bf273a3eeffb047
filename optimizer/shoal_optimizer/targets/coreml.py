"""Core ML: an mlprogram made by coremltools, which converts on Linux but runs on Apple machines only.

What can be checked here is checked (`coreml_spec`), and the network's answers are compared in ONNX
Runtime; the program itself was not run, and the facts say so.
"""

from __future__ import annotations

import contextlib
import copy
import io
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from shoal_optimizer.targets import coreml_spec
from shoal_optimizer.targets.base import Calibration, ClassSpec, Exported, Target, check_parity
from shoal_optimizer.targets.onnx import OnnxTarget, quiet
from shoal_protos.bundle import RuntimeNeed, Signature
from shoal_protos.errors import InvalidInput, MissingExtra, Unsupported

if TYPE_CHECKING:
    from torch import Tensor, nn

    from shoal_optimizer.task import Task

MODEL_FILE = "model.mlpackage.zip"
RUNTIME_MIN = "7.0"  # coremltools that knows iOS 17 and macOS 14, whose programs are written
MAX_BATCH = 64
_TRACED_ITEMS = 7
WEIGHT_THRESHOLD = 512  # elements; smaller weights stay in fp16
CHECKED = "the program's names, types, shapes and weights, answers of its network on ONNX Runtime; not run"


class CoreMlTarget(Target):
    """fp32 runs on CPU and GPU, fp16 on the Neural Engine as well. int8 weights make the file smaller,
    not faster: they are expanded to fp16 when it is loaded or run.

    Int8 activations need calibration by Core ML itself, which runs on Apple machines only.
    """

    name: ClassVar[str] = "coreml"
    precisions: ClassVar[tuple[str, ...]] = ("fp32", "fp16", "int8_weights")
    isa_matters: ClassVar[bool] = False

    def convert(
        self,
        model: nn.Module | None,
        task: Task,
        precision: str,
        calibration: Calibration | None,
        class_spec: ClassSpec,
    ) -> Exported:
        if model is None or not task.has_module:
            raise Unsupported(
                "Core ML models are made from PyTorch models; coremltools reads no ONNX files.",
                "Write a task with the network in PyTorch (shoal task new), or leave the target out.",
            )
        if precision == "int8_weights":
            model = rounded(model)
        content = coreml_spec.pack(*_program(model, task, precision))
        twin = OnnxTarget().convert(model, task, "fp32", None, class_spec)
        if precision == "int8_weights":  # its answers may differ from the original's
            twin = replace(twin, precision=precision)
        need = RuntimeNeed(self.name, MODEL_FILE, version_min=RUNTIME_MIN, precision=precision)
        facts = {"checked": CHECKED, "run_on_device": False, "converter": f"coremltools {_version()}"}
        return Exported({MODEL_FILE: content}, need, precision, task.signature, facts, twin)

    def check(self, exported: Exported, model: nn.Module | None, task: Task) -> Exported:
        """The program's specification, and the answers of its network on ONNX Runtime."""
        assert exported.twin is not None
        found = coreml_spec.check(exported.files[MODEL_FILE], exported.signature, exported.precision)
        measured = check_parity(exported.twin, model, task).facts
        parity = {key: value for key, value in measured.items() if key.startswith("parity_")}
        facts = {**exported.facts, **parity, **found, "parity_on": "onnxruntime", "int8_share": None}
        return replace(exported, facts=facts)


def _version() -> str:
    from importlib.metadata import version

    return version("coremltools")


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Silences progress bars, and the word on libraries that only Apple machines have."""
    import logging

    logger = logging.getLogger("coremltools")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with quiet(), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)


def _coremltools() -> Any:
    try:
        import coremltools
        import coremltools.optimize
    except ImportError as error:
        raise MissingExtra("coreml", "coremltools") from error
    return coremltools


def _program(model: nn.Module, task: Task, precision: str) -> tuple[bytes, bytes, bytes]:
    """(specification, weights, manifest) of the converted pipeline.

    It is traced: the program of torch.export has no type for uint8 inputs in coremltools 9, and traces
    of torch 2.13 convert though coremltools was tested with older ones.
    """
    import torch

    from shoal_optimizer.modules import Pipeline

    pipeline = averaged(Pipeline(task.pre, model, task.post)).eval()
    items = task.required("evaluation").inputs
    example = torch.from_numpy(np.ascontiguousarray(items[np.arange(2) % len(items)]))
    with _silent(), torch.no_grad(), tempfile.TemporaryDirectory(prefix="shoal-coreml-") as folder:
        tools = _coremltools()
        traced = torch.jit.trace(pipeline, example, check_trace=False)  # type: ignore[no-untyped-call]
        _check_trace(traced, pipeline, items)
        inputs, outputs = _types(tools, task.signature)
        wide = precision == "fp32"
        made = tools.convert(
            traced,
            inputs=inputs,
            outputs=outputs,
            convert_to="mlprogram",
            minimum_deployment_target=tools.target.iOS17,
            compute_precision=tools.precision.FLOAT32 if wide else tools.precision.FLOAT16,
            skip_model_load=True,
        )
        if precision == "int8_weights":
            made = _small_weights(tools, made)
        package = Path(folder) / "model.mlpackage"
        made.save(str(package))
        return coreml_spec.read_package(package)


def averaged(pipeline: nn.Module) -> nn.Module:
    """A copy with a mean in place of each global average pool over one dimension: coremltools 9 makes a
    constant of that one's size and fails when the batch is open."""
    import torch
    from torch import nn

    class Mean(nn.Module):
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return inputs.mean(-1, keepdim=True)

    copied = copy.deepcopy(pipeline)
    for parent in list(copied.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.AdaptiveAvgPool1d) and child.output_size in (1, (1,)):
                setattr(parent, name, Mean())
    return copied


def _check_trace(traced: Any, pipeline: nn.Module, items: np.ndarray) -> None:
    """Raises InvalidInput when a trace answers other items, and more of them, unlike the model."""
    import torch

    others = torch.from_numpy(np.ascontiguousarray(items[-_TRACED_ITEMS:]))
    wanted, got = pipeline(others), traced(others)
    near = 1e-3 + 1e-2 * float(wanted.abs().max()) if wanted.numel() else 0.0
    if got.shape != wanted.shape or not torch.allclose(got, wanted, rtol=0.0, atol=near):
        raise InvalidInput(
            "The traced model answers differently: its forward() branches on its input, or is random.",
            "Write forward() without branches on values (torch.where), or leave the target coreml out.",
        )


def _types(tools: Any, signature: Signature) -> tuple[list[Any], list[Any]]:
    """Core ML's description of the signature. Raises Unsupported for types that it does not have."""
    inputs = []
    for spec in signature.inputs:
        kind = coreml_spec.array_type(spec.datatype)
        if any(size < 0 for size in spec.shape[1:]):
            raise Unsupported(
                f"The input '{spec.name}' has open dimensions {list(spec.shape)}.",
                "Core ML needs their range; declare fixed ones in the task's input.",
            )
        batch = spec.shape[0] if spec.shape[0] > 0 else tools.RangeDim(1, MAX_BATCH, default=1)
        inputs.append(tools.TensorType(name=spec.name, shape=(batch, *spec.shape[1:]), dtype=kind))
    return inputs, [tools.TensorType(name=spec.name, dtype=np.float32) for spec in signature.outputs]


def _small_weights(tools: Any, made: Any) -> Any:
    """The program with symmetric int8 weights, a scale for each output channel."""
    optimize = tools.optimize.coreml
    chosen = optimize.OpLinearQuantizerConfig(
        mode="linear_symmetric",
        dtype="int8",
        granularity="per_channel",
        weight_threshold=WEIGHT_THRESHOLD,
    )
    return optimize.linear_quantize_weights(made, optimize.OptimizationConfig(global_config=chosen))


def rounded(model: nn.Module) -> nn.Module:
    """A copy whose large convolution and linear weights have the values that int8 can hold.

    Rounding them once more changes nothing, so the Core ML program and its twin for ONNX Runtime
    have the same weights. Batch norms scale output channels, and with them the scales.
    """
    import torch
    from torch import nn

    copied = copy.deepcopy(model)
    transposed = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    plain = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
    with torch.no_grad():
        for module in copied.modules():
            if isinstance(module, plain) and module.weight.numel() > WEIGHT_THRESHOLD:
                module.weight.copy_(_rounded(module.weight, 0))
            elif isinstance(module, transposed) and module.weight.numel() > WEIGHT_THRESHOLD:
                module.weight.copy_(_rounded(module.weight, 1))
    return copied


def _rounded(weight: Tensor, axis: int) -> Tensor:
    """`weight` on a symmetric grid of 255 values per index of `axis`."""
    others = [place for place in range(weight.ndim) if place != axis]
    scale = weight.abs().amax(dim=others, keepdim=True).clamp_min(1e-12) / 127
    return (weight / scale).round() * scale
