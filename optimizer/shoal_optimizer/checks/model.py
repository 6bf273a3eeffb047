"""Does the model answer steadily, on what preprocess() gives it, and does the metric tell good from bad?"""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from shoal_optimizer.checks.report import CheckReport
from shoal_optimizer.scaffolding.found import shortened
from shoal_optimizer.task import Task
from shoal_protos.errors import InvalidInput

BATCH = 16
JUDGED = 256  # items for the metric
UNSCALED = 20.0  # larger inputs than that were probably not scaled
TOLERANCE = 1e-3  # of the outputs' size


def check_model(report: CheckReport, task: Task) -> None:
    """Loads it and looks at how it answers: twice the same, alone as in company."""
    inputs = task.required("evaluation").inputs[:BATCH]
    module = task.original if task.has_module else None
    if module is not None:
        training = [name or type(part).__name__ for name, part in module.named_modules() if part.training]
        if training:
            report.fail(
                "model",
                f"{shortened(training, 3)} stays in training mode after eval().",
                "Do not override train(); switch layers by self.training.",
            )
        count = sum(p.numel() for p in module.parameters())
        report.facts["parameters"] = count
    began = time.perf_counter()
    first = task.predict(module, inputs)  # type: ignore[arg-type]
    report.facts["forward_s"] = time.perf_counter() - began
    signature = task.signature
    scale = float(np.abs(first).max()) or 1.0
    if np.isnan(first).any() or np.isinf(first).any():
        report.fail(
            "model",
            "The model answers NaN or infinity.",
            "Look for divisions by zero, logarithms of zero and broken weights.",
        )
        return
    again = task.predict(module, inputs)  # type: ignore[arg-type]
    if not np.allclose(first, again, rtol=0, atol=TOLERANCE * scale):
        report.fail(
            "model",
            f"The same input gets different answers: by {np.abs(first - again).max():.3g} of {scale:.3g}.",
            "Look for randomness in forward(): functional.dropout needs training=self.training.",
        )
    alone = np.concatenate([task.predict(module, inputs[i : i + 1]) for i in range(min(4, len(inputs)))])  # type: ignore[arg-type]
    difference = (
        np.abs(alone - first[: len(alone)]).max() if alone.shape == first[: len(alone)].shape else 9e9
    )
    if not difference <= TOLERANCE * scale:
        report.fail(
            "model",
            f"An item's answer depends on what else is in its batch: by {difference:.3g} of {scale:.3g}.",
            "Look for statistics over the batch (dimension 0) in forward(); devices batch as they like.",
        )
    shape = list(signature.outputs[0].shape)
    size = f", {report.facts['parameters']:,} parameters" if "parameters" in report.facts else ""
    report.add("model", f"answers {signature.outputs[0].datatype} {shape}{size}; steady, alone as in batches")


def check_preprocess(report: CheckReport, task: Task) -> None:
    """What the network really gets."""
    import torch

    inputs = task.required("evaluation").inputs[:BATCH]
    with torch.inference_mode():
        given = task.guard("preprocess()", lambda: task.pre(torch.from_numpy(np.ascontiguousarray(inputs))))
    if not isinstance(given, torch.Tensor):
        raise InvalidInput(
            f"preprocess() gives {type(given).__name__}.", "Return a module that gives one tensor."
        )
    if len(given) != len(inputs):
        raise InvalidInput(
            f"preprocess() makes {len(given)} items of {len(inputs)}.", "Keep the batch dimension first."
        )
    if not bool(torch.isfinite(given).all()):
        raise InvalidInput("preprocess() gives NaN or infinity.", "Look for divisions by zero.")
    low, high = float(given.min()), float(given.max())
    text = f"the network gets {list(given.shape[1:])}, {low:.3g} to {high:.3g}"
    if given.is_floating_point() and max(abs(low), abs(high)) > UNSCALED:  # whole numbers are indices
        report.warn(
            "preprocess",
            f"{text}: not scaled.",
            "Is that what it was trained with? Else scale in preprocess().",
        )
    else:
        report.add("preprocess", text)


