"""From exported files to a bundle: golden cases, reference sketches, drift thresholds, digest."""

from __future__ import annotations

import hashlib
import io
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from shoal_optimizer.inputs import by_name
from shoal_optimizer.lineage import lineage_of, tool_versions
from shoal_optimizer.targets.base import Exported, load_twin, run_instance
from shoal_protos.bundle import (
    BoxRule,
    BundleConfig,
    GoldenCases,
    Lineage,
    Reference,
    Signature,
    open_bundle,
    write_bundle,
)

if TYPE_CHECKING:
    from shoal_optimizer.recipe import Recipe
    from shoal_optimizer.task import Task
    from shoal_protos.v1.telemetry_pb2 import SketchSet

__all__ = ["FieldReference", "Packed", "lineage_of", "pack", "tool_versions"]

GOLDEN_CASES = 12
GOLDEN_FILE = "golden.npz"
INPUTS_FILE = "reference-inputs.sketch"
OUTPUTS_FILE = "reference-outputs.sketch"
WINDOW_SIZES = (25, 50, 100, 200)
WINDOWS = 200  # clean windows drawn for each size
MARGIN = 1.15
_TOLERANCES = {"fp32": (1e-2, 1e-3), "fp16": (2e-2, 1e-2)}  # relative, and of the largest output


@dataclass(frozen=True)
class Packed:
    """A bundle on disk. `size_bytes` are the model files, `wire_bytes` the same gzip-compressed."""

    digest: str
    layout: Path
    config: BundleConfig
    size_bytes: int
    wire_bytes: int
    total_bytes: int  # everything a device fetches


@dataclass(frozen=True)
class FieldReference:
    """What inputs look like in the field, where that is no longer the training data.

    `inputs` is the field's own sketch; `items` and `clean` are endpoint inputs [n, ...] made to look
    like the field: from `items` the outputs' reference comes, from the held-out `clean` the thresholds.
    """

    inputs: SketchSet
    items: np.ndarray
    clean: np.ndarray


def pack(
    exported: Exported,
    task: Task,
    recipe: Recipe,
    lineage: Lineage,
    out_layout: Path,
    *,
    name: str = "",
    field: FieldReference | None = None,
) -> Packed:
    """Writes the bundle; equal inputs give an equal digest.

    Args:
        field: the drift reference of a variant that was adapted to the field; else the task's data.

    Raises:
        InvalidInput: the task's data do not fit the variant.
    """
    instance = load_twin(exported)
    try:
        golden, tolerances = golden_cases(exported, task, instance)
        if field is not None:
            items, clean = field.items, field.clean
        else:
            items = (task.data("training") or task.calibration_data()).inputs
            clean = task.required("evaluation").inputs
        outputs = run_instance(instance, exported.signature, items)
        clean_outputs = run_instance(instance, exported.signature, clean)
    finally:
        instance.close()
    inputs_set, outputs_set, thresholds = drift_reference(
        exported,
        items,
        outputs,
        clean,
        clean_outputs,
        seed=task.seed,
        reference=None if field is None else field.inputs,
    )
    config = BundleConfig(
        signature=exported.signature,
        runtime=exported.runtime,
        name=name or f"{task.label} {recipe.name} {exported.precision} {exported.runtime.name}",
        golden=tolerances,
        reference=Reference(INPUTS_FILE, OUTPUTS_FILE, thresholds),
        lineage=lineage,
    )
    files = {
        **exported.files,
        GOLDEN_FILE: golden,
        INPUTS_FILE: inputs_set.SerializeToString(deterministic=True),
        OUTPUTS_FILE: outputs_set.SerializeToString(deterministic=True),
    }
    digest = write_bundle(out_layout, config, files)
    bundle = open_bundle(out_layout, digest)
    return Packed(digest, out_layout, config, exported.size_bytes, exported.wire_bytes, bundle.manifest.size)


