"""What a job's lines become: blobs, variants, measurements, trials, versions, releases.

Each line is applied in one transaction together with how far the output was read, so a worker
killed at any moment applies every line exactly once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from shoal_controller import job_files, optimizations, registry, releases
from shoal_controller.blobs import BlobStore
from shoal_controller.clock import Clock
from shoal_controller.store.repositories import Store, record
from shoal_controller.store.tables import Endpoint, Model, Optimization, Release, Trial, Variant, Version
from shoal_protos.bundle import blob_path, check_digest, open_bundle
from shoal_protos.errors import InvalidInput
from shoal_protos.v1.profile_pb2 import Profile

ACTOR = "worker"
TRIAL_SECONDS = 600  # a trial that nobody answered within this is "no data"
MAX_STEPS = 100


class Importer:
    """Applies the lines of one job."""

    def __init__(
        self, store: Store, blobs: BlobStore, clock: Clock, job: str, directory: Path, machine: Profile
    ) -> None:
        self._store = store
        self._blobs = blobs
        self._clock = clock
        self._job = job
        self._directory = directory.resolve()
        self._machine = machine

    def apply(self, events: Iterable[Mapping[str, Any]], read: int) -> None:
        """Applies lines in order; `read` is the number of bytes of output they end at.

        Raises:
            ShoalError: a line that a well-behaved job never writes; nothing of it is kept.
        """
        batch = list(events)
        blobs: dict[str, tuple[int, str]] = {}
        for event in batch:
            blobs |= self._store_blobs(event)  # slow and durable, before the transaction
        with self._store.write() as session:
            row = session.get(Optimization, self._job)
            assert row is not None
            for digest, (size, purpose) in blobs.items():
                self._blobs.adopt(session, digest, size, purpose=purpose)
            for event in batch:
                if row.state == "running":
                    _HANDLERS[event["event"]](self, session, row, event)
            row.progress = {**row.progress, "read": read}

    # ------------------------------------------------------------------ blobs

    def _store_blobs(self, event: Mapping[str, Any]) -> dict[str, tuple[int, str]]:
        """Stores the files that a line names; returns digest -> (size, purpose)."""
        found: dict[str, tuple[int, str]] = {}
        for purpose, path in self._files(event):
            digest, size = self._blobs.store(path)
            found[digest] = (size, purpose)
        if event["event"] == "variant":
            digest = check_digest(str(event["bundle"]))
            layout = self._inside(str(event["layout"]))
            bundle = open_bundle(layout, digest)
            names = [
                bundle.manifest.config.digest,
                *(layer.digest for layer in bundle.manifest.layers),
                digest,
            ]
            for name in names:  # the manifest last: whoever finds it finds everything
                found[name] = (self._blobs.store(blob_path(layout, name))[1], "bundle")
        return found

    def _files(self, event: Mapping[str, Any]) -> Iterable[tuple[str, Path]]:
        kind = event["event"]
        if kind in ("ingested", "adapted"):
            for purpose, path in (event.get("files") or {}).items():
                if purpose in ("weights", "data") and path:
                    yield purpose, self._inside(str(path))
        elif kind == "done":
            for path in (event.get("report") or {}).values():
                if path:
                    yield "report", self._inside(str(path))
        elif kind == "trial" and event.get("dataset"):
            yield "data", self._inside(str(event["dataset"]))

    def _digest(self, path: str | None) -> str:
        return self._blobs.store(self._inside(path))[0] if path else ""

    def _inside(self, name: str) -> Path:
        """A path of the job's, which must lie in its own directory."""
        path = (self._directory / name).resolve()
        if not path.is_relative_to(self._directory) or not path.exists():
            raise InvalidInput(f"The job named a file that is not in its directory: {name[:120]}.")
        return path

    # ------------------------------------------------------------------ lines

    def _progress(self, session: Session, row: Optimization, event: Mapping[str, Any]) -> None:
        step, now = str(event.get("step", "")), self._clock()
        message = str(event.get("message") or "")[:500]
        steps = [dict(s) for s in row.progress.get("steps") or []]
        if steps and steps[-1]["step"] == step:
            steps[-1] |= {"message": message or steps[-1].get("message", ""), "share": event.get("share")}
        else:
            if steps:
                steps[-1] |= {"state": "done", "ended_ms": now}
            steps.append(
                {
                    "step": step,
                    "state": "running",
                    "message": message,
                    "share": event.get("share"),
                    "started_ms": now,
                }
            )
        row.progress = {
            **row.progress,
            "step": step,
            "share": event.get("share"),
            "message": message,
            "steps": steps[-MAX_STEPS:],
        }

    def _ingested(self, session: Session, row: Optimization, event: Mapping[str, Any]) -> None:
        version = session.get(Version, row.version)
        assert version is not None
        files = event.get("files") or {}
        version.state = "ready"
        version.signature = dict(event.get("signature") or {})
        version.metric = str(event.get("metric") or "")
        version.baseline = dict(event.get("baseline") or {})
        version.analysis = dict(event.get("analysis") or {})
        version.weights_blob = self._digest(files.get("weights"))
        version.data_blob = self._digest(files.get("data"))
        record(
            session,
            project=row.project,
            actor=ACTOR,
            verb="ready",
            kind="version",
            object=version.id,
            before={"state": "ingesting"},
            after={"state": "ready", "metric": version.metric, "baseline": version.baseline},
        )

    def _variant(self, session: Session, row: Optimization, event: Mapping[str, Any]) -> None:
        version = self._target_version(session, row)
        variant = registry.add_variant(session, version, self._clock, event, actor=ACTOR)
        if variant.plain:
            self._release_plain(session, row, version)

    def _target_version(self, session: Session, row: Optimization) -> Version:
        version = session.get(Version, str(row.result.get("version") or row.version))
        assert version is not None
        return version

    def _release_plain(self, session: Session, row: Optimization, version: Version) -> None:
        """Nobody waits for a search: once every wanted class has a plain variant, it is released."""
        if row.kind == "adapt" or _releases(session, version):
            return
        wanted = job_files.wanted_classes(session, row, self._machine)
        known = set(registry.known_classes(session, version.id))
        if set(wanted) <= known:
            self._release(session, row, version, None, "plain")

    def _trial(self, session: Session, row: Optimization, event: Mapping[str, Any]) -> None:
        key = f"{row.id}.{event['id']}"
        if session.get(Trial, key) is not None:
            return
        now = self._clock()
        trial = Trial(
            id=key,
            optimization=row.id,
            bundle=check_digest(str(event["bundle"])),
            profile_class=str(event["class"]),
            kind=str(event["kind"]),
            incumbent=str(event.get("incumbent") or ""),
            dataset=self._digest(event.get("dataset")),
            options=_options(event.get("options")),
            state="pending",
            created_ms=now,
            not_after_ms=now + TRIAL_SECONDS * 1000,
        )
        session.add(trial)
        session.flush()
        after = {"bundle": trial.bundle, "class": trial.profile_class, "kind": trial.kind}
        record(
            session, project=row.project, actor=ACTOR, verb="created", kind="trial", object=key, after=after
        )

    def _waiting(self, session: Session, row: Optimization, event: Mapping[str, Any]) -> None:
        row.result = {**row.result, "waiting": list(event.get("trials") or [])}

    def _adapted(self, session: Session, row: Optimization, event: Mapping[str, Any]) -> None:
        sentence = str(event.get("sentence") or "")
        evidence = dict(event.get("evidence") or {})
        result = {**row.result, "kept": bool(event.get("kept")), "sentence": sentence, "evidence": evidence}
        if event.get("kept") and not row.result.get("version"):
            result["version"] = self._adapted_version(session, row, event, sentence).id
        row.result = result

    def _adapted_version(
        self, session: Session, row: Optimization, event: Mapping[str, Any], sentence: str
    ) -> Version:
        parent = session.get(Version, row.version)
        assert parent is not None
        model = session.get(Model, parent.model)
        assert model is not None
        files = event.get("files") or {}
        version = registry.add_version(
            session,
            model,
            self._clock,
            source_blob=parent.source_blob,
            actor="loop" if row.spec.get("finding") else ACTOR,
            state="ready",
            parent=parent.id,
            note=f"adapted to the field by {row.id}",
            reason=sentence,
        )
        version.signature, version.metric, version.analysis = parent.signature, parent.metric, parent.analysis
        version.baseline = dict(event.get("baseline") or parent.baseline)
        version.weights_blob = self._digest(files.get("weights")) or parent.weights_blob
        version.data_blob = self._digest(files.get("data")) or parent.data_blob
        return version

    def _done(self, session: Session, row: Optimization, event: Mapping[str, Any]) -> None:
        version = self._target_version(session, row)
        report = {name: self._digest(path) for name, path in (event.get("report") or {}).items() if path}
        if event.get("knowledge"):
            job_files.keep_knowledge(self._directory, self._inside(str(event["knowledge"])), row.id)
        bundles = {
            v.bundle: v.id for v in session.scalars(select(Variant).where(Variant.version == version.id))
        }
        fronts = {
            name: [bundles[p["bundle"]] for p in front if p.get("bundle") in bundles]
            for name, front in (event.get("fronts") or {}).items()
        }
        row.result = {
            **row.result,
            "fronts": event.get("fronts") or {},
            "choice": event.get("choice") or {},
            "report": report,
        }
        if row.kind != "adapt" or row.result.get("kept"):
            self._release(session, row, version, {n: f for n, f in fronts.items() if f}, row.kind)
        self._close_steps(row)
        optimizations.finish(session, row, self._clock, "done", actor=ACTOR)

    def _close_steps(self, row: Optimization) -> None:
        now = self._clock()
        steps = [{"ended_ms": now, **step, "state": "done"} for step in row.progress.get("steps") or []]
        row.progress = {**row.progress, "steps": steps, "share": 1.0}

    def _release(
        self,
        session: Session,
        row: Optimization,
        version: Version,
        fronts: dict[str, list[str]] | None,
        note: str,
    ) -> None:
        """Makes the release that this job brought, sharing the classes that it did not touch."""
        existing = _releases(session, version)
        endpoint = session.get(Endpoint, row.endpoint) if row.endpoint else None
        objective = row.objective or (endpoint.objective if endpoint is not None else "")
        if not fronts:
            fronts = releases.best_fronts(session, version, objective)
        if existing:
            fronts = {**existing[-1].fronts, **fronts}
        if not fronts or (existing and existing[-1].fronts == fronts):
            row.result = {**row.result, "release": existing[-1].id if existing else ""}
            return
        if existing and note == "ingest":
            note = "plain"
        release = releases.create_release(
            session, version, self._clock, actor=ACTOR, fronts=fronts, note=note
        )
        row.result = {**row.result, "release": release.id}

    def _error(self, session: Session, row: Optimization, event: Mapping[str, Any]) -> None:
        text = f"{event.get('message') or 'The job failed.'} {event.get('remedy') or ''}".strip()
        fail(session, row, self._clock, text)


