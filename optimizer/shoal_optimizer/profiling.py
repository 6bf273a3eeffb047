"""Time of each operation inside the runtime, and which layers of the model it is made of.

Runtimes fuse: one operation of theirs may be a convolution, its batch norm and its activation. Each
operation is therefore named by the layers that went into it. Profiling itself costs a few microseconds an
operation, so shares are to be read, not sums.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from shoal_optimizer.inputs import by_name
from shoal_protos.errors import MissingExtra, Unsupported

if TYPE_CHECKING:
    from shoal_optimizer.task import Task

SECONDS = 0.4
_SKIPPED = 3  # first calls allocate
_MARKS = ("_nchwc", "_nhwc", "_quant", "_token", "/WithoutBiases", "/DequantizeLinear")


@dataclass(frozen=True)
class Operation:
    """One operation of a runtime's graph: its time for one item, and the layers that are computed in it.

    Attributes:
        us: trimmed mean of the time, microseconds.
        share: of all operations' time.
        precision: what the runtime says it computes in, "" where it doesn't say.
    """

    name: str
    kind: str
    us: float
    share: float
    layers: tuple[str, ...] = ()
    precision: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"layers": list(self.layers)}


def profile(
    runtime: str, model: Path, inputs: Mapping[str, np.ndarray], *, reference: bytes | None = None,
    seconds: float = SECONDS,
) -> list[Operation]:  # fmt: skip
    """Profiles a model file with one thread.

    Args:
        inputs: one item by input name.
        reference: an ONNX graph with the original's names, which says what fused operations are made of;
            None = the model file itself where it is ONNX.

    Raises:
        Unsupported: a runtime without a profiler here.
        MissingExtra: the runtime isn't installed.
    """
    if runtime == "onnxruntime":
        return _onnxruntime(model, inputs, reference or model.read_bytes(), seconds)
    if runtime == "openvino":
        return _openvino(model, inputs, reference, seconds)
    raise Unsupported(f"{runtime} tells no times of single operations here.", "Look at onnxruntime's.")


def layer_times(task: Task, *, seconds: float = SECONDS) -> list[Operation]:
    """The original's float graph in ONNX Runtime: the time of each fused group of layers."""
    from shoal_optimizer.targets.onnx import float_graph

    graph = float_graph(task.original if task.has_module else None, task)
    item = by_name(task.required("evaluation").inputs[:1], task.signature)
    with tempfile.TemporaryDirectory(prefix="shoal-profile-") as folder:
        path = Path(folder) / "model.onnx"
        path.write_bytes(graph)
        return profile("onnxruntime", path, item, seconds=seconds)


# ---------------------------------------------------------------------------- runtimes


def _onnxruntime(
    model: Path, inputs: Mapping[str, np.ndarray], reference: bytes, seconds: float
) -> list[Operation]:
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingExtra("onnxruntime", "onnxruntime") from error
    import onnx

    with tempfile.TemporaryDirectory(prefix="shoal-profile-") as folder:
        optimized = Path(folder) / "optimized.onnx"
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "profile")
        options.optimized_model_filepath = str(optimized)
        session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
        _repeat(lambda: session.run(None, dict(inputs)), seconds)
        events = json.loads(Path(session.end_profiling()).read_bytes())
        nodes = onnx.load(str(optimized)).graph.node
    times: dict[str, list[float]] = defaultdict(list)
    kinds: dict[str, str] = {}
    for event in events:
        name = str(event.get("name", ""))
        if event.get("cat") == "Node" and name.endswith("_kernel_time"):
            times[name.removesuffix("_kernel_time")].append(float(event["dur"]))
            kinds[name.removesuffix("_kernel_time")] = str(event["args"].get("op_name", ""))
    tensors = {node.name: [node.name, *node.output] for node in nodes}
    owners = covered(reference, {name: tensors.get(name, [name]) for name in times})
    return _operations(times, kinds, owners, {})


def _openvino(
    model: Path, inputs: Mapping[str, np.ndarray], reference: bytes | None, seconds: float
) -> list[Operation]:
    try:
        import openvino
    except ImportError as error:
        raise MissingExtra("openvino", "openvino") from error
    core = openvino.Core()
    settings = {
        "PERF_COUNT": True,
        "INFERENCE_NUM_THREADS": 1,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",  # as the agent loads it
    }
    compiled = core.compile_model(core.read_model(str(model)), "CPU", settings)
    request = compiled.create_infer_request()
    times: dict[str, list[float]] = defaultdict(list)
    kinds: dict[str, str] = {}
    precisions: dict[str, str] = {}

    def once() -> None:
        request.infer(list(inputs.values()))
        for node in request.profiling_info:
            if "EXECUTED" in str(node.status):
                times[node.node_name].append(node.real_time.total_seconds() * 1e6)
                kinds[node.node_name] = node.node_type
                precisions[node.node_name] = node.exec_type.rpartition("_")[2].lower()

    _repeat(once, seconds)
    if reference is None and model.suffix == ".onnx":
        reference = model.read_bytes()
    ends = {name: [name] for name in times}
    owners = covered(reference, ends, named_by_last=False) if reference else {}
    return _operations(times, kinds, owners, precisions)


