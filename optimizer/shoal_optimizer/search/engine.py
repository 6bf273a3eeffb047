"""The search: which networks to train, until the budget or the progress ends."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace
from typing import Any

from shoal_optimizer import executors
from shoal_optimizer.analysis import Analysis, analyse
from shoal_optimizer.candidates import Candidate, Network, Workshop
from shoal_optimizer.objective import Objective
from shoal_optimizer.recipe import Recipe
from shoal_optimizer.search import fidelity, foresight, frontier, looking, sampler, space, together
from shoal_optimizer.search.failures import reason_of
from shoal_optimizer.search.foresight import Foreseen
from shoal_optimizer.search.learner import Learner
from shoal_optimizer.search.purse import Purse, networks_for
from shoal_optimizer.search.sampler import Told
from shoal_optimizer.search.selection import MAX_KEPT, Selection
from shoal_optimizer.search.space import Export, Params, Space
from shoal_protos.errors import ShoalError

__all__ = ["Search", "networks_for", "prepare"]

log = logging.getLogger(__name__)

PATIENCE = 3  # networks in a row that change no front, before the search ends early
PARALLEL_SECONDS = 20.0  # guessed training time above which another process is worth its start
RIVALS = 3  # networks that the sampler proposes where predictions can tell which to train
WIDE_MINUTES = 3.0  # budgets above it try more forms and families


@dataclass
class Search:
    """Fills a workshop with candidates. Everything finished is in the job's state."""

    workshop: Workshop
    selection: Selection
    objective: Objective
    space: Space
    analysis: Analysis
    executor: Callable[[int], Executor] = executors.LocalProcesses
    learner: Learner | None = None
    more: Callable[[float | None], Sequence[Export]] = field(default=lambda room: ())

    def __post_init__(self) -> None:
        state = self.workshop.state
        self.purse = Purse(self.workshop.spec.budget, lambda: state.used_s)
        self.purse.form_seconds = float(state.facts.get("form_seconds", 0.0))

    def explore(self) -> list[Candidate]:
        """Plain exports first, then networks, then more forms; returns all candidates made."""
        self._feed()
        plain = self.workshop.plain()
        self.export(plain)
        if not self.space.exports:
            return self.candidates()
        self._train_known_good_together()
        while (params := self._next()) is not None:
            self._try(params)
        self._more_forms(plain)
        return self.candidates()

    def candidates(self) -> list[Candidate]:
        """All candidates so far, in the order made."""
        return [Candidate.from_json(raw) for raw in self.workshop.state.candidates.values()]

    def export(self, network: Network, exports: Sequence[Export] | None = None) -> list[Candidate]:
        """Every export of a network (by default all that the space has), judged and glanced at."""
        items = fidelity.cheap_items(self.workshop.task)
        found: list[Candidate] = []
        for export in self.space.exports if exports is None else exports:
            if self._unwanted(network, export):
                continue
            started = time.monotonic()
            made = self.workshop.candidate(network, export, items=items)
            if made is not None:
                found.append(self._predict(made))
            self._took(time.monotonic() - started)
        looked_at = found
        if self.workshop.spec.budget.measurements is not None:
            looked_at = looking.worth(found, self.candidates(), self.selection.timed)
        for number, candidate in enumerate(looked_at):
            self.workshop.voice.progress("measure", number / len(looked_at), candidate.name)
            self.selection.glance(candidate)
        self._feed(found)
        return found

    # ------------------------------------------------------------------ single forms

    def _unwanted(self, network: Network, export: Export) -> bool:
        """True (with a note) for a form that a prior speaks against, or that time does not allow."""
        if f"{network.key}-{export.key}" in self.workshop.state.candidates:
            return False
        plain = network.plain and export.precision == "fp32"
        reason = "" if self.learner is None else self.learner.verdict(export, self.objective)
        if not reason and not network.plain and self.purse.over:
            reason = "the time is used up"
        if plain or not reason:
            return False
        name = f"{network.recipe.name}-{export.form}-{export.target}"
        self.workshop.voice.progress("quantize", None, f"{name} is skipped: {reason}")
        whole = space.complete(network.recipe, export)
        self.workshop.leave_out(
            name, "skipped", reason, recipe=whole.to_json(), target=export.target, precision=export.precision
        )
        return True

    def _predict(self, candidate: Candidate) -> Candidate:
        """Notes what the table expects, before anything is measured; once."""
        if self.learner is None or candidate.predicted or self.selection.timed(candidate):
            return candidate
        predicted = self.learner.predict(candidate)
        if not predicted:
            return candidate
        return self.workshop.keep(replace(candidate, predicted=predicted))

    def _took(self, seconds: float) -> None:
        facts = self.workshop.state.facts
        self.purse.form_seconds = facts["form_seconds"] = max(self.purse.form_seconds, seconds)

    def _feed(self, candidates: Sequence[Candidate] | None = None) -> None:
        """Tells the tables what this machine measured, for the classes that it is of."""
        if self.learner is None:
            return
        local = [c.name for c in self.workshop.spec.classes if c.local]
        if not local:
            return
        everything = self.candidates() if candidates is None else candidates
        measured = [(c, m) for c in everything if (m := self.selection.timed(c)) is not None]
        for candidate, found in measured:
            self.learner.observe(candidate, found, [n for n in local if n in candidate.classes])
        self.learner.compare(measured, local)

    def _more_forms(self, plain: Network) -> None:
        """Other quantizers and smaller files for the original and the best network, while time lasts."""
        room = self._room()
        for network in (plain, self._best_network()):
            for export in self.more(room) if network is not None else ():
                if self.purse.left - self.purse.settling(MAX_KEPT, len(self.workshop.spec.classes)) <= (
                    self.purse.form_seconds
                ):
                    return
                assert network is not None
                self.export(network, [export])

    def _room(self) -> float | None:
        """Accuracy that the plain float variant has above the objective's bound."""
        bound = next((c.bound for c in self.objective.constraints if c.metric == "accuracy"), None)
        found = next((c.accuracy for c in self.candidates() if c.plain and c.accuracy is not None), None)
        return None if bound is None or found is None else found.value - bound

    def _best_network(self) -> Network | None:
        """The trained network whose exports do best under the objective."""
        state = self.workshop.state
        trained = [c for c in self.candidates() if c.network in state.networks]
        if not trained:
            return None
        points = [fidelity.point(c, fidelity.guess(c, self.selection.timed(c))) for c in trained]
        best = self.objective.choose(map(frontier.as_objective_point, points)).key
        key = next(c.network for c in trained if c.name == best)
        saved = state.networks[key]
        return self.workshop.train(Recipe.from_json(saved["recipe"], saved["name"]), saved["params"])

    # ------------------------------------------------------------------ which network next

    @property
    def _told(self) -> list[Told]:
        return [Told(entry["params"], entry["values"]) for entry in self.workshop.state.told]

    def _next(self) -> Params | None:
        state, budget = self.workshop.state, self.workshop.spec.budget
        limit = networks_for(budget)
        tried = len(state.told)
        if tried >= limit or (tried and not self._training_seconds()):
            return None
        if tried > PATIENCE and all(not e["progressed"] for e in state.told[-PATIENCE:]):
            return None
        look = self._looks()
        rivals = sampler.proposals(
            self.space,
            self.objective,
            self._told,
            seed=self.workshop.spec.seed,
            networks=limit,
            count=RIVALS if look else 1,
        )
        if len(rivals) < 2:
            return rivals[0] if rivals else None
        # The sampler's own order stays wherever predictions see no difference.
        return min(rivals, key=lambda params: self._excess(space.network(params)))

    def _training_seconds(self) -> float:
        """Seconds that the next training may take; 0 = none any more."""
        return self.purse.training(
            len(self.space.exports),
            MAX_KEPT,
            len(self.workshop.spec.classes),
            first=not self.workshop.state.networks,
        )

    def _looks(self) -> bool:
        """True where latencies can be predicted, and matter."""
        known = self.learner is not None and len(self.learner.knowledge.latency) > 0
        return known and any(self.objective.names(m) for m in ("latency_p50", "latency_p95"))

    def _excess(self, recipe: Recipe) -> float:
        found = self._foreseen(recipe)
        return 0.0 if found is None else found.excess(self.objective)

    def _foreseen(self, recipe: Recipe) -> Foreseen | None:
        """Free facts of a network; None where it cannot even be shaped (training it will say why)."""
        known: dict[str, Any] = self.workshop.state.facts.setdefault("foreseen", {})
        if recipe.key not in known:
            learner = self.learner or Learner.none(self.workshop.spec.classes)
            try:
                found = foresight.foresee(
                    recipe, self.workshop.task, learner, seed=self.workshop.spec.seed, look=self._looks()
                )
                known[recipe.key] = found.to_json()
            except ShoalError:
                known[recipe.key] = None
        return Foreseen.from_json(known[recipe.key])

    def _refusal(self, recipe: Recipe) -> str:
        bounded = any(c.metric == "size" for c in self.objective.constraints)
        if not bounded and not self._looks():
            return ""
        found = self._foreseen(recipe)
        return "" if found is None else found.refusal(self.objective, len(self.workshop.spec.classes))

    def _try(self, params: Params) -> None:
        recipe = space.network(params)
        state = self.workshop.state
        before = self._fronts(self.candidates())
        made: list[Candidate] = []
        try:
            reason = self._refusal(recipe)
            if reason:
                self.workshop.voice.progress("prune", 1.0, f"{recipe.name} is skipped: {reason}")
                foreseen = self._foreseen(recipe)
                more: Mapping[str, Any] = {"predicted": foreseen.said()} if foreseen is not None else {}
                self.workshop.leave_out(recipe.name, "skipped", reason, recipe=recipe.to_json(), **more)
            else:
                made = self.export(
                    self.workshop.train(recipe, params, seconds=self._training_seconds() or None)
                )
        except Exception as error:  # one network's failure, whatever it is, ends no search
            self._failed(recipe, error)
        progressed = any(
            frontier.progressed(old, new, metrics=frontier.metrics_for(self.objective))
            for old, new in zip(before, self._fronts(self.candidates()), strict=True)
        )
        values = self.selection.told(made)
        state.told.append({"params": dict(params), "values": values, "progressed": progressed})
        state.save()

    def _failed(self, recipe: Recipe, error: Exception) -> None:
        if not isinstance(error, ShoalError):
            log.error("%s failed", recipe.name, exc_info=error)
        reason = reason_of(error)
        self.workshop.voice.progress("prune", 1.0, f"{recipe.name} is left out: {reason}")
        self.workshop.leave_out(recipe.name, "failed", reason, recipe=recipe.to_json())

    def _fronts(self, candidates: Sequence[Candidate]) -> list[list[frontier.Point]]:
        return [
            [
                fidelity.point(c, fidelity.guess(c, self.selection.timed(c)))
                for c in self.selection.members(profile_class, candidates)
            ]
            for profile_class in self.workshop.spec.classes
        ]

    # ------------------------------------------------------------------ more than one core

    def _train_known_good_together(self) -> None:
        """Trains the known-good networks in processes (or on a cluster) side by side, where that pays."""
        spec = self.workshop.spec
        elsewhere = spec.executor.startswith("ray")
        todo = [
            params
            for params in self.space.known_good()[: networks_for(spec.budget)]
            if Network(space.network(params).training, None).key not in self.workshop.state.networks
        ]
        data = self.workshop.task.data("training")
        if not todo or spec.weights is None or spec.data is None or data is None:
            return
        if not elsewhere:
            seconds = fidelity.training_seconds(self.analysis, len(data), int(todo[0]["epochs"]))
            if spec.threads < 2 or len(todo) < 2 or seconds < PARALLEL_SECONDS:
                return
        self.workshop.voice.progress("distil", None, f"{len(todo)} networks side by side")
        limit = self.purse.training(
            len(todo) * len(self.space.exports), MAX_KEPT, len(spec.classes), first=True
        )
        orders = {space.network(p).name: (space.network(p), p) for p in todo}
        ordered = [together.order_of(spec, recipe, limit) for recipe, _ in orders.values()]
        if elsewhere:
            ordered = [order.packed() for order in ordered]
        workers = len(todo) if elsewhere else min(spec.threads, len(todo))

        def say(text: str) -> None:
            self.workshop.voice.progress("distil", None, text)

        for order, found in together.results(ordered, self.executor, workers, say=say):
            recipe, params = orders[order.name]
            if isinstance(found, Exception):
                self._failed(recipe, found)
                self.workshop.state.told.append({"params": dict(params), "values": {}, "progressed": False})
                self.workshop.state.save()
            else:
                self.workshop.adopt(recipe, params, found)


