"""From a file to a Task: a Python file with one Task class, or an ONNX file with its `.npz`."""

from __future__ import annotations

import importlib.util
import sys
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from shoal_agent.runtimes.tensors import dtype_of
from shoal_optimizer.data import Items, TaskData
from shoal_optimizer.task import Task, TaskFiles
from shoal_protos.bundle import BoxRule, TensorSpec, digest_of, digest_of_file
from shoal_protos.errors import InvalidInput, Unsupported

if TYPE_CHECKING:
    from torch import nn

MODULE_PREFIX = "shoal_task_"

# onnx.TensorProto element types that have a protocol datatype.
_ONNX_DATATYPES = {
    1: "FP32", 2: "UINT8", 3: "INT8", 4: "UINT16", 5: "INT16", 6: "INT32", 7: "INT64",
    9: "BOOL", 10: "FP16", 11: "FP64", 12: "UINT32", 13: "UINT64",
}  # fmt: skip


def load_python_task(path: Path) -> Task:
    """Imports `path` and makes an instance of its one Task class.

    Raises:
        InvalidInput: importing raises, there is no Task class or more than one, a declaration is
            wrong, or a file that it names is missing.
    """
    module = _import(path)
    found = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Task) and value.__module__ == module.__name__
    ]
    if not found:
        raise InvalidInput(
            f"{path.name} has no Task.", "Write a class that derives from shoal_optimizer.Task."
        )
    if len(found) > 1:
        names = ", ".join(sorted(kind.__name__ for kind in found))
        raise InvalidInput(f"{path.name} has several tasks: {names}.", "Keep one in a file.")
    try:
        task = found[0]()
    except Exception as error:
        raise InvalidInput(
            f"{found[0].__name__}() raised {type(error).__name__}: {error}.", "A task takes no arguments."
        ) from error
    task.directory, task.source = path.parent, path
    check_declarations(task)
    return task


def _import(path: Path) -> Any:
    # Named by content and place: a file that is loaded twice has one set of classes, and a copy of it
    # elsewhere its own, beside its own data. `module_like` finds the classes of stored modules again.
    place = digest_of(str(path).encode())[7:15]
    name = f"{MODULE_PREFIX}{path.stem}_{digest_of_file(path)[7:19]}_{place}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise InvalidInput(f"{path.name} is neither a Python nor an ONNX file.", "Give a .py or .onnx file.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))  # the task's own `files` may be modules
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        sys.modules.pop(name, None)
        raise InvalidInput(
            f"Importing {path.name} raised {type(error).__name__}: {error}.",
            f"Run `python {path.name}` to see the whole traceback.",
        ) from error
    return module


def module_like(name: str) -> str:
    """The loaded task module that a stored module's class belongs to: same content, else same file name.

    A worker unpacks a task anywhere, so places differ; content differs when the file was edited since.
    """
    loaded = [known for known in reversed(sys.modules) if known.startswith(MODULE_PREFIX)]
    for parts in (0, 1, 2):
        wanted = name.rsplit("_", parts)[0]
        for known in loaded:
            if known.rsplit("_", parts)[0] == wanted:
                return known
    return name


def check_declarations(task: Task) -> None:
    """Checks what a task declares, before any of its methods runs. Raises InvalidInput."""
    kind = type(task).__name__
    spec = getattr(task, "input", None)
    if not isinstance(spec, TensorSpec):
        raise InvalidInput(
            f"{kind}.input is not declared.",
            'Write input = TensorSpec("image", "UINT8", (-1, 32, 32, 3), "NHWC", 0, 255).',
        )
    dtype_of(spec.datatype)
    if len(spec.shape) < 2 or spec.shape[0] != -1:
        raise InvalidInput(f"{kind}.input has shape {spec.shape}.", "Start with -1, the batch dimension.")
    for field, value, known in (
        ("input_kind", task.input_kind, ("image", "audio", "series", "tensor")),
        ("output_kind", task.output_kind, ("logits", "boxes", "values")),
        ("color", task.color, ("", "gray", "rgb", "bgr")),
        ("resize", task.resize, ("", "stretch", "letterbox", "crop")),
    ):
        if value not in known:
            raise InvalidInput(
                f"{kind}.{field} is {value!r}.", f"Use one of {', '.join(filter(None, known))}."
            )
    for field, number, most in (("pad", task.pad, 255), ("sample_rate", task.sample_rate, 10_000_000)):
        if not isinstance(number, int) or not 0 <= number <= most:
            raise InvalidInput(f"{kind}.{field} is {number!r}.", f"Give a whole number from 0 to {most}.")
    _check_boxes(task)
    if isinstance(task.files, str):
        raise InvalidInput(f"{kind}.files is one string.", f"Write files = [{task.files!r}].")
    for name in task.files:
        path = (task.directory / name).resolve()
        if not path.is_relative_to(task.directory.resolve()):
            raise InvalidInput(f"{kind}.files names '{name}', outside the task's folder.", "Move it beside.")
        if not path.exists():
            raise InvalidInput(
                f"{kind}.files names '{name}', which is missing.",
                f"Put it into {task.directory} or take it off the list.",
            )


