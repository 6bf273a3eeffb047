"""What a search found, as plain values: for `done` lines and the report."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from shoal_agent.telemetry.intervals import wilson
from shoal_optimizer import lineage, profiling, replay
from shoal_optimizer.analysis import analyse
from shoal_optimizer.candidates import Candidate, Workshop
from shoal_optimizer.meter import Figure, Measurement
from shoal_optimizer.objective import Objective
from shoal_optimizer.report import SCHEMA
from shoal_optimizer.search.fidelity import Figures
from shoal_optimizer.search.selection import ClassResult, Selection, front_entry
from shoal_protos.bundle import open_bundle
from shoal_protos.errors import ShoalError

SENSITIVITY_SHARE = 0.03  # of the budget


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
                "options": result.figures[chosen.name].options.to_json(),
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
    classes = [_class(result, selection, candidates) for result in results]
    return {
        "schema": SCHEMA,
        "model": workshop.label,
        "metric": workshop.task.metric_name,
        "objective": str(objective),
        "sentence": sentence(results, candidates),
        "time_ms": int(time.time() * 1000),
        "used_s": round(workshop.state.used_s, 1),
        "seed": spec.seed,
        "kind": spec.kind,
        "classes": classes,
        "networks": [
            {"key": key, **{name: value for name, value in network.items() if name != "path"}}
            for key, network in workshop.state.networks.items()
        ],
        "left_out": list(workshop.state.facts.get("left_out", [])),
        "adaptation": adaptation,
        "graph": graph(workshop, classes) if spec.kind == "optimize" else None,
        "sensitivity": sensitivity(workshop) if spec.kind == "optimize" else None,
        "lineage": lineage.of_job(workshop.task, spec, workshop.weights_digest),
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
        row = {**_row(candidate, figures), "on_front": candidate.name in names}
        rows.append({**row, "predicted": candidate.predicted.get(profile_class.name)})
    order = {c.name: i for i, c in enumerate(result.front)}
    rows.sort(key=lambda row: (order.get(row["name"], len(order)), row["size_bytes"], row["name"]))
    chosen = "" if result.choice is None else result.choice.key
    return {
        "name": profile_class.name,
        "local": profile_class.local,
        "emulated": profile_class.emulated,
        "isa": list(profile_class.isa),
        "runtimes": dict(profile_class.runtimes),
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
        "files": bundle_files(candidate),
        "network": candidate.network,
        "classes": list(candidate.classes),
        "target": candidate.target,
        "precision": candidate.precision,
        "recipe": [dict(step) for step in candidate.recipe],
        "plain": candidate.plain,
        "size_bytes": candidate.size_bytes,
        "wire_bytes": candidate.wire_bytes,
        "accuracy": plain(figures.accuracy),
        "per_class": per_class(candidate),
        "field_accuracy": plain(candidate.field_accuracy),
        "latency_p50": plain(figures.latency_p50),
        "latency_p95": plain(figures.latency_p95),
        "memory": plain(figures.memory),
        "ratio": plain(figures.ratio),
        "winner": figures.winner,
        "int8_share": figures.int8_share,
        "reverted": [dict(step) for step in candidate.reverted],
        "source": figures.source,
        "accuracy_source": figures.accuracy_source or figures.source,
        "context": figures.context,
    }


def bundle_files(candidate: Candidate) -> dict[str, str]:
    """Title -> digest of every file of the bundle, its description included."""
    try:
        return dict(replay.describe(candidate)["files"])
    except (OSError, ShoalError):  # a layout that was swept away says nothing against the figures
        return {}


def per_class(candidate: Candidate) -> dict[str, dict[str, float | int]]:
    """Label of the data -> its recall with a 95 % Wilson interval and the items behind it."""
    found = {}
    for label, (recall, n) in candidate.per_class.items():
        low, high = wilson(recall * n, n)
        found[label] = {"value": recall, "low": low, "high": high, "n": n}
    return found


# ---------------------------------------------------------------------------- what is inside the models


def graph(workshop: Workshop, classes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The original layer by layer with the time of each in ONNX Runtime, and the operations of what was
    chosen in its own runtime. What no runtime here can tell is left out with the reason."""
    task = workshop.task
    found: dict[str, Any] = {
        "original": analyse(task).to_json(),
        "operations": [],
        "reason": "",
        "chosen": {},
    }
    try:
        found["operations"] = [o.to_json() for o in profiling.layer_times(task)]
    except Exception as error:  # a profiler that fails costs a column, never the report
        found["reason"] = f"No times: {type(error).__name__}: {str(error)[:200]}"
    candidates = {c["name"]: c for entry in classes for c in entry["candidates"]}
    for name in dict.fromkeys(str(entry["chosen"]) for entry in classes if entry["chosen"]):
        found["chosen"][name] = _operations(workshop, candidates[name]["bundle"])
    return found


def sensitivity(workshop: Workshop) -> dict[str, Any] | None:
    """What pruning each layer alone costs; None where that cannot be, or takes more than a small share of
    the time. What an earlier call measured is read from the job's cache."""
    from shoal_optimizer.sensitivity import channel_map

    end = time.monotonic() + SENSITIVITY_SHARE * workshop.spec.budget.minutes * 60
    try:
        return channel_map(workshop.task, cancelled=lambda: time.monotonic() > end).to_json()
    except ShoalError:
        return None


def _operations(workshop: Workshop, bundle: str) -> dict[str, Any]:
    saved = [Candidate.from_json(raw) for raw in workshop.state.candidates.values()]
    candidate = next(c for c in saved if c.bundle == bundle)
    item = {workshop.task.signature.inputs[0].name: workshop.task.required("evaluation").inputs[:1]}
    try:
        path = open_bundle(candidate.ref.layout, bundle, verify=False).model_file
        operations = profiling.profile(candidate.target, path, item)
    except Exception as error:
        return {"operations": [], "reason": f"No times: {str(error)[:200]}"}
    return {"operations": [o.to_json() for o in operations], "reason": ""}


def _context(timings: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """What this machine was like when it measured last."""
    for raw in (*timings.get("clean", {}).values(), *timings.get("quick", {}).values()):
        context = Measurement.from_json(raw).context
        if context:
            return {k: v for k, v in context.items() if k not in ("runtime", "runtime_version", "precision")}
    return {}