def prepare(workshop: Workshop, selection: Selection, objective: Objective, learner: Learner) -> Search:
    """Opens the task's space, as wide as the budget reaches."""
    task, spec = workshop.task, workshop.spec
    analysis = analyse(task)
    trainable = task.has_module and task.trainable
    wide = spec.budget.minutes > WIDE_MINUTES
    found = space.build(
        analysis,
        spec.classes,
        trainable=trainable,
        sparse=objective.names(frontier.WIRE),
        architecture=_architecture(workshop) if wide and trainable else None,
        wide=wide,
    )

    def more(room: float | None) -> Sequence[Export]:
        return space.more_exports(spec.classes, analysis, objective, room)

    def executor(workers: int) -> Executor:
        if spec.executor == "processes":  # of their own, also for one: what dies there takes no job down
            return executors.LocalProcesses(workers)
        return executors.make(spec.executor, workers=workers)

    search = Search(workshop, selection, objective, found, analysis, executor, learner)
    if wide or (not trainable and spec.budget.minutes >= 1):  # without training there is time for forms
        search.more = more
    return search


def _architecture(workshop: Workshop) -> dict[str, tuple[Any, ...]] | None:
    from shoal_optimizer.techniques.architecture import space_of

    try:
        return dict(space_of(workshop.task).options)
    except ShoalError as error:
        workshop.leave_out("architecture", "skipped", error.message)
        return None
