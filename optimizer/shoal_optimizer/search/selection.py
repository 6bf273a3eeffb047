"""From candidates to a front and a choice per class: measure, ask the fleet, order, choose."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shoal_optimizer.candidates import Candidate, Workshop, as_figure, variant_event
from shoal_optimizer.evaluation import Score
from shoal_optimizer.jobspec import JobSpec, ProfileClass, RuntimeOptions
from shoal_optimizer.local_meter import LocalMeter
from shoal_optimizer.meter import BundleRef, Figure, Measurement, Meter, request_key
from shoal_optimizer.objective import Choice, Objective
from shoal_optimizer.search import asking, choosing, fidelity, frontier, options
from shoal_optimizer.search.fidelity import Figures
from shoal_optimizer.search.frontier import Point
from shoal_optimizer.search.learner import Learner
from shoal_optimizer.search.purse import Purse

MAX_KEPT = 6  # points of a front that are worth a device's time
MOST_TUNED = 2  # of them, whose runtime options are measured here
HERE = ProfileClass("", local=True)


@dataclass(frozen=True)
class ClassResult:
    """One class: its front best first, all candidates' figures, and the choice."""

    profile_class: ProfileClass
    front: tuple[Candidate, ...]
    figures: Mapping[str, Figures]  # by candidate name
    choice: Choice | None  # None: nothing can run on this class


