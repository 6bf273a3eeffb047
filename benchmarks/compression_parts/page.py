"""The table that people read, and the two files in docs/results."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Figures = Mapping[str, Mapping[str, Any]]
COLUMNS = (
    ("size", "size_ratio"), ("file", "file_ratio"), ("wire", "wire_ratio"),
    ("x PyTorch", "speedup_over_pytorch"),
    ("x ONNX Runtime fp32", "speedup_over_onnxruntime_fp32"), ("x best fp32", "speedup_over_best_fp32"),
    ("accuracy kept", "accuracy_kept"), ("worst seed", "accuracy_kept_worst_seed"), ("us", "latency_us"),
)  # fmt: skip
# (largest size, least speed over PyTorch, least accuracy kept): better ends of the ranges that are quoted.
QUOTED = {
    "weight_pruning": (0.30, None, 0.98), "channel_pruning": (0.20, 3.0, 0.95), "int8": (0.25, 4.0, 0.95),
    "distillation": (0.10, 5.0, 0.90), "architecture_search": (0.05, 10.0, 0.90),
}  # fmt: skip
# (size, accuracy kept in each seed, over ONNX Runtime fp32, over PyTorch), without and with VNNI
AIMS = {
    "combined": ((0.04, 0.99, 10, 30), (0.04, 0.99, 14, 40)),
    "wide.combined": ((0.04, 0.99, 13, 40), (0.04, 0.99, 13, 40)),
}


def table(figures: Figures) -> str:
    """One line for each row, with intervals where they say something."""
    lines = [
        "| row | runtime | " + " | ".join(title for title, _ in COLUMNS) + " |",
        "|---" * (len(COLUMNS) + 2) + "|",
    ]
    for row in dict.fromkeys(name.rpartition(".")[0] for name in figures if name.endswith(".size_ratio")):
        cells = [_cell(key, figures[f"{row}.{key}"]) for _, key in COLUMNS]
        lines.append(f"| {row} | {figures[f'{row}.size_ratio']['runtime']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(key: str, figure: Mapping[str, Any]) -> str:
    value, low, high = figure["value"], figure["low"], figure["high"]
    if key.endswith("_ratio") or key == "accuracy_kept_worst_seed":
        return f"{value:.1%}"
    if key == "accuracy_kept":
        return f"{value:.2%} ({low:.2%} to {high:.2%})"
    return f"{value:.0f}" if key == "latency_us" else f"{value:.1f} ({low:.1f} to {high:.1f})"


def verdicts(figures: Figures, vnni: bool) -> list[str]:
    """A sentence for each row about its aim."""
    found = []
    for row, (size, speed, kept) in QUOTED.items():
        if f"{row}.size_ratio" not in figures:
            continue
        got = [
            figures[f"{row}.{key}"]["value"]
            for key in ("size_ratio", "speedup_over_pytorch", "accuracy_kept")
        ]
        parts = [_said("size", got[0], size, least=False), _said("accuracy kept", got[2], kept)]
        if speed is None:
            parts.append("speed: not to be had on dense runtimes, none is claimed")
        else:
            parts.append(_said("speed over PyTorch", got[1], speed))
        found.append(f"- {row}, against the better end of what is quoted: " + "; ".join(parts))
    for row, aims in AIMS.items():
        if f"{row}.size_ratio" not in figures:
            continue
        size, kept, ort, eager = aims[vnni]
        parts = [
            _said("size", figures[f"{row}.size_ratio"]["value"], size, least=False),
            _said(
                "accuracy kept in the worst seed", figures[f"{row}.accuracy_kept_worst_seed"]["value"], kept
            ),
            _said("over ONNX Runtime fp32", figures[f"{row}.speedup_over_onnxruntime_fp32"]["value"], ort),
            _said("over PyTorch", figures[f"{row}.speedup_over_pytorch"]["value"], eager),
        ]
        found.append(f"- {row}, against the aim {'with' if vnni else 'without'} VNNI: " + "; ".join(parts))
    return found


def _said(what: str, value: float, aim: float, least: bool = True) -> str:
    met = value >= aim if least else value <= aim
    sign = ">=" if least else "<="
    text = f"{value:.3g} ({sign} {aim:g})" if aim > 1 else f"{value:.2%} ({sign} {aim:.0%})"
    return f"{what} {text} {'met' if met else 'missed'}"


def write(
    path: Path,
    document: Mapping[str, Any],
    missing: Sequence[str],
    notes: Sequence[str],
    *,
    judged: bool = True,
) -> str:
    """Writes `path` and the page beside it; gives the page's text. The aims are those of the full one."""
    figures = document["figures"]
    vnni = any("vnni" in feature for feature in document["context"]["isa"])
    aims = [*verdicts(figures, vnni), ""] if judged else []
    text = "\n".join([table(figures), "", *aims, *notes])
    if missing:
        text += "\n\nNot finished: " + ", ".join(missing) + ". Run it again to go on.\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n")
    path.with_suffix(".md").write_text(f"# compression\n\n{text.rstrip()}\n")
    return text
