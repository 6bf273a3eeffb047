"""The search: which networks to train, until the budget or the progress ends."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from shoal_optimizer import executors
from shoal_optimizer.analysis import Analysis, analyse
from shoal_optimizer.candidates import Candidate, Network, Workshop
from shoal_optimizer.jobspec import Budget
from shoal_optimizer.objective import Objective
from shoal_optimizer.recipe import Recipe
from shoal_optimizer.search import fidelity, frontier, sampler, space
from shoal_optimizer.search.sampler import Told
from shoal_optimizer.search.selection import Selection
from shoal_optimizer.search.space import Params, Space
from shoal_protos.errors import ShoalError

if TYPE_CHECKING:
    from collections.abc import Callable

PATIENCE = 3  # networks in a row that change no front, before the search ends early
PARALLEL_SECONDS = 20.0  # guessed training time above which another process is worth its start
PLAIN_ONLY_MINUTES = 0.05  # a budget below it asks for conversion only


def networks_for(budget: Budget) -> int:
    """How many networks a budget allows: the two known-good ones, and one a minute beyond three.

    Time is a ceiling as well; this keeps a short search short on tasks that train in seconds.
    """
    if budget.minutes < PLAIN_ONLY_MINUTES:
        return 0
    return budget.networks if budget.networks is not None else 2 + max(0, int(budget.minutes) - 3)


@dataclass
class Search:
    """Fills a workshop with candidates. Everything finished is in the job's state."""

    workshop: Workshop
    selection: Selection
    objective: Objective
    space: Space
    analysis: Analysis
    executor: Callable[[int], Executor] = executors.LocalProcesses

    def explore(self) -> list[Candidate]:
        """Plain exports first, then networks; returns all candidates made."""
        self.export(self.workshop.plain())
        if not self.space.exports:
            return self.candidates()
        self._train_known_good_together()
        while (params := self._next()) is not None:
            self._try(params)
        return self.candidates()

    def candidates(self) -> list[Candidate]:
        """All candidates so far, in the order made."""
        return [Candidate.from_json(raw) for raw in self.workshop.state.candidates.values()]

    def export(self, network: Network) -> list[Candidate]:
        """Every export of a network, judged and glanced at."""
        items = fidelity.cheap_items(self.workshop.task)
        made = [self.workshop.candidate(network, e, items=items) for e in self.space.exports]
        found = [c for c in made if c is not None]
        for number, candidate in enumerate(found):
            self.workshop.voice.progress("measure", number / len(found), candidate.name)
            self.selection.glance(candidate)
        return found

    # ------------------------------------------------------------------ which network next

    @property
    def _told(self) -> list[Told]:
        return [Told(entry["params"], entry["values"]) for entry in self.workshop.state.told]

    def _next(self) -> Params | None:
        state, budget = self.workshop.state, self.workshop.spec.budget
        limit = networks_for(budget)
        tried = len(state.told)
        if tried >= limit:
            return None
        typical = max((entry["seconds"] for entry in state.networks.values()), default=0.0)
        if tried and state.used_s + 1.5 * typical > budget.minutes * 60:
            return None
        if tried > PATIENCE and all(not e["progressed"] for e in state.told[-PATIENCE:]):
            return None
        return sampler.propose(
            self.space, self.objective, self._told, seed=self.workshop.spec.seed, networks=limit
        )

    def _try(self, params: Params) -> None:
        recipe = space.network(params)
        state = self.workshop.state
        before = self._fronts(self.candidates())
        made: list[Candidate] = []
        try:
            reason = self._refusal(recipe)
            if reason:
                self.workshop.voice.progress("prune", 1.0, f"{recipe.name} is skipped: {reason}")
                self.workshop.leave_out(recipe.name, "skipped", reason, recipe=recipe.to_json())
            else:
                made = self.export(self.workshop.train(recipe, params))
        except ShoalError as error:
            self.workshop.voice.progress("prune", 1.0, f"{recipe.name} is left out: {error.message}")
            self.workshop.leave_out(recipe.name, "failed", error.message, recipe=recipe.to_json())
        progressed = any(
            frontier.progressed(old, new, metrics=frontier.metrics_for(self.objective))
            for old, new in zip(before, self._fronts(self.candidates()), strict=True)
        )
        values = self.selection.told(made)
        state.told.append({"params": dict(params), "values": values, "progressed": progressed})
        state.save()

    def _refusal(self, recipe: Recipe) -> str:
        if not any(c.metric == "size" for c in self.objective.constraints):
            return ""
        return fidelity.refusal(
            fidelity.shape(recipe, self.workshop.task, self.workshop.spec.seed), self.objective
        )

    def _fronts(self, candidates: Sequence[Candidate]) -> list[list[frontier.Point]]:
        return [
            [
                fidelity.point(c, fidelity.guess(c, self.selection.glance(c)))
                for c in self.selection.members(profile_class, candidates)
            ]
            for profile_class in self.workshop.spec.classes
        ]

    # ------------------------------------------------------------------ more than one core

    def _train_known_good_together(self) -> None:
        """Trains the known-good networks in processes side by side, where that pays."""
        spec = self.workshop.spec
        todo = [
            params
            for params in self.space.known_good()[: networks_for(spec.budget)]
            if Network(space.network(params).training, None).key not in self.workshop.state.networks
        ]
        data = self.workshop.task.data("training")
        if spec.threads < 2 or len(todo) < 2 or spec.weights is None or spec.data is None or data is None:
            return
        seconds = fidelity.training_seconds(self.analysis, len(data), int(todo[0]["epochs"]))
        if seconds < PARALLEL_SECONDS:
            return
        self.workshop.voice.progress("distil", None, f"{len(todo)} networks side by side")
        with self.executor(min(spec.threads, len(todo))) as pool:
            futures = [
                (params, pool.submit(train_apart, *self._order(space.network(params), params)))
                for params in todo
            ]
            for params, future in futures:
                self._adopt(space.network(params), params, *future.result())

    def _order(
        self, recipe: Recipe, params: Params
    ) -> tuple[str, str, str, int, list[dict[str, object]], str]:
        spec = self.workshop.spec
        out = self.workshop.folder / "work" / f"apart-{Network(recipe.training, None).key}.pt"
        out.parent.mkdir(parents=True, exist_ok=True)
        task = str(spec.source / spec.task)
        return task, str(spec.weights), str(spec.data), spec.seed, recipe.to_json(), str(out)

    def _adopt(self, recipe: Recipe, params: Params, path: str, seconds: float, notes: list[str]) -> None:
        from shoal_optimizer.task import load_module

        network = Network(recipe.training, load_module(Path(path)), seconds, params, tuple(notes))
        self.workshop.remember(network)
        Path(path).unlink()


def train_apart(
    task: str, weights: str, data: str, seed: int, steps: list[dict[str, object]], out: str
) -> tuple[str, float, list[str]]:
    """Trains one network in another process and stores its module at `out`.

    Returns:
        (path of the module, seconds, notes).
    """
    from shoal_optimizer.recipe import apply
    from shoal_optimizer.task import load_task, save_module

    loaded = load_task(task, seed=seed, weights=Path(weights), data=Path(data))
    applied = apply(Recipe.from_json(steps), loaded, seed=seed)
    assert applied.model is not None
    save_module(applied.model, Path(out))
    return out, applied.seconds, list(applied.notes)


def prepare(workshop: Workshop, selection: Selection, objective: Objective) -> Search:
    """Analyses the task and opens its space."""
    workshop.voice.progress("analyse", None, workshop.task.label)
    analysis = analyse(workshop.task)
    trainable = workshop.task.has_module and workshop.task.trainable
    found = space.build(
        analysis, workshop.spec.classes, trainable=trainable, sparse=objective.names(frontier.WIRE)
    )
    return Search(workshop, selection, objective, found, analysis)