@dataclass
class Selection:
    """Measures candidates and decides. Meters remember, so asking again costs nothing."""

    workshop: Workshop
    objective: Objective
    quick: Meter
    clean: Meter  # unhurried, one process a measurement
    fleet: Meter | None  # None: no device will answer
    trials: int  # per class, at most
    learner: Learner | None = None
    macs: int = 0  # of the original, one item
    _trials: dict[tuple[str, str, str], Measurement] = field(default_factory=dict)  # class, name, options
    _scores: dict[tuple[str, str], tuple[Score, str]] = field(default_factory=dict)  # with sources
    _options: dict[tuple[str, str], RuntimeOptions] = field(default_factory=dict)  # other than the default

    @property
    def spec(self) -> JobSpec:
        return self.workshop.spec

    # ------------------------------------------------------------------ points

    def glance(self, candidate: Candidate) -> Measurement | None:
        """A short timing here; None for what this machine can't load."""
        if candidate.accuracy is None:
            return None
        refused = self._refused(candidate)
        if refused:
            self.workshop.leave_out(candidate.name, "skipped", f"it is not measured: {refused}")
            return None
        found = self.quick.measure(candidate.ref, HERE)
        self.workshop.state.save()
        return found if isinstance(found, Measurement) else None

    def timed(self, candidate: Candidate) -> Measurement | None:
        """What `glance` found before; measures nothing."""
        known = self.workshop.state.timings.get("quick", {})
        key = request_key(candidate.ref, HERE, "timing", None, None)
        return Measurement.from_json(known[key]) if key in known else None

    def _refused(self, candidate: Candidate) -> str:
        """Why the budget does not let this machine measure it; what a fleet measures is bounded in `ask`."""
        budget = self.spec.budget
        if self.fleet is not None or (budget.measurements is None and budget.bytes is None):
            return ""
        known = map(Candidate.from_json, self.workshop.state.candidates.values())
        done = {key.partition("|")[0] for key in self.workshop.state.timings.get("quick", {})}
        return Purse(budget, lambda: 0.0).refused(candidate, known, done)

    def members(self, profile_class: ProfileClass, candidates: Iterable[Candidate]) -> list[Candidate]:
        """Candidates that the class can run, equal bundles once."""
        seen: dict[str, Candidate] = {}
        for candidate in candidates:
            if profile_class.name in candidate.classes:
                seen.setdefault(candidate.bundle, candidate)
        return list(seen.values())

    def guessed_front(self, profile_class: ProfileClass, candidates: Iterable[Candidate]) -> list[Candidate]:
        """The candidates that may be kept for a class, best first; steering figures only."""
        everything = self.members(profile_class, candidates)
        losing = self.losing(profile_class, {c.name: (c, c.per_class) for c in everything})
        members = {c.name: c for c in everything if c.name not in losing}
        points = [fidelity.point(c, fidelity.guess(c, self.glance(c))) for c in members.values()]
        if self.workshop.ground.field is not None:
            points = [p for p in points if not self._worse_in_field(members[p.key], members.values())]
        return [members[p.key] for p in self._best_first(points, members)[:MAX_KEPT]]

    def losing(
        self, profile_class: ProfileClass, members: Mapping[str, tuple[Candidate, choosing.Recalls]]
    ) -> dict[str, str]:
        """Name -> which class of the data a candidate forgets, of those that do. Plain ones never do."""
        plain = self.plain(profile_class)
        if plain is None:
            return {}
        reference = members[plain.name][1] if plain.name in members else {}
        found = {
            name: choosing.lost_class(recalls, reference or plain.per_class, self.objective)
            for name, (candidate, recalls) in members.items()
            if not candidate.plain
        }
        return {name: why for name, why in found.items() if why}

    def _best_first(self, points: Sequence[Point], members: Mapping[str, Candidate]) -> list[Point]:
        """The front, best first. What nobody has judged on its class yet neither goes before what is
        proven, the plain conversion above all, nor keeps it out."""
        metrics = frontier.metrics_for(self.objective)
        proven = [p for p in points if _proven(p, members[p.key])]
        unproven = [p for p in frontier.front(points, metrics=metrics) if not _proven(p, members[p.key])]
        return [
            *frontier.ordered(frontier.front(proven, metrics=metrics), self.objective),
            *frontier.ordered(unproven, self.objective),
        ]

    @staticmethod
    def _worse_in_field(candidate: Candidate, others: Iterable[Candidate]) -> bool:
        """True when another one is beyond doubt better on data that looks like the field."""
        mine = candidate.field_accuracy
        rivals = [c.field_accuracy for c in others if c.field_accuracy is not None]
        return mine is not None and any(mine.high < rival.low for rival in rivals)

    def told(self, candidates: Sequence[Candidate]) -> dict[str, float | None]:
        """The best of one network's exports under the objective, for the sampler."""
        points = [
            frontier.as_objective_point(fidelity.point(c, fidelity.guess(c, self.glance(c))))
            for c in candidates
        ]
        if not points:
            return {}
        best = self.objective.choose(points).key
        return dict(next(p for p in points if p.key == best).values)

    # ------------------------------------------------------------------ measuring what is kept

    def settle(self, candidates: Sequence[Candidate]) -> dict[str, list[Candidate]]:
        """The kept candidates per class, measured again where noise could change the front and judged
        on the whole evaluation data."""
        for profile_class in self.spec.classes:
            self._measure_undecided(profile_class, candidates)
            plain = self.plain(profile_class)
            if plain is not None:  # what others are compared with is judged as they are
                self.workshop.judge_whole(plain)
        kept: dict[str, list[Candidate]] = {}
        whole: dict[str, Candidate] = {}
        for profile_class in self.spec.classes:
            chosen = self.guessed_front(profile_class, candidates)
            for candidate in chosen:
                whole.setdefault(candidate.key, self.workshop.judge_whole(candidate))
            kept[profile_class.name] = [whole[c.key] for c in chosen]
        return kept

    def _measure_undecided(self, profile_class: ProfileClass, candidates: Iterable[Candidate]) -> None:
        """Unhurried timings for points whose place on the front is uncertain and whose class is ours."""
        if not profile_class.local or self.fleet is not None:
            return
        members = {c.name: c for c in self.members(profile_class, candidates)}
        points = [fidelity.point(c, fidelity.guess(c, self.glance(c))) for c in members.values()]
        undecided = frontier.undecided(
            points, metrics=frontier.metrics_for(self.objective), noisy=(frontier.LATENCY,)
        )
        for number, point in enumerate(undecided):
            self.workshop.voice.progress("measure", number / len(undecided), point.key)
            self.careful(members[point.key], profile_class)

    def careful(
        self, candidate: Candidate, profile_class: ProfileClass, options: RuntimeOptions | None = None
    ) -> Measurement:
        """An unhurried timing with memory, in a process of its own."""
        found = self.clean.measure(candidate.ref, profile_class, options=options)
        self.workshop.state.save()
        assert isinstance(found, Measurement)
        return found

    def tune(self, kept: Mapping[str, Sequence[Candidate]]) -> None:
        """Measures runtime options of what is likely to be chosen, on classes that this machine is of."""
        for profile_class in self.spec.classes if options.matters(self.objective) else ():
            if not profile_class.local or self.fleet is not None:
                continue
            for candidate in kept[profile_class.name][:MOST_TUNED]:
                tried = options.worth_trying(profile_class, candidate.target, self.macs)
                if tried and not self._refused(candidate):
                    plain = self.careful(candidate, profile_class)
                    others = {o: self.careful(candidate, profile_class, o) for o in tried}
                    self._take(candidate, profile_class, plain, others)

    def _take(
        self,
        candidate: Candidate,
        profile_class: ProfileClass,
        plain: Measurement | None,
        others: Mapping[RuntimeOptions, Measurement],
    ) -> None:
        best = options.best(self.objective, plain, others)
        if not best.default:
            self._options[profile_class.name, candidate.name] = best

    # ------------------------------------------------------------------ the fleet

    def ask(self, kept: Mapping[str, Sequence[Candidate]]) -> list[str]:
        """Asks a device of each class about what is kept; returns the ids that aren't answered yet."""
        if self.fleet is None:
            return []
        answers = asking.ask(self, self.fleet, kept)
        self._trials.update(answers.timings)
        self._scores.update(answers.scores)
        for profile_class in self.spec.classes:
            for candidate in kept[profile_class.name]:
                plain = self._trials.get((profile_class.name, candidate.name, ""))
                others = {
                    o: found
                    for o in options.worth_trying(profile_class, candidate.target, self.macs)
                    if (found := self._trials.get((profile_class.name, candidate.name, o.key))) is not None
                }
                if others:
                    self._take(candidate, profile_class, plain, others)
                self._learn(candidate, profile_class, plain)
        return answers.pending

    def _learn(self, candidate: Candidate, profile_class: ProfileClass, found: Measurement | None) -> None:
        if self.learner is not None:
            self.learner.observe(candidate, found, [profile_class.name])
            rivals = [
                (c, m)
                for c in map(Candidate.from_json, self.workshop.state.candidates.values())
                if (m := self._trials.get((profile_class.name, c.name, ""))) is not None
            ]
            self.learner.compare(rivals, [profile_class.name])

    def incumbent(self, profile_class: ProfileClass) -> BundleRef | None:
        """What a candidate is timed against: the serving bundle, else the plain one of this version."""
        serving = self.spec.incumbents.get(profile_class.name)
        if serving is not None:
            return BundleRef(serving.bundle, serving.layout or Path())
        plain = self.plain(profile_class)
        return plain.ref if plain is not None else None

    def plain(self, profile_class: ProfileClass) -> Candidate | None:
        """This job's plain export for a class, the first of its runtimes."""
        everything = map(Candidate.from_json, self.workshop.state.candidates.values())
        return next((c for c in self.members(profile_class, everything) if c.plain), None)

    def known_by_devices(self, kept: Mapping[str, Sequence[Candidate]]) -> list[Candidate]:
        """Every candidate that a trial names: what is kept, and what it is timed against."""
        found = {c.key: c for members in kept.values() for c in members}
        if self.fleet is not None:
            for profile_class in self.spec.classes:
                rival = self.plain(profile_class)
                if rival is not None and profile_class.name not in self.spec.incumbents:
                    found.setdefault(rival.key, rival)
        return list(found.values())

    # ------------------------------------------------------------------ the result

    def figures(self, candidate: Candidate, profile_class: ProfileClass, *, careful: bool = False) -> Figures:
        """What may be claimed for a class."""
        chosen = self._options.get((profile_class.name, candidate.name), RuntimeOptions())
        local = None
        if profile_class.local:
            clean = careful and not self._refused(candidate)
            measured = None if chosen.default else chosen
            local = self.careful(candidate, profile_class, measured) if clean else self.glance(candidate)
        score, source = self._scores.get((profile_class.name, candidate.name), (None, ""))
        return fidelity.claim(
            candidate,
            profile_class,
            local,
            self._trials.get((profile_class.name, candidate.name, chosen.key)),
            None if score is None else as_figure(score),
            source,
            None if score is None else score.per_class,
            chosen,
        )

    def emit(self, candidates: Iterable[Candidate], *, careful: bool = False) -> None:
        """Says `variant` for each bundle once, for all classes that can run it."""
        classes = {c.name: c for c in self.spec.classes}
        labels = self.objective.labels
        merged: dict[str, Candidate] = {}
        names: dict[str, set[str]] = {}
        for candidate in candidates:
            merged.setdefault(candidate.bundle, candidate)
            names.setdefault(candidate.bundle, set()).update(candidate.classes)
        for bundle, candidate in merged.items():
            members = [classes[name] for name in sorted(names[bundle]) if name in classes]
            figures = {c.name: self.figures(candidate, c, careful=careful).to_json(labels) for c in members}
            event = variant_event(candidate, classes, figures)
            event["classes"] = figures
            self.workshop.voice.variant(self.workshop.state, event)

    def result(
        self, profile_class: ProfileClass, kept: Sequence[Candidate], *, careful: bool = False
    ) -> ClassResult:
        """The front of a class, best first, from what may be claimed."""
        everything = {c.name: c for c in kept}
        figures = {n: self.figures(c, profile_class, careful=careful) for n, c in everything.items()}
        losing = dict(
            self.losing(profile_class, {n: (c, figures[n].per_class) for n, c in everything.items()})
        )
        floats = {n: fidelity.float_refusal(c, figures[n]) for n, c in everything.items()}
        losing |= {name: why for name, why in floats.items() if why}
        members = {n: c for n, c in everything.items() if n not in losing}
        points = [fidelity.point(c, figures[n]) for n, c in members.items()]
        for name, why in losing.items():
            self.workshop.leave_out(name, "not chosen", why)
        if not points:
            return ClassResult(profile_class, (), figures, None)
        # What has no latency yet can neither be kept out nor keep others out by it.
        front = self._best_first(points, members)
        proven = [p for p in points if _proven(p, members[p.key])]
        plain = frozenset(n for n, c in members.items() if c.plain)
        choice = choosing.choose(proven or front, plain, self.objective, losing)
        if choice.key not in {p.key for p in front}:
            front = [next(p for p in points if p.key == choice.key), *front]
        front.sort(key=lambda p: p.key != choice.key)  # the chosen one first, else as they are
        return ClassResult(profile_class, tuple(members[p.key] for p in front), figures, choice)


