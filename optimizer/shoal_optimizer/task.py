"""The task: the only code a user writes.

A task names a trained model, the data to judge it by and the endpoint's signature. This module
imports no torch; it is loaded when a task's model, loss or augmentation is used.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, cast

import numpy as np

from shoal_agent.detection import mean_precision
from shoal_agent.runtimes.tensors import datatype_of
from shoal_optimizer import signatures
from shoal_optimizer.boxes import matches
from shoal_optimizer.data import Items, materialise, read_split
from shoal_optimizer.data import TaskData as TaskData
from shoal_optimizer.inputs import Reader
from shoal_optimizer.weights import load_module as load_module
from shoal_optimizer.weights import require_torch as require_torch
from shoal_optimizer.weights import save_module as save_module
from shoal_protos.bundle import BoxRule, Signature, TensorSpec, canonical_json, digest_of
from shoal_protos.errors import InvalidInput, ShoalError, Unsupported

if TYPE_CHECKING:
    from torch import Tensor, nn

SPLITS = ("calibration", "evaluation", "training", "unlabelled", "holdout", "shifted")
STORED_SPLITS = ("calibration", "evaluation", "training", "unlabelled")  # the others Shoal never sees

_PREDICT_BYTES = 8 << 20  # of a batch of inputs

_T = TypeVar("_T")


@dataclass(frozen=True)
class TaskFiles:
    """What an ingest stores by content: the trained module (or ONNX file) and the data."""

    weights: Path
    data: Path


class Task:
    """Base class of a user's task. Override what the model needs; the rest has defaults.

    Class attributes:
        input: the endpoint's input as applications send it: name, datatype, shape with -1 in the
            batch dimension, layout, value range.
        output: the endpoint's output; derived from the model when None.
        files: names of files beside the task file that travel with it, and nothing else does. A
            plain list of texts: pushing reads it without importing the file.
        optional_files: the same for files that need not be there, such as trained weights.
        labels: class names, in the order of the logits.
        input_kind: "image", "audio", "series" or "tensor"; output_kind: "logits", "boxes" or "values".
        color, resize, pad: the colour order of images, and how pictures of another size are brought to
            the input's ("stretch", "letterbox" with bars of the value `pad`, "crop").
        sample_rate: of audio and series, Hz. units: of values.
        boxes: how the candidates of the output kind "boxes" become the answer.

    Inputs may be given as files: a path (relative to the task file) or a Pillow image for the input
    kind "image", the path of a .wav for "audio"; they are decoded as clients decode them.

    Kind "boxes": the output is FP32 [-1, candidates, 4 + labels], see `BoxRule`. A target is float32
    [boxes, 5]: x1, y1, x2, y2 as shares of the input's width and height, and the class; items may have
    different numbers of boxes. Shares are of the picture where the input is given as one.
    """

    name: ClassVar[str] = ""
    files: ClassVar[Sequence[str]] = ()
    optional_files: ClassVar[Sequence[str]] = ()
    input: ClassVar[TensorSpec]
    output: ClassVar[TensorSpec | None] = None
    labels: ClassVar[Sequence[str]] = ()
    input_kind: ClassVar[str] = "tensor"
    output_kind: ClassVar[str] = "values"
    color: ClassVar[str] = ""
    resize: ClassVar[str] = ""
    units: ClassVar[str] = ""
    pad: ClassVar[int] = 114
    sample_rate: ClassVar[int] = 0
    boxes: ClassVar[BoxRule | None] = None

    directory: Path = Path()  # where the task file and its files are
    source: Path = Path()  # the task file itself
    seed: int = 0
    cache_dir: Path | None = None  # exported graphs and calibration ranges are kept here when set
    stored_weights: Path | None = None  # set: `original` comes from there, not from `model()`
    stored_data: Path | None = None

    # ------------------------------------------------------------------ what a user writes

    def model(self) -> nn.Module:
        """The trained module. Gets `preprocess`'s output, gives logits or values."""
        raise NotImplementedError

    def calibration(self) -> Items | None:
        """Inputs to choose int8 ranges from; None = some of the training data."""
        return None

    def evaluation(self) -> Items:
        """The data that accuracy is measured on."""
        raise NotImplementedError

    def training(self) -> Items | None:
        """The data for fine-tuning; None = conversion and quantization only."""
        return None

    def unlabelled(self) -> Any:
        """More inputs like those of `training()`, without targets: an iterable of inputs, or one array
        [n, ...]. Students learn the original's answers to them. None = there are none."""
        return None

    def holdout(self) -> Items | None:
        """Data that Shoal never sees; `shoal demo` sends it as traffic."""
        return None

    def shifted(self) -> Items | None:
        """The same world after a real change, for `shoal demo`; None = it corrupts `holdout()` itself."""
        return None

    def preprocess(self) -> nn.Module | None:
        """From the endpoint's input to the model's input; goes into every variant, never quantized."""
        return None

    def postprocess(self) -> nn.Module | None:
        """From the model's output to the endpoint's output; goes into every variant."""
        return None

    def augment(self, inputs: Tensor) -> Tensor:
        """Random training-time changes of a float32 batch of endpoint inputs (before preprocess)."""
        return inputs

    def architecture(self, width: float, depth: float, kernel: int, resolution: float) -> nn.Module:
        """An untrained network of the model's family for the technique `architecture`, which gives it the
        original's weights where names and shapes allow. Not needed: without it Shoal finds what can be
        varied in the model itself.

        Args:
            width: share of the channels, 1.0 = all. depth: share of the blocks that can go.
            kernel: largest kernel size, 0 = as it is. resolution: share of the input's sides; the network
                gets the whole input and makes it smaller itself.
        """
        raise NotImplementedError

    def metric(self, outputs: np.ndarray, targets: np.ndarray) -> float:
        """Higher is better. Default: share of right answers for logits, R squared for values, mean
        average precision at IoU 0.5 of what `detection.suppress` leaves for boxes."""
        if self.output_kind == "logits":
            return float(np.mean(outputs.argmax(axis=-1) == targets))
        if self.output_kind == "boxes":
            return mean_precision(matches(outputs, targets, self.box_rule))
        residual = float(np.sum((np.asarray(outputs, np.float64).reshape(targets.shape) - targets) ** 2))
        total = float(np.sum((targets - targets.mean(axis=0)) ** 2))
        return 1.0 - residual / total if total else float("nan")

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Fine-tuning loss of the model's outputs (before postprocess). Default by output kind; boxes
        have none, since only the task knows how its head encodes them."""
        from torch.nn import functional

        if self.output_kind == "boxes":
            raise NotImplementedError
        if self.output_kind == "logits":
            return functional.cross_entropy(outputs, targets.long())
        return functional.mse_loss(outputs, targets.reshape(outputs.shape).to(outputs.dtype))

    # ------------------------------------------------------------------ what Shoal calls

    @property
    def label(self) -> str:
        """The model's name for people and registries."""
        return self.name or type(self).__name__.lower()

    @property
    def has_module(self) -> bool:
        """True when there is a torch module; an ONNX file can only be converted and quantized."""
        return True

    @property
    def onnx_file(self) -> Path:
        """The ONNX file that the task is made of. Raises Unsupported for a Python task."""
        raise Unsupported(f"{type(self).__name__} is a Python task.", "Use its torch module.")

    @property
    def trainable(self) -> bool:
        """True when there is a torch module and data to fine-tune it with."""
        return self.has_module and self.data("training") is not None

    @property
    def metric_name(self) -> str:
        if type(self).metric is not Task.metric:
            return "metric"
        return {"logits": "accuracy", "boxes": "map50"}.get(self.output_kind, "r2")

    @property
    def box_rule(self) -> BoxRule:
        """`boxes`, or the rule's defaults."""
        return self.boxes or BoxRule()

    @property
    def counts_correct(self) -> bool:
        """True when the metric is a share of right answers, so a binomial interval holds."""
        return self.metric_name == "accuracy"

    @cached_property
    def _splits(self) -> dict[str, TaskData | None]:
        return {}

    def data(self, split: str) -> TaskData | None:
        """A split, materialised once; None when the task has none.

        Raises:
            InvalidInput: the method raises, is empty, or gives wrong shapes, types or values.
        """
        if split not in self._splits:
            self._splits[split] = self._load_split(split)
        return self._splits[split]

    def required(self, split: str) -> TaskData:
        """Like `data`, refusing a task that has no such split."""
        found = self.data(split)
        if found is None:
            raise InvalidInput(
                f"{type(self).__name__}.{split}() gives no data.",
                f"Return an iterable of (inputs, target) pairs from {split}().",
            )
        return found

    def calibration_data(self, count: int = 300) -> TaskData:
        """Up to `count` items for int8 ranges: `calibration()`, else training, else evaluation data."""
        found = self.data("calibration") or self.data("training") or self.required("evaluation")
        return found.sample(count, self.seed)

    def _load_split(self, split: str) -> TaskData | None:
        if self.stored_data is not None and split in STORED_SPLITS:
            return read_split(self.stored_data, split)
        with seeded(self.seed):
            items = self.guard(f"{split}()", getattr(self, split))
            if items is None:
                return None
            where = f"{type(self).__name__}.{split}()"
            if split == "unlabelled":
                items = self._paired(items)
            # A generator runs the user's code while it is read.
            reader = Reader(self.declared, self.directory)
            return self.guard(f"{split}()", lambda: materialise(items, self.input, where, reader))

    def _paired(self, inputs: Any) -> Any:
        """Inputs with empty targets, which nobody reads."""
        boxes = self.output_kind == "boxes"
        if getattr(inputs, "ndim", -1) == len(self.input.shape):
            return inputs, np.zeros((len(inputs), 0, 5) if boxes else len(inputs), np.float32)
        return ((one, np.zeros((0, 5) if boxes else (), np.float32)) for one in inputs)

    def guard(self, field: str, call: Callable[[], _T]) -> _T:
        """Runs the user's code; what it raises becomes an InvalidInput that names `field`."""
        try:
            return call()
        except ShoalError:
            raise
        except NotImplementedError as error:
            raise InvalidInput(
                f"{type(self).__name__}.{field} is not implemented.", f"Write {field} in the task file."
            ) from error
        except FileNotFoundError as error:
            raise InvalidInput(
                f"{type(self).__name__}.{field} found no file: {error.filename or error}.",
                "Put it beside the task file and name it in `files`.",
            ) from error
        except Exception as error:
            raise InvalidInput(
                f"{type(self).__name__}.{field} raised {type(error).__name__}: {error}.",
                "Run the task file by itself to see the whole traceback.",
            ) from error

    @cached_property
    def original(self) -> nn.Module:
        """The trained module in evaluation mode. Copy it before changing it.

        Raises:
            InvalidInput: `model()` raises or gives no module.
        """
        torch = require_torch()
        if self.stored_weights is not None:
            module = load_module(self.stored_weights)
        else:
            with seeded(self.seed):
                module = self.guard("model()", self.model)
        if not isinstance(module, torch.nn.Module):
            raise InvalidInput(
                f"{type(self).__name__}.model() gives {type(module).__name__}, not a torch.nn.Module.",
                "Return the trained module itself.",
            )
        from shoal_optimizer.techniques.masks import settled

        # Masks of torch.nn.utils.prune become permanent: such a module can be neither copied nor exported.
        return settled(module).float().eval()

    @cached_property
    def pre(self) -> nn.Module:
        """`preprocess()`, or a cast to float32 when there is none."""
        return self._part("preprocess")

    @cached_property
    def post(self) -> nn.Module:
        """`postprocess()`, or nothing."""
        return self._part("postprocess")

    def _part(self, name: str) -> nn.Module:
        torch = require_torch()
        module = self.guard(f"{name}()", getattr(self, name))
        if module is None:
            from shoal_optimizer.modules import ToFloat

            return ToFloat() if name == "preprocess" else cast("nn.Module", torch.nn.Identity())
        if not isinstance(module, torch.nn.Module):
            raise InvalidInput(
                f"{type(self).__name__}.{name}() gives {type(module).__name__}.",
                "Return a torch.nn.Module, or None.",
            )
        return cast("nn.Module", module.eval())

    def pipeline(self, model: nn.Module) -> nn.Module:
        """preprocess, `model`, postprocess as one module in evaluation mode: what is exported."""
        from shoal_optimizer.modules import Pipeline

        return Pipeline(self.pre, model, self.post).eval()

    @cached_property
    def signature(self) -> Signature:
        """The endpoint's signature, the output's shape taken from the model when not declared.

        Raises:
            InvalidInput: the model cannot run on the data, or contradicts the declaration.
        """
        outputs = self._probe_outputs()
        declared = self.output or TensorSpec(
            name=self.output_kind,
            datatype=datatype_of(outputs.dtype),
            shape=(-1, *outputs.shape[1:]),
        )
        signatures.check_output(self, declared, outputs)
        if self.counts_correct:
            signatures.check_targets(self, outputs.shape[-1])
        if self.metric_name == "map50":
            signatures.check_boxes(self)
        return replace(self.declared, outputs=(declared,))

    @property
    def declared(self) -> Signature:
        """The signature without the output: what is known before the model is."""
        return Signature(
            inputs=(self.input,),
            outputs=(),
            input_kind=self.input_kind,
            output_kind=self.output_kind,
            labels=tuple(self.labels),
            color=self.color,
            resize=self.resize,
            units=self.units,
            pad=self.pad,
            sample_rate=self.sample_rate,
            boxes=self.box_rule if self.output_kind == "boxes" else None,
        )

    def _probe_outputs(self) -> np.ndarray:
        return self.predict(self.original, self.required("evaluation").inputs[:2])

    def predict(self, model: nn.Module, inputs: np.ndarray, batch: int = 256) -> np.ndarray:
        """Endpoint outputs [n, ...] of a torch model for endpoint inputs [n, ...], by torch itself."""
        torch = require_torch()
        pipeline = self.pipeline(model)
        # Large inputs in smaller batches: activations are many times their size.
        batch = max(1, min(batch, _PREDICT_BYTES // max(inputs[:1].nbytes, 1)))

        def forward() -> np.ndarray:
            parts = []
            with torch.inference_mode():
                for start in range(0, len(inputs), batch):
                    output = pipeline(torch.from_numpy(np.ascontiguousarray(inputs[start : start + batch])))
                    parts.append(output.numpy())
            return np.concatenate(parts)

        return self.guard("model()", forward)

    def measured(self, outputs: np.ndarray, targets: np.ndarray) -> float:
        """The metric, refused unless it is a finite number.

        Raises:
            InvalidInput: the outputs contain NaN, `metric()` raises, or gives no finite number.
        """
        if np.isnan(outputs).any():
            share = float(np.isnan(outputs).reshape(len(outputs), -1).any(axis=1).mean())
            raise InvalidInput(
                f"The model of {type(self).__name__} answers NaN for {share:.0%} of the inputs.",
                "Look for divisions by zero, logarithms of zero and broken weights in the model.",
            )
        value = self.guard("metric()", lambda: self.metric(outputs, targets))
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise InvalidInput(
                f"{type(self).__name__}.metric() gives {value!r}.",
                "Return one finite number, higher meaning better.",
            )
        return number

    def save(self, directory: Path, model: nn.Module | None = None) -> TaskFiles:
        """Writes what later jobs need: weights (of `model`, else the original) and data."""
        directory.mkdir(parents=True, exist_ok=True)
        files = TaskFiles(directory / "weights.pt", directory / "data.npz")
        save_module(self.original if model is None else model, files.weights)
        self.save_data(files.data)
        return files

    def save_data(self, path: Path) -> None:
        """Writes the stored splits to one `.npz`; equal data give equal bytes."""
        arrays: dict[str, np.ndarray] = {}
        for split in STORED_SPLITS:
            data = self.data(split)
            if data is not None:
                arrays[f"{split}:inputs"] = data.inputs
                arrays[f"{split}:targets"] = data.targets
        np.savez_compressed(path, **arrays)  # type: ignore[arg-type]

    @cached_property
    def data_digest(self) -> str:
        """Digest over the stored splits: part of every variant's lineage."""
        found = {split: self.data(split) for split in STORED_SPLITS}
        return digest_of(canonical_json({k: v.digest for k, v in found.items() if v is not None}))


# ---------------------------------------------------------------------------- loading


def load_task(
    path: Path | str,
    *,
    seed: int = 0,
    weights: Path | None = None,
    data: Path | None = None,
) -> Task:
    """Imports the task in a Python file, or makes one of an ONNX file with its `.npz`.

    Args:
        weights, data: files that `Task.save` wrote; then `model()` and the data methods are not called.

    Raises:
        InvalidInput: the file is missing, raises, holds no Task or several, or names missing files.
    """
    from shoal_optimizer.loading import load_onnx_task, load_python_task

    path = Path(path).resolve()
    if not path.is_file():
        raise InvalidInput(f"There is no task file '{path}'.", "Check the path; `shoal task new` makes one.")
    task = load_onnx_task(path, data, weights) if path.suffix == ".onnx" else load_python_task(path)
    task.seed = seed
    task.stored_weights, task.stored_data = weights, data
    return task


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seeds the global generators for the user's code and puts their states back afterwards."""
    torch = require_torch()
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed % (1 << 32))
    torch.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