def golden_cases(exported: Exported, task: Task, instance: Any) -> tuple[bytes, GoldenCases]:
    """Real inputs with this variant's own outputs, and how far another device may differ.

    For logits and boxes the inputs are those with the clearest answers: another CPU may round int8
    differently, and an answer near a tie would then flip without anything being wrong.
    """
    data = task.required("evaluation").sample(256, task.seed)
    outputs = run_instance(instance, exported.signature, data.inputs)
    chosen = np.arange(min(GOLDEN_CASES, len(outputs)))
    margin = _margins(exported.signature, outputs)
    if margin is not None:
        chosen = np.sort(np.argsort(-margin, kind="stable")[: max(len(outputs) // 2, GOLDEN_CASES)])
        chosen = chosen[np.linspace(0, len(chosen) - 1, min(GOLDEN_CASES, len(chosen))).astype(int)]
    answer = exported.signature.outputs[0]
    stream = io.BytesIO()
    arrays: dict[str, Any] = {
        **{f"input:{n}": v for n, v in by_name(data.inputs[chosen], exported.signature).items()},
        f"output:{answer.name}": outputs[chosen],
    }
    np.savez_compressed(stream, **arrays)
    scale = float(np.max(np.abs(outputs[chosen]))) or 1.0
    rtol, share = _TOLERANCES.get(exported.precision, (0.05, 0.05))
    return stream.getvalue(), GoldenCases(GOLDEN_FILE, rtol=rtol, atol=float(f"{share * scale:.3g}"))


def _margins(signature: Signature, outputs: np.ndarray) -> np.ndarray | None:
    """How clear each answer [n, ...] is; None where the kind of output has no such measure."""
    if signature.output_kind == "logits" and outputs.shape[-1] > 1:
        ordered = np.sort(outputs, axis=-1)
        least: np.ndarray = (ordered[..., -1] - ordered[..., -2]).reshape(len(outputs), -1).min(axis=1)
        return least
    if signature.output_kind == "boxes":
        # The candidate nearest to the threshold decides; pictures without any box prove little.
        threshold = (signature.boxes or BoxRule()).score_threshold
        scores = outputs[..., 4:].max(axis=-1)
        clear: np.ndarray = np.abs(scores - threshold).min(axis=1) - (scores.max(axis=1) < threshold)
        return clear
    return None


def drift_reference(
    exported: Exported,
    inputs: np.ndarray,
    outputs: np.ndarray,
    clean_inputs: np.ndarray,
    clean_outputs: np.ndarray,
    *,
    seed: int = 0,
    reference: SketchSet | None = None,
) -> tuple[SketchSet, SketchSet, dict[str, dict[str, float]]]:
    """Sketches of reference inputs and outputs, and the thresholds from held-out clean data.

    Thresholds of outputs have the keys "output_psi" and "output_ks". A given `reference` takes the
    place of the sketch of `inputs`.
    """
    from shoal_agent.telemetry.sketches import sketch

    spec, signature = exported.signature.inputs[0], exported.signature
    # The first input is watched, as devices do.
    inputs, clean_inputs = (by_name(items, signature)[spec.name] for items in (inputs, clean_inputs))
    if reference is None:
        reference = sketch(signature.input_kind, inputs, spec.low, spec.high)
    threshold = (signature.boxes or BoxRule()).score_threshold
    reference_outputs = sketch(signature.output_kind, outputs, threshold=threshold)
    thresholds: dict[str, dict[str, float]] = {}
    for prefix, base, clean, low, high in (
        ("", reference, clean_inputs, spec.low, spec.high),
        ("output_", reference_outputs, clean_outputs, None, None),
    ):
        for size, worst in window_thresholds(base, clean, low, high, seed=seed, threshold=threshold).items():
            thresholds.setdefault(str(size), {}).update({prefix + k: v for k, v in worst.items()})
    return reference, reference_outputs, thresholds


def window_thresholds(
    reference: SketchSet,
    clean: np.ndarray,
    low: float | None = None,
    high: float | None = None,
    *,
    sizes: Iterable[int] = WINDOW_SIZES,
    windows: int = WINDOWS,
    seed: int = 0,
    threshold: float = 0.0,
) -> dict[int, dict[str, float]]:
    """window size -> {"psi", "ks"}: the largest distance that clean windows reach, with a margin.

    `clean` [n, ...] is held out from the reference: windows of the reference itself look too much like
    it, and the alarm would be false on the first clean day. Sizes above n are left out. `threshold` is that
    of the box rule.
    """
    key = hashlib.sha256(reference.SerializeToString(deterministic=True))
    key.update(np.ascontiguousarray(clean).tobytes())
    key.update(repr((low, high, tuple(sizes), windows, seed, threshold)).encode())
    if key.digest() not in _thresholds:
        _thresholds[key.digest()] = _measure_windows(
            reference, clean, low, high, sizes, windows, seed, threshold
        )
        while len(_thresholds) > 64:
            _thresholds.popitem(last=False)
    return _thresholds[key.digest()]


# Inputs are the same for every variant of a task, so their thresholds are drawn once a process.
_thresholds: OrderedDict[bytes, dict[int, dict[str, float]]] = OrderedDict()


def _measure_windows(
    reference: SketchSet,
    clean: np.ndarray,
    low: float | None,
    high: float | None,
    sizes: Iterable[int],
    windows: int,
    seed: int,
    threshold: float,
) -> dict[int, dict[str, float]]:
    from shoal_agent.telemetry.distances import ks_of_counts, psi_of_counts

    random = np.random.default_rng(seed)
    bins = _item_bins(reference, clean, low, high, threshold)
    found: dict[int, dict[str, float]] = {}
    for size in (size for size in sizes if size <= len(clean)):
        picks = np.stack([random.choice(len(clean), size, replace=False) for _ in range(windows)])
        worst = {"psi": 0.0, "ks": 0.0}
        for expected, places in bins:
            seen = _window_counts(places[picks], len(expected))
            for name, distance in (("psi", psi_of_counts), ("ks", ks_of_counts)):
                worst[name] = max(worst[name], float(distance(expected, seen).max()))
        found[size] = {name: value * MARGIN for name, value in worst.items()}
    raised = _raised_by_smaller(found, len(clean))
    return {
        size: {name: float(f"{value:.4g}") for name, value in worst.items()} for size, worst in raised.items()
    }


def _item_bins(
    reference: SketchSet, items: np.ndarray, low: float | None, high: float | None, threshold: float
) -> list[tuple[np.ndarray, np.ndarray]]:
    """(reference counts [bins], bin of each item [n]) per statistic, by the sketches' own rule.

    Computed once for all windows: sketching each of hundreds of windows anew takes seconds.
    """
    from shoal_agent.telemetry.sketches import CLASS_SHARE, statistics

    bounds = (float("nan") if bound is None else float(bound) for bound in (low, high))
    values = statistics(reference.kind, items, *bounds, threshold=threshold)
    found = []
    for part in reference.sketches:
        column = np.asarray(values["class" if part.name == CLASS_SHARE else part.name], np.float64)
        places = ((column - part.low) / part.width).astype(np.int64)
        expected = np.asarray(part.counts, np.float64)
        found.append((expected, np.clip(places, 0, len(expected) - 1)))
    return found


def _window_counts(places: np.ndarray, bins: int) -> np.ndarray:
    """Counts [windows, bins] of bin numbers [windows, items]."""
    windows = len(places)
    flat = (places + np.arange(windows)[:, None] * bins).ravel()
    return np.bincount(flat, minlength=windows * bins).reshape(windows, bins).astype(np.float64)


def _raised_by_smaller(found: dict[int, dict[str, float]], pool: int) -> dict[int, dict[str, float]]:
    """Windows that are most of the pool all share its own deviation and hardly differ from each other,
    so their largest distance is too small for another clean pool. They get at least what the largest
    independent size promises: psi falls as 1/n, ks as 1/sqrt(n)."""
    independent = [size for size in found if 4 * size <= pool]
    if not independent:
        return found
    base = max(independent)
    return {
        size: worst
        if size <= base
        else {
            "psi": max(worst["psi"], found[base]["psi"] * base / size),
            "ks": max(worst["ks"], found[base]["ks"] * (base / size) ** 0.5),
        }
        for size, worst in found.items()
    }
