"""What every target has in common: a torch model and its task in, deployable files out."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import shutil
import tempfile
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from shoal_optimizer.inputs import by_name, step_of
from shoal_optimizer.targets import gates
from shoal_protos.bundle import BundleConfig, RuntimeNeed, Signature, open_bundle, write_bundle
from shoal_protos.errors import InvalidInput, NotFound, ShoalError, Unsupported

if TYPE_CHECKING:
    from torch import nn

    from shoal_agent.runtimes.base import Instance
    from shoal_optimizer.data import TaskData
    from shoal_optimizer.task import Task

PRECISIONS = ("fp32", "fp16", "int8", "int8_weights", "int4_weights")
PARITY_ITEMS = 64
_VNNI = ("avx512_vnni", "avx_vnni")


@dataclass(frozen=True)
class ClassSpec:
    """What a target must know of a profile class.

    Attributes:
        isa: features that every device of the class has ("avx2", "avx512_vnni", "neon", and
            "sparsity_2:4" where its accelerator skips zeros in that pattern...).
        runtimes: name -> version.
        local: this machine is of the class, so what it measures holds for it.
    """

    name: str
    isa: frozenset[str] = frozenset()
    runtimes: Mapping[str, str] = field(default_factory=dict)
    local: bool = False

    @classmethod
    def of(cls, name: str, isa: Iterable[str], runtimes: Mapping[str, str], local: bool = False) -> ClassSpec:
        return cls(name, frozenset(isa), dict(runtimes), local)

    @property
    def arm(self) -> bool:
        return self.name.startswith(("aarch64", "arm")) or "neon" in self.isa

    def skips_zeros(self, pattern: str) -> bool:
        """True when hardware of the class computes faster with zeros in a pattern such as "2:4"."""
        return f"sparsity_{pattern}" in self.isa

    @property
    def vnni(self) -> str:
        """The int8 dot-product feature of an x86 class, "" when it has none."""
        return next((feature for feature in _VNNI if feature in self.isa), "")


@dataclass(frozen=True)
class Calibration:
    """What int8 ranges come from.

    Attributes:
        inputs: endpoint inputs [n, ...].
        method: "minmax", "percentile" or "entropy" over `inputs`; "dynamic" takes ranges at each call
            instead and needs no inputs.
        pinned: module path -> (low, high) of its output, where training learned the range.
        keep_float: weighted layers, by the float graph's node names, that stay in float.
        max_drop: of the task's metric on `judged`, against float; above it layers go back to float.
            1.0 = never.
        judged: labelled data for that, `judged_on` the split that they come from.
    """

    inputs: np.ndarray
    method: str = "minmax"
    pinned: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    keep_float: tuple[str, ...] = ()
    max_drop: float = 1.0
    judged: TaskData | None = None
    judged_on: str = ""


@dataclass(frozen=True)
class Exported:
    """A deployable form of one model.

    Attributes:
        files: title -> content; `runtime.model_file` names the one to load.
        facts: figures of the export: "parity_max" (largest difference from torch on real data, in
            output units), "parity_agreement" (share of equal arg-max), "parity_kappa",
            "parity_sqnr_db" and "parity_varying_sqnr_db" (see `gates`), "int8_share" (read from the
            runtime's optimized graph; None = fp32 asked, or that runtime can't be had here),
            "float_operators" (what stayed in float) and "int8_share_expected" (without what should).
        twin: the same graph for a runtime of this machine, where the own one only exists on devices:
            golden and reference outputs come from it.
    """

    files: Mapping[str, bytes]
    runtime: RuntimeNeed
    precision: str
    signature: Signature
    facts: Mapping[str, Any] = field(default_factory=dict)
    twin: Exported | None = None

    @property
    def model_file(self) -> str:
        return self.runtime.model_file

    @property
    def size_bytes(self) -> int:
        """Bytes of the model files, uncompressed."""
        return sum(len(content) for content in self.files.values())

    @cached_property
    def wire_bytes(self) -> int:
        """Bytes of the model files, each gzip-compressed at level 9."""
        return sum(compressed_size(content) for content in self.files.values())


def compressed_size(content: bytes) -> int:
    """Bytes after gzip at level 9: the unit of every size ratio."""
    import gzip

    return len(gzip.compress(content, 9, mtime=0))


class Target(ABC):
    """A runtime's format. The base class owns limits, errors and the parity check."""

    name: ClassVar[str]  # the runtime's name, as in profiles
    isa_matters: ClassVar[bool] = True  # int8 files depend on the class's CPU features
    precisions: ClassVar[tuple[str, ...]] = ("fp32", "int8")
    dynamic: ClassVar[bool] = False  # its int8 may take activation ranges at each call

    @abstractmethod
    def convert(
        self,
        model: nn.Module | None,
        task: Task,
        precision: str,
        calibration: Calibration | None,
        class_spec: ClassSpec,
    ) -> Exported:
        """Makes the files. `model` is None when the task is an ONNX file."""

    def serves(self, class_spec: ClassSpec) -> bool:
        """True when devices of the class have this target's runtime."""
        return self.name in class_spec.runtimes

    def export(
        self,
        model: nn.Module | None,
        task: Task,
        precision: str = "fp32",
        calibration: Calibration | None = None,
        class_spec: ClassSpec | None = None,
        *,
        min_int8_share: float = gates.MIN_INT8_SHARE,
    ) -> Exported:
        """Converts, loads the result with the agent's own runtime and compares it with the torch model.

        Args:
            min_int8_share: of the operations that should be int8, on a class that this machine is of.

        Raises:
            InvalidInput: the model cannot be exported, or its converted form answers differently.
            Unsupported: a precision that this target does not have, int8 that is computed in float, or a
                narrow file whose answers are far from the original's (`gates`).
        """
        if precision not in self.precisions:
            raise Unsupported(
                f"The target {self.name} has no precision '{precision}'.",
                f"Use {', '.join(self.precisions)}.",
            )
        if calibration is not None and calibration.method == "dynamic" and not self.dynamic:
            raise Unsupported(
                f"The target {self.name} has no dynamic int8.",
                "Use the method minmax, or the target onnxruntime.",
            )
        if precision == "int8" and calibration is None:
            calibration = Calibration(task.calibration_data().inputs)
        spec = class_spec or ClassSpec("any")
        remedy = "Avoid data-dependent control flow in forward(); torch.export.export() shows where."
        if model is None:
            remedy = "Export the ONNX file again with opset 17 or newer and float32 weights."
        with _clear_errors(self.name, remedy, model, task):
            exported = self.convert(model, task, precision, calibration, spec)
        if calibration is not None and calibration.keep_float:
            kept = {"keep_float": list(calibration.keep_float)}
            exported = dataclasses.replace(exported, facts={**exported.facts, **kept})
        checked = with_expected_share(self.check(exported, model, task), model, task)
        return refuse_fallback(checked, spec, min_int8_share)

    def check(self, exported: Exported, model: nn.Module | None, task: Task) -> Exported:
        """Adds to the facts what can be found out here; a target whose runtime can't be had here says so.

        Raises:
            InvalidInput: the file does not answer as the model does, or breaks the format's rules.
        """
        return check_parity(exported, model, task)


