"""Feature hints: the student's inner outputs are pulled towards the teacher's, through adapters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from shoal_optimizer.hooks import watching
from shoal_protos.errors import InvalidInput, Unsupported

if TYPE_CHECKING:
    from torch import Tensor, nn

COUNT = 3  # pairs that are chosen when none are named
Pair = tuple[str, str]  # path in the student, path in the teacher


def parse(text: str) -> tuple[Pair, ...]:
    """ "layer1,layer2=blocks.1" -> (("layer1", "layer1"), ("layer2", "blocks.1"))."""
    found = []
    for part in filter(None, text.split(",")):
        mine, _, theirs = part.partition("=")
        found.append((mine, theirs or mine))
    return tuple(found)


class Hints:
    """The mean over pairs of layers of |A f_s - f_t|^2 / |f_t|^2, for the student's and the teacher's
    outputs f_s, f_t and a learned 1x1 map A (Romero et al., "FitNets: Hints for Thin Deep Nets", 2015).

    Divided by the teacher's power, every layer counts alike. The adapters A are trained along and thrown
    away. Use as a context: it listens to both networks.
    """

    def __init__(
        self, student: nn.Module, teacher: nn.Module, example: Tensor, pairs: Sequence[Pair] = ()
    ) -> None:
        """
        Args:
            example: prepared inputs, to find shapes with.
            pairs: chosen when empty: layers of equal path in both, spread over the depth.

        Raises:
            InvalidInput: a named layer does not exist or gives no single tensor.
            Unsupported: the networks have no layers of equal path.
        """
        import torch

        self._handles: list[Any] = []
        self._mine: dict[str, Tensor] = {}
        self._theirs: dict[str, Tensor] = {}
        mine, theirs = _shapes(student, example), _shapes(teacher, example)
        self.pairs = tuple(pairs) or choose(student, mine, theirs)
        for one, other in self.pairs:
            for path, known, whose in ((one, mine, "student"), (other, theirs, "teacher")):
                if path not in known:
                    raise InvalidInput(
                        f"The {whose} has no layer '{path}' whose output could be a hint.",
                        f"Name some of {', '.join(list(known)[:8])}.",
                    )
        parts = dict(student.named_modules())
        self.adapters = torch.nn.ModuleList(
            _adapter(mine[one], theirs[other], _convolves(parts[one])) for one, other in self.pairs
        )
        self._listen(student, [one for one, _ in self.pairs], self._mine)
        self._listen(teacher, [other for _, other in self.pairs], self._theirs)

    def __enter__(self) -> Hints:
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _listen(self, model: nn.Module, paths: Sequence[str], into: dict[str, Tensor]) -> None:
        parts = dict(model.named_modules())
        for path in paths:

            def keep(layer: Any, args: Any, output: Any, path: str = path) -> None:
                into[path] = output

            self._handles.append(parts[path].register_forward_hook(keep))

    def loss(self) -> Tensor:
        """Of the batch that both networks saw last."""
        import torch

        found = []
        for adapter, (one, other) in zip(self.adapters, self.pairs, strict=True):
            wanted = self._theirs[other].detach()
            mine = adapter(self._mine[one])
            if mine.shape[2:] != wanted.shape[2:] and mine.dim() == 4:
                wanted = torch.nn.functional.adaptive_avg_pool2d(wanted, mine.shape[2:])
            found.append((mine - wanted).square().mean() / wanted.square().mean().clamp(min=1e-8))
        return torch.stack(found).mean()


def choose(
    student: nn.Module, mine: dict[str, tuple[int, ...]], theirs: dict[str, tuple[int, ...]]
) -> tuple[Pair, ...]:
    """Convolutions and linear layers of equal path, evenly spread, without the last (that makes the
    answer, which is matched anyway)."""
    parts = dict(student.named_modules())
    kinds = ("Conv1d", "Conv2d", "Conv3d", "Linear")
    common = [p for p in mine if p in theirs and type(parts[p]).__name__ in kinds][:-1]
    fitting = [p for p in common if _fits(mine[p], theirs[p], _convolves(parts[p]))]
    if not fitting:
        raise Unsupported(
            "Student and teacher have no layers of equal name for hints.",
            "Name pairs in distillation.hint_layers (student=teacher), or leave hints out.",
        )
    count = min(COUNT, len(fitting))
    places = sorted({round((number + 1) * len(fitting) / count) - 1 for number in range(count)})
    return tuple((fitting[place], fitting[place]) for place in places)


def _convolves(part: nn.Module) -> bool:
    """Whether its outputs have their channels second ([n, channels, ...]) and not last ([n, t, channels])."""
    from torch.nn.modules.conv import _ConvNd

    return any(isinstance(inner, _ConvNd) for inner in part.modules())


def _fits(mine: tuple[int, ...], theirs: tuple[int, ...], convolves: bool) -> bool:
    if len(mine) != len(theirs):
        return False
    if len(mine) == 3:
        return mine[2] == theirs[2] if convolves else mine[1] == theirs[1]
    return len(mine) in (2, 4)


def _shapes(model: nn.Module, example: Tensor) -> dict[str, tuple[int, ...]]:
    """Path -> shape of the output, in the order of running, of parts that give one tensor."""
    import torch

    found: dict[str, tuple[int, ...]] = {}

    def hook(path: str) -> Any:
        def note(layer: Any, args: Any, output: Any) -> None:
            if isinstance(output, torch.Tensor) and output.dim() >= 2:
                found[path] = tuple(output.shape)

        return note

    was = model.training
    model.eval()
    try:
        hooks = ((part, hook(path)) for path, part in model.named_modules() if path)
        with watching(hooks), torch.no_grad():
            model(example)
    finally:
        model.train(was)
    return found


def _adapter(mine: tuple[int, ...], theirs: tuple[int, ...], convolves: bool) -> nn.Module:
    from torch import nn

    if not _fits(mine, theirs, convolves):
        raise InvalidInput(
            f"Outputs {list(mine)} and {list(theirs)} cannot be compared as hints.",
            "Pair layers with equally many dimensions.",
        )
    if len(mine) == 4:
        return nn.Conv2d(mine[1], theirs[1], 1)
    if len(mine) == 3 and convolves:
        return nn.Conv1d(mine[1], theirs[1], 1)
    return nn.Linear(mine[-1], theirs[-1])
