"""OpenVINO: the ONNX file that it reads as well, or its own format (IR) where that is the better form.

    fp32, fp16, int8_weights   ONNX: as fast as the IR and up to half as large before compression
    int8                       ONNX with QDQ; the IR of NNCF where the ONNX file falls short (`chosen`)
    int4_weights               IR by NNCF, where it is smaller than int8_weights

The measurements behind it are in docs/decisions/0006.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from shoal_optimizer.targets import openvino_ir as ir
from shoal_optimizer.targets import weights_only
from shoal_optimizer.targets.base import (
    Calibration,
    ClassSpec,
    Exported,
    Target,
    check_parity,
    with_expected_share,
)
from shoal_optimizer.targets.onnx import MODEL_FILE, OnnxTarget, Scheme, float_graph
from shoal_protos.bundle import RuntimeNeed
from shoal_protos.errors import MissingExtra, ShoalError, Unsupported

if TYPE_CHECKING:
    from torch import nn

    from shoal_optimizer.task import Task

RUNTIME_MIN = "2025.0"
ONNX, IR = "onnx", "ir"
GOOD_SQNR_DB = 20.0  # answers whose error has at most a hundredth of their energy need no second form
CLEARLY_DB = 3.0  # a form is more faithful with half the error's energy


class OpenVinoTarget(Target):
    """U8S8 QDQ runs in int8 there as in ONNX Runtime, and the same saturation rule holds for x86
    without VNNI. The fact `format` is "onnx" or "ir", `format_reason` says why."""

    name: ClassVar[str] = "openvino"
    precisions: ClassVar[tuple[str, ...]] = ("fp32", "int8", "fp16", "int8_weights", "int4_weights")

    def convert(
        self,
        model: nn.Module | None,
        task: Task,
        precision: str,
        calibration: Calibration | None,
        class_spec: ClassSpec,
    ) -> Exported:
        if precision == "int8":
            assert calibration is not None
            return _int8(model, task, calibration, class_spec)
        if precision == "int4_weights":
            keep = calibration.keep_float if calibration is not None else ()
            return _int4(model, task, class_spec, keep)
        return _from_onnx(model, task, precision, calibration, class_spec)

    def check(self, exported: Exported, model: nn.Module | None, task: Task) -> Exported:
        """Parity, unless choosing the form has measured it already."""
        return exported if "parity_max" in exported.facts else check_parity(exported, model, task)


def _from_onnx(
    model: nn.Module | None,
    task: Task,
    precision: str,
    calibration: Calibration | None,
    class_spec: ClassSpec,
) -> Exported:
    made = OnnxTarget(judged_in="openvino").convert(model, task, precision, calibration, class_spec)
    need = RuntimeNeed("openvino", MODEL_FILE, RUNTIME_MIN, isa=made.runtime.isa, precision=precision)
    facts = {**made.facts, "format": ONNX, "format_reason": "as fast as the IR and smaller"}
    files = {MODEL_FILE: ir.widened(made.files[MODEL_FILE])}
    return Exported(files, need, precision, made.signature, facts)


def _ir(
    files: dict[str, bytes], task: Task, precision: str, isa: tuple[str, ...], facts: dict[str, Any]
) -> Exported:
    need = RuntimeNeed("openvino", ir.XML, RUNTIME_MIN, isa=isa, precision=precision)
    known = {"format": IR, "tools": ir.versions()}
    return Exported(files, need, precision, task.signature, known | facts)


def _int4(model: nn.Module | None, task: Task, class_spec: ClassSpec, keep: tuple[str, ...]) -> Exported:
    """NNCF's IR. Raises Unsupported where it is hardly smaller than int8 weights in ONNX."""
    graph = ir.widened(float_graph(model, task))
    files = ir.saved(ir.four_bit_weights(graph, keep), graph)
    made = _ir(files, task, "int4_weights", (), {"format_reason": "the form whose 4-bit weights it reads"})
    plainer = _from_onnx(model, task, "int8_weights", None, class_spec)
    saved = 1 - made.wire_bytes / plainer.wire_bytes
    if saved < weights_only.LEAST_SAVED["int4_weights"]:
        raise Unsupported(
            f"int4_weights would save {max(0.0, saved):.0%} of the {plainer.wire_bytes} compressed bytes of "
            "int8_weights.",
            "Use the precision int8_weights or int8: 4 bits are for large matrix products.",
        )
    return made


