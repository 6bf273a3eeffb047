"""Which layers of a torch model make its outputs or its attentions' heads, and where forward() fails."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from shoal_optimizer.hooks import watching

if TYPE_CHECKING:
    from torch import Tensor, nn

HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads", "nhead")


def output_layers(model: Any, example: Any, inside: Any = None) -> list[Any]:
    """Weighted layers from which the model's output comes without another weighted layer between:
    their output channels are the model's, so they keep their width. Found in autograd's graph.

    Args:
        inside: a part of the model whose output is meant instead.
    """
    import torch
    from torch import nn

    weighted = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    made: dict[int, Any] = {}
    kept: list[Any] = []  # keeps grad_fns alive, so that ids stay unique
    starts: list[Any] = []

    def remember(layer: Any, args: Any, output: Any) -> None:
        if isinstance(output, torch.Tensor) and output.grad_fn is not None:
            made[id(output.grad_fn)] = layer
            kept.append(output.grad_fn)

    def result(layer: Any, args: Any, output: Any) -> None:
        first = output[0] if isinstance(output, (tuple, list)) else output
        if isinstance(first, torch.Tensor):
            starts.append(first.grad_fn)

    layers = [layer for layer in (inside or model).modules() if isinstance(layer, weighted)]
    hooks = [*((layer, remember) for layer in layers), (inside or model, result)]
    with watching(hooks), torch.enable_grad():
        # Also a frozen model gets a graph when its input asks for gradients.
        model(example.detach().clone().requires_grad_(True))
    found, seen, queue = [], set(), starts
    while queue:
        node = queue.pop()
        if node is None or id(node) in seen:
            continue
        seen.add(id(node))
        kept.append(node)
        if id(node) in made:
            found.append(made[id(node)])
            continue
        queue.extend(parent for parent, _ in node.next_functions)
    return found or layers[-1:]


def head_layers(model: Any, example: Any) -> list[Any]:
    """Linear and convolutional layers inside attentions that say their number of heads, but for those
    that make the attention's output: queries, keys and values keep their size."""
    from torch import nn

    found = []
    for part in model.modules():
        heads = next((h for n in HEADS if isinstance(h := getattr(part, n, None), int) and h > 1), 0)
        if not heads or isinstance(part, nn.MultiheadAttention):
            continue
        own = [layer for layer in part.modules() if isinstance(layer, (nn.Linear, nn.Conv1d, nn.Conv2d))]
        last = output_layers(model, example, inside=part)
        found += [layer for layer in own if not any(layer is one for one in last)]
    return found


def where_it_fails(model: nn.Module, example: Tensor) -> str:
    """ "in 'layer4.0', after 'layer4.0.conv1', " for a model whose forward() fails."""
    import torch

    entered: list[str] = []
    finished: list[str] = []

    def enter(name: str) -> Any:
        return lambda layer, args: entered.append(name)

    def leave(name: str) -> Any:
        def done(layer: Any, args: Any, output: Any) -> None:
            entered.remove(name)
            finished.append(name)

        return done

    handles = []
    for name, layer in model.named_modules():
        handles += [
            layer.register_forward_pre_hook(enter(name)),
            layer.register_forward_hook(leave(name)),
        ]
    try:
        with torch.no_grad():
            model(example)
    except Exception:
        inner = entered[-1] if entered and entered[-1] else f"{type(model).__name__}.forward()"
        after = f", after '{finished[-1]}'" if finished else ""
        return f"in '{inner}'{after}, "
    finally:
        for handle in handles:
            handle.remove()
    return ""
