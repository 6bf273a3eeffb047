"""Golden cases: example inputs for timing and warm-up, and the check of a bundle's answers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from shoal_agent.detection import Detections, match, suppress
from shoal_agent.runtimes.base import Instance
from shoal_agent.runtimes.tensors import Array, check_inputs, dtype_of
from shoal_protos.bundle import BoxRule, Bundle, GoldenCases, Signature, TensorSpec
from shoal_protos.errors import InvalidInput

MAX_CASES = 1024
_OPEN_SIZE = 16  # of a dimension that the signature leaves open, for made-up inputs


@dataclass(frozen=True)
class GoldenReport:
    """How golden cases came out. Without cases: `cases` = 0, `ok`, and NaN figures."""

    cases: int
    ok: bool
    max_abs_error: float
    agreement: float  # share of cases with the expected arg-max (logits) or boxes, else within tolerance


def load_arrays(path: str, label: str) -> dict[str, Array]:
    """All arrays of an `.npz` file. Raises InvalidInput for anything that isn't one, pickles included."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except Exception as error:  # zip, header, compression and dtype errors have no common base
        raise InvalidInput(f"{label} is not a readable .npz file: {str(error)[:200]}") from error


def golden_cases(bundle: Bundle) -> tuple[dict[str, Array], dict[str, Array], int]:
    """(inputs, expected outputs, number of cases) of a bundle that has golden cases.

    Raises:
        InvalidInput: the file is malformed or does not fit the signature.
    """
    golden = bundle.config.golden
    if golden is None:
        return {}, {}, 0
    arrays = load_arrays(str(bundle.file(golden.file)), f"'{golden.file}'")
    inputs = {name[6:]: value for name, value in arrays.items() if name.startswith("input:")}
    outputs = {name[7:]: value for name, value in arrays.items() if name.startswith("output:")}
    count = check_inputs(one_by_one(bundle.config.signature), inputs)
    known = {spec.name for spec in bundle.config.signature.outputs}
    if not outputs or not set(outputs) <= known or any(len(value) != count for value in outputs.values()):
        raise InvalidInput(f"The outputs in '{golden.file}' do not fit the signature.")
    return (
        {name: np.ascontiguousarray(value[:MAX_CASES]) for name, value in inputs.items()},
        {name: value[:MAX_CASES] for name, value in outputs.items()},
        min(count, MAX_CASES),
    )


def one_by_one(signature: Signature) -> Signature:
    """The signature for cases that are run one at a time: a batch that is fixed to 1 counts as open."""
    inputs = tuple(
        replace(spec, shape=(-1, *spec.shape[1:])) if spec.shape[:1] == (1,) else spec
        for spec in signature.inputs
    )
    return replace(signature, inputs=inputs)


def example_inputs(bundle: Bundle, limit: int = 16, seed: int = 0) -> list[dict[str, Array]]:
    """Up to `limit` inputs of batch size 1: golden cases where there are some, else made up inside the
    signature's ranges."""
    inputs, _, count = golden_cases(bundle)
    if count:
        return [
            {name: np.ascontiguousarray(value[i : i + 1]) for name, value in inputs.items()}
            for i in range(min(count, limit))
        ]
    random = np.random.default_rng(seed)
    specs = bundle.config.signature.inputs
    return [{spec.name: _made_up(spec, random) for spec in specs} for _ in range(min(4, limit))]


def _made_up(spec: TensorSpec, random: np.random.Generator) -> Array:
    shape = [
        size if size >= 0 else (1 if place == 0 else _OPEN_SIZE) for place, size in enumerate(spec.shape)
    ]
    dtype = dtype_of(spec.datatype)
    if dtype.kind == "b":
        return random.integers(0, 2, shape).astype(np.bool_)
    low = spec.low if spec.low is not None else 0.0
    high = spec.high if spec.high is not None else low + (255.0 if dtype == np.uint8 else 1.0)
    return random.uniform(low, high, shape).astype(dtype)


