"""Making candidates: train a network, export it, judge it, pack it; each once, also across restarts."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from shoal_optimizer import evaluation, packing, recipe
from shoal_optimizer.jobspec import JobSpec
from shoal_optimizer.jobstate import State, Voice
from shoal_optimizer.recipe import Recipe
from shoal_optimizer.search import space
from shoal_optimizer.search.candidate import Candidate, Ground, Network, as_figure, variant_event
from shoal_optimizer.search.failures import reason_of
from shoal_optimizer.search.space import Export, Params
from shoal_optimizer.search.together import Trained
from shoal_optimizer.targets.base import Calibration, Exported, find, load_exported
from shoal_optimizer.task import Task, load_module, save_module
from shoal_protos.bundle import digest_of_file, open_bundle
from shoal_protos.errors import ShoalError, Unsupported

__all__ = ["Candidate", "Ground", "Network", "Workshop", "as_figure", "variant_event"]

log = logging.getLogger(__name__)

OVERTIME, GRACE_SECONDS = 1.2, 5.0  # a training that takes longer than its time so far is given up
_STEPS = {
    "channel_pruning": "prune",
    "weight_pruning": "prune",
    "architecture": "prune",
    "distillation": "distil",
    "quantization_aware": "distil",
    "quantization": "quantize",
}


class Workshop:
    """Makes the candidates of one job and remembers them in its state."""

    def __init__(
        self,
        task: Task,
        spec: JobSpec,
        folder: Path,
        state: State,
        voice: Voice,
        ground: Ground | None = None,
    ) -> None:
        """
        Args:
            folder: the job's directory: bundles go to `out/bundles`, networks to `work`.
        """
        self.task = task
        self.spec = spec
        self.folder = folder
        self.state = state
        self.voice = voice
        self.ground = ground or Ground()
        self.weights_digest = digest_of_file(spec.weights) if spec.weights else ""
        self._models: dict[str, Network] = {}
        task.cache_dir = folder / "cache"

    # ------------------------------------------------------------------ networks

    def plain(self) -> Network:
        """The original as it is (or the adapted one)."""
        if self.ground.teacher is not None:
            model: Any = self.ground.teacher
        else:
            model = self.task.original if self.task.has_module else None
        return Network(space.PLAIN, model)

    def train(self, wanted: Recipe, params: Params | None = None, *, seconds: float | None = None) -> Network:
        """Applies the training part of a recipe, or reads what an earlier start of this job trained.

        Args:
            seconds: trainings are shortened to end in about this time; one that does not end by far is
                given up.

        Raises:
            Cancelled: the time was over and the training did not end.
            InvalidInput, Unsupported: the recipe can't be applied to this task.
        """
        trained = wanted.training
        if not trained.steps:
            return self.plain()
        key = Network(trained, None).key
        if key in self._models:
            return self._models[key]
        saved = self.state.networks.get(key)
        if saved is not None and Path(saved["path"]).is_file():
            network = Network(
                trained,
                load_module(Path(saved["path"])),
                saved["seconds"],
                params,
                tuple(saved["notes"]),
                saved.get("threads", 1),
                saved.get("shortened", False),
            )
        else:
            network = self._train(trained, params, seconds)
        self._models[key] = network
        return network

    def _train(self, trained: Recipe, params: Params | None, seconds: float | None) -> Network:
        last = None if seconds is None else time.monotonic() + OVERTIME * seconds + GRACE_SECONDS

        def progress(step: str, share: float | None, message: str) -> None:
            self.voice.progress(_STEPS.get(step, step), share, f"{trained.name} {message}".strip())

        applied = recipe.apply(
            trained,
            self.task,
            teacher=self.ground.teacher,
            training=self.ground.training,
            augment=self.ground.augment,
            seed=self.spec.seed,
            progress=progress,
            cancelled=None if last is None else lambda: time.monotonic() > last,
            class_spec=self._special_class(trained),
            seconds=seconds,
        )
        network = Network(
            trained,
            applied.model,
            applied.seconds,
            params,
            applied.notes,
            _torch_threads(),
            was_shortened(applied.notes),
        )
        self.remember(network)
        return network

    def _special_class(self, trained: Recipe) -> Any:
        """The class that an N:M pattern is made for; other steps are the same for every class."""
        for step in trained.steps:
            pattern = str(step.params.get("pattern", "unstructured"))
            if pattern != "unstructured":
                specs = [space.class_spec(c) for c in self.spec.classes]
                return next((spec for spec in specs if spec.skips_zeros(pattern)), None)
        return None

    def remember(self, network: Network) -> None:
        """Saves a trained network, so that no later start trains it again."""
        assert network.model is not None
        path = self.folder / "work" / f"network-{network.key}.pt"
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        try:
            save_module(network.model, partial)
        except BaseException:  # a full disk gets its room back
            partial.unlink(missing_ok=True)
            raise
        partial.replace(path)
        self.state.networks[network.key] = {
            "name": network.recipe.name,
            "path": str(path),
            "seconds": network.seconds,
            "notes": list(network.notes),
            "recipe": network.recipe.to_json(),
            "params": None if network.params is None else dict(network.params),
            "threads": network.threads,
            "shortened": network.shortened,
        }
        self.state.save()

    def adopt(self, recipe: Recipe, params: Params, trained: Trained) -> Network:
        """Takes a network that another process trained, and saves it."""
        path = self.folder / "work" / f"apart-{Network(recipe.training, None).key}.pt"
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            path.write_bytes(trained.module)
            model = load_module(path)
        finally:
            path.unlink(missing_ok=True)
        network = Network(
            recipe.training,
            model,
            trained.seconds,
            params,
            trained.notes,
            trained.threads,
            was_shortened(trained.notes),
        )
        self.remember(network)
        return network

    def leave_out(self, name: str, outcome: str, reason: str, **more: Any) -> None:
        """Notes what was not made and why, once, for the report.

        Args:
            outcome: "failed" (it was tried) or "skipped" (it was not).
            more: what else is known, such as "recipe", "target", "predicted".
        """
        kept: list[dict[str, Any]] = self.state.facts.setdefault("left_out", [])
        entry = {"name": name, "outcome": outcome, "reason": reason, **more}
        if entry not in kept:
            kept.append(entry)
            self.state.save()

    # ------------------------------------------------------------------ candidates

    def candidate(self, network: Network, export: Export, *, items: int | None = None) -> Candidate | None:
        """Exports, judges and packs; None (and a progress line) where that can't be done.

        Args:
            items: judge on at most so many evaluation items; None = all.
        """
        key = f"{network.key}-{export.key}"
        saved = self.state.candidates.get(key)
        if saved is not None:
            return Candidate.from_json(saved)
        whole = space.complete(network.recipe, export)
        name = f"{whole.name}-{export.form}-{export.target}"
        self.voice.progress("quantize" if export.precision == "int8" else "convert", None, name)
        try:
            made = self._make(key, name, network, whole, export, items)
        except Exception as error:  # whatever one form lacks or breaks, the others are made
            if not isinstance(error, ShoalError):
                log.exception("%s failed", name)
            reason = reason_of(error)
            self.voice.progress("convert", None, f"{name} is left out: {reason}")
            self.leave_out(
                name, "failed", reason, recipe=whole.to_json(), target=export.target,
                precision=export.precision,
            )  # fmt: skip
            return None
        return self.keep(made)

    def keep(self, candidate: Candidate) -> Candidate:
        """Saves what is known of a candidate now."""
        self.state.candidates[candidate.key] = candidate.to_json()
        self.state.save()
        return candidate

    def again(self, whole: Recipe, export: Export, name: str) -> Candidate:
        """A candidate by its whole recipe, quantization included, as a replay needs it.

        Raises:
            ShoalError: it cannot be made here; nothing is left out silently.
        """
        network = self.train(whole)
        return self._make(f"{network.key}-{export.key}", name, network, whole, export, 1)

    def _make(
        self, key: str, name: str, network: Network, whole: Recipe, export: Export, items: int | None
    ) -> Candidate:
        exported = find(export.target).export(
            network.model,
            self.task,
            export.precision,
            self._calibration(network, whole) if export.precision == "int8" else None,
            space.class_spec(export.classes[0]),
        )
        judged, in_field = self._judge(exported, items)
        self.voice.progress("pack", None, name)
        packed = self._pack(exported, whole, name, export)
        return Candidate(
            key=key,
            name=name,
            network=network.key,
            bundle=packed.digest,
            layout=str(packed.layout),
            target=export.target,
            precision=export.precision,
            recipe=tuple(whole.to_json()),
            classes=tuple(c.name for c in export.classes),
            size_bytes=packed.size_bytes,
            wire_bytes=packed.wire_bytes,
            plain=network.plain and export.precision == "fp32",
            accuracy=as_figure(judged) if judged else None,
            field_accuracy=as_figure(in_field) if in_field else None,
            int8_share=exported.facts.get("int8_share"),
            reverted=tuple(exported.facts.get("reverted", ())),
            items=judged.n if judged else 0,
            per_class=judged.per_class if judged else {},
            quantizer=export.quantizer if export.precision != "fp32" else "",
        )

    def _calibration(self, network: Network, whole: Recipe) -> Calibration | None:
        quantization = Recipe(whole.steps[len(network.recipe.steps) :], whole.name)
        applied = recipe.apply(
            quantization,
            self.task,
            teacher=network.model,
            calibration=self.ground.calibration,
            seed=self.spec.seed,
        )
        return applied.calibration

    def _judge(
        self, exported: Exported, items: int | None
    ) -> tuple[evaluation.Score | None, evaluation.Score | None]:
        data = self.task.required("evaluation")
        if items is not None:
            data = data.sample(items, self.spec.seed)
        try:
            instance = load_exported(exported)
        except Unsupported:  # another kind of processor: what this one can't run it can't judge
            return None, None
        try:
            found = evaluation.evaluate_instance(self.task, instance, data)
            if self.ground.field is None:
                return found, None
            return found, evaluation.evaluate_instance(self.task, instance, self.ground.field)
        finally:
            instance.close()

    def _pack(self, exported: Exported, whole: Recipe, name: str, export: Export) -> packing.Packed:
        lineage = packing.lineage_of(
            self.task,
            whole,
            exported,
            model_version=self.spec.version,
            seed=self.spec.seed,
            parent=self.ground.parent,
            weights_digest=self.weights_digest,
        )
        partial = self.folder / "work" / f"pack-{name}"
        shutil.rmtree(partial, ignore_errors=True)  # from before a crash
        try:
            packed = packing.pack(
                exported,
                self.task,
                whole,
                lineage,
                partial,
                name=f"{self.label} {name}",
                field=self.ground.reference,
            )
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        return replace(packed, layout=self._settle_layout(partial, name, packed.digest))

    def _settle_layout(self, partial: Path, name: str, digest: str) -> Path:
        """Moves a bundle to `out/bundles/NAME`; a name that another bundle has gets the digest's start."""
        folder = self.folder / "out" / "bundles"
        folder.mkdir(parents=True, exist_ok=True)
        for layout in (folder / name, folder / f"{name}-{digest[7:15]}"):
            if not layout.exists():
                partial.replace(layout)
                return layout
            if open_bundle(layout, verify=False).digest == digest:
                break
        shutil.rmtree(partial)
        return layout

    def judge_whole(self, candidate: Candidate) -> Candidate:
        """The candidate judged on the whole evaluation data, if it was judged on a part before."""
        data = self.task.required("evaluation")
        if candidate.accuracy is None or candidate.items >= len(data):
            return candidate
        from shoal_agent import runtimes

        bundle = open_bundle(Path(candidate.layout), candidate.bundle, verify=False)
        with runtimes.find(candidate.target).load(bundle) as instance:
            judged = evaluation.evaluate_instance(self.task, instance, data)
        return self.keep(
            replace(candidate, accuracy=as_figure(judged), items=len(data), per_class=judged.per_class)
        )

    @property
    def label(self) -> str:
        model = self.spec.model or self.task.label
        return f"{model} v{self.spec.version}" if self.spec.version else model


def _torch_threads() -> int:
    import torch

    return torch.get_num_threads()


def was_shortened(notes: Iterable[str]) -> bool:
    """True when training said that time did not allow all of its steps (`techniques.training`)."""
    return any("the time that is left allows" in note or "are left out" in note for note in notes)
