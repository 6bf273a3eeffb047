"""Where a variant comes from: recipe, seed, digests of data and weights, versions of tools, the machine.

Enough to make it again (`shoal_optimizer.replay`), and to say what differs where that fails.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from shoal_protos.bundle import Lineage, digest_of_file

if TYPE_CHECKING:
    from torch import nn

    from shoal_optimizer.jobspec import JobSpec
    from shoal_optimizer.recipe import Recipe
    from shoal_optimizer.targets.base import Exported
    from shoal_optimizer.task import Task

TOOLS = (
    *("shoal", "torch", "torchvision", "onnx", "onnxscript", "onnxruntime", "openvino", "nncf", "numpy"),
    *("torch-pruning", "litert-torch", "ai-edge-quantizer", "coremltools"),
)


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


def of_job(task: Task, spec: JobSpec, weights_digest: str) -> dict[str, Any]:
    """The lineage that all variants of a job share, as `report.json` carries it.

    `weights` is the digest of the stored file, which holds the task file's place; `weights_content` that
    of the numbers alone, which is equal wherever the original is made again.
    """
    return {
        "task": spec.task,
        "task_digest": digest_of_file(task.source) if task.source.is_file() else "",
        "model": spec.model,
        "version": spec.version,
        "seed": spec.seed,
        "data": task.data_digest,
        "weights": weights_digest,
        "weights_content": weights_content(task),
        "tools": {"python": platform.python_version(), **tool_versions(), "the optimizer's code": code()},
        "machine": machine(),
    }


def weights_content(task: Task) -> str:
    """Digest of the original's parameters and buffers by name; of the file for an ONNX task."""
    if not task.has_module:
        return digest_of_file(task.onnx_file)
    return module_digest(task.original)


def module_digest(model: nn.Module) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of a module's state."""
    found = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        values = np.ascontiguousarray(tensor.detach().cpu().numpy())
        found.update(f"{name} {values.dtype} {values.shape} ".encode())
        found.update(values.tobytes())
    return "sha256:" + found.hexdigest()


def machine() -> dict[str, Any]:
    """What of this machine can change a variant's bits: the processor and its instruction set."""
    from shoal_agent import profile

    found = profile.measure([])
    return {"cpu": found.cpu_model, "isa": sorted(found.isa_features), "cores": found.cores}


@cache
def code() -> str:
    """Digest (12 hex digits) of this package's files: two checkouts of one version may differ."""
    home = Path(__file__).parent
    found = hashlib.sha256()
    for path in sorted(home.rglob("*.py")):
        found.update(f"{path.relative_to(home)} ".encode() + path.read_bytes())
    return found.hexdigest()[:12]


def tool_versions() -> dict[str, str]:
    """Installed packages that shape a variant -> version."""
    installed = {name: _version(name) for name in TOOLS}
    return {name: found for name, found in installed.items() if found}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def _plain(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Facts as JSON, floats shortened so that the digest does not hang on a last bit."""
    short = {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in facts.items()}
    if "reverted" in short:  # what they cost was timed, and must not change the digest
        short["reverted"] = [step["layers"] for step in facts["reverted"]]
    return dict(json.loads(json.dumps(short)))
