"""The directory of a job: everything it may read, laid out before its process starts.

A job has neither a database nor keys; this directory and its own output are all it ever sees.
"""

from __future__ import annotations

import base64
import json
import logging
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from shoal_agent.profile import class_of
from shoal_controller import classes, endpoints, sources
from shoal_controller.blobs import BlobStore
from shoal_controller.classes import ClassFacts
from shoal_controller.store.tables import (
    Assignment,
    Device,
    Endpoint,
    Model,
    Optimization,
    Trial,
    Variant,
    Version,
)
from shoal_optimizer.search.knowledge import FILE, merge
from shoal_protos.errors import NotFound
from shoal_protos.v1.profile_pb2 import Profile
from shoal_protos.v1.telemetry_pb2 import TrialResult

log = logging.getLogger("shoal.worker")

PLAIN_MINUTES = 0.01  # a job's budget is above 0; this leaves no time for anything but conversion
DEFAULT_TRIALS = 6


def prepare(
    session: Session, blobs: BlobStore, directory: Path, row: Optimization, machine: Profile, *, threads: int
) -> None:
    """Lays out `directory` for a job, or brings it up to date when the job is started again.

    Args:
        machine: the profile of this machine: a class of the same hardware is `local` to it.

    Raises:
        NotFound: a blob that the job needs is gone.
        InvalidInput: the source is not a push.
    """
    version = session.get(Version, row.version)
    assert version is not None
    model = session.get(Model, version.model)
    assert model is not None
    for room in ("in/samples", "in/outputs", "out", "tmp"):
        (directory / room).mkdir(parents=True, exist_ok=True, mode=0o700)
    source = directory / "source"
    if not source.is_dir():
        sources.unpack(blobs.path(version.source_blob), directory / "source.partial")
        (directory / "source.partial").replace(source)
    task = str(row.spec.get("task") or sources.inspect(blobs.path(version.source_blob)).task)
    spec: dict[str, Any] = {
        "kind": row.kind,
        "id": row.id,
        "seed": int(row.spec.get("seed", 0)),
        "threads": threads,
        "source": str(source),
        "task": task,
        "version": {"model": model.name, "number": version.number},
        "objective": row.objective,
        "classes": (wanted := _classes(session, row, machine)),
        "budget": _budget(row, wanted),
        "trial_results": _trials(session, blobs, directory, row),
    }
    for name, digest in (("weights", version.weights_blob), ("data", version.data_blob)):
        if digest:
            spec[name] = str(_place(blobs, digest, directory / "in" / name))
    if row.kind == "optimize":
        spec["knowledge"] = str(_knowledge(directory))
    if row.kind == "adapt":
        spec["field"] = _field(blobs, directory, row)
    if row.endpoint:
        spec |= _serving(session, blobs, row)
    temporary = directory / "job.json.partial"
    temporary.write_text(json.dumps(spec, indent=1))
    temporary.replace(directory / "job.json")


def knowledge_of(directory: Path) -> Path:
    """The fleet's file of knowledge, beside the folder of jobs."""
    return directory.resolve().parent.parent / FILE


def keep_knowledge(directory: Path, learned: Path, job: str) -> None:
    """Adds what a job learned to the fleet's file. A job is added once, also if its line is read again."""
    try:
        merge(knowledge_of(directory), learned, job=job)
    except OSError as error:
        log.warning("what %s learned could not be kept: %s", job, error)


def _knowledge(directory: Path) -> Path:
    """What is known when the job first starts; a later start of it must not find anything else."""
    target = directory / "in" / FILE
    if not target.exists():
        source = knowledge_of(directory)
        temporary = target.with_suffix(".partial")
        temporary.write_bytes(source.read_bytes() if source.is_file() else b"{}")
        temporary.replace(target)
    return target


def _place(blobs: BlobStore, digest: str, target: Path) -> Path:
    """Copies a blob into the job's directory; never a link, since user code may write there."""
    source = blobs.path(digest)
    if not target.exists():
        temporary = target.with_name(target.name + ".partial")
        shutil.copyfile(source, temporary)
        temporary.replace(target)
    return target