def fail(session: Session, row: Optimization, clock: Clock, text: str) -> None:
    """Ends a job, and the version it was to bring, as failed."""
    version = session.get(Version, row.version)
    if row.kind == "ingest" and version is not None and version.state == "ingesting":
        version.state, version.error = "failed", text
        record(
            session,
            project=row.project,
            actor=ACTOR,
            verb="failed",
            kind="version",
            object=version.id,
            before={"state": "ingesting"},
            after={"state": "failed"},
            reason=text,
        )
    steps = [dict(step) for step in row.progress.get("steps") or []]
    if steps:
        steps[-1]["state"] = "failed"
    row.progress = {**row.progress, "steps": steps}
    optimizations.finish(session, row, clock, "failed", actor=ACTOR, error=text)


def after_exit(
    session: Session, row: Optimization, clock: Clock, code: int, log: str, machine: Profile
) -> None:
    """What a job's end means, once all its lines are applied. `code` < 0 is a signal."""
    if row.state != "running":
        if row.state == "done" and row.kind == "ingest":
            _convert_missing(session, row, clock, machine)
        return
    version = session.get(Version, row.version)
    if code == 0 and row.result.get("waiting"):
        row.state, row.lease_owner, row.lease_until_ms = "waiting", "", 0
        after = {"state": "waiting", "trials": row.result["waiting"]}
        record(
            session,
            project=row.project,
            actor=ACTOR,
            verb="waiting",
            kind="optimization",
            object=row.id,
            after=after,
        )
    elif code == 0 and row.kind == "ingest" and version is not None and version.state == "ready":
        optimizations.finish(session, row, clock, "done", actor=ACTOR)
        _convert_missing(session, row, clock, machine)
    elif code == 0:
        fail(session, row, clock, f"The job ended without a result.{_tail(log)}")
    elif code < 0:
        fail(
            session,
            row,
            clock,
            f"The job's process was killed by signal {-code}. If it ran out of memory, give the worker "
            f"more or make the data smaller.{_tail(log)}",
        )
    else:
        fail(session, row, clock, f"The job's process ended with exit code {code}.{_tail(log)}")


