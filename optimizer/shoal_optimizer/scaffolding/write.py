"""The written task: from what was found to a Python file that a newcomer can read and edit."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from shoal_optimizer.scaffolding.found import Found
from shoal_optimizer.scaffolding.models import OwnModel, Scaling, own_scaling

WIDTH = 88
TRAINING_FLOPS = 45 * 4e9  # of the built-in network: under a minute on a slow core
COMPRESSED_BYTES = 64 << 20  # larger data are packed as they are: speed counts more


def pack_data(found: Found, path: Path) -> None:
    """Writes the arrays that the task reads. Equal data give equal bytes."""
    write = np.savez_compressed if found.inputs.nbytes < COMPRESSED_BYTES else np.savez
    partial_path = path.with_name(f".{path.name}.partial.npz")
    write(partial_path, inputs=found.inputs, targets=found.targets, evaluation=found.evaluation)
    partial_path.replace(path)


def text(
    found: Found, own: OwnModel | None, *, file: str, data: str, weights: str, source: str, note: str
) -> str:
    """The task file."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(  # noqa: S701  # Python, not HTML; what comes from data is quoted by repr
        loader=PackageLoader("shoal_optimizer", "scaffolding"),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
        keep_trailing_newline=True,
    )
    stem = Path(file).stem
    network, blocks, macs = _network(found)
    scaled_target = own is None and found.output_kind == "values"
    epochs, batch = _schedule(len(found.training_inputs), macs)
    scaling = own.scaling if own is not None and own.scaling is not None else own_scaling(found)
    values: dict[str, Any] = {
        "title": stem.replace("_", " ").strip().capitalize(),
        "class_name": class_name(stem),
        "file": file,
        "source": _harmless(source),
        "data": data,
        "weights": own.weights if own is not None else weights,
        "facts": [_wrapped(f"{name}: {_harmless(value)}") for name, value in found.facts],
        "labels": found.labels,
        "table": found.table,
        "own": own,
        "scaling": scaling,
        "scaling_note": note,
        "scaled_target": scaled_target,
        "target_scaling": _target_scaling(found) if scaled_target else None,
        "kind": found.input_kind,
        "output_kind": found.output_kind,
        "rank": found.inputs.ndim,
        "channel_axis": own.channel_axis if own is not None else True,
        "prepare_doc": _prepare_doc(found),
        "answers": f"{found.outputs} logits" if found.output_kind == "logits" else f"{found.outputs} values",
        "task_doc": "Which of the classes is it?" if found.output_kind == "logits" else "How much is it?",
        "network": network,
        "blocks": blocks,
        "width": found.table.width if found.table is not None else math.prod(found.inputs.shape[1:]),
        "outputs": found.outputs,
        "epochs": epochs,
        "batch": batch,
        "duration": _duration(epochs, len(found.training_inputs), macs),
        "spec_text": _spec(found),
        "color": found.color,
        "resize": found.resize,
        "sample_rate": found.sample_rate,
        "units": "",
        "files": _quoted([data, *(own.files if own is not None else ())]),
        "listing": listing,
        "tuple": _tuple,
    }
    rendered = environment.get_template("task.py.j2").render(values)
    return re.sub(r"\n{4,}", "\n\n\n", rendered)


def class_name(stem: str) -> str:
    """`traffic_signs` -> `TrafficSigns`."""
    return "".join(part[:1].upper() + part[1:] for part in stem.split("_") if part) or "Mine"


def listing(name: str, values: Sequence[Any], comment: str = "") -> str:
    """A constant tuple: one line if it fits, else a value a line."""
    tail = f"  # {comment}" if comment else ""
    single = f"{name} = {_tuple(values)}"
    if len(single) + len(tail) <= WIDTH:
        return single + tail
    lines = "".join(f"    {_value(value)},\n" for value in values)
    return f"{name} = ({tail}\n{lines})"


def _tuple(values: Sequence[Any]) -> str:
    inside = ", ".join(_value(value) for value in values)
    return f"({inside},)" if len(values) == 1 else f"({inside})"


def _value(value: Any) -> str:
    if isinstance(value, str):
        return _text(value)
    return repr(float(value)) if isinstance(value, float) else repr(value)


def _text(value: str) -> str:
    """A Python literal in double quotes, as formatters like it."""
    quoted = repr(value)
    if quoted.startswith("'") and '"' not in value and "\\" not in quoted:
        return f'"{value}"'
    return quoted


