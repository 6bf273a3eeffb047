"""The zoo's page: one row a model, and what was measured where."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any


def context() -> dict[str, Any]:
    """The machine and the tools, as they are during a timing."""
    from shoal_agent import profile

    machine = profile.measure()
    return {
        "class": profile.class_of(machine),
        "threads": 1,
        "load_1min": round(os.getloadavg()[0], 2),
        "versions": {name: version(name) for name in ("onnxruntime", "openvino", "nncf", "onnx")},
    }


def render(result: Mapping[str, Any]) -> str:
    lines = [
        "# Models that nobody tuned for",
        "",
        "`python benchmarks/zoo.py`: Shoal's defaults (`shoal optimize MODEL.onnx`, "
        f"{_minutes(result['rows'])} of search, no training) against the best of what one would do by hand, "
        "at equal accuracy: the objective allows one point of the metric, and a way by hand that loses more "
        "does not count.",
        "",
        f"{result['zoo.models']} models; median speedup over the best way by hand "
        f"**{result['zoo.median_speedup_over_best_by_hand']:.2f}x**, worst {result['zoo.worst']:.2f}x "
        f"({result['zoo.worst_model']}). {_where(result['context'])}",
        "",
        "| model | chosen by Shoal | accuracy kept | best by hand | ms by hand | ms Shoal | speedup (95 %) |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [_row(row) for row in result["rows"]]
    lines += ["", "## What accuracy means, and what did not count", ""]
    lines += [_notes(row) for row in result["rows"]]
    return "\n".join(lines) + "\n"


def _minutes(rows: Sequence[Mapping[str, Any]]) -> str:
    """The budgets that the rows were made with; older rows had two minutes and did not say so."""
    found = sorted({float(row["shoal"].get("minutes", 2.0)) for row in rows})
    return " or ".join(f"{minutes:g}" for minutes in found) + " minutes"


def _where(context: Mapping[str, Any]) -> str:
    tools = ", ".join(f"{name} {number}" for name, number in context["versions"].items())
    return (
        f"One thread, interleaved rounds, on `{context['class']}` at a load of {context['load_1min']} "
        f"({tools}); on a machine that is not idle only ratios mean something."
    )


def _row(row: Mapping[str, Any]) -> str:
    timing, shoal = row["timing"], row["shoal"]
    if "failed" in shoal:
        return f"| {row['name']} | failed: {shoal['failed']} | | {timing['best']} | | | |"
    low, high = timing["low"], timing["high"]
    return (
        f"| {row['name']} | {shoal['chosen']} | {shoal['accuracy']:.4f} of {row['baseline']:.4f} | "
        f"{timing['best']} | {timing['ms'][timing['best']]:.3f} | {timing['ms']['shoal']:.3f} | "
        f"{timing['speedup']:.2f} ({low:.2f} to {high:.2f}) |"
    )


def _notes(row: Mapping[str, Any]) -> str:
    out = []
    for name, way in row["by_hand"].items():
        if "failed" in way:
            out.append(f"{name} failed ({way['failed']})")
        elif way["accuracy"] < row["bound"] - 1e-9:
            out.append(f"{name} does not count ({way['accuracy']:.4f})")
    told = "; ".join(out) or "every way by hand counts"
    source = f"`{row['package']}`, {row['licence']}"
    return f"- **{row['name']}** ({source}): {row['judged']}, {row['items']} items. {told}."