def check_golden(bundle: Bundle, instance: Instance) -> GoldenReport:
    """Runs every golden case, one at a time as an application would, and compares the answers.

    Raises:
        InvalidInput: malformed cases, or the runtime refuses them.
    """
    inputs, expected, count = golden_cases(bundle)
    golden = bundle.config.golden
    if golden is None or count == 0:
        return GoldenReport(0, True, math.nan, math.nan)
    rows = [
        instance.run({name: np.ascontiguousarray(value[i : i + 1]) for name, value in inputs.items()})
        for i in range(count)
    ]
    found = {name: np.concatenate([row[name] for row in rows]) for name in expected}
    if any(found[name].shape != expected[name].shape for name in expected):
        return GoldenReport(count, False, math.inf, 0.0)
    signature = bundle.config.signature
    if signature.output_kind == "boxes":
        return _check_boxes(found, expected, golden, signature.boxes or BoxRule())
    within, worst = _tolerance(found, expected, golden.rtol, golden.atol)
    if signature.output_kind != "logits":
        return GoldenReport(count, bool(within.all()), worst, float(within.mean()))
    same = np.ones(count, bool)
    for name, value in expected.items():
        if np.isnan(found[name]).any():
            return GoldenReport(count, False, math.inf, 0.0)
        same &= found[name].reshape(count, -1).argmax(1) == value.reshape(count, -1).argmax(1)
    agreement = float(same.mean())
    return GoldenReport(count, bool(within.all()) or agreement >= golden.min_agreement, worst, agreement)


def _check_boxes(
    found: Mapping[str, Array], expected: Mapping[str, Array], golden: GoldenCases, rule: BoxRule
) -> GoldenReport:
    """Boxes agree where their numbers do, or where applications would get the same answer.

    The corners of a candidate that nobody sees are free: they come from cells that hold nothing.
    """
    count = len(next(iter(expected.values())))
    if any(value.ndim != 3 or value.shape[2] < 5 for value in expected.values()):
        raise InvalidInput(f"The outputs in '{golden.file}' are no boxes.")
    within, worst = _tolerance(
        {name: _seen(value, expected[name], rule) for name, value in found.items()},
        {name: _seen(value, found[name], rule) for name, value in expected.items()},
        golden.rtol,
        golden.atol,
    )
    if any(np.isnan(value).any() for value in found.values()):
        return GoldenReport(count, False, math.inf, 0.0)
    same = within.copy()
    for place in np.flatnonzero(~within):
        same[place] = all(
            same_answer(suppress(found[name][place], rule), suppress(value[place], rule))
            for name, value in expected.items()
        )
    agreement = float(same.mean())
    return GoldenReport(count, bool(within.all()) or agreement >= golden.min_agreement, worst, agreement)


def _seen(own: Array, other: Array, rule: BoxRule) -> Array:
    """`own` with the corners of candidates blanked that neither side scores as high as the rule asks."""
    scores = np.maximum(own[..., 4:].max(axis=-1), other[..., 4:].max(axis=-1))
    return np.where(((scores < rule.score_threshold)[..., None]) & (np.arange(own.shape[-1]) < 4), 0, own)


def same_answer(found: Detections, expected: Detections, iou: float = 0.5) -> bool:
    """True when both hold the same boxes: as many, each overlapping one of its class by `iou`."""
    if len(found) != len(expected):
        return False
    target = np.concatenate([expected.boxes, expected.classes[:, None].astype(np.float32)], axis=1)
    return bool(match(found, target, iou).hits.all())


def _tolerance(
    found: Mapping[str, Array], expected: Mapping[str, Array], rtol: float, atol: float
) -> tuple[Array, float]:
    """(which cases lie within the tolerance, largest absolute error)."""
    count = len(next(iter(expected.values())))
    within, worst = np.ones(count, bool), 0.0
    for name, value in expected.items():
        want = value.reshape(count, -1).astype(np.float64)
        error = np.abs(found[name].reshape(count, -1).astype(np.float64) - want)
        error = np.nan_to_num(error, nan=np.inf, posinf=np.inf)
        within &= (error <= atol + rtol * np.abs(want)).all(axis=1)
        worst = max(worst, float(error.max(initial=0.0)))
    return within, worst
