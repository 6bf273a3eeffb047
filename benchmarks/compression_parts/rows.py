"""Makes the rows: applies a recipe, exports for every runtime, judges once, keeps all of it by content."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from compression_parts.pictures import Pictures
from shoal_agent import processor, runtimes
from shoal_agent.runtimes.base import Options
from shoal_optimizer import recipe as recipes
from shoal_optimizer import targets
from shoal_optimizer.evaluation import evaluate_exported
from shoal_optimizer.recipe import Recipe
from shoal_optimizer.targets.base import ClassSpec, Exported, load_exported, run_instance
from shoal_optimizer.task import Task
from shoal_protos.bundle import BundleConfig, write_bundle
from shoal_protos.errors import ShoalError

RUNTIMES = ("onnxruntime", "openvino", "litert")
ORIGINAL = "original"
VERSION = 1  # of what a row's folder holds


@dataclass(frozen=True)
class Subject:
    """One trained original: its task, the test set, and where its rows are kept."""

    network: str
    seed: int
    key: str  # content of the original
    task: Task
    test: Pictures
    folder: Path


def this_machine() -> ClassSpec:
    """The class that this machine is of, with the runtimes that it has."""
    versions = {}
    for name in RUNTIMES:
        try:
            versions[name] = runtimes.find(name).version()
        except ShoalError:  # noqa: PERF203 (not installed)
            continue
    architecture = processor.architecture()
    return ClassSpec.of(architecture, processor.features(architecture), versions, local=True)


def folder_of(subject: Subject, row: str, recipe: Recipe) -> Path:
    """Equal originals, recipes and CPU features give the same folder."""
    spec = this_machine()
    content = [VERSION, subject.key, recipe.checked().to_json(), sorted(spec.isa), sorted(spec.runtimes)]
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]
    return subject.folder / "rows" / f"{subject.network}-seed{subject.seed}-{row}-{digest}"


def stored(subject: Subject, row: str, recipe: Recipe) -> dict[str, Any] | None:
    """What `made` wrote earlier, None when the row is not finished."""
    path = folder_of(subject, row, recipe) / "row.json"
    return json.loads(path.read_text()) if path.is_file() else None


def made(subject: Subject, row: str, recipe: Recipe, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Applies `recipe`, exports and judges; from the folder where that was done before.

    Returns:
        JSON with "folder", "cpu_s", "notes" and per runtime "digest", "size", "wire", "validation",
        "test" (shares of right answers), "int8_share". Which test pictures were right is in
        `right-RUNTIME.npy`.
    """
    found = stored(subject, row, recipe)
    if found is not None:
        return found
    say(f"{subject.network} seed {subject.seed}: {row}")
    begun = time.process_time()
    applied = recipes.apply(
        recipe, subject.task, seed=subject.seed, class_spec=this_machine(),
        progress=lambda step, share, text: say(f"  {step} {text}") if text else None,
    )  # fmt: skip
    trained = time.process_time() - begun
    folder = folder_of(subject, row, recipe)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    forms = {}
    for name in RUNTIMES:
        try:
            exported = targets.base.find(name).export(
                applied.model, subject.task, applied.precision, applied.calibration, this_machine()
            )
            forms[name] = _form(subject, exported, folder, name)
        except ShoalError as error:  # noqa: PERF203 (a runtime that cannot have it is left out)
            say(f"  {name} left out: {error}")
    answer = {
        "network": subject.network, "seed": subject.seed, "row": row, "recipe": recipe.checked().to_json(),
        "folder": folder.name, "train_cpu_s": trained, "cpu_s": time.process_time() - begun,
        "notes": list(applied.notes), "forms": forms,
    }  # fmt: skip
    (folder / "row.json.part").write_text(json.dumps(answer, indent=1))
    (folder / "row.json.part").replace(folder / "row.json")
    summary = ", ".join(
        f"{name} {form['size']} B, validation {form['validation']:.4f}" for name, form in forms.items()
    )
    say(f"  {summary}; {answer['cpu_s']:.0f} CPU s")
    return answer


def _form(subject: Subject, exported: Exported, folder: Path, name: str) -> dict[str, Any]:
    """Stores one runtime's files as a bundle and judges them in that runtime."""
    config = BundleConfig(signature=exported.signature, runtime=exported.runtime)
    digest = write_bundle(folder / name, config, exported.files)
    instance = load_exported(exported)
    try:
        outputs = run_instance(instance, exported.signature, subject.test.inputs)
    finally:
        instance.close()
    right = outputs.argmax(-1) == subject.test.targets
    np.save(folder / f"right-{name}.npy", right)
    return {
        "digest": digest,
        "size": exported.size_bytes,
        "wire": exported.wire_bytes,
        "validation": evaluate_exported(subject.task, exported).value,
        "test": float(right.mean()),
        "int8_share": exported.facts.get("int8_share"),
        "precision": exported.precision,
    }


def options() -> Options:
    """What all rows are timed under: one thread."""
    return Options(threads=1)
