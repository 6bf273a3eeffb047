"""`If` nodes whose condition is a constant, replaced by the branch that is taken.

ONNX Runtime does the same when it loads a model, but 1.32 crashes on nested ones (silero-vad with a fixed
sample rate), and quantizers see no node inside a branch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

ROUNDS = 32  # of nesting


def inlined(model: Any) -> tuple[Any, int]:
    """The model without the `If` nodes that constants decide, and how many there were."""
    made = type(model).FromString(model.SerializeToString())
    count = 0
    for _ in range(ROUNDS):
        found = [node for node in made.graph.node if node.op_type == "If"]
        decided = [(node, value) for node in found if (value := _constant(made, node.input[0])) is not None]
        if not decided:
            break
        for node, value in decided:
            _replace(made.graph, node, bool(np.asarray(value).reshape(-1)[0]), count)
            count += 1
    return made, count


def _constant(model: Any, name: str) -> np.ndarray | None:
    """The value of a tensor that depends on constants alone; None otherwise."""
    from onnx import helper, numpy_helper
    from onnx.reference import ReferenceEvaluator

    makers = {output: node for node in model.graph.node for output in node.output}
    stored = {item.name: item for item in model.graph.initializer}
    if name in stored:
        value: np.ndarray = numpy_helper.to_array(stored[name])
        return value
    needed: set[int] = set()
    weights: dict[str, Any] = {}
    todo = [name]
    while todo:
        wanted = todo.pop()
        if not wanted or wanted in weights:
            continue
        if wanted in stored:
            weights[wanted] = stored[wanted]
            continue
        node = makers.get(wanted)
        if node is None or any(a.HasField("g") for a in node.attribute):
            return None  # an input, or control flow
        if id(node) not in needed:
            needed.add(id(node))
            todo += node.input
    nodes = [node for node in model.graph.node if id(node) in needed]
    graph = helper.make_graph(
        nodes, "condition", [], [helper.make_empty_tensor_value_info(name)], list(weights.values())
    )
    try:
        made = helper.make_model(graph, opset_imports=model.opset_import)
        answers: Any = ReferenceEvaluator(made).run([name], {})
        return np.asarray(answers[0])
    except Exception:
        return None  # then the node stays: whatever could not be computed is no reason to refuse a model


def _replace(graph: Any, node: Any, taken: bool, number: int) -> None:
    from onnx import helper

    wanted = "then_branch" if taken else "else_branch"
    branch = next(a.g for a in node.attribute if a.name == wanted)
    prefix = f"{node.name or 'If'}_{number}_"
    own = {item.name for item in branch.initializer} | {n for inner in branch.node for n in inner.output if n}
    names = {name: prefix + name for name in own}
    place = next(i for i, other in enumerate(graph.node) if other.output[:] == node.output[:])
    del graph.node[place]
    for item in branch.initializer:
        kept = graph.initializer.add()
        kept.CopyFrom(item)
        kept.name = names[item.name]
    made = [_renamed(inner, names, prefix) for inner in branch.node]
    made += [
        helper.make_node("Identity", [names.get(inner.name, inner.name)], [outer], f"{prefix}{outer}_out")
        for inner, outer in zip(branch.output, node.output, strict=True)
        if outer
    ]
    for step, inner in enumerate(made):
        graph.node.insert(place + step, inner)


def _renamed(node: Any, names: Mapping[str, str], prefix: str) -> Any:
    made = type(node).FromString(node.SerializeToString())
    made.name = prefix + node.name if node.name else ""
    made.input[:] = [names.get(name, name) for name in node.input]
    made.output[:] = [names.get(name, name) for name in node.output]
    for attribute in made.attribute:
        if attribute.HasField("g"):
            _rename_inside(attribute.g, names)
    return made


def _rename_inside(graph: Any, names: Mapping[str, str]) -> None:
    """References from an inner graph to renamed outer tensors; what the inner graph defines hides them."""
    hidden = {item.name for item in graph.initializer} | {item.name for item in graph.input}
    hidden |= {name for node in graph.node for name in node.output}
    outer = {old: new for old, new in names.items() if old not in hidden}
    for node in graph.node:
        node.input[:] = [outer.get(name, name) for name in node.input]
        for attribute in node.attribute:
            if attribute.HasField("g"):
                _rename_inside(attribute.g, outer)
    for item in graph.output:
        item.name = outer.get(item.name, item.name)
