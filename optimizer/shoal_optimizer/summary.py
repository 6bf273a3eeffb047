"""What a search found, as plain values: for `done` lines and the report."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from shoal_optimizer import packing
from shoal_optimizer.candidates import Candidate, Workshop
from shoal_optimizer.meter import Figure, Measurement
from shoal_optimizer.objective import Objective
from shoal_optimizer.report import SCHEMA
from shoal_optimizer.search.fidelity import Figures
from shoal_optimizer.search.selection import ClassResult, Selection, front_entry


def fronts(results: Sequence[ClassResult]) -> dict[str, list[dict[str, Any]]]:
    """`done.fronts`: best first."""
    return {r.profile_class.name: [front_entry(c, r.figures[c.name]) for c in r.front] for r in results}


def choices(results: Sequence[ClassResult]) -> dict[str, dict[str, Any]]:
    """`done.choice`; classes that nothing can run on are left out."""
    found = {}
    for result in results:
        if result.choice is not None:
            chosen = next(c for c in result.front if c.name == result.choice.key)
            found[result.profile_class.name] = {
                "bundle": chosen.bundle,
                "name": chosen.name,
                "feasible": result.choice.feasible,
                "sentence": result.choice.sentence,
            }
    return found


def build(
    workshop: Workshop,
    selection: Selection,
    objective: Objective,
    results: Sequence[ClassResult],
    candidates: Sequence[Candidate],
    *,
    adaptation: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Everything the report shows: every trial with intervals and context, and the lineage."""
    spec = workshop.spec
    return {
        "schema": SCHEMA,
        "model": workshop.label,
        "objective": str(objective),
        "sentence": sentence(results, candidates),
        "time_ms": int(time.time() * 1000),
        "used_s": round(workshop.state.used_s, 1),
        "seed": spec.seed,
        "kind": spec.kind,
        "classes": [_class(result, selection, candidates) for result in results],
        "networks": list(workshop.state.networks.values()),
        "adaptation": adaptation,
        "lineage": {
            "task": spec.task,
            "data": workshop.task.data_digest,
            "weights": workshop.weights_digest or "made by the task file",
            **packing.tool_versions(),
        },
        "context": _context(workshop.state.timings),
    }


def sentence(results: Sequence[ClassResult], candidates: Sequence[Candidate]) -> str:
    """The result in one sentence."""
    chosen = [r for r in results if r.choice is not None]
    if not chosen:
        return "Nothing was found that these classes can run."
    met = sum(1 for r in chosen if r.choice is not None and r.choice.feasible)
    bundles = len({c.bundle for c in candidates})
    classes = "1 class" if len(results) == 1 else f"{len(results)} classes"
    return f"{bundles} candidates for {classes}; the objective is met for {met} of {len(results)}."


def _class(result: ClassResult, selection: Selection, candidates: Sequence[Candidate]) -> dict[str, Any]:
    profile_class = result.profile_class
    names = {c.name for c in result.front}
    rows = []
    for candidate in selection.members(profile_class, candidates):
        figures = result.figures.get(candidate.name) or selection.figures(candidate, profile_class)
        rows.append({**_row(candidate, figures), "on_front": candidate.name in names})
    order = {c.name: i for i, c in enumerate(result.front)}
    rows.sort(key=lambda row: (order.get(row["name"], len(order)), row["size_bytes"], row["name"]))
    chosen = "" if result.choice is None else result.choice.key
    return {
        "name": profile_class.name,
        "local": profile_class.local,
        "sentence": result.choice.sentence if result.choice else "No target of this class could be exported.",
        "feasible": bool(result.choice and result.choice.feasible),
        "chosen": chosen,
        "front": [front_entry(c, result.figures[c.name]) for c in result.front],
        "candidates": rows,
    }


def _row(candidate: Candidate, figures: Figures) -> dict[str, Any]:
    def plain(figure: Figure | None) -> dict[str, float | int] | None:
        return None if figure is None else figure.to_json()

    return {
        "name": candidate.name,
        "bundle": candidate.bundle,
        "target": candidate.target,
        "precision": candidate.precision,
        "recipe": [dict(step) for step in candidate.recipe],
        "plain": candidate.plain,
        "size_bytes": candidate.size_bytes,
        "wire_bytes": candidate.wire_bytes,
        "accuracy": plain(figures.accuracy),
        "field_accuracy": plain(candidate.field_accuracy),
        "latency_p50": plain(figures.latency_p50),
        "latency_p95": plain(figures.latency_p95),
        "memory": plain(figures.memory),
        "ratio": plain(figures.ratio),
        "winner": figures.winner,
        "int8_share": figures.int8_share,
        "source": figures.source,
        "accuracy_source": figures.accuracy_source or figures.source,
        "context": figures.context,
    }


def _context(timings: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """What this machine was like when it measured last."""
    for raw in (*timings.get("clean", {}).values(), *timings.get("quick", {}).values()):
        context = Measurement.from_json(raw).context
        if context:
            return {k: v for k, v in context.items() if k not in ("runtime", "runtime_version", "precision")}
    return {}