def _repeat(call: Any, seconds: float) -> None:
    end, count = time.monotonic() + seconds, 0
    while count < 2 * _SKIPPED or time.monotonic() < end:
        call()
        count += 1


def _operations(
    times: Mapping[str, Sequence[float]],
    kinds: Mapping[str, str],
    owners: Mapping[str, Sequence[str]],
    precisions: Mapping[str, str],
) -> list[Operation]:
    enough = {name: values[_SKIPPED:] for name, values in times.items() if len(values) > _SKIPPED}
    means = {name: _trimmed(values) for name, values in enough.items()}
    total = sum(means.values()) or 1.0
    return [
        Operation(name, kinds[name], us, us / total, tuple(owners.get(name, ())), precisions.get(name, ""))
        for name, us in means.items()
    ]


def _trimmed(values: Sequence[float]) -> float:
    """Mean of the middle 80 %: times are whole microseconds, so a median would be too coarse."""
    ordered = np.sort(np.asarray(values, np.float64))
    cut = len(ordered) // 10
    return float(ordered[cut : len(ordered) - cut].mean())


# ---------------------------------------------------------------------------- what is fused into what


def covered(
    reference: bytes, names: Mapping[str, Sequence[str]], *, named_by_last: bool = True
) -> dict[str, list[str]]:
    """Operation -> the layers of the reference graph that are computed in it, in the graph's order.

    Args:
        names: operation -> its own name and those of its outputs.
        named_by_last: a fused operation is called after its last node (ONNX Runtime), or after its first
            (OpenVINO). Every other node belongs to the next named one downstream, or upstream.
    """
    import onnx

    graph = onnx.load_from_string(reference).graph
    known = {_bare(name): operation for operation, found in list(names.items())[::-1] for name in found}
    owner = {
        place: known[next(n for n in (*node.output, node.name) if n in known)]
        for place, node in enumerate(graph.node)
        if any(n in known for n in (*node.output, node.name))
    }
    later, earlier = _neighbours(graph)
    _spread(owner, later if named_by_last else earlier, reverse=named_by_last)
    _spread(owner, earlier if named_by_last else later, reverse=not named_by_last)
    layers: dict[str, list[str]] = {}
    weights = {item.name for item in graph.initializer}
    for place, node in enumerate(graph.node):
        if place in owner:
            inside = layers.setdefault(owner[place], [])
            label = layer_of(node, weights)
            if label not in inside:
                inside.append(label)
    return layers


def _neighbours(graph: Any) -> tuple[list[list[int]], list[list[int]]]:
    """Places of each node's consumers, and of its producers."""
    made = {name: place for place, node in enumerate(graph.node) for name in node.output}
    later: list[list[int]] = [[] for _ in graph.node]
    earlier: list[list[int]] = [[made[name] for name in node.input if name in made] for node in graph.node]
    for place, producers in enumerate(earlier):
        for producer in producers:
            later[producer].append(place)
    return later, earlier


def _spread(owner: dict[int, str], towards: Sequence[Sequence[int]], *, reverse: bool) -> None:
    """Gives nodes without an owner that of their first neighbour that has one; nodes are in order."""
    places = range(len(towards) - 1, -1, -1) if reverse else range(len(towards))
    for place in places:
        if place not in owner:
            found = next((owner[n] for n in towards[place] if n in owner), "")
            if found:
                owner[place] = found


def _bare(name: str) -> str:
    for mark in _MARKS:
        name = name.removesuffix(mark)
    return name


def layer_of(node: Any, weights: set[str]) -> str:
    """The module path of a node: by its weight's name, else by the exporter's scopes, else its own name."""
    for name in node.input:
        if name in weights and name.startswith("model.") and ".weight" in name:
            return str(name.removeprefix("model.").partition(".weight")[0])
    for item in node.metadata_props:
        if item.key == "pkg.torch.onnx.name_scopes":
            scopes = [part.strip(" '\"") for part in item.value.strip("[]").split(",")]
            path = scopes[-2] if len(scopes) > 1 else ""
            return path.removeprefix("model.") if path.startswith("model.") else path or str(node.name)
    return str(node.name or node.output[0])