def _check_boxes(task: Task) -> None:
    """What the output kind "boxes" asks for, and nothing else may have."""
    kind = type(task).__name__
    rule = task.boxes
    if rule is not None and not isinstance(rule, BoxRule):
        raise InvalidInput(
            f"{kind}.boxes is {type(rule).__name__}.", "Write boxes = BoxRule(0.25, 0.5, 100)."
        )
    if task.output_kind != "boxes":
        if rule is not None:
            raise InvalidInput(
                f"{kind}.boxes is set, but output_kind is {task.output_kind!r}.",
                'Write output_kind = "boxes".',
            )
        return
    rule = task.box_rule
    if not (0 < rule.score_threshold < 1 and 0 < rule.iou_threshold <= 1 and rule.max_boxes >= 1):
        raise InvalidInput(
            f"{kind}.boxes is {rule}.",
            "Give thresholds between 0 and 1, and at least one box an image.",
        )
    if not task.labels:
        raise InvalidInput(f"{kind}.labels is empty.", "Name the classes in the order of their scores.")
    wanted = 4 + len(task.labels)
    if task.output is not None and (
        len(task.output.shape) != 3 or task.output.shape[-1] != wanted or task.output.datatype != "FP32"
    ):
        raise InvalidInput(
            f"{kind}.output is {task.output.datatype} {list(task.output.shape)}.",
            f"Boxes of {len(task.labels)} labels are FP32 [-1, candidates, {wanted}].",
        )
    trained = type(task).training is not Task.training
    if task.has_module and trained and type(task).loss is Task.loss:
        raise InvalidInput(
            f"{kind} has training() but no loss().",
            "Write loss(self, outputs, targets): only the task knows how its head encodes boxes "
            "(examples/detector.py shows one), or take training() away: then nothing is fine-tuned.",
        )