def _proven(point: Point, candidate: Candidate) -> bool:
    """Plain, or of known accuracy."""
    return candidate.plain or point.get(frontier.ACCURACY) is not None


def local_meters(workshop: Workshop) -> tuple[LocalMeter, LocalMeter]:
    """The quick and the clean meter of a job, sharing its saved answers."""
    timings = workshop.state.timings
    scratch = workshop.folder / "work"
    scratch.mkdir(parents=True, exist_ok=True)
    return (
        LocalMeter(in_process=True, seconds=fidelity.CHEAP_SECONDS, known=timings.setdefault("quick", {})),
        LocalMeter(seconds=fidelity.TRUE_SECONDS, scratch=scratch, known=timings.setdefault("clean", {})),
    )


def front_entry(candidate: Candidate, figures: Figures) -> dict[str, Any]:
    """One entry of `done.fronts`."""

    def value(figure: Figure | None) -> float | None:
        return None if figure is None else figure.value

    return {
        "bundle": candidate.bundle,
        "name": candidate.name,
        "target": candidate.target,
        "precision": candidate.precision,
        "layout": candidate.layout,
        "accuracy": value(figures.accuracy),
        "latency_p50_ms": value(figures.latency_p50),
        "latency_p95_ms": value(figures.latency_p95),
        "memory_bytes": value(figures.memory),
        "int8_share": figures.int8_share,
        "size_bytes": candidate.size_bytes,
        "wire_bytes": candidate.wire_bytes,
        "source": figures.source,
        "accuracy_source": figures.accuracy_source or figures.source,
        "options": figures.options.to_json(),
    }