@contextlib.contextmanager
def _clear_errors(target: str, remedy: str, model: nn.Module | None, task: Task) -> Iterator[None]:
    """Turns what a converter raises into an InvalidInput that names the model."""
    from shoal_optimizer.targets import reasons

    try:
        yield
    except ShoalError:
        raise
    except Exception as error:
        reason, better = reasons.explain(error, model, task)
        raise InvalidInput(
            f"The model cannot be exported for {target}: {reason}.", better or remedy
        ) from error


def check_parity(exported: Exported, model: nn.Module | None, task: Task) -> Exported:
    """Adds parity and int8 share to the facts.

    Raises:
        InvalidInput: an fp32 export differs from torch.
        Unsupported: a narrower one is too far from it, see `gates`.
    """
    inputs = task.required("evaluation").inputs[:PARITY_ITEMS]
    wanted = task.predict(model, inputs)  # type: ignore[arg-type]
    instance = load_exported(exported)
    try:
        got = run_instance(instance, exported.signature, inputs)
        facts = instance.facts()
    finally:
        instance.close()
    parity = gates.compare(wanted, got, exported.signature.output_kind)
    gates.require_parity(parity, exported.runtime.name, exported.precision)
    found = {**exported.facts, **parity.facts(), "int8_share": None}
    if exported.precision == "int8":
        # Without convolutions and products there is nothing to gain: such a file counts as float.
        found["int8_share"] = 0.0 if math.isnan(facts.int8_share) else facts.int8_share
        found["float_operators"] = list(facts.float_operators)
    return dataclasses.replace(exported, facts=found)


