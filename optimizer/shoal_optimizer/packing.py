"""From exported files to a bundle: golden cases, reference sketches, drift thresholds, digest."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from shoal_optimizer.targets.base import Exported, load_exported, run_instance
from shoal_protos.bundle import (
    BundleConfig,
    GoldenCases,
    Lineage,
    Reference,
    open_bundle,
    write_bundle,
)

if TYPE_CHECKING:
    from shoal_protos.v1.telemetry_pb2 import SketchSet

    from shoal_optimizer.recipe import Recipe
    from shoal_optimizer.task import Task

GOLDEN_CASES = 12
GOLDEN_FILE = "golden.npz"
INPUTS_FILE = "reference-inputs.sketch"
OUTPUTS_FILE = "reference-outputs.sketch"
WINDOW_SIZES = (25, 50, 100, 200)
WINDOWS = 200  # clean windows drawn for each size
MARGIN = 1.15
_TOOLS = ("shoal", "torch", "onnx", "onnxscript", "onnxruntime", "openvino", "torch-pruning", "numpy")


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


def lineage_of(
    task: Task,
    recipe: Recipe,
    exported: Exported,
    *,
    model_version: int = 0,
    seed: int = 0,
    parent: str = "",
    weights_digest: str = "",
) -> Lineage:
    """What is needed to make the variant again."""
    return Lineage(
        model=task.label,
        model_version=model_version,
        recipe=tuple(recipe.to_json()),
        target={"runtime": exported.runtime.name, "precision": exported.precision, **_plain(exported.facts)},
        seed=seed,
        data_digest=task.data_digest,
        weights_digest=weights_digest,
        tools=tool_versions(),
        parent=parent,
    )


def tool_versions() -> dict[str, str]:
    """Installed packages that shape a variant -> version."""
    found = {}
    for name in _TOOLS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


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
    instance = load_exported(exported)
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

    For logits the inputs are those with the clearest answers: another CPU may round int8 differently,
    and an answer near a tie would then flip without anything being wrong.
    """
    data = task.required("evaluation").sample(256, task.seed)
    outputs = run_instance(instance, exported.signature, data.inputs)
    chosen = np.arange(min(GOLDEN_CASES, len(outputs)))
    if exported.signature.output_kind == "logits" and outputs.shape[-1] > 1:
        ordered = np.sort(outputs, axis=-1)
        margin = (ordered[..., -1] - ordered[..., -2]).reshape(len(outputs), -1).min(axis=1)
        chosen = np.sort(np.argsort(-margin, kind="stable")[: max(len(outputs) // 2, GOLDEN_CASES)])
        chosen = chosen[np.linspace(0, len(chosen) - 1, min(GOLDEN_CASES, len(chosen))).astype(int)]
    spec, answer = exported.signature.inputs[0], exported.signature.outputs[0]
    stream = io.BytesIO()
    np.savez_compressed(
        stream, **{f"input:{spec.name}": data.inputs[chosen], f"output:{answer.name}": outputs[chosen]}
    )
    scale = float(np.max(np.abs(outputs[chosen]))) or 1.0
    rtol, share = (0.05, 0.05) if exported.precision == "int8" else (1e-2, 1e-3)
    return stream.getvalue(), GoldenCases(GOLDEN_FILE, rtol=rtol, atol=float(f"{share * scale:.3g}"))


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

    Args:
        reference: the inputs' sketch where it is known already; else that of `inputs`.
    """
    from shoal_agent.telemetry.sketches import sketch

    spec, signature = exported.signature.inputs[0], exported.signature
    bounds = (spec.low, spec.high)
    if reference is None:
        reference = sketch(signature.input_kind, inputs, *bounds)
    reference_outputs = sketch(signature.output_kind, outputs)
    thresholds: dict[str, dict[str, float]] = {}
    for size, worst in _input_thresholds(signature.input_kind, bounds, reference, clean_inputs, seed).items():
        thresholds[str(size)] = dict(worst)
    found = window_thresholds(
        signature.output_kind, (None, None), reference_outputs, clean_outputs, seed=seed
    )
    for size, worst in found.items():
        thresholds.setdefault(str(size), {}).update({f"output_{k}": v for k, v in worst.items()})
    return reference, reference_outputs, thresholds


_known_thresholds: dict[str, dict[int, dict[str, float]]] = {}


def _input_thresholds(
    kind: str,
    bounds: tuple[float | None, float | None],
    reference: SketchSet,
    clean: np.ndarray,
    seed: int,
) -> dict[int, dict[str, float]]:
    """`window_thresholds` of inputs, kept by content: all variants of a task see the same inputs."""
    state = hashlib.sha256(repr((kind, bounds, seed, clean.dtype, clean.shape)).encode())
    state.update(reference.SerializeToString(deterministic=True))
    state.update(np.ascontiguousarray(clean).tobytes())
    key = state.hexdigest()
    if key not in _known_thresholds:
        if len(_known_thresholds) >= 16:
            _known_thresholds.clear()
        _known_thresholds[key] = window_thresholds(kind, bounds, reference, clean, seed=seed)
    return _known_thresholds[key]


def window_thresholds(
    kind: str,
    bounds: tuple[float | None, float | None],
    reference: SketchSet,
    clean: np.ndarray,
    *,
    sizes: Iterable[int] = WINDOW_SIZES,
    windows: int = WINDOWS,
    seed: int = 0,
) -> dict[int, dict[str, float]]:
    """window size -> {"psi", "ks"}: the largest over clean windows, with a margin.

    `clean` is held out from the reference: windows of the reference itself look too much like it, and
    the alarm would be false on the first clean day. Sizes above the held-out data are left out.
    """
    from shoal_agent.telemetry.distances import largest
    from shoal_agent.telemetry.sketches import sketch

    random = np.random.default_rng(seed)
    found: dict[int, dict[str, float]] = {}
    for size in sizes:
        if size > len(clean):
            continue
        worst = {"psi": 0.0, "ks": 0.0}
        for _ in range(windows):
            window = clean[random.choice(len(clean), size, replace=False)]
            distance = largest(reference, sketch(kind, window, *bounds))
            worst = {name: max(worst[name], distance[name][0]) for name in worst}
        found[size] = {name: float(f"{value * MARGIN:.4g}") for name, value in worst.items()}
    return found


def _plain(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Facts as JSON, floats shortened so that the digest does not hang on a last bit."""
    short = {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in facts.items()}
    return dict(json.loads(json.dumps(short)))
