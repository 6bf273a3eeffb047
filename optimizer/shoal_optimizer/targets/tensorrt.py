"""TensorRT: an ONNX file with explicit quantization and a recipe that the device builds its engine by.

Engines fit one GPU, TensorRT version and driver, so none is shipped. The file's answers are compared on
ONNX Runtime and its graph with TensorRT's rules; nothing here runs on a GPU, and the facts say so.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from shoal_optimizer.targets import onnx as onnx_target
from shoal_optimizer.targets import qdq, tensorrt_rules
from shoal_optimizer.targets.base import Calibration, ClassSpec, Exported, Target, check_parity
from shoal_protos.bundle import RuntimeNeed, Signature
from shoal_protos.errors import Unsupported

if TYPE_CHECKING:
    from torch import nn

    from shoal_optimizer.task import Task

MODEL_FILE = onnx_target.MODEL_FILE
RECIPE_FILE = "tensorrt.json"
RECIPE_SCHEMA = 1
RUNTIME_MIN = "10.0"  # strongly typed networks, opset 20
MAX_BATCH = 64
WORKSPACE_BYTES = 256 << 20  # builders on small boards share memory with the CPU
CHECKED = "TensorRT's rules on the graph, answers on ONNX Runtime; not run on a GPU"
_QUANTIZED_OPS = ("Conv", "ConvTranspose", "Gemm", "MatMul", "Add")


class TensorRtTarget(Target):
    """Types are in the graph, as TensorRT 11 demands: symmetric int8 per tensor for activations, per
    channel for weights, biases in float, scales at the inputs of weighted layers and residual sums."""

    name: ClassVar[str] = "tensorrt"
    precisions: ClassVar[tuple[str, ...]] = ("fp32", "int8")
    isa_matters: ClassVar[bool] = False

    def convert(
        self,
        model: nn.Module | None,
        task: Task,
        precision: str,
        calibration: Calibration | None,
        class_spec: ClassSpec,
    ) -> Exported:
        graph = onnx_target.float_graph(model, task)
        facts: dict[str, Any] = {"opset": onnx_target.OPSET, "checked": CHECKED, "run_on_gpu": False}
        if precision == "int8":
            assert calibration is not None
            graph = symmetric_graph(graph, task, calibration)
            facts |= {"activations": "int8", "weights": "int8", "symmetric": True}
        content = onnx_target.strip(graph)
        tensorrt_rules.require(content)
        if precision == "int8":
            facts["int8_share_declared"] = _declared(content)
        need = RuntimeNeed(self.name, MODEL_FILE, version_min=RUNTIME_MIN, precision=precision)
        twin = Exported(
            {MODEL_FILE: content},
            RuntimeNeed("onnxruntime", MODEL_FILE, precision=precision),
            precision,
            task.signature,
        )
        recipe = json.dumps(build_recipe(task.signature, precision), indent=1, sort_keys=True)
        files = {MODEL_FILE: content, RECIPE_FILE: recipe.encode()}
        return Exported(files, need, precision, task.signature, facts, twin)

    def check(self, exported: Exported, model: nn.Module | None, task: Task) -> Exported:
        """Parity of the same file on ONNX Runtime. Its int8 share says nothing about an engine."""
        assert exported.twin is not None
        measured = check_parity(exported.twin, model, task).facts
        facts = {**exported.facts, **measured, "parity_on": "onnxruntime", "int8_share": None}
        return replace(exported, facts=facts)


def _declared(content: bytes) -> float:
    share = tensorrt_rules.declared_share(content)
    if not share > 0:
        raise Unsupported(
            "No convolution or matrix product of this model would run in int8 on TensorRT.",
            "Use the precision fp32.",
        )
    return share


def build_recipe(signature: Signature, precision: str, max_batch: int = MAX_BATCH) -> dict[str, Any]:
    """How a device makes its engine of the model file: plain JSON, no code.

    Raises:
        Unsupported: an input has open dimensions besides the batch.
    """
    profile = {}
    for spec in signature.inputs:
        if any(size < 0 for size in spec.shape[1:]):
            raise Unsupported(
                f"The input '{spec.name}' has open dimensions {list(spec.shape)}.",
                "TensorRT needs their range; declare fixed ones in the task's input.",
            )
        rest = [int(size) for size in spec.shape[1:]]
        batches = {"min": 1, "opt": 1, "max": max_batch}
        if spec.shape[0] >= 0:
            batches = dict.fromkeys(batches, int(spec.shape[0]))
        profile[spec.name] = {bound: [size, *rest] for bound, size in batches.items()}
    return {
        "schema": RECIPE_SCHEMA,
        "model": MODEL_FILE,
        "strongly_typed": True,
        "precisions": ["fp32"] if precision == "fp32" else ["int8", "fp32"],
        "tf32": True,
        "profiles": [profile],
        "workspace_bytes": WORKSPACE_BYTES,
        "optimization_level": 3,
        "timing_cache": True,
        # An engine is rebuilt when one of these differs from when it was built.
        "engine_key": [
            "model_sha256",
            "gpu_name",
            "compute_capability",
            "tensorrt_version",
            "driver_version",
        ],
        "run_on_gpu_before_shipping": False,
    }


def symmetric_graph(graph: bytes, task: Task, calibration: Calibration) -> bytes:
    """The float graph with Q and DQ at the inputs of weighted layers and residual sums."""
    return fusible_sums(
        qdq.placed(
            onnx_target.marked_prepared(graph),
            onnx_target.reader(graph, calibration.inputs),
            calibration.method,
            signed_activations=True,
            op_types_to_quantize=list(_QUANTIZED_OPS),
            nodes_to_exclude=[*onnx_target.excluded_nodes(graph), *float_sums(graph)],
            extra_options={
                "ActivationSymmetric": True,
                "WeightSymmetric": True,
                "QuantizeBias": False,
                "AddQDQPairToWeight": False,
                "OpTypesToExcludeOutputQuantization": list(_QUANTIZED_OPS),
            },
        )
    )


def fusible_sums(graph: bytes) -> bytes:
    """Takes the Q and DQ between a convolution and the sum that alone reads it: TensorRT then fuses both
    into one int8 kernel, with the other summand quantized (its documentation, "Explicit Quantization":
    quantize the residual input in skip connections)."""
    parsed = tensorrt_rules.Graph(graph)
    spare: set[str] = set()
    for node in parsed.nodes:
        if node.op_type != "Add" or not all(map(parsed.quantized, node.input)):
            continue
        for place, name in enumerate(node.input):
            chain = _private_chain(parsed, name)
            if chain:
                node.input[place] = chain[0].input[0]
                spare.update(link.name for link in chain)
                break  # the other summand stays quantized
    kept = [node for node in parsed.nodes if node.name not in spare]
    del parsed.model.graph.node[:]
    parsed.model.graph.node.extend(kept)
    content: bytes = parsed.model.SerializeToString()
    return content


def _private_chain(graph: tensorrt_rules.Graph, name: str) -> list[Any]:
    """[Q, DQ] when `name` is a convolution's output behind a Q and DQ that nothing else reads, else []."""
    last = graph.makers[name]
    first = graph.makers.get(last.input[0])
    if first is None or first.op_type != "QuantizeLinear":
        return []
    source = graph.makers.get(first.input[0])
    alone = all(len(graph.readers.get(tensor, [])) == 1 for tensor in (name, last.input[0], first.input[0]))
    return [first, last] if alone and source is not None and source.op_type == "Conv" else []


def float_sums(graph: bytes) -> list[str]:
    """Names of the sums that are no residual ones: a sum with a constant is a bias, and TensorRT fuses
    int8 sums only behind a convolution."""
    parsed = tensorrt_rules.Graph(graph)
    found = []
    for node in parsed.nodes:
        makers = [parsed.makers.get(name) for name in node.input]
        constant = [name in parsed.constants for name in node.input]
        if node.op_type == "Add" and (
            any(constant) or not any(maker is not None and maker.op_type == "Conv" for maker in makers)
        ):
            found.append(node.name)
    return found


__all__ = ["RECIPE_FILE", "TensorRtTarget", "build_recipe", "float_sums", "symmetric_graph"]