def with_expected_share(exported: Exported, model: nn.Module | None, task: Task) -> Exported:
    """Adds `int8_share_expected`: the share among operations that should be int8, without those of
    preprocess, postprocess and the layers kept in float (`float_by_design`)."""
    share = exported.facts.get("int8_share")
    if share is None or "int8_share_expected" in exported.facts:
        return exported
    floats = exported.facts.get("float_operators", [])
    meant = float_by_design(exported, model, task) if share < 1.0 else []
    facts: dict[str, Any] = {"int8_share_expected": gates.expected_share(share, len(floats), len(meant))}
    if meant:
        facts["float_by_design"] = meant
    return dataclasses.replace(exported, facts={**exported.facts, **facts})


def refuse_fallback(exported: Exported, spec: ClassSpec, minimum: float = gates.MIN_INT8_SHARE) -> Exported:
    """The same export, unless too much of its int8 became float on this machine, which is of the class.

    On another kind of machine the share is read by the device: by timing trials, and by the probe
    against the promised one.

    Raises:
        Unsupported: the expected share is below `minimum`; names the operations.
    """
    facts = exported.facts
    expected = facts.get("int8_share_expected", facts.get("int8_share"))
    if exported.precision == "int8" and spec.local and expected is not None:
        meant = facts.get("float_by_design", [])
        names = [name for name in facts.get("float_operators", []) if not any(k in name for k in meant)]
        gates.require_share(expected, exported.runtime.name, minimum, names)
    return exported


def float_by_design(exported: Exported, model: nn.Module | None, task: Task) -> list[str]:
    """Names, in the float ONNX graph, of the convolutions and matrix products that no int8 is meant for."""
    import onnx

    from shoal_optimizer.targets.onnx import excluded_nodes, float_graph
    from shoal_optimizer.targets.qdq import WEIGHTED

    graph = float_graph(model, task)
    outside = {*excluded_nodes(graph), *exported.facts.get("keep_float", ())}
    for step in exported.facts.get("reverted", ()):  # see `reverting`
        outside.update(step["layers"])
    nodes = onnx.load_from_string(graph).graph.node
    return [node.name for node in nodes if node.op_type in WEIGHTED and node.name in outside]


def load_twin(exported: Exported, *, threads: int = 1) -> Instance:
    """Loads exported files with their own runtime or, where that is missing here, their twin."""
    if exported.twin is None:
        return load_exported(exported, threads=threads)
    try:
        return load_exported(exported, threads=threads)
    except Unsupported:
        return load_exported(exported.twin, threads=threads)


def load_exported(exported: Exported, *, threads: int = 1) -> Instance:
    """Loads exported files with the agent's runtime: what is measured is what will run."""
    from shoal_agent import runtimes
    from shoal_agent.runtimes.base import Options

    # Requirements are for devices; here only the answers count, and any CPU can give them.
    need = dataclasses.replace(exported.runtime, isa=(), version_min="", version_max="")
    folder = Path(tempfile.mkdtemp(prefix="shoal-load-"))
    try:
        config = BundleConfig(signature=exported.signature, runtime=need)
        bundle = open_bundle(folder, write_bundle(folder, config, exported.files), verify=False)
        instance = runtimes.find(need.name).load(bundle, Options(threads=threads))
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    weakref.finalize(instance, shutil.rmtree, folder, ignore_errors=True)  # facts() reads the file again
    return instance


def run_instance(instance: Instance, signature: Signature, inputs: np.ndarray, batch: int = 64) -> np.ndarray:
    """Outputs [n, ...] of the first output for endpoint inputs [n, ...]."""
    answer, batch = signature.outputs[0].name, step_of(signature, batch)
    parts = [
        np.array(instance.run(by_name(inputs[start : start + batch], signature))[answer])
        for start in range(0, len(inputs), batch)
    ]
    return np.concatenate(parts)


def find(name: str) -> Target:
    """The target named `name`. Raises NotFound, listing what is installed."""
    for entry in entry_points(group="shoal.targets"):
        if entry.name == name:
            found: type[Target] = entry.load()
            return found()
    known = ", ".join(sorted(entry.name for entry in entry_points(group="shoal.targets")))
    raise NotFound(f"There is no target '{name}'.", f"Installed targets: {known}.")


def available(class_spec: ClassSpec) -> list[Target]:
    """Every installed target whose runtime the class has, by name."""
    names = sorted(entry.name for entry in entry_points(group="shoal.targets"))
    return [target for target in map(find, names) if target.serves(class_spec)]
