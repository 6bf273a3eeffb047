"""What the three kinds of job do: ingest, optimize, adapt.

Each is written to be started again on the same directory at any moment: what an earlier start
finished is in the state and isn't done twice; trials that aren't answered end this start.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from shoal_optimizer import adaptation as adaptations
from shoal_optimizer import evaluation, objective, replay, report, summary
from shoal_optimizer.adaptation import Adaptation, Evidence
from shoal_optimizer.analysis import analyse
from shoal_optimizer.candidates import Candidate, Ground, Workshop
from shoal_optimizer.corruptions import Corruption
from shoal_optimizer.jobspec import JobSpec
from shoal_optimizer.jobstate import State, Voice
from shoal_optimizer.matching import Matched
from shoal_optimizer.meter import TrialMeter
from shoal_optimizer.objective import Objective
from shoal_optimizer.packing import FieldReference
from shoal_optimizer.recipe import Recipe
from shoal_optimizer.search import engine, selection, space
from shoal_optimizer.search.knowledge import FILE, Knowledge
from shoal_optimizer.search.learner import Learner
from shoal_optimizer.search.prior import kind_of
from shoal_optimizer.search.selection import Selection
from shoal_optimizer.task import Task, load_module, load_task, save_module
from shoal_protos.bundle import open_bundle
from shoal_protos.errors import InvalidInput, ShoalError
from shoal_protos.v1.telemetry_pb2 import SketchSet

FEW_MACS = 20_000_000  # of one item; below it a second thread waits more than it works


def perform(spec: JobSpec, folder: Path, state: State, voice: Voice) -> None:
    """Does what the job asks; its last line is `done` or `waiting`.

    Raises:
        ShoalError: the job can't be done; the caller says `error`.
    """
    kinds = {"ingest": ingest, "optimize": optimize, "adapt": adapt, "replay": replay.perform}
    kinds[spec.kind](spec, folder, state, voice)


def _threads(task: Task, spec: JobSpec, macs: int) -> None:
    """One thread for small models; at most two for large ones, since agents share the machine."""
    if task.has_module:
        import torch

        torch.set_num_threads(min(spec.threads, 2) if macs > FEW_MACS else 1)


def _load(spec: JobSpec, voice: Voice) -> Task:
    voice.progress("analyse", None, f"loading {spec.task}")
    return load_task(spec.source / spec.task, seed=spec.seed, weights=spec.weights, data=spec.data)


def _selection(workshop: Workshop, voice: Voice, *, trials: int) -> Selection:
    spec = workshop.spec
    quick, clean = selection.local_meters(workshop)
    fleet = TrialMeter(
        spec.id,
        lambda fields: voice.say("trial", **fields),
        spec.trial_results,
        outputs=workshop.folder / "in" / "outputs",
    )
    return Selection(
        workshop,
        refuse_unknown_labels(objective.parse(spec.objective), workshop.task),
        quick,
        clean,
        fleet if trials > 0 else None,
        trials,
    )


def refuse_unknown_labels(wanted: Objective, task: Task) -> Objective:
    """The objective, if every class of the data that it names exists. Raises InvalidInput."""
    for label in wanted.labels:
        if label not in task.labels:
            known = ", ".join(task.labels[:20]) or "none: write `labels` in the task"
            raise InvalidInput(f"The objective bounds recall[{label}], and the task has no such label.",
                               f"It has {known}.")  # fmt: skip
    return wanted


# ---------------------------------------------------------------------------- ingest


def ingest(spec: JobSpec, folder: Path, state: State, voice: Voice) -> None:
    """Imports the task, runs the baseline, stores weights and data, then converts for every class."""
    files = folder / "out" / "files"
    done = state.facts.get("ingested")
    if done is not None and all(Path(path).is_file() for path in done["files"].values()):
        spec = replace(spec, weights=Path(done["files"]["weights"]), data=Path(done["files"]["data"]))
        task = _load(spec, voice)
        _threads(task, spec, int(done["analysis"]["macs"]))
    else:
        task = _load(spec, voice)
        voice.progress("analyse", 0.5, "running the model")
        analysis = analyse(task)
        _threads(task, spec, analysis.macs)
        voice.progress("baseline", None, "judging the original")
        baseline = evaluation.evaluate_model(task, task.original if task.has_module else None)
        stored = task.save(files)
        spec = replace(spec, weights=stored.weights, data=stored.data)
        done = {
            "signature": asdict(task.signature),
            "metric": task.metric_name,
            "baseline": baseline.to_json(),
            "analysis": analysis.to_json(),
            "files": {"weights": str(stored.weights), "data": str(stored.data)},
        }
        state.facts["ingested"] = done
        state.save()
    voice.say("ingested", **done)
    workshop = Workshop(task, spec, folder, state, voice)
    chosen = _selection(workshop, voice, trials=0)
    exports = space.exports_for(spec.classes, ("fp32",))
    plain = workshop.plain()
    made: list[Candidate] = []
    for number, export in enumerate(exports):
        voice.progress("plain", number / len(exports), f"converting for {export.target}")
        candidate = workshop.candidate(plain, export)
        if candidate is not None:
            made.append(candidate)
            chosen.emit([candidate])
    kept = {c.name: chosen.guessed_front(c, made) for c in spec.classes}
    _finish(workshop, chosen, kept, made, careful=False)


# ---------------------------------------------------------------------------- optimize


def optimize(spec: JobSpec, folder: Path, state: State, voice: Voice) -> None:
    """Searches within the budget, asks the fleet about what is kept, and chooses per class."""
    task = _load(spec, voice)
    workshop = Workshop(task, spec, folder, state, voice)
    chosen = _selection(workshop, voice, trials=spec.budget.trials)
    search = engine.prepare(workshop, chosen, chosen.objective, _learner(chosen, task))
    _threads(task, spec, chosen.macs)
    candidates = search.candidates() if "explored" in state.facts else search.explore()
    state.facts["explored"] = True
    state.save()
    _conclude(workshop, chosen, candidates)


def _learner(chosen: Selection, task: Task) -> Learner:
    """Opens the knowledge that the job was given, for this kind of network."""
    spec, cost = chosen.spec, analyse(task)
    chosen.macs = cost.macs
    chosen.learner = Learner(Knowledge.read(spec.knowledge), spec.classes, kind_of(cost))
    return chosen.learner


def _conclude(
    workshop: Workshop,
    chosen: Selection,
    candidates: Sequence[Candidate],
    adaptation: dict[str, Any] | None = None,
) -> None:
    """Measures what is kept, asks the fleet, and finishes, or waits for answers."""
    state, voice = workshop.state, workshop.voice
    kept = chosen.settle(candidates)
    chosen.tune(kept)
    careful = chosen.fleet is None
    named = chosen.known_by_devices(kept)
    chosen.emit(named, careful=careful)
    pending = chosen.ask(kept)
    if pending:
        state.save()
        voice.say("waiting", trials=pending)
        return
    if chosen.fleet is not None:
        chosen.emit(named)  # now with what devices answered
    _finish(workshop, chosen, kept, candidates, careful=careful, adaptation=adaptation)


def _finish(
    workshop: Workshop,
    chosen: Selection,
    kept: dict[str, list[Candidate]],
    candidates: Sequence[Candidate],
    *,
    careful: bool,
    adaptation: dict[str, Any] | None = None,
) -> None:
    results = [chosen.result(c, kept[c.name], careful=careful) for c in workshop.spec.classes]
    data = summary.build(workshop, chosen, chosen.objective, results, candidates, adaptation=adaptation)
    paths = report.write(data, workshop.folder / "out")
    more: dict[str, Any] = {}
    if chosen.learner is not None:
        more["knowledge"] = workshop.folder / "out" / FILE
        chosen.learner.knowledge.write_learned(more["knowledge"], workshop.spec.id)
    workshop.state.save()
    workshop.voice.say(
        "done", fronts=summary.fronts(results), choice=summary.choices(results), report=paths, **more
    )


# ---------------------------------------------------------------------------- adapt


def adapt(spec: JobSpec, folder: Path, state: State, voice: Voice) -> None:
    """Adapts the original to the field and, if that is kept, makes the serving recipes from it."""
    task = _load(spec, voice)
    _threads(task, spec, analyse(task).macs)
    field = adaptations.read_field(spec.field_data.inputs)
    labelled = adaptations.read_samples(spec.field_data.samples, task)
    plain = Workshop(task, spec, folder, state, voice)
    if "adapted" not in state.facts:
        incumbent = _incumbent(spec, task)
        found = adaptations.adapt(
            task,
            field,
            labelled,
            incumbent,
            seed=spec.seed,
            progress=lambda share, message: voice.progress("adapt", share, message),
        )
        _remember(found, task, folder, state)
    adapted = state.facts["adapted"]
    voice.say("adapted", **adapted)
    if not adapted["kept"]:
        chosen = _selection(plain, voice, trials=0)
        _finish(plain, chosen, {c.name: [] for c in spec.classes}, [], careful=False, adaptation=adapted)
        return
    workshop = Workshop(task, spec, folder, state, voice, _ground(task, spec, state, field, labelled))
    chosen = _selection(workshop, voice, trials=spec.budget.trials)
    exports = space.exports_for(spec.classes)
    search = engine.Search(
        workshop, chosen, chosen.objective, space.Space((), (), (), exports), analyse(task)
    )
    for recipe in _recipes(spec):
        _remake(search, recipe)
    _conclude(workshop, chosen, search.candidates(), adapted)


def _remake(search: engine.Search, recipe: Recipe) -> None:
    """Trains a serving network from the adapted original and exports it; a failure leaves it out."""
    try:
        search.export(search.workshop.train(recipe))
    except ShoalError as error:
        search.workshop.voice.progress("distil", 1.0, f"{recipe.name} is left out: {error.message}")


def _recipes(spec: JobSpec) -> list[Recipe]:
    """The networks that serve now, each once; the known-good one if nothing is known."""
    found: dict[str, Recipe] = {}
    for entry in spec.recipes:
        steps = entry.get("steps", []) if isinstance(entry, dict) else entry
        recipe = Recipe.from_json(steps).training
        recipe = replace(recipe, name=_name(recipe))
        found.setdefault(recipe.key, recipe)
    return list(found.values()) or [space.network({"ratio": space.KNOWN_GOOD, "teacher": True, "epochs": 10})]


def _name(recipe: Recipe) -> str:
    """A name for people: what the search would call it, else its techniques."""
    if not recipe.steps:
        return space.PLAIN.name
    ratio = next((s.params.get("ratio") for s in recipe.steps if s.technique == "channel_pruning"), None)
    if ratio is not None:
        return f"pruned{float(ratio) * 100:g}".replace(".", "_")
    return "-".join(step.technique for step in recipe.steps)


def _incumbent(spec: JobSpec, task: Task) -> adaptations.Predict:
    """Answers of a bundle that serves now and runs here, else of the original."""
    from shoal_agent import runtimes
    from shoal_optimizer.targets.base import run_instance

    for serving in spec.incumbents.values():
        if serving.layout is None:
            continue
        try:
            bundle = open_bundle(serving.layout, serving.bundle, verify=False)
            instance = runtimes.find(bundle.config.runtime.name).load(bundle)
        except ShoalError:
            continue
        return lambda inputs: run_instance(instance, bundle.config.signature, inputs)
    return lambda inputs: task.predict(task.original, inputs)


def _remember(found: Adaptation, task: Task, folder: Path, state: State) -> None:
    files = folder / "out" / "files"
    files.mkdir(parents=True, exist_ok=True)
    save_module(found.model, files / "weights.pt")
    adaptations.save_data(files / "data.npz", task, found)
    baseline = evaluation.evaluate_model(task, found.model)
    state.facts["matched"] = {
        "corruptions": [[c.family, dict(c.params), list(c.spectrum)] for c in found.matched.corruptions],
        "distances": list(found.matched.distances),
        "before": found.matched.before,
    }
    state.facts["adapted"] = {
        "files": {"weights": str(files / "weights.pt"), "data": str(files / "data.npz")},
        "baseline": baseline.to_json(),
        "evidence": _evidence(found.evidence),
        "kept": found.verdict.kept,
        "sentence": f"{found.verdict.sentence} {found.matched.sentence}",
    }
    state.save()


def _evidence(evidence: Evidence) -> dict[str, Any]:
    raw = evidence.to_json()
    for name in ("before", "after", "clean_before", "clean_after"):
        raw[name].pop("per_class", None)
    return raw


def _ground(
    task: Task, spec: JobSpec, state: State, field: SketchSet, labelled: adaptations.Labelled
) -> Ground:
    saved = state.facts["matched"]
    matched = Matched(
        tuple(
            Corruption(family, params, tuple(spectrum)) for family, params, spectrum in saved["corruptions"]
        ),
        tuple(saved["distances"]),
        saved["before"],
    )
    training, augment, calibration, held_out = adaptations.ground(task, matched, labelled)
    base = adaptations.require_training(task)
    items = adaptations.moved(base, matched, task.signature, task.seed + 4)
    return Ground(
        teacher=load_module(Path(state.facts["adapted"]["files"]["weights"])).eval(),
        training=training,
        augment=augment,
        calibration=calibration,
        field=held_out,
        reference=FieldReference(field, items.inputs, held_out.inputs),
        parent=f"{spec.model} v{spec.version}".strip(),
    )
