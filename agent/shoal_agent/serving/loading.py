"""From a bundle on disk to something that can answer: opened, checked, loaded, warmed up and timed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from shoal_agent import runtimes
from shoal_agent.runtimes.base import Facts, Instance, Options
from shoal_agent.runtimes.golden import example_inputs
from shoal_agent.serving.batching import Lane, Speed, measure_speed
from shoal_agent.serving.observer import Observer
from shoal_agent.serving.samples import Recorder
from shoal_agent.serving.wire import Codec
from shoal_agent.telemetry.sampling import Policy
from shoal_protos.bundle import Bundle, open_bundle
from shoal_protos.v1.desired_pb2 import ROLE_PRIMARY, ROLE_SHADOW, PlacementSettings

ROLES: Mapping[str, int] = {"primary": ROLE_PRIMARY, "shadow": ROLE_SHADOW}


@dataclass(frozen=True)
class Loaded:
    """A bundle in memory under one endpoint."""

    endpoint: str
    version: str
    role: str
    bundle: Bundle
    settings: PlacementSettings
    instance: Instance
    speed: Speed
    facts: Facts
    codec: Codec
    observer: Observer
    lane: Lane
    recorder: Recorder

    @property
    def predicts_classes(self) -> bool:
        return self.bundle.config.signature.output_kind == "logits"


@dataclass(frozen=True)
class Source:
    """What to load, and as what."""

    endpoint: str
    store: Path
    digest: str
    version: str
    role: str
    settings: PlacementSettings
    verify: bool = True


def build(source: Source, policy: Policy, make_lane: Callable[[Instance, Speed], Lane]) -> Loaded:
    """Loads a bundle beside whatever serves. Blocking.

    Raises:
        ShoalError: the bundle cannot be opened, loaded or run.
    """
    bundle = open_bundle(source.store, source.digest, verify=source.verify)
    signature = bundle.config.signature
    examples = example_inputs(bundle, limit=1)
    runtime = runtimes.find(bundle.config.runtime.name)
    instance = runtime.load(bundle, Options.from_proto(source.settings.options))
    open_batch = all(spec.shape and spec.shape[0] == -1 for spec in signature.inputs)
    speed = measure_speed(instance, examples, open_batch)
    return Loaded(
        endpoint=source.endpoint,
        version=source.version,
        role=source.role,
        bundle=bundle,
        settings=source.settings,
        instance=instance,
        speed=speed,
        facts=instance.facts(),
        codec=Codec(source.endpoint, source.version, signature),
        observer=Observer(source.endpoint, bundle.digest, ROLES[source.role], signature),
        lane=make_lane(instance, speed),
        recorder=Recorder(source.endpoint, bundle.digest, signature, policy),
    )