# ---------------------------------------------------------------------------- int8: which form?


def _int8(model: nn.Module | None, task: Task, calibration: Calibration, class_spec: ClassSpec) -> Exported:
    """The ONNX file, or NNCF's IR where OpenVINO runs the ONNX file badly or not at all."""
    plain = _from_onnx(model, task, "int8", calibration, class_spec)
    try:
        measured = _measured(plain, model, task, calibration)
    except MissingExtra:
        return plain  # no OpenVINO here: nothing can be compared; `check` says so
    except ShoalError as error:
        if ir.refusal(calibration):
            raise
        other = _measured(_nncf_form(model, task, calibration, class_spec), model, task, calibration)
        return _with_reason(other, f"the ONNX file is refused: {error.message}")
    trouble = shortcoming(measured)
    if not trouble:
        return measured
    cannot = ir.refusal(calibration)
    if cannot:
        return _with_reason(measured, f"{trouble}, but {cannot}")
    try:
        other = _measured(_nncf_form(model, task, calibration, class_spec), model, task, calibration)
    except Exception as error:  # NNCF raises its own; the ONNX file is good enough to ship
        return _with_reason(measured, f"{trouble}, but NNCF failed: {str(error)[:200]}")
    return chosen(measured, other)


def _nncf_form(
    model: nn.Module | None, task: Task, calibration: Calibration, class_spec: ClassSpec
) -> Exported:
    scheme = Scheme.of(class_spec)
    graph = ir.widened(float_graph(model, task))
    files = ir.saved(ir.quantized(graph, calibration, scheme), graph)
    return _ir(files, task, "int8", scheme.isa, scheme.facts() | {"method": calibration.method})


def _measured(exported: Exported, model: nn.Module | None, task: Task, calibration: Calibration) -> Exported:
    """With parity and int8 share as they are on this machine."""
    kept = {"keep_float": list(calibration.keep_float)} if calibration.keep_float else {}
    known = replace(exported, facts={**exported.facts, **kept})
    return with_expected_share(check_parity(known, model, task), model, task)


def shortcoming(exported: Exported) -> str:
    """What is not good about a measured int8 export, "" when another form isn't worth making."""
    share, fidelity = exported.facts.get("int8_share_expected"), exported.facts["parity_sqnr_db"]
    if share is not None and share < 1.0:
        return f"the ONNX file runs {share:.0%} of the operations in int8"
    if fidelity < GOOD_SQNR_DB:
        return f"the ONNX file's answers have a signal-to-noise ratio of {fidelity:.0f} dB"
    return ""


def chosen(plain: Exported, other: Exported) -> Exported:
    """The better of the ONNX file and the IR, both measured: first by int8 share, then by how faithful
    the answers are if the difference is clear, then by bytes on the wire. No timing: it would make equal
    inputs give different files, and forms with equal shares were within 7 % of each other."""
    shares = [float(item.facts.get("int8_share_expected") or 0.0) for item in (plain, other)]
    fidelity = [float(item.facts["parity_sqnr_db"]) for item in (plain, other)]
    figures = (
        f"int8 share {shares[0]:.2f} and {shares[1]:.2f}, {fidelity[0]:.0f} and {fidelity[1]:.0f} dB, "
        f"{plain.wire_bytes} and {other.wire_bytes} bytes as ONNX and IR"
    )
    if shares[0] != shares[1]:
        best = other if shares[1] > shares[0] else plain
        return _with_reason(best, f"the higher int8 share ({figures})")
    if abs(fidelity[0] - fidelity[1]) >= CLEARLY_DB:
        best = other if fidelity[1] > fidelity[0] else plain
        return _with_reason(best, f"the more faithful answers ({figures})")
    best = other if other.wire_bytes < plain.wire_bytes else plain
    return _with_reason(best, f"the smaller one ({figures})")


def _with_reason(exported: Exported, reason: str) -> Exported:
    return replace(exported, facts={**exported.facts, "format_reason": reason})