def _convert_missing(session: Session, row: Optimization, clock: Clock, machine: Profile) -> None:
    """Queues the conversion for classes that the ingest brought no plain variant for."""
    version = session.get(Version, row.version)
    assert version is not None
    known = set(registry.known_classes(session, version.id))
    missing = sorted(set(job_files.wanted_classes(session, row, machine)) - known)
    if not missing:
        return
    optimizations.enqueue(
        session,
        clock,
        kind="optimize",
        version=version,
        actor=ACTOR,
        spec={"minutes": 0, "classes": missing},
        reason="plain variants, so that nobody waits for a search",
        project=row.project,
    )


def _releases(session: Session, version: Version) -> list[Release]:
    return list(
        session.scalars(select(Release).where(Release.version == version.id).order_by(Release.number))
    )


def _options(raw: Any) -> dict[str, Any]:
    """Runtime options that a job asked for; {} = the default ones, one thread."""
    if not isinstance(raw, Mapping):
        return {}
    threads, extra = int(raw.get("threads") or 1), dict(raw.get("extra") or {})
    return {} if threads == 1 and not extra else {"threads": threads, "extra": extra}


def _tail(log: str) -> str:
    lines = [line for line in log.strip().splitlines() if line.strip()][-8:]
    return "\nLast lines of its log:\n" + "\n".join(line[:300] for line in lines) if lines else ""


_HANDLERS = {
    "progress": Importer._progress,
    "ingested": Importer._ingested,
    "variant": Importer._variant,
    "trial": Importer._trial,
    "waiting": Importer._waiting,
    "adapted": Importer._adapted,
    "done": Importer._done,
    "error": Importer._error,
}
