"""Asking devices of the fleet about candidates, within the budget of trials and bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from shoal_optimizer.evaluation import Score, score
from shoal_optimizer.inputs import by_name
from shoal_optimizer.jobspec import ProfileClass, RuntimeOptions
from shoal_optimizer.meter import BundleRef, Measurement, Meter, Pending
from shoal_optimizer.search import options
from shoal_protos.bundle import open_bundle

if TYPE_CHECKING:
    from shoal_optimizer.candidates import Candidate
    from shoal_optimizer.search.selection import Selection

OUTPUT_ITEMS = 300  # evaluation items sent to a device of a class that this machine is not of


@dataclass
class Answers:
    """What devices said so far. Keys: (class, candidate's name[, options' key])."""

    pending: list[str] = field(default_factory=list)
    timings: dict[tuple[str, str, str], Measurement] = field(default_factory=dict)
    scores: dict[tuple[str, str], tuple[Score, str]] = field(default_factory=dict)


@dataclass
class _Bytes:
    """Bytes that trials send to devices; each blob goes to a class once."""

    budget: int | None
    sent: dict[tuple[str, str], int] = field(default_factory=dict)

    def allows(self, profile_class: str, blobs: Mapping[str, int]) -> bool:
        """Counts them if they fit."""
        new = {(profile_class, d): size for d, size in blobs.items() if (profile_class, d) not in self.sent}
        if self.budget is not None and sum(self.sent.values()) + sum(new.values()) > self.budget:
            return False
        self.sent |= new
        return True


def ask(selection: Selection, fleet: Meter, kept: Mapping[str, Sequence[Candidate]]) -> Answers:
    """Asks about what is kept. What is asked depends on the job only, so a second start asks the same."""
    answers = Answers()
    purse = _Bytes(selection.spec.budget.bytes)
    for profile_class in selection.spec.classes:
        incumbent = selection.incumbent(profile_class)
        asked = kept[profile_class.name][: selection.trials]
        for candidate in asked:
            rival = incumbent if incumbent and incumbent.digest != candidate.bundle else None
            if not purse.allows(profile_class.name, _blobs(candidate.ref, rival)):
                _too_much(selection, candidate)
                continue
            if not profile_class.emulated:  # nobody of it can time anything
                _timing(answers, fleet, candidate, profile_class, rival, RuntimeOptions())
            if not profile_class.local:
                _outputs(answers, fleet, selection, candidate, profile_class, purse)
        if not profile_class.emulated and options.matters(selection.objective):
            _options(answers, fleet, selection, asked, profile_class)
    return answers


def _options(
    answers: Answers,
    fleet: Meter,
    selection: Selection,
    asked: Sequence[Candidate],
    profile_class: ProfileClass,
) -> None:
    """Other runtime options of the best guess, with the trials that are left."""
    spare = selection.trials - len(asked)
    for candidate in asked[:1]:
        for tried in options.worth_trying(profile_class, candidate.target, selection.macs)[: max(0, spare)]:
            _timing(answers, fleet, candidate, profile_class, None, tried)


def _timing(
    answers: Answers,
    fleet: Meter,
    candidate: Candidate,
    profile_class: ProfileClass,
    rival: BundleRef | None,
    chosen: RuntimeOptions,
) -> None:
    answer = fleet.measure(
        candidate.ref, profile_class, incumbent=rival, options=None if chosen.default else chosen
    )
    if isinstance(answer, Pending):
        answers.pending.append(answer.trial)
    else:
        answers.timings[profile_class.name, candidate.name, chosen.key] = answer


def _outputs(
    answers: Answers,
    fleet: Meter,
    selection: Selection,
    candidate: Candidate,
    profile_class: ProfileClass,
    purse: _Bytes,
) -> None:
    """Accuracy on a class that this machine is not of: its device answers real inputs."""
    task, path = selection.workshop.task, selection.workshop.folder / "out" / "trial-inputs.npz"
    data = task.required("evaluation").sample(OUTPUT_ITEMS, selection.spec.seed)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name("trial-inputs.partial.npz")
        arrays: dict[str, Any] = by_name(data.inputs, task.signature)
        np.savez_compressed(partial, **arrays)
        partial.replace(path)
    if not purse.allows(profile_class.name, {"inputs": path.stat().st_size}):
        _too_much(selection, candidate)
        return
    answer = fleet.measure(candidate.ref, profile_class, "outputs", dataset=path)
    if isinstance(answer, Pending):
        answers.pending.append(answer.trial)
    elif answer.status == "measured":
        with np.load(answer.outputs, allow_pickle=False) as stored:
            outputs = stored[task.signature.outputs[0].name]
        if len(outputs) == len(data):
            found = score(task, outputs, data.targets)
            answers.scores[profile_class.name, candidate.name] = found, answer.source


def _blobs(*refs: BundleRef | None) -> dict[str, int]:
    """Digest -> bytes of everything that a device fetches for these bundles."""
    found: dict[str, int] = {}
    for ref in refs:
        if ref is not None and ref.layout != Path():
            manifest = open_bundle(ref.layout, ref.digest, verify=False).manifest
            found |= {layer.digest: layer.size for layer in manifest.layers}
            found[manifest.config.digest] = manifest.config.size
    return found


def _too_much(selection: Selection, candidate: Candidate) -> None:
    limit = selection.spec.budget.bytes
    selection.workshop.leave_out(
        candidate.name, "skipped", f"no trial: the budget of {limit} bytes for devices is used"
    )
