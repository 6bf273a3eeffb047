"""Parts of a network that it can do without: whole blocks whose input and output have the same shape."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from shoal_optimizer.hooks import watching

if TYPE_CHECKING:
    from torch import Tensor, nn

# Operations that leave what passes through them recognisable: a path of these is a shortcut.
_LIGHT_METHODS = frozenset({"add", "add_", "relu", "relu_", "contiguous", "clone", "clamp", "clamp_"})
_ADDITIONS = frozenset({"add", "iadd", "add_"})


@dataclass(frozen=True)
class Unit:
    """Modules that become nothing together.

    Attributes:
        paths: their names in the model, in the order in which they run.
        residual: the unit has a shortcut from its input to its output, so that without it the input
            goes on as it is.
    """

    paths: tuple[str, ...]
    residual: bool

    @property
    def name(self) -> str:
        return self.paths[0]


@dataclass(frozen=True)
class Call:
    """How a module was called: shapes with the batch; `given` is None unless one tensor came first."""

    order: int
    count: int
    given: tuple[int, ...] | None
    made: tuple[int, ...] | None
    alone: bool  # nothing but that tensor was given


def example_of(task: Any, count: int = 2) -> Tensor:
    """What the model gets for the first evaluation items: float32 [count, ...], after preprocess."""
    import numpy as np
    import torch

    items = task.required("evaluation").inputs
    chosen = items[np.arange(count) % len(items)]
    with torch.no_grad():
        prepared: Tensor = task.pre(torch.from_numpy(np.ascontiguousarray(chosen)))
    return prepared


def calls_of(model: nn.Module, example: Tensor) -> dict[str, Call]:
    """Runs the model once and notes the calls of every module that was run."""
    import torch

    found: dict[str, Call] = {}

    def hook(path: str) -> Any:
        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            first = args[0] if args else None
            given = tuple(first.shape) if isinstance(first, torch.Tensor) else None
            made = tuple(output.shape) if isinstance(output, torch.Tensor) else None
            count = found[path].count + 1 if path in found else 1
            found[path] = Call(len(found), count, given, made, len(args) == 1 and not kwargs)

        return note

    hooks = ((module, hook(path)) for path, module in model.named_modules() if path)
    with watching(hooks, with_kwargs=True), torch.no_grad():
        model(example)
    return found


def units(model: nn.Module, example: Tensor) -> list[Unit]:
    """Everything that could go, in the order in which it runs; whether the model bears it is not tried.

    Residual blocks first of all, the innermost ones. Beside them, in plain chains: composite modules, and
    single linear or convolutional layers together with the normalisation that follows.
    """
    calls = calls_of(model, example)
    modules = dict(model.named_modules())
    residual = list(_residual(model, "", calls))
    taken = tuple(f"{path}." for path in residual)
    plain = [
        unit
        for unit in _plain(model, "", modules, calls)
        if not unit.name.startswith(taken)
        and not any(r.startswith(f"{unit.name}.") for r in residual)
        and unit.name not in residual
    ]
    found = [Unit((path,), True) for path in residual] + plain
    return sorted(found, key=lambda unit: calls[unit.name].order)


def _fits(path: str, calls: dict[str, Call]) -> bool:
    call = calls.get(path)
    return call is not None and call.count == 1 and call.given is not None and call.given == call.made


def _residual(module: nn.Module, path: str, calls: dict[str, Call]) -> Iterator[str]:
    """Names of the innermost modules with a shortcut past all of their weights."""
    inner = [
        found
        for name, child in module.named_children()
        for found in _residual(child, f"{path}.{name}".lstrip("."), calls)
    ]
    if inner:
        yield from inner
    elif path and list(module.children()) and _fits(path, calls) and _weighs(module) and has_shortcut(module):
        yield path


def _weighs(module: nn.Module) -> bool:
    return any(parameter.dim() >= 2 for parameter in module.parameters())


def _plain(
    module: nn.Module, path: str, modules: dict[str, nn.Module], calls: dict[str, Call]
) -> Iterator[Unit]:
    children = [(f"{path}.{name}".lstrip("."), child) for name, child in module.named_children()]
    chain = bool(children) and is_chain(module)
    for number, (name, child) in enumerate(children):
        inner = list(_plain(child, name, modules, calls))
        if inner or not chain or not _fits(name, calls) or not _mixes(child):
            yield from inner
            continue
        following = children[number + 1 : number + 2]
        norms = [n for n, m in following if _is_norm(m) and _fits(n, calls)]
        yield Unit((name, *([] if list(child.children()) else norms)), False)


def _mixes(module: nn.Module) -> bool:
    """True where channels are mixed: a filter per channel is a matter of the kernel, not of depth."""
    from torch import nn
    from torch.nn.modules.conv import _ConvNd

    return any(
        isinstance(part, nn.Linear)
        or (isinstance(part, _ConvNd) and part.groups < part.in_channels)
        or (isinstance(part, _ConvNd) and part.in_channels == part.groups == 1)
        for part in module.modules()
    )


def _is_norm(module: nn.Module) -> bool:
    return "Norm" in type(module).__name__


def _is_light(module: nn.Module) -> bool:
    """Activations, normalisation, dropout, nothing: no weight matrix, and one tensor in and out."""
    kind = type(module)
    if kind.__module__.startswith(("torch.nn.modules.activation", "torch.nn.modules.dropout")):
        return kind.__name__ != "MultiheadAttention"
    return kind.__name__ == "Identity" or _is_norm(module)


def _graph_of(module: nn.Module) -> Any:
    """The module's own operations as a torch.fx graph, None where tracing fails (control flow on data)."""
    import torch.fx

    try:
        return torch.fx.symbolic_trace(module).graph
    except Exception:  # whatever the user's forward() raises under tracing
        return None


def has_shortcut(module: nn.Module) -> bool:
    """True if the input reaches the output through additions, activations and normalisation alone."""
    graph = _graph_of(module)
    if graph is None:
        return False
    parts = dict(module.named_modules())
    queue = [node for node in graph.nodes if node.op == "output"]
    added, seen = False, set()
    while queue:
        node = queue.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.op == "placeholder":
            return added
        if node.op == "output" or _passes(node, parts):
            added = added or _adds(node)
            queue.extend(node.all_input_nodes)
    return False


def _adds(node: Any) -> bool:
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return name in _ADDITIONS and len(node.all_input_nodes) == 2


def _passes(node: Any, parts: dict[str, nn.Module]) -> bool:
    if node.op == "call_module":
        return _is_light(parts[node.target])
    if node.op == "call_method":
        return node.target in _LIGHT_METHODS
    if node.op != "call_function":
        return False
    if node.target in (operator.add, operator.iadd):
        return True
    name = getattr(node.target, "__name__", "")
    home = getattr(node.target, "__module__", "") or ""
    return name in _ADDITIONS | _LIGHT_METHODS or (
        home == "torch.nn.functional"
        and "norm" not in name
        and name in ("relu", "relu6", "silu", "gelu", "hardswish", "leaky_relu", "dropout")
    )


def is_chain(module: nn.Module) -> bool:
    """True if each operation of the module's forward() takes the one before it and nothing else."""
    from torch import nn

    if type(module) is nn.Sequential:
        return True
    graph = _graph_of(module)
    if graph is None:
        return False
    return all(
        len(node.all_input_nodes) <= 1 and (len(node.users) == 1 or node.op == "output")
        for node in graph.nodes
        if node.op != "get_attr"
    )
