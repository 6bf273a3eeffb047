"""How far a network's answers are from its teacher's: logits, values and boxes."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def match_teacher(outputs: Tensor, wanted: Tensor, kind: str, temperature: float) -> Tensor:
    """Distance from the teacher's outputs.

    For logits `T^2 * KL(softmax(teacher/T) || softmax(student/T))`, the soft-target term of Hinton,
    Vinyals and Dean, "Distilling the Knowledge in a Neural Network" (2015), section 2; the factor T^2
    keeps its gradients of the size of the hard targets'. The mean is over items, not over classes
    ("batchmean"): dividing by the classes too would make the term vanish. For values: mean squares.
    """
    from torch.nn import functional

    if kind != "logits":
        return functional.mse_loss(outputs, wanted)
    return temperature**2 * functional.kl_div(
        functional.log_softmax(outputs.flatten(0, -2) / temperature, dim=-1),
        functional.log_softmax(wanted.flatten(0, -2) / temperature, dim=-1),
        reduction="batchmean",
        log_target=True,
    )


def match_boxes(candidates: Tensor, wanted: Tensor) -> Tensor:
    """Distance of a detector's candidates [n, candidates, 4 + classes] from the teacher's.

    With scores s (student) and t (teacher), and C the sum of weights c = (max t)^2 over candidates:

        sum |t - s|^2 BCE(s, t) / C  +  sum c * smooth_l1((b_s - b_t) / size of b_t) / C

    The first term is the quality focal loss of Li et al., "Generalized Focal Loss" (2020), equation 2
    with beta 2, the teacher's score being the soft target: the many candidates on which both see
    nothing weigh nothing. In the second only boxes that the teacher believes in are worth imitating,
    as in Chen et al., "Learning Efficient Object Detection Models with Knowledge Distillation" (2017).
    Differences of corners are divided by the teacher's width and height: small objects count alike.
    """
    import torch
    from torch.nn import functional

    least = 1e-4  # keeps logarithms and divisions finite in float32
    scores, truth = candidates[..., 4:].clamp(least, 1 - least), wanted[..., 4:].clamp(0, 1)
    confidence = truth.amax(-1, keepdim=True) ** 2
    total = confidence.sum().clamp(min=1.0)
    entropy = functional.binary_cross_entropy(scores, truth, reduction="none")
    size = (wanted[..., 2:4] - wanted[..., :2]).clamp(min=least)
    away = (candidates[..., :4] - wanted[..., :4]) / torch.cat([size, size], -1)
    boxes = functional.smooth_l1_loss(away, torch.zeros_like(away), reduction="none", beta=0.1)
    return (((truth - scores) ** 2 * entropy).sum() + (confidence * boxes).sum()) / total
