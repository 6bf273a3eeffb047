"""Why a converter refused a model, in a sentence that names operator and layer, or the line that branches."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torch import nn

    from shoal_optimizer.task import Task

_OPERATORS = (
    re.compile(r"No ONNX function found for <OpOverload\(op='([\w.]+)'"),
    re.compile(r"target=torch\.ops\.([\w.]+?)\.\w+\]"),
    re.compile(r"convert function for op '(\w+)' not implemented"),
)
_LINE = re.compile(r'raised this error:\s+File "([^"]+)", line (\d+), in \w+\s+(\S[^\n]*)')
_DEPTH = 10  # of an exception's causes
_LENGTH = 300

BRANCH_REMEDY = "Write it with torch.where, or take it out of forward(): exported graphs have no branches."
OPERATOR_REMEDY = "Replace the operator, or move it to the application before or after the model."


def explain(error: BaseException, model: nn.Module | None, task: Task) -> tuple[str, str]:
    """(reason, remedy) of an exception that a converter raised; the remedy is "" where none is known."""
    texts = [str(part) for part in _chain(error)]
    for text in texts:
        found = _LINE.search(text)
        if found:
            where = f"{Path(found[1]).name}, line {found[2]}"
            return f"forward() depends on values at {where}: {found[3].strip()[:120]}", BRANCH_REMEDY
    for pattern in _OPERATORS:
        for text in texts:
            match = pattern.search(text)
            if match:
                operator = match[1]
                layer = layer_of(operator, model, task)
                place = f" in the layer {layer}" if layer else ""
                return f"the operator {operator}{place} has no counterpart there", OPERATOR_REMEDY
    lines = [line.strip() for line in texts[0].splitlines() if line.strip()]
    return f"{type(error).__name__}: {(lines or [''])[0][:_LENGTH]}", ""


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    for _ in range(_DEPTH):
        if error is None:
            return
        yield error
        error = error.__cause__ or error.__context__


def layer_of(operator: str, model: nn.Module | None, task: Task) -> str:
    """Path and class of the first module that runs an operator, "" when it can't be told.

    Args:
        operator: "aten._linalg_eigh", or without the namespace.
    """
    if model is None or not task.has_module:
        return ""
    import torch

    from shoal_optimizer.modules import Pipeline

    name = operator.rpartition(".")[2]
    pipeline = Pipeline(task.pre, model, task.post).eval()
    items = torch.from_numpy(np.ascontiguousarray(task.required("evaluation").inputs[:2]))
    with contextlib.suppress(Exception), torch.no_grad():  # the model may resist this too
        program = torch.export.export(pipeline, (items,))
        for graph in (program.graph, program.run_decompositions().graph):
            for node in graph.nodes:
                if node.op == "call_function" and name in str(node.target).split("."):
                    return _module(node)
    return ""


def _module(node: Any) -> str:
    stack = list(node.meta.get("nn_module_stack", {}).values())
    if not stack:
        return ""
    path, kind = stack[-1]
    return f"'{str(path).removeprefix('model.')}' ({str(kind).rpartition('.')[2]})"
