"""Weight pruning: single weights go. Fewer bytes to send; no runtime here computes faster for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from shoal_optimizer.techniques import masks
from shoal_optimizer.techniques.base import Parameter, Technique, Work
from shoal_optimizer.techniques.training import TrainingPlan, fine_tune
from shoal_protos.errors import InvalidInput, Unsupported

if TYPE_CHECKING:
    from torch import nn

UPDATES = 30  # times that the masks are chosen again while the sparsity grows
PATTERNS = ("unstructured", "2:4", "1:4", "4:8")


class WeightPruning(Technique):
    """Zeroes the weights of least magnitude over the whole network, gradually while fine-tuning.

    The gain is the compressed size of the file. Dense kernels multiply zeros as they do any number:
    with 50 and 90 percent of them ONNX Runtime and OpenVINO were measured 0.94 to 1.0 times as fast.
    Later steps keep the zeros, and int8 maps them to zero exactly.
    """

    name: ClassVar[str] = "weight_pruning"
    parameters: ClassVar[Mapping[str, Parameter]] = {
        "sparsity": Parameter(0.8, 0.0, 0.99, help="share of weights that become zero"),
        "pattern": Parameter(
            "unstructured", choices=PATTERNS, help="N:M keeps N of M neighbours, for hardware that skips them"
        ),
        "epochs": Parameter(4, 0, 1000, help="passes of fine-tuning; 0 = prune at once, do not train"),
        "ramp": Parameter(0.6, 0.0, 1.0, help="share of the training over which the sparsity grows"),
        "learning_rate": Parameter(1e-3, 1e-6, 1.0, help="peak of the one-cycle schedule"),
        "batch": Parameter(64, 1, 4096, help="items per step"),
        "alpha": Parameter(0.7, 0.0, 1.0, help="weight of the teacher"),
        "temperature": Parameter(4.0, 0.5, 20.0, help="softens the teacher's answers; logits only"),
    }

    def transform(self, work: Work, params: Mapping[str, Any]) -> Work:
        model = work.module()
        if not masks.weights(model):
            raise InvalidInput(
                "The model has no convolution, linear, attention or recurrent layer to prune.",
                "Leave weight_pruning out of the recipe.",
            )
        before = wire_bytes(model)
        if params["pattern"] == "unstructured":
            schedule: Schedule | None = Schedule(model, params["sparsity"], params["ramp"])
            left_out: list[str] = []
        else:
            schedule, left_out = None, prune_n_of_m(model, params["pattern"], work)
        notes: list[str] = []
        if params["epochs"]:
            plan = TrainingPlan(
                seed=work.seed,
                **{k: params[k] for k in ("epochs", "learning_rate", "batch", "alpha", "temperature")},
            )
            fine_tune(
                work,
                model,
                plan,
                lambda share, message: work.progress(self.name, share, message),
                after_step=schedule,
                note=notes.append,
                seconds=work.seconds_left(),
            )
        elif schedule is not None:
            schedule(1.0)
        model.eval()
        work = work.note(
            f"weight pruning: {masks.zero_share(model):.1%} of the weights are zero, compressed weights "
            f"{before} -> {wire_bytes(model)} bytes; not faster on dense runtimes"
        )
        for text in notes:
            work = work.note(f"{self.name}: {text}")
        if left_out:
            work = work.note(f"not in the pattern {params['pattern']}: {', '.join(left_out)}")
        return work


class Schedule:
    """Raises the sparsity along a cubic while training: called after each step with the share done.

    `s(t) = s_f + (s_i - s_f) (1 - t)^3` of Zhu and Gupta, "To prune, or not to prune" (2017), equation 1:
    many weights go while many are superfluous, few at the end. t runs from 0 to 1 over the first `ramp`
    of the steps, the rest recovers. s_i are the zeros that the model has already.
    """

    def __init__(self, model: nn.Module, sparsity: float, ramp: float) -> None:
        self._model = model
        self._chosen = masks.weights(model)
        self._first = masks.zero_share(model)
        self._last = max(sparsity, self._first)
        self._ramp = ramp
        self._start()

    def _start(self) -> None:
        self._keep = masks.keeper(self._model)
        self._share, self._due = 0.0, 0.0

    def target(self, share: float) -> float:
        """The sparsity wanted when this share of the steps is done."""
        t = min(1.0, share / self._ramp) if self._ramp else 1.0
        return self._last + (self._first - self._last) * (1 - t) ** 3

    def __call__(self, share: float) -> None:
        if share <= self._share:  # training started over with the first weights
            self._start()
        self._share = share
        self._keep()  # a weight that is gone does not come back
        grows = share < self._ramp
        if self._due > 1 or (grows and share < self._due):
            return
        masks.apply(self._chosen, masks.by_magnitude(self._chosen, self.target(share)))
        self._keep = masks.keeper(self._model)
        self._due = share + self._ramp / UPDATES if grows else 2.0


def prune_n_of_m(model: nn.Module, pattern: str, work: Work) -> list[str]:
    """Masks in the pattern "N:M"; gives the names of weights whose inputs are no multiple of M.

    Raises:
        Unsupported: the class does not gain from it.
    """
    spec = work.class_spec
    if spec is None or not spec.skips_zeros(pattern):
        whom = "No class was named" if spec is None else f"Devices of the class {spec.name} do not skip zeros"
        raise Unsupported(
            f"{whom}: {pattern} would cost accuracy and gain nothing that unstructured pruning does not.",
            f"Use the pattern 'unstructured', or a class with the feature sparsity_{pattern}.",
        )
    kept, group = (int(part) for part in pattern.split(":"))
    chosen = masks.weights(model)
    found = {weight.name: masks.n_of_m(weight, kept, group) for weight in chosen}
    masks.apply(chosen, {name: mask for name, mask in found.items() if mask is not None})
    return [name for name, mask in found.items() if mask is None]


def wire_bytes(model: nn.Module) -> int:
    """Bytes of all weights as float32, each compressed as files are for sending."""
    from shoal_optimizer.targets.base import compressed_size

    return compressed_size(b"".join(p.detach().numpy().tobytes() for p in model.parameters()))
