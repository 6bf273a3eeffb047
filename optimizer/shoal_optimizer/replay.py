"""Making a variant again from a report, and saying whether it came out equal, bit for bit.

`order` and `compare` are pure; `perform` is what the job of kind `replay` does: load the task file anew,
check its data, train the recipe, export, pack, compare digests. Where bits differ, the verdict names the
file, and what differs between the tools, the processor and the original's weights then and now.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shoal_optimizer.jobspec import JobSpec, ProfileClass
from shoal_protos.errors import Conflict, InvalidInput, NotFound

if TYPE_CHECKING:
    from shoal_optimizer.candidates import Candidate, Workshop
    from shoal_optimizer.jobstate import State, Voice
    from shoal_optimizer.task import Task

_NEEDED = ("task", "seed", "data", "weights_content", "tools", "machine")
CONFIG = "bundle.json"


@dataclass(frozen=True)
class Difference:
    """One thing that was `then` and is `now`; "" = it was or is not there."""

    name: str
    then: str
    now: str


@dataclass(frozen=True)
class Verdict:
    """What a replay gave.

    Attributes:
        equal: the bundle's digest is the reported one, so every byte that a device gets is equal.
        files: the bundle's files that differ.
        causes: tools, processor and weights that differ; a difference of bits has its cause here, or in
            nothing that is known.
    """

    name: str
    bundle: str
    made: str
    equal: bool
    files: tuple[Difference, ...] = ()
    causes: tuple[Difference, ...] = ()
    model_equal: bool = True

    @property
    def sentence(self) -> str:
        """What came out, in one or two sentences."""
        causes = ", ".join(f"{c.name} {c.then or 'none'} -> {c.now or 'none'}" for c in self.causes)
        if self.equal:
            also = f" Equal although these differ: {causes}." if causes else ""
            return f"{self.name} is equal bit for bit: {self.bundle[:19]}.{also}"
        names = ", ".join(f.name for f in self.files)
        if self.model_equal:
            lead = (
                f"{self.name}: the model files are equal bit for bit; what describes them is not ({names})."
            )
        else:
            lead = f"{self.name} came out different in {names}."
        if causes:
            return f"{lead} What differs: {causes}."
        return f"{lead} Tools, processor and weights are the same, so some step is not repeatable here."

    def to_json(self) -> dict[str, Any]:
        def plain(items: Sequence[Difference]) -> list[dict[str, str]]:
            return [{"name": d.name, "then": d.then, "now": d.now} for d in items]

        return {
            "name": self.name,
            "bundle": self.bundle,
            "made": self.made,
            "equal": self.equal,
            "model_equal": self.model_equal,
            "files": plain(self.files),
            "causes": plain(self.causes),
            "sentence": self.sentence,
        }


# ---------------------------------------------------------------------------- what to make


@dataclass(frozen=True)
class Order:
    """A variant to make again; `lineage` as in `report.json`."""

    variant: Mapping[str, Any]
    profile_class: Mapping[str, Any]
    threads: int  # that trained its network
    lineage: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {
            "variant": dict(self.variant),
            "class": dict(self.profile_class),
            "threads": self.threads,
            "lineage": dict(self.lineage),
        }


def read(path: Path) -> dict[str, Any]:
    """Reads `report.json`.

    Raises:
        InvalidInput: it is missing, not JSON, or no report.
    """
    try:
        report = json.loads(path.read_bytes())
    except OSError as error:
        raise InvalidInput(f"There is no report '{path}'.", "Give the report.json of a search.") from error
    except ValueError as error:
        raise InvalidInput(
            f"{path.name} is not JSON.", "Give report.json, which lies beside report.html."
        ) from error
    if not isinstance(report, dict) or not isinstance(report.get("classes"), list):
        raise InvalidInput(f"{path.name} is no report of a search.", "Give the report.json of a search.")
    return report


def order(report: Mapping[str, Any], variant: str = "") -> Order:
    """What a report says about a variant, as the replay needs it.

    Args:
        variant: a candidate's name or the start of its bundle's digest; "" = the chosen one of the first
            class.

    Raises:
        InvalidInput: the report is too old, or of an adaptation, whose data are not in the task.
        NotFound: no variant of that name.
    """
    lineage = report.get("lineage", {})
    missing = [name for name in _NEEDED if name not in lineage]
    if missing:
        raise InvalidInput(
            f"The report does not say its {', '.join(missing)}.", "Search again: it is of an older version."
        )
    if report.get("adaptation"):
        raise InvalidInput(
            "The variants of this report come from an original that was adapted to the field, and the "
            "field's data are not part of the task.",
            "Replay the report of the search before it.",
        )
    if not variant:
        variant = next((str(entry["chosen"]) for entry in report["classes"] if entry.get("chosen")), "")
    names: list[str] = []
    for entry in report["classes"]:
        for candidate in entry["candidates"]:
            names.append(str(candidate["name"]))
            if variant and _is(candidate, variant):
                return Order(candidate, _class_of(report, candidate), _threads(report, candidate), lineage)
    known = ", ".join(dict.fromkeys(names)) or "none"
    raise NotFound(f"The report has no variant '{variant}'.", f"It has: {known}.")


def _is(candidate: Mapping[str, Any], name: str) -> bool:
    digest = str(candidate["bundle"])
    return candidate["name"] == name or (len(name) >= 8 and digest.removeprefix("sha256:").startswith(name))


def _class_of(report: Mapping[str, Any], candidate: Mapping[str, Any]) -> dict[str, Any]:
    """The class that the variant was exported for: the first of those that share it."""
    entries = {entry["name"]: entry for entry in report["classes"]}
    names = [name for name in candidate.get("classes", ()) if name in entries] or list(entries)
    entry = entries[names[0]]
    return {name: entry[name] for name in ("name", "isa", "runtimes", "local")}


def _threads(report: Mapping[str, Any], candidate: Mapping[str, Any]) -> int:
    found = [n for n in report.get("networks", ()) if n.get("key") == candidate.get("network")]
    return int(found[0].get("threads", 1)) if found else 1


# ---------------------------------------------------------------------------- comparing


def compare(wanted: Mapping[str, Any], made: Mapping[str, Any], causes: Sequence[Difference] = ()) -> Verdict:
    """Compares two candidates by their digests.

    Args:
        wanted, made: "name", "bundle" (digest) and "files" (title -> digest).
    """
    before, after = wanted["files"], made["files"]
    files = [
        Difference(title, str(before.get(title, "")), str(after.get(title, "")))
        for title in sorted({*before, *after})
        if before.get(title) != after.get(title)
    ]
    equal = wanted["bundle"] == made["bundle"]
    if not equal and not files:
        files = [Difference(CONFIG, str(wanted["bundle"]), str(made["bundle"]))]
    described = {CONFIG, "golden.npz", "reference-inputs.sketch", "reference-outputs.sketch"}
    return Verdict(
        name=str(wanted["name"]),
        bundle=str(wanted["bundle"]),
        made=str(made["bundle"]),
        equal=equal,
        files=() if equal else tuple(files),
        causes=tuple(causes),
        model_equal=all(f.name in described for f in files),
    )


def causes(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[Difference]:
    """What differs between two lineages and can change bits: tools, the processor, the weights, the file."""
    tools_then, tools_now = then["tools"], now["tools"]
    found = [
        Difference(name, str(tools_then.get(name, "")), str(tools_now.get(name, "")))
        for name in sorted({*tools_then, *tools_now})
        if tools_then.get(name, "") != tools_now.get(name, "")
    ]
    for name in ("cpu", "isa"):
        before, after = then["machine"].get(name, ""), now["machine"].get(name, "")
        if before != after:
            found.append(Difference(name, _text(before), _text(after)))
    if then["weights_content"] != now["weights_content"]:
        found.append(
            Difference("the original's weights", then["weights_content"][:19], now["weights_content"][:19])
        )
    if then.get("task_digest") and then["task_digest"] != now.get("task_digest"):
        found.append(
            Difference(f"the file {then['task']}", then["task_digest"][:19], now["task_digest"][:19])
        )
    return found


def _text(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


# ---------------------------------------------------------------------------- the job


def perform(spec: JobSpec, folder: Path, state: State, voice: Voice) -> None:
    """Makes the variant of `spec.replay` again below `folder` and says `replayed`.

    Raises:
        Conflict: the task's data are not those of the report.
        ShoalError: the task cannot be loaded, or the recipe not be applied here.
    """
    from shoal_optimizer import lineage as lineages
    from shoal_optimizer.candidates import Workshop

    order_ = Order(
        spec.replay["variant"], spec.replay["class"], int(spec.replay["threads"]), spec.replay["lineage"]
    )
    then = order_.lineage
    spec = replace(spec, seed=int(then["seed"]), version=int(then.get("version") or 0))
    task = _load(spec, voice)
    voice.progress("data", None, "comparing the data")
    if task.data_digest != then["data"]:
        raise Conflict(
            f"The data of {spec.task} are not those of the report: {task.data_digest[:19]} instead of "
            f"{str(then['data'])[:19]}.",
            "Put back the data that the search used; other data make another variant.",
        )
    voice.progress("baseline", None, "making the original")
    stored = task.save(folder / "work" / "files")
    spec = replace(spec, weights=stored.weights, data=stored.data)
    task = _load(spec, voice)
    now = lineages.of_job(task, spec, "")
    workshop = Workshop(task, spec, folder, state, voice)
    if now["weights_content"] == then["weights_content"]:
        # The stored file also holds where the task file lies, which may be elsewhere now.
        workshop.weights_digest = str(then["weights"])
    made = _make(workshop, task, order_)
    verdict = compare(order_.variant, describe(made), causes(then, now))
    voice.say("replayed", layout=made.layout, **verdict.to_json())


def _load(spec: JobSpec, voice: Voice) -> Task:
    from shoal_optimizer.task import load_task

    voice.progress("analyse", None, f"loading {spec.task}")
    return load_task(spec.source / spec.task, seed=spec.seed, weights=spec.weights, data=spec.data)


def _make(workshop: Workshop, task: Task, wanted: Order) -> Candidate:
    from shoal_optimizer.recipe import Recipe
    from shoal_optimizer.search.space import Export

    if task.has_module:
        import torch

        torch.set_num_threads(wanted.threads)
    raw, variant = wanted.profile_class, wanted.variant
    profile_class = ProfileClass(
        str(raw["name"]), tuple(raw["isa"]), dict(raw["runtimes"]), bool(raw["local"])
    )
    name = str(variant["name"])
    whole = Recipe.from_json(variant["recipe"], str(variant.get("recipe_name") or name))
    export = Export(
        str(variant["target"]), str(variant["precision"]), tuple(sorted(raw["isa"])), (profile_class,)
    )
    return workshop.again(whole, export, name)


def describe(candidate: Candidate) -> dict[str, Any]:
    """Name, digest and the digest of every file of a candidate's bundle."""
    from shoal_protos.bundle import open_bundle

    bundle = open_bundle(Path(candidate.layout), candidate.bundle, verify=False)
    files = {layer.title: layer.digest for layer in bundle.manifest.layers}
    return {
        "name": candidate.name,
        "bundle": candidate.bundle,
        "files": {CONFIG: bundle.manifest.config.digest, **files},
    }