def check_metric(report: CheckReport, task: Task) -> None:
    """The metric of the model, of one constant answer, and of perfect answers where they can be made."""
    data = task.required("evaluation")
    chosen = data.sample(JUDGED, 0)
    module = task.original if task.has_module else None
    began = time.perf_counter()
    outputs = task.predict(module, chosen.inputs)  # type: ignore[arg-type]
    report.facts["item_s"] = (time.perf_counter() - began) / len(chosen)
    value = task.measured(outputs, chosen.targets)
    report.facts["metric"] = {"name": task.metric_name, "value": value, "n": len(chosen)}
    constant, perfect = _constant(task, outputs, chosen.targets), _perfect(task, outputs, chosen.targets)
    flat = _measure(task, constant, chosen.targets)
    best = _measure(task, perfect, chosen.targets)
    report.facts["metric"] |= {"constant": flat, "perfect": best}
    text = f"{task.metric_name} {value:.4g} on {len(chosen)} items"
    if flat is None:
        report.add("metric", text)
        return
    if best is not None and best < flat:
        report.fail(
            "metric",
            f"metric() is lower for perfect answers ({best:.4g}) than for a constant one ({flat:.4g}).",
            "Higher must mean better: return its negative, or 1 minus it.",
        )
        return
    if (best is not None and best == flat == value) or (best is None and flat == value):
        report.fail(
            "metric",
            f"metric() gives {value:.4g} whatever the answers are.",
            "Compare `outputs` [n, ...] with `targets` [n, ...] in it.",
        )
        return
    if value <= flat:
        report.warn(
            "metric",
            f"{text}, no better than always giving the same answer ({flat:.4g}).",
            "Is the model trained, are the classes in its order, is preprocess() what it was trained with?",
        )
        return
    report.add("metric", f"{text}; a constant answer gets {flat:.4g}")


def _constant(task: Task, outputs: np.ndarray, targets: np.ndarray) -> np.ndarray | None:
    """The best answer that does not look at the input."""
    if task.output_kind == "logits" and _are_classes(outputs, targets):
        answer = np.zeros(outputs.shape[1:], outputs.dtype)
        answer[np.bincount(targets).argmax()] = 1
        return np.broadcast_to(answer, outputs.shape).copy()
    if task.output_kind == "values" and targets.dtype.kind in "iuf":
        if targets.size == outputs.size:
            mean = targets.mean(axis=0).reshape(outputs.shape[1:])
            return np.array(np.broadcast_to(mean, outputs.shape), outputs.dtype)
        return np.array(np.broadcast_to(outputs.mean(axis=0), outputs.shape)).astype(outputs.dtype)
    return None


def _perfect(task: Task, outputs: np.ndarray, targets: np.ndarray) -> np.ndarray | None:
    if task.output_kind == "logits" and _are_classes(outputs, targets):
        return np.array(np.eye(outputs.shape[-1])[targets], outputs.dtype)
    if task.output_kind == "values" and targets.size == outputs.size and targets.dtype.kind in "iuf":
        return np.array(targets.reshape(outputs.shape), outputs.dtype)
    return None


def _are_classes(outputs: np.ndarray, targets: np.ndarray) -> bool:
    whole = outputs.ndim == 2 and targets.ndim == 1 and targets.dtype.kind in "iu"
    return whole and int(targets.min()) >= 0 and int(targets.max()) < outputs.shape[-1]


def _measure(task: Task, outputs: np.ndarray | None, targets: np.ndarray) -> float | None:
    """The metric of made-up answers; None when there are none, or the metric cannot judge them."""
    if outputs is None:
        return None
    try:
        return task.measured(outputs, targets)
    except InvalidInput:
        return None


def check_training(report: CheckReport, task: Task) -> None:
    """One training step on a copy: the loss is a number and every part of the network learns."""
    import copy

    import torch

    data = task.required("training").sample(BATCH * 2, 0)
    model = copy.deepcopy(task.original).train()
    inputs = torch.from_numpy(np.ascontiguousarray(data.inputs))
    targets = torch.from_numpy(np.ascontiguousarray(data.targets))
    began = time.perf_counter()

    def step() -> Any:
        outputs = model(task.pre(task.augment(inputs.to(torch.float32))))
        loss = task.loss(outputs, targets)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    loss = task.guard("loss()", step).detach()
    report.facts["step_item_s"] = (time.perf_counter() - began) / len(data)
    if not bool(torch.isfinite(loss).all()):
        raise InvalidInput(f"loss() gives {float(loss)}.", "Look at the loss and the targets.")
    still = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    if still:
        report.warn(
            "training",
            f"{shortened(still, 3)} gets no gradient.",
            "Is it used in forward()? What is not used should not be in the model.",
        )
    else:
        report.add("training", f"one step works, loss {float(loss):.4g}")