def _quoted(names: Sequence[str]) -> str:
    return _tuple(list(dict.fromkeys(names)))


def _harmless(value: str) -> str:
    """Text that may stand in a docstring."""
    return value.replace("\\", "/").replace('"""', "'''")


def _wrapped(line: str) -> str:
    return textwrap.fill(line, WIDTH, initial_indent="    ", subsequent_indent="        ")


def _spec(found: Found) -> str:
    spec = found.input
    shape = ", ".join(str(d) for d in spec.shape)
    parts = [_text(spec.name), _text(spec.datatype), f"({shape})", _text(spec.layout)]
    if spec.low is not None:
        parts += [f"{spec.low:g}", f"{spec.high:g}"]
    return ", ".join(parts)


def _prepare_doc(found: Found) -> str:
    if found.table is not None:
        return "From raw rows, as applications send them, to what the network gets."
    if found.input_kind == "image":
        return "From pictures (bytes, NHWC) to what the network gets (NCHW, scaled)."
    if found.input_kind in ("series", "audio"):
        return "From raw samples to what the network gets, scaled."
    return "From raw values to what the network gets, scaled."


def _target_scaling(found: Found) -> Scaling:
    targets = found.training_targets.astype(np.float64).reshape(len(found.training_targets), -1)
    mean, std = targets.mean(axis=0), targets.std(axis=0)
    std = np.where(std > 1e-12, std, 1.0)
    if found.targets.ndim > 2 or len(mean) > 64:
        mean, std = np.array([targets.mean()]), np.array([targets.std() or 1.0])
    return Scaling("", *(tuple(float(f"{v:.6g}") for v in part) for part in (mean, std)))


def _network(found: Found) -> tuple[str, list[tuple[int, ...]], float]:
    """The built-in network's kind, its blocks and its multiply-accumulates an item."""
    if found.input_kind == "image":
        height, width, channels = found.inputs.shape[1:]
        return "image", *_image_blocks(height, width, channels)
    if found.input_kind in ("series", "audio"):
        length = found.inputs.shape[1]
        return "series", *_series_blocks(length, found.inputs.shape[2] if found.inputs.ndim == 3 else 1)
    wide = found.table.width if found.table is not None else math.prod(found.inputs.shape[1:])
    return "tensor", [], 64.0 * (wide + 64 + found.outputs)


def _image_blocks(height: int, width: int, channels: int) -> tuple[list[tuple[int, ...]], float]:
    """Halves the picture until it is about 4 pixels wide; large pictures are halved at once."""
    blocks: list[tuple[int, ...]] = []
    macs, last, out = 0.0, channels, 16 if max(height, width) > 48 else 32
    while True:
        side = min(height, width)
        stride = 2 if side >= 8 and (blocks or side > 48) else 1
        height, width = math.ceil(height / stride), math.ceil(width / stride)
        blocks.append((last, out, stride))
        macs += 9.0 * last * out * height * width
        last, out = out, min(128, out * 2)
        if (min(height, width) < 8 and len(blocks) >= 3) or len(blocks) == 6:
            return blocks, macs


def _series_blocks(length: int, channels: int) -> tuple[list[tuple[int, ...]], float]:
    blocks: list[tuple[int, ...]] = []
    macs, last, out = 0.0, channels, 32
    while True:
        kernel, stride = (33, 8) if not blocks and length >= 512 else (5, 2 if length >= 16 else 1)
        length = math.ceil(length / stride)
        blocks.append((last, out, kernel, stride))
        macs += 1.0 * kernel * last * out * length
        last, out = out, min(128, out * 2)
        if (length < 64 and len(blocks) >= 3) or len(blocks) == 6:
            return blocks, macs


def _duration(epochs: int, items: int, macs: float) -> str:
    seconds = epochs * 6.0 * macs * items / (TRAINING_FLOPS / 45)
    return "in a few seconds" if seconds < 10 else "in about a minute or two on one CPU core"


def _schedule(items: int, macs: float) -> tuple[int, int]:
    """Epochs and batch size that keep training to about a minute and give small data enough steps."""
    epoch = 6.0 * macs * items  # forward and backward, two operations each
    epochs = round(max(2.0, min(60.0, 40_000 / items, TRAINING_FLOPS / max(epoch, 1.0))))
    epochs = max(epochs, 2)
    return epochs, 32 if items < 20_000 else 128