def _budget(row: Optimization, wanted: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Minutes and trials per class. An adaptation keeps the networks that serve, whose timing is
    known: it asks devices only about classes that this machine cannot speak for."""
    minutes = float(row.spec.get("minutes", 3.0))
    if minutes <= 0 or row.kind == "ingest":
        return {"minutes": PLAIN_MINUTES, "trials": 0}
    known = row.kind == "adapt" and all(c["local"] for c in wanted)
    return {"minutes": minutes, "trials": 0 if known else int(row.spec.get("trials", DEFAULT_TRIALS))}


def wanted_classes(session: Session, row: Optimization, machine: Profile) -> dict[str, ClassFacts]:
    """The classes that a job works for: those it names, else those of the endpoint's devices, else
    the fleet's; of an empty fleet, this machine's own."""
    endpoint = session.get(Endpoint, row.endpoint) if row.endpoint else None
    if endpoint is not None:
        devices = endpoints.members(session, endpoint)
    else:
        devices = list(session.scalars(select(Device).where(Device.revoked.is_(False))))
    facts = classes.class_facts(devices)
    named: Iterable[str] | None = row.spec.get("classes")
    if named is not None:
        missing = [name for name in named if name not in facts]
        everything = classes.class_facts(session.scalars(select(Device))) if missing else facts
        facts = {name: everything[name] for name in named if name in everything}
    own = classes.facts_of(machine, class_of(machine))
    return facts or {own.name: own}


def _classes(session: Session, row: Optimization, machine: Profile) -> list[dict[str, Any]]:
    own = classes.facts_of(machine, class_of(machine))
    return [
        {
            "name": name,
            "isa": sorted(facts.isa),
            "runtimes": dict(facts.runtimes),
            "local": facts.hardware == own.hardware
            and facts.isa == own.isa
            and set(facts.runtimes) <= set(own.runtimes),
            "emulated": facts.emulated,
            "providers": {name: list(values) for name, values in sorted(facts.providers.items())},
        }
        for name, facts in sorted(wanted_classes(session, row, machine).items())
    ]


def _trials(session: Session, blobs: BlobStore, directory: Path, row: Optimization) -> dict[str, str | None]:
    """Answered trials by the job's own ids; None = no data. Raw outputs are laid out beside."""
    results: dict[str, str | None] = {}
    for trial in session.scalars(select(Trial).where(Trial.optimization == row.id)):
        if trial.state not in ("done", "no_data"):
            continue
        own = trial.id.removeprefix(f"{row.id}.")
        if trial.state == "no_data" or trial.result is None:
            results[own] = None
            continue
        digest = TrialResult.FromString(trial.result).outputs_blob
        if digest:
            try:
                _place(blobs, digest, directory / "in" / "outputs" / f"{digest[7:]}.npz")
            except NotFound:
                results[own] = None
                continue
        results[own] = base64.b64encode(trial.result).decode()
    return results


def _field(blobs: BlobStore, directory: Path, row: Optimization) -> dict[str, Any]:
    found: Mapping[str, Any] = row.spec.get("field") or {}
    spec: dict[str, Any] = {"samples": []}
    if found.get("inputs"):
        spec["inputs"] = str(_place(blobs, found["inputs"], directory / "in" / "field.sketches"))
    for digest in found.get("samples") or []:
        if blobs.exists(digest):  # a sample may live shorter than a queue is long
            path = _place(blobs, digest, directory / "in" / "samples" / f"{digest[7:]}.npz")
            spec["samples"].append(str(path))
    return spec


def _serving(session: Session, blobs: BlobStore, row: Optimization) -> dict[str, Any]:
    """What serves now: recipes to repeat, bundles to be better than."""
    endpoint = session.get(Endpoint, row.endpoint)
    assignment = session.get(Assignment, endpoint.assignment) if endpoint is not None else None
    if assignment is None:
        return {}
    recipes: list[Any] = []
    incumbents: dict[str, dict[str, str]] = {}
    for name, key in sorted(assignment.choice.items()):
        variant = session.get(Variant, key)
        if variant is None:
            continue
        incumbents[name] = {"bundle": variant.bundle, "layout": str(blobs.root)}
        recipe = {
            "steps": variant.recipe,
            "target": variant.target,
            "precision": variant.precision,
            "class": name,
        }
        if recipe not in recipes:
            recipes.append(recipe)
    return {"recipes": recipes, "incumbents": incumbents}
