"""Can the model be converted, and does the converted one answer the same, in batches of any size?"""

from __future__ import annotations

import re
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from shoal_optimizer.checks.report import CheckReport
from shoal_optimizer.task import Task
from shoal_protos.errors import InvalidInput, ShoalError

_MISSING = re.compile(r"OpOverload\(op='([\w.]+)'")
SIZES = (1, 3)


def check_export(report: CheckReport, task: Task) -> None:
    """ONNX export, parity in ONNX Runtime, batches of other sizes."""
    from shoal_optimizer.targets.base import find, load_exported, run_instance

    model = task.original if task.has_module else None
    began = time.perf_counter()
    try:
        exported = find("onnxruntime").export(model, task)
    except InvalidInput as error:
        raise _explained(error, task) from error
    report.facts["export_s"] = time.perf_counter() - began
    facts = exported.facts
    report.facts["export"] = {
        "size_bytes": exported.size_bytes,
        "parity_max": facts["parity_max"],
        "parity_agreement": facts["parity_agreement"],
    }
    instance = load_exported(exported)
    try:
        inputs = task.required("evaluation").inputs[: sum(SIZES)]
        wanted = task.predict(model, inputs)  # type: ignore[arg-type]
        start = 0
        for size in SIZES:
            part = inputs[start : start + size]
            if not len(part):
                break
            began = time.perf_counter()
            got = run_instance(instance, exported.signature, part, batch=size)
            report.facts["onnx_item_s"] = (time.perf_counter() - began) / len(part)
            expected = wanted[start : start + size]
            scale = float(np.abs(expected).max()) or 1.0
            if got.shape != expected.shape or float(np.abs(got - expected).max()) > 1e-3 + 1e-2 * scale:
                raise InvalidInput(
                    f"The converted model answers differently in a batch of {size}.",
                    "Avoid fixed batch sizes in forward(): x.reshape(len(x), -1), not x.reshape(8, -1).",
                )
            start += size
    finally:
        instance.close()
    agreement = facts["parity_agreement"]
    same = f", {agreement:.0%} equal answers" if agreement is not None else ""
    report.add(
        "export",
        f"ONNX, {exported.size_bytes / 1e6:.2f} MB; off by at most {facts['parity_max']:.2g}{same}; "
        + ("batches of one" if task.signature.inputs[0].shape[0] == 1 else "any batch"),
    )


def _explained(error: InvalidInput, task: Task) -> ShoalError:
    """The same error with the operation and the layer, or the line of the user's code."""
    text = "\n".join(str(part) for part in _chain(error))
    found = _MISSING.search(text)
    if found:
        operation = found.group(1).removeprefix("aten.")
        layer = _layer_of(task, operation.rpartition(".")[2])
        where = f" in {layer}" if layer else ""
        return InvalidInput(
            f"The operation '{operation}'{where} has no ONNX form.",
            "Write it with plain operations (torch.nn, arithmetic, matmul), or move it into the application.",
        )
    line = _line_of(error, task.directory)
    if line and ("data-dependent" in text or "control flow" in text or "guard on" in text):
        return InvalidInput(
            f"forward() decides by values that are only known later: {line}.",
            "Use torch.where() instead of `if` on a tensor, fixed counts instead of loops over values.",
        )
    if line:
        return InvalidInput(f"{error.message} At {line}.", error.remedy)
    return error


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen = 0
    while error is not None and seen < 10:
        yield error
        error, seen = error.__cause__ or error.__context__, seen + 1


def _layer_of(task: Task, operation: str) -> str:
    """`stage2.act (SiLU)`: the layer whose forward() uses an operation; "" when it can't be told."""
    import torch

    try:
        item = torch.from_numpy(np.ascontiguousarray(task.required("evaluation").inputs[:2]))
        program = torch.export.export(task.pipeline(task.original), (item,))
        for node in program.graph.nodes:
            name = str(node.target).removeprefix("aten.").partition(".")[0]
            if node.op == "call_function" and (name == operation or name.endswith(f"_{operation}")):
                return _layer_name(node.meta.get("nn_module_stack") or {})
    except Exception:
        return ""  # the export's own error is told instead
    return ""


def _layer_name(stack: dict[str, Any]) -> str:
    if not stack:
        return ""
    path, kind = list(stack.values())[-1]
    shown = kind if isinstance(kind, str) else kind.__name__
    return f"{path or 'the model'} ({shown.rpartition('.')[2]})"


def _line_of(error: BaseException, folder: Path) -> str:
    """`net.py, line 12: if x.sum() > 0:`, the deepest line of the user's own code."""
    for part in list(_chain(error))[::-1]:
        frames = traceback.extract_tb(part.__traceback__)
        own = [
            f for f in frames if Path(f.filename).is_relative_to(folder) and "site-packages" not in f.filename
        ]
        if own:
            return f"{Path(own[-1].filename).name}, line {own[-1].lineno}: {(own[-1].line or '').strip()}"
    return ""
