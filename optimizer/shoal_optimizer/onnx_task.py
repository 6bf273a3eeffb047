"""A task made of an ONNX file and its `.npz`: converted and quantized, not trained."""

from __future__ import annotations

import tempfile
import weakref
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from shoal_agent.runtimes.tensors import datatype_of
from shoal_optimizer import onnx_data, onnx_graph
from shoal_optimizer.data import Items, TaskData, read_split
from shoal_optimizer.inputs import by_name
from shoal_optimizer.task import STORED_SPLITS, Task, TaskFiles
from shoal_protos.bundle import Signature, TensorSpec, digest_of_file
from shoal_protos.errors import InvalidInput, Unsupported

if TYPE_CHECKING:
    from torch import nn

# onnx.TensorProto element types that have a protocol datatype.
_DATATYPES = {
    1: "FP32", 2: "UINT8", 3: "INT8", 4: "UINT16", 5: "INT16", 6: "INT32", 7: "INT64",
    9: "BOOL", 10: "FP16", 11: "FP64", 12: "UINT32", 13: "UINT64",
}  # fmt: skip


class OnnxTask(Task):
    """An ONNX file and an `.npz` as `onnx_data` describes it.

    Without an array `calibration` half of the items choose int8 ranges and the other half judges. Class
    numbers as targets, one an answer, make it a classifier (of each position, where an item has several);
    anything else is judged by R squared.
    """

    def __init__(self, path: Path, data: Path | None, weights: Path | None = None) -> None:
        """
        Args:
            data, weights: the user's `.npz`, or both as `save` wrote them.
        """
        self.source = path
        self.directory = path.parent
        self.stored_weights = weights
        self._data_file = data or path.with_suffix(".npz")
        self.notes: tuple[str, ...] = ()
        self._arrays = self._read()
        if weights is None:
            self._prepare()
        self._declare()

    # ------------------------------------------------------------------ the file

    @property
    def onnx_file(self) -> Path:
        """The graph that everything is made from: self-contained, its inputs the endpoint's."""
        return self.stored_weights or self._prepared

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

    def _read(self) -> onnx_data.Arrays:
        data = read_split(self._data_file, "evaluation") if self._data_file.is_file() else None
        if data is None:  # not one that `save_data` wrote
            return onnx_data.read(self._data_file, self.source.name)
        calibration = read_split(self._data_file, "calibration")
        return onnx_data.Arrays(
            _columns(data.inputs),
            data.targets,
            calibration=_columns(calibration.inputs) if calibration else {},
            labels=onnx_data.stored_labels(self._data_file),
        )

    def _prepare(self) -> None:
        made = onnx_graph.prepare(self.source, self._arrays)
        self.notes = made.notes
        folder = tempfile.TemporaryDirectory(prefix="shoal-onnx-")
        self._prepared = Path(folder.name) / "model.onnx"
        self._prepared.write_bytes(made.content)
        weakref.finalize(self, folder.cleanup)

    def _declare(self) -> None:
        import onnx

        try:
            graph = onnx.load(str(self.onnx_file)).graph
        except Exception as error:
            raise InvalidInput(
                f"{self.source.name} is no ONNX model: {error}.", "Export it again."
            ) from error
        self._specs = tuple(_spec(value) for value in onnx_graph.inputs_of(graph))
        self._outputs = tuple(item.name for item in graph.output)
        self.input = self._specs[0]  # type: ignore[misc]
        arrays = self._arrays
        self.labels = arrays.labels  # type: ignore[misc]
        rank = len(graph.output[0].type.tensor_type.shape.dim)
        targets = arrays.targets
        boxes = targets.ndim == 3 and targets.shape[-1] == 5 and bool(arrays.labels)
        if targets.dtype.kind in "iu" and (targets.ndim == 1 or targets.ndim == rank - 1):
            self.output_kind = "logits"  # type: ignore[misc]
        elif boxes and rank == 3 and targets.dtype.kind == "f":
            self.output_kind = "boxes"  # type: ignore[misc]
        # Images are recognised by their channels only where they come last; else any tensor will do.
        image = len(self.input.shape) == 4 and self.input.shape[-1] in (1, 3, 4)
        self.input_kind = "image" if image and len(self._specs) == 1 else "tensor"  # type: ignore[misc]

    # ------------------------------------------------------------------ data

    def _halved(self) -> int:
        """Items that calibrate, where the data do not say which."""
        return 0 if self._arrays.calibration else self._arrays.count // 2

    def evaluation(self) -> Items:
        start = self._halved()
        items = onnx_data.as_items(self._arrays.inputs, self._specs)
        return items[start:], self._arrays.targets[start:]  # type: ignore[return-value]

    def calibration(self) -> Items:
        stored = self._arrays.calibration or {
            name: value[: self._halved()] for name, value in self._arrays.inputs.items()
        }
        items = onnx_data.as_items(stored, self._specs)
        return items, np.zeros(len(items), np.int64)  # type: ignore[return-value]

    def _load_split(self, split: str) -> TaskData | None:
        if split not in ("evaluation", "calibration"):
            return None
        inputs, targets = self.guard(f"{split}()", getattr(self, split))
        if not len(inputs):
            raise InvalidInput(f"'{self._data_file.name}' leaves no data for {split}.", "Give more items.")
        return TaskData(inputs, targets)

    def save(self, directory: Path, model: nn.Module | None = None) -> TaskFiles:
        directory.mkdir(parents=True, exist_ok=True)
        files = TaskFiles(directory / "weights.onnx", directory / "data.npz")
        files.weights.write_bytes(self.onnx_file.read_bytes())
        self.save_data(files.data)
        return files

    def save_data(self, path: Path) -> None:
        found = {split: self.data(split) for split in STORED_SPLITS}
        arrays: dict[str, Any] = {}
        for split, data in found.items():
            if data is not None:
                arrays |= {f"{split}:inputs": data.inputs, f"{split}:targets": data.targets}
        if self.labels:
            arrays["labels"] = np.array(self.labels)
        np.savez_compressed(path, **arrays)

    @cached_property
    def weights_digest(self) -> str:
        return digest_of_file(self.onnx_file)

    # ------------------------------------------------------------------ answers

    @cached_property
    def _session(self) -> Any:
        return onnx_graph.session(self.onnx_file.read_bytes())

    def predict(self, model: Any, inputs: np.ndarray, batch: int = 32) -> np.ndarray:
        """Outputs of the ONNX file itself; `model` is ignored, since there is no torch module."""
        specs = self._specs
        step = max(1, specs[0].shape[0]) if specs[0].shape[0] > 0 else batch
        named = Signature(specs, ())

        def forward() -> np.ndarray:
            return np.concatenate(
                [
                    self._session.run(self._outputs[:1], by_name(inputs[i : i + step], named))[0]
                    for i in range(0, len(inputs), step)
                ]
            )

        return self.guard("model", forward)

    @cached_property
    def signature(self) -> Signature:
        """The endpoint's signature: every input and output of the file, the judged output first.

        Raises:
            InvalidInput: targets that do not fit the answers.
        """
        from shoal_optimizer import signatures

        item = self.required("evaluation").inputs[:2]
        batch = self._specs[0].shape[0]
        feed = by_name(item[:1], Signature(self._specs, ()))
        answers = self.guard("model", lambda: self._session.run(list(self._outputs), feed))
        specs = [
            TensorSpec(name, datatype_of(value.dtype), (batch, *value.shape[1:]))
            if value.shape[:1] == (1,)
            else TensorSpec(name, datatype_of(value.dtype), tuple(value.shape))
            for name, value in zip(self._outputs, answers, strict=True)
        ]
        outputs = answers[0]
        signatures.check_output(self, replace(specs[0], shape=(-1, *outputs.shape[1:])), outputs)
        if self.output_kind == "logits":
            self._check_classes(outputs)
        if self.metric_name == "map50":
            signatures.check_boxes(self)
        return replace(self.declared, inputs=self._specs, outputs=tuple(specs))

    def _check_classes(self, outputs: np.ndarray) -> None:
        """Class numbers [n, ...] for logits [n, ..., classes]."""
        targets, classes = self._arrays.targets, outputs.shape[-1]
        if targets.shape[1:] != outputs.shape[1:-1]:
            raise InvalidInput(
                f"The targets are {list(targets.shape)}, the answers {[-1, *outputs.shape[1:]]}.",
                "Give one class number for each answer of an item.",
            )
        if targets.min() < 0 or targets.max() >= classes:
            raise InvalidInput(
                f"The targets go from {targets.min()} to {targets.max()}, the model has {classes} logits.",
                "Number the classes from 0 in the order of the logits.",
            )


def _columns(items: np.ndarray) -> dict[str, np.ndarray]:
    return {"": items} if items.dtype.names is None else {name: items[name] for name in items.dtype.names}


def _spec(value: Any) -> TensorSpec:
    tensor = value.type.tensor_type
    datatype = _DATATYPES.get(tensor.elem_type)
    if datatype is None:
        raise InvalidInput(
            f"The input '{value.name}' has an element type that applications cannot send "
            f"({'text' if tensor.elem_type == 8 else tensor.elem_type}).",
            "Use a plain number type.",
        )
    return TensorSpec(value.name, datatype, tuple(dim.dim_value or -1 for dim in tensor.shape.dim))
