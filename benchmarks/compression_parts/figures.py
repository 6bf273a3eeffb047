"""Figures of the finished rows: sizes, speeds with their spread, accuracy kept with its interval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from compression_parts.rows import ORIGINAL
from compression_parts.timing import EAGER, Key, ratio

RESAMPLES = 2000
WEIGHT_PRUNING = "weight_pruning"
Found = Mapping[int, Mapping[str, dict[str, Any]]]  # seed -> row name -> row


def figure(value: float, low: float, high: float, n: int, unit: str) -> dict[str, Any]:
    return {"value": value, "unit": unit, "low": min(low, value), "high": max(high, value), "n": n}


def of_network(
    network: str, prefix: str, found: Found, times: Mapping[Key, list[float]], folder: Path
) -> dict[str, dict[str, Any]]:
    """All figures of one network. A row's runtime is the one that was fastest over all seeds."""
    figures: dict[str, dict[str, Any]] = {}
    rights = {
        seed: {
            name: np.load(folder / "rows" / row["folder"] / f"right-{runtime}.npy")
            for name, row in rows.items()
            for runtime in [fastest(network, name, found, times)]
        }
        for seed, rows in found.items()
    }
    floats = {seed: fastest(network, ORIGINAL, {seed: rows}, times) for seed, rows in found.items()}
    accuracy = [float(right[ORIGINAL].mean()) for right in rights.values()]
    figures[f"{prefix}original.accuracy"] = figure(
        float(np.mean(accuracy)), min(accuracy), max(accuracy), len(accuracy), "share"
    )
    for name in dict.fromkeys(name for rows in found.values() for name in rows if name != ORIGINAL):
        seeds = [seed for seed, rows in found.items() if name in rows]
        runtime = fastest(network, name, found, times)
        values = _sizes([(found[seed][ORIGINAL], found[seed][name]) for seed in seeds], runtime, name)
        bases = {
            "pytorch": dict.fromkeys(seeds, EAGER),
            "onnxruntime_fp32": dict.fromkeys(seeds, "onnxruntime"),
            "best_fp32": floats,
            "same_runtime_fp32": dict.fromkeys(seeds, runtime),
        }
        for other, base in bases.items():
            over: list[float] = []
            under: list[float] = []
            for seed in seeds:
                over += times[network, seed, ORIGINAL, base[seed]]
                under += times[(network, seed, name, runtime)]
            values[f"speedup_over_{other}"] = ratio_figure(over, under)
        pairs = [(rights[seed][ORIGINAL], rights[seed][name]) for seed in seeds]
        kept = [float(right.mean() / whole.mean()) for whole, right in pairs]
        low, high = kept_interval(pairs)
        items = sum(len(right) for _, right in pairs)
        values["accuracy_kept"] = figure(float(np.mean(kept)), low, high, items, "share")
        values["accuracy_kept_worst_seed"] = figure(min(kept), min(kept), min(kept), len(kept), "share")
        latency = [value for seed in seeds for value in times[(network, seed, name, runtime)]]
        low, high = (float(np.quantile(latency, share)) for share in (0.05, 0.95))
        values["latency_us"] = figure(float(np.median(latency)), low, high, len(latency), "us")
        for key, value in values.items():
            figures[f"{prefix}{name}.{key}"] = value | {"runtime": runtime}
    return figures


def ratio_figure(over: list[float], under: list[float]) -> dict[str, Any]:
    value, low, high, n = ratio(over, under)
    return figure(value, low, high, n, "ratio")


def fastest(network: str, row: str, found: Found, times: Mapping[Key, list[float]]) -> str:
    """The runtime of least median latency among those that every seed has the row in."""
    forms = [set(rows[row]["forms"]) for rows in found.values() if row in rows]
    seeds = [seed for seed, rows in found.items() if row in rows]
    best: str = min(
        sorted(set.intersection(*forms)),
        key=lambda name: float(np.median([times[network, seed, row, name] for seed in seeds])),
    )
    return best


def _sizes(
    pairs: Sequence[tuple[dict[str, Any], dict[str, Any]]], runtime: str, name: str
) -> dict[str, dict[str, Any]]:
    """Shares of the original's fp32 ONNX file. Weight pruning's size is that of the compressed file: zeros
    take their bytes in an uncompressed one."""
    whole = [original["forms"]["onnxruntime"] for original, _ in pairs]
    forms = [row["forms"][runtime] for _, row in pairs]
    files = [form["size"] / base["size"] for form, base in zip(forms, whole, strict=True)]
    wire = [form["wire"] / base["wire"] for form, base in zip(forms, whole, strict=True)]
    claimed = wire if name == WEIGHT_PRUNING else files
    unit = "ratio of gzip bytes" if name == WEIGHT_PRUNING else "ratio of file bytes"
    return {
        "size_ratio": _range(claimed, unit),
        "file_ratio": _range(files, "ratio of file bytes"),
        "wire_ratio": _range(wire, "ratio of gzip bytes"),
    }


def _range(values: Sequence[float], unit: str) -> dict[str, Any]:
    return figure(float(np.mean(values)), min(values), max(values), len(values), unit)


def kept_interval(pairs: Sequence[tuple[np.ndarray, np.ndarray]], seed: int = 0) -> tuple[float, float]:
    """95 % bootstrap interval of the mean over seeds of accuracy kept, resampling seeds and, within each,
    test pictures (original and variant on the same ones).

    Args:
        pairs: for each seed whether the original, and the variant, were right, bool [n].
    """
    random = np.random.default_rng(seed)
    tables = [_counts(whole, right) for whole, right in pairs]
    sizes = [len(right) for _, right in pairs]
    drawn = np.stack(
        [random.multinomial(n, table, RESAMPLES) for n, table in zip(sizes, tables, strict=True)]
    )
    both, only_whole, only_right = drawn[..., 0], drawn[..., 1], drawn[..., 2]
    kept = (both + only_right) / np.maximum(both + only_whole, 1)  # [seeds, resamples]
    picks = random.integers(0, len(pairs), (RESAMPLES, len(pairs)))
    means = kept[picks.T, np.arange(RESAMPLES)].mean(0)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def _counts(whole: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Shares of pictures that both, only the original, only the variant, or neither had right."""
    cells = [whole & right, whole & ~right, ~whole & right, ~whole & ~right]
    return np.array([float(cell.mean()) for cell in cells])


def cpu_hours(found: Mapping[str, Found], originals: Mapping[tuple[str, int], float], extra: float) -> float:
    """CPU hours of everything that was trained, exported and judged. `extra` seconds: candidates."""
    rows = [row for seeds in found.values() for named in seeds.values() for row in named.values()]
    return (float(sum(row["cpu_s"] for row in rows)) + sum(originals.values()) + extra) / 3600
