"""An ONNX file with its `.npz`: a task without training, made ready where it lies."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np

from shoal_optimizer.scaffolding.arrays import load
from shoal_protos.errors import InvalidInput, MissingExtra

BATCH = "batch"


def prepare(source: Path, out: Path, data: Path | None) -> tuple[list[str], list[str]]:
    """Puts the model at `out` and its data beside it, as `OUT.npz`, and gives the model a dynamic batch.

    Returns:
        What was decided, and warnings.

    Raises:
        InvalidInput: no ONNX file, no data, or a fixed batch above 1 that the model's operations insist on.
    """
    data = data or source.with_suffix(".npz")
    if not data.is_file():
        raise InvalidInput(
            f"There is no data to judge {source.name} by: {data} is missing.",
            "Write numpy.savez(path, inputs=..., targets=...) and name it with --data, or give it the "
            "model's name.",
        )
    arrays = load(data)
    decided: list[str] = []
    model = _dynamic(source, arrays.get("inputs"), decided)
    out.parent.mkdir(parents=True, exist_ok=True)
    if model is not None:
        out.write_bytes(model.SerializeToString())
    elif source.resolve() != out.resolve():
        shutil.copyfile(source, out)
    target = out.with_suffix(".npz")
    if data.resolve() != target.resolve():
        shutil.copyfile(data, target)
        decided.append(f"The data are copied to {target.name}, which travels with the model.")
    warnings = []
    if not any(name.partition(":")[0] == "calibration" for name in arrays):
        decided.append("Half of the items choose int8 ranges, the other half judges.")
    if "labels" not in arrays:
        warnings.append(f"{target.name} has no array `labels` with the class names; answers will be numbers.")
    return decided, warnings


def _dynamic(source: Path, inputs: np.ndarray | None, decided: list[str]) -> Any:
    """The model with a dynamic batch, None when it has one already."""
    try:
        import onnx
    except ImportError as error:
        raise MissingExtra("optimizer", "onnx") from error
    try:
        model = onnx.load(str(source))
    except Exception as error:
        raise InvalidInput(f"{source.name} is no ONNX model: {error}.", "Export it again.") from error
    constants = {item.name for item in model.graph.initializer}
    values = [item for item in model.graph.input if item.name not in constants]
    fixed = [v for v in values if v.type.tensor_type.shape.dim and v.type.tensor_type.shape.dim[0].dim_value]
    if not fixed or len(values) > 1:
        return None  # with several inputs loading decides, which knows what is fixed
    size = fixed[0].type.tensor_type.shape.dim[0].dim_value
    for value in (*values, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = BATCH
    del model.graph.value_info[:]
    if not _works(model, inputs):
        if size == 1:
            decided.append("The batch stays 1: the model's operations insist on it.")
            return None
        raise InvalidInput(
            f"{source.name} has a fixed batch of {size} that its operations insist on.",
            'Export it again with dynamic_shapes={"x": {0: torch.export.Dim("batch")}} '
            "(or dynamic_axes of the older exporter).",
        )
    decided.append(f"The batch was fixed to {size}; it is dynamic now (answers are equal, checked).")
    return model


def _works(model: Any, inputs: np.ndarray | None) -> bool:
    """True when batches of 1 and 3 give the same answers."""
    import onnxruntime

    if inputs is None or len(inputs) < 3:
        return False
    try:
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        name = session.get_inputs()[0].name
        together = session.run(None, {name: inputs[:3]})[0]
        alone = np.concatenate([session.run(None, {name: inputs[i : i + 1]})[0] for i in range(3)])
    except Exception:
        return False  # whatever it raises: the model wants its batch
    return bool(together.shape == alone.shape and np.allclose(together, alone, rtol=1e-3, atol=1e-4))