class OnnxTask(Task):
    """An ONNX file and an `.npz` with arrays `inputs` and `targets`: converted and quantized, not trained.

    Optional arrays: `labels` (text), `calibration` (inputs). Without it half of the items calibrate
    and the other half evaluate.
    """

    def __init__(self, path: Path, data: Path | None) -> None:
        self.source = path
        self.directory = path.parent
        self._data_file = data or path.with_suffix(".npz")
        self._declare()

    @property
    def onnx_file(self) -> Path:
        return self.stored_weights or self.source

    @property
    def label(self) -> str:
        return self.source.stem

    @property
    def has_module(self) -> bool:
        return False

    @cached_property
    def original(self) -> nn.Module:
        raise Unsupported(
            f"{self.source.name} is an ONNX file: it cannot be pruned or trained.",
            "Push a Python task with the torch module to prune and distil.",
        )

    def _declare(self) -> None:
        import onnx

        try:
            graph = onnx.load(str(self.onnx_file)).graph
        except Exception as error:
            raise InvalidInput(
                f"{self.source.name} is no ONNX model: {error}.", "Export it again."
            ) from error
        constants = {item.name for item in graph.initializer}
        inputs = [item for item in graph.input if item.name not in constants]
        if len(inputs) != 1 or len(graph.output) != 1:
            raise InvalidInput(
                f"{self.source.name} has {len(inputs)} inputs and {len(graph.output)} outputs.",
                "Export a model with one of each.",
            )
        self.input = _spec(inputs[0])  # type: ignore[misc]
        stored = self._arrays()
        targets = stored["targets"]
        self.output = _spec(graph.output[0])  # type: ignore[misc]
        if targets.ndim == 1 and targets.dtype.kind in "iu":
            self.output_kind = "logits"  # type: ignore[misc]
        elif targets.ndim == 3 and targets.shape[-1] == 5 and "labels" in stored:
            self.output_kind = "boxes"  # type: ignore[misc]
        # Images are recognised by their channels only where they come last; else any tensor will do.
        image = len(self.input.shape) == 4 and self.input.shape[-1] in (1, 3, 4)
        self.input_kind = "image" if image else "tensor"  # type: ignore[misc]
        if "labels" in stored:
            self.labels = tuple(str(name) for name in stored["labels"])  # type: ignore[misc]

    def _arrays(self) -> dict[str, np.ndarray]:
        try:
            with np.load(self._data_file, allow_pickle=False) as stored:
                arrays = dict(stored)
        except (OSError, ValueError) as error:
            raise InvalidInput(
                f"The data file '{self._data_file.name}' of {self.source.name} cannot be read: {error}.",
                "Put an .npz of the same name beside the ONNX file, with arrays `inputs` and `targets`.",
            ) from error
        if "evaluation:inputs" in arrays:  # what `save_data` wrote
            return {
                "inputs": arrays["evaluation:inputs"],
                "targets": arrays["evaluation:targets"],
                "calibration": arrays["calibration:inputs"],
            }
        missing = [name for name in ("inputs", "targets") if name not in arrays]
        if missing:
            raise InvalidInput(f"'{self._data_file.name}' lacks the array '{missing[0]}'.", "Add it.")
        return arrays

    def evaluation(self) -> Items:
        stored = self._arrays()
        start = 0 if "calibration" in stored else len(stored["inputs"]) // 2
        return stored["inputs"][start:], stored["targets"][start:]  # type: ignore[return-value]

    def calibration(self) -> Items:
        stored = self._arrays()
        inputs = stored.get("calibration", stored["inputs"][: len(stored["inputs"]) // 2])
        return inputs, np.zeros(len(inputs), np.int64)  # type: ignore[return-value]

    def _load_split(self, split: str) -> TaskData | None:
        kept, self.stored_data = self.stored_data, None  # `_arrays` reads both layouts
        try:
            return super()._load_split(split)
        finally:
            self.stored_data = kept

    def predict(self, model: Any, inputs: np.ndarray, batch: int = 256) -> np.ndarray:
        """Outputs of the ONNX file itself; `model` is ignored, since there is no torch module."""
        import onnxruntime

        def forward() -> np.ndarray:
            session = onnxruntime.InferenceSession(str(self.onnx_file), providers=["CPUExecutionProvider"])
            name = session.get_inputs()[0].name
            fixed = session.get_inputs()[0].shape[0]
            step = fixed if isinstance(fixed, int) else batch
            parts = [session.run(None, {name: inputs[i : i + step]})[0] for i in range(0, len(inputs), step)]
            return np.concatenate(parts)

        return self.guard("model", forward)

    def _probe_outputs(self) -> np.ndarray:
        return self.predict(None, self.required("evaluation").inputs[:2])

    def save(self, directory: Path, model: nn.Module | None = None) -> TaskFiles:
        directory.mkdir(parents=True, exist_ok=True)
        files = TaskFiles(directory / "weights.onnx", directory / "data.npz")
        files.weights.write_bytes(self.onnx_file.read_bytes())
        self.save_data(files.data)
        return files

    @cached_property
    def weights_digest(self) -> str:
        return digest_of_file(self.onnx_file)


def load_onnx_task(path: Path, data: Path | None) -> OnnxTask:
    """Raises InvalidInput when the ONNX or its data cannot be read."""
    task = OnnxTask(path, data)
    check_declarations(task)
    return task


def _spec(value: Any) -> TensorSpec:
    tensor = value.type.tensor_type
    datatype = _ONNX_DATATYPES.get(tensor.elem_type)
    if datatype is None:
        raise InvalidInput(f"'{value.name}' has an unusual element type.", "Use a plain number type.")
    dims = [dim.dim_value or -1 for dim in tensor.shape.dim]
    if len(dims) < 2 or dims[0] != -1 or -1 in dims[1:]:
        raise InvalidInput(
            f"'{value.name}' has shape {dims}.",
            "Export with a dynamic batch dimension first and fixed others.",
        )
    return TensorSpec(value.name, datatype, tuple(dims))
