"""The one writer of desired states: a pure merge of what endpoints, rollouts, trials and requests want.

No IO and no clock: `desired_publish` loads the facts, this decides, `desired_publish` signs and stores.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from shoal_protos.v1 import desired_pb2

DesiredContent = desired_pb2.DesiredState
"""A desired state without epoch, generation and dates."""

SCHEMA = 1
SINCE = "0.1.0"  # the version that first had every feature required here

# Rollout states in which the rollout still decides what its devices have.
ACTIVE = frozenset({"running", "paused", "stopping"})
# A device in one of these has its wave's new assignment; in any other it has the old one.
MOVED = frozenset({"updating", "settling", "switched", "no_traffic"})

# Allowance of a probe over what was measured: a factor, and a slice of a busy small machine.
LATENCY_TOLERANCE = 3.0
LATENCY_ALLOWANCE_MS = 2.0
MEMORY_TOLERANCE = 1.5
MEMORY_ALLOWANCE_BYTES = 64 << 20  # a fresh process's allocator and the runtime's own buffers


@dataclass(frozen=True)
class VariantFacts:
    """What the registry knows of one variant. `isa`, `version_min`, `version_max` come from its bundle."""

    id: str
    bundle: str
    runtime: str
    model: str = ""
    model_version: int = 0
    isa: frozenset[str] = frozenset()
    version_min: str = ""
    version_max: str = ""
    promised_int8_share: Mapping[str, float] = field(default_factory=dict)  # by class
    envelopes: Mapping[str, EnvelopeFacts] = field(default_factory=dict)  # by class
    options: Mapping[str, OptionFacts] = field(default_factory=dict)  # by class; absent = the default ones


@dataclass(frozen=True)
class OptionFacts:
    """How a runtime loads a variant, where that was measured to be better than by default."""

    threads: int = 0
    extra: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, raw: Mapping[str, object]) -> OptionFacts:
        """From figures or a trial's row; what is no such thing is the default."""
        threads, extra = raw.get("threads"), raw.get("extra")
        return cls(
            max(0, threads) if isinstance(threads, int) else 0,
            {str(k): str(v) for k, v in extra.items()} if isinstance(extra, Mapping) else {},
        )


@dataclass(frozen=True)
class EnvelopeFacts:
    """Measured limits for one class; 0 = not measured."""

    latency_p95_ms: float = 0.0
    memory_bytes: int = 0
    accuracy: float = 0.0


@dataclass(frozen=True)
class AssignmentFacts:
    id: str
    choice: Mapping[str, str]  # class -> variant id
    classes: frozenset[str] | None = None  # classes that its release has a front for; None = all chosen


@dataclass(frozen=True)
class RolloutFacts:
    """A rollout as one device sees it. `device_state` is "" for a device that is not in it."""

    state: str
    from_assignment: str
    to_assignment: str
    attempt: int = 1
    device_state: str = ""


@dataclass(frozen=True)
class EndpointFacts:
    """One endpoint whose filter matches the device."""

    name: str
    project: str
    assignment: str  # current id, "" = nothing yet
    attempt: int = 1  # of the rollout that led to it
    rollout: RolloutFacts | None = None
    settle_seconds: int = 10
    max_error_share: float = 0.05
    max_latency_ratio: float = 0.0
    min_requests: int = 20
    sampling_share: float = 0.0
    max_samples_per_window: int = 64
    max_bytes_per_day: int = 32 << 20
    threads: int = 0


@dataclass(frozen=True)
class TrialFacts:
    id: str
    bundle: str
    kind: str  # "timing", "outputs"
    dataset: str = ""
    incumbent: str = ""
    not_after_ms: int = 0
    max_bytes: int = 32 << 20
    threads: int = 0
    extra: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class RequestFacts:
    id: str
    kind: str  # "logs", "diagnose", "profile"
    not_after_ms: int


@dataclass(frozen=True)
class AgentFacts:
    """Settings that every agent of the fleet gets."""

    addresses: tuple[str, ...] = ()  # host:port of door 8443, in order
    telemetry_seconds: int = 0
    heartbeat_seconds: int = 0


@dataclass(frozen=True)
class DeviceInputs:
    """Everything that decides what one device should have."""

    fleet: str
    device: str
    profile_class: str
    isa: frozenset[str]
    runtimes: Mapping[str, str]  # name -> version
    endpoints: Sequence[EndpointFacts] = ()
    assignments: Mapping[str, AssignmentFacts] = field(default_factory=dict)
    variants: Mapping[str, VariantFacts] = field(default_factory=dict)
    trials: Sequence[TrialFacts] = ()
    requests: Sequence[RequestFacts] = ()
    agent: AgentFacts = AgentFacts()
    pins: Mapping[str, str] = field(default_factory=dict)  # endpoint -> variant id that the device keeps
    # A quarantined device keeps just this (endpoint -> variant id); None = it is not quarantined.
    held: Mapping[str, str] | None = None


def merge(inputs: DeviceInputs) -> DesiredContent:
    """What the device should have. Equal inputs give equal bytes."""
    state = DesiredContent(schema=SCHEMA, fleet=inputs.fleet, device=inputs.device)
    keep: set[str] = set()
    for endpoint in sorted(inputs.endpoints, key=lambda e: e.name):
        placement = _placement(inputs, endpoint)
        if placement is not None:
            state.placements.append(placement)
        keep |= _kept(inputs, endpoint)
    state.trials.extend(_trial(trial) for trial in sorted(inputs.trials, key=lambda t: t.id))
    state.requests.extend(_request(request) for request in sorted(inputs.requests, key=lambda r: r.id))
    keep.update(trial.incumbent for trial in inputs.trials if trial.incumbent)
    state.keep.extend(sorted(keep))
    state.requires.extend(_requirements(state))
    state.agent_settings.CopyFrom(_agent_settings(inputs.agent))
    return state


def chosen_assignment(endpoint: EndpointFacts) -> tuple[str, int]:
    """(assignment id, attempt) that applies to the device; "" = nothing for this endpoint yet.

    During a rollout a device has the new assignment from the moment its wave moves it until the
    rollout stops; a device that joined meanwhile waits for its wave like any other.
    """
    rollout = endpoint.rollout
    if rollout is None or rollout.state not in ACTIVE:
        return endpoint.assignment, endpoint.attempt
    if rollout.state != "stopping" and rollout.device_state in MOVED:
        return rollout.to_assignment, rollout.attempt
    return rollout.from_assignment, endpoint.attempt


def kept_variant(inputs: DeviceInputs, endpoint: str) -> str | None:
    """The variant id that the device keeps at an endpoint whatever rollouts say ("" = none, it is
    quarantined and had nothing); None = rollouts decide."""
    if inputs.held is not None:
        return inputs.held.get(endpoint, "")
    return inputs.pins.get(endpoint)


def _kept_placement(inputs: DeviceInputs, variant: VariantFacts) -> tuple[VariantFacts, bool]:
    """A pin is a choice; what a quarantined device had may have been a fallback, with nothing measured."""
    return variant, inputs.held is not None and inputs.profile_class not in variant.envelopes


def variant_for(inputs: DeviceInputs, assignment: AssignmentFacts) -> tuple[VariantFacts, bool] | None:
    """(variant, is it a fallback) for the device; None if no chosen variant can run there."""
    own = inputs.variants.get(assignment.choice.get(inputs.profile_class, ""))
    if own is not None:
        return own, assignment.classes is not None and inputs.profile_class not in assignment.classes
    candidates = [
        (_distance(inputs, name, variant), variant.id, variant)
        for name, variant in (
            (name, inputs.variants.get(key)) for name, key in sorted(assignment.choice.items())
        )
        if variant is not None and can_run(inputs, name, variant)
    ]
    return (min(candidates, key=lambda c: c[:2])[2], True) if candidates else None


def can_run(inputs: DeviceInputs, other_class: str, variant: VariantFacts) -> bool:
    """Judged by what the bundle needs; the class's name only tells the architecture."""
    version = inputs.runtimes.get(variant.runtime)
    if version is None or _architecture(other_class) != _architecture(inputs.profile_class):
        return False
    if variant.version_min and _number(version) < _number(variant.version_min):
        return False
    if variant.version_max and _number(version) >= _number(variant.version_max):
        return False
    return variant.isa <= inputs.isa


def _distance(inputs: DeviceInputs, other_class: str, variant: VariantFacts) -> tuple[int, int]:
    """Smaller is nearer: fewer class parts that differ, then more instructions put to use."""
    mine, other = (set(_parts(name)) for name in (inputs.profile_class, other_class))
    return len(mine ^ other), -len(variant.isa)


def _parts(profile_class: str) -> list[str]:
    return profile_class.replace("+", ".").split(".")


def _architecture(profile_class: str) -> str:
    return _parts(profile_class)[0]


def _number(version: str) -> tuple[int, ...]:
    digits = []
    for part in version.split("."):
        head = "".join(c for c in part if c.isdigit())
        if not head:
            break
        digits.append(int(head))
    return tuple(digits)


def _placement(inputs: DeviceInputs, endpoint: EndpointFacts) -> desired_pb2.Placement | None:
    chosen, attempt = chosen_assignment(endpoint)
    assignment = inputs.assignments.get(chosen)
    kept = kept_variant(inputs, endpoint.name)
    if kept is None:
        found = variant_for(inputs, assignment) if assignment is not None else None
    else:
        known = inputs.variants.get(kept)
        found, attempt = _kept_placement(inputs, known) if known is not None else None, endpoint.attempt
    if found is None:
        return None
    variant, fallback = found
    return desired_pb2.Placement(
        endpoint=endpoint.name,
        bundle=variant.bundle,
        role=desired_pb2.ROLE_PRIMARY,
        attempt=attempt,
        settings=_settings(inputs, endpoint, variant, fallback),
    )


def _settings(
    inputs: DeviceInputs, endpoint: EndpointFacts, variant: VariantFacts, fallback: bool
) -> desired_pb2.PlacementSettings:
    settings = desired_pb2.PlacementSettings(
        project=endpoint.project,
        model=variant.model,
        model_version=variant.model_version,
        variant=variant.id,
        options=_options(inputs, endpoint, variant, fallback),
        settle=desired_pb2.Settle(
            seconds=endpoint.settle_seconds,
            max_error_share=endpoint.max_error_share,
            max_latency_ratio=endpoint.max_latency_ratio,
            min_requests=endpoint.min_requests,
        ),
        sampling=desired_pb2.Sampling(
            share=endpoint.sampling_share,
            max_samples_per_window=endpoint.max_samples_per_window if endpoint.sampling_share else 0,
            max_bytes_per_day=endpoint.max_bytes_per_day if endpoint.sampling_share else 0,
        ),
        fallback=fallback,
    )
    if not fallback:
        # Figures of another class say nothing about this one.
        settings.promised_int8_share = variant.promised_int8_share.get(inputs.profile_class, 0.0)
        envelope = variant.envelopes.get(inputs.profile_class)
        if envelope is not None and (envelope.latency_p95_ms or envelope.memory_bytes):
            settings.envelope.CopyFrom(_envelope(envelope))
    return settings


def _options(
    inputs: DeviceInputs, endpoint: EndpointFacts, variant: VariantFacts, fallback: bool
) -> desired_pb2.RuntimeOptions:
    """What a person set for the endpoint, else what the variant was measured with on this class."""
    measured = None if fallback else variant.options.get(inputs.profile_class)
    if endpoint.threads or measured is None:
        return desired_pb2.RuntimeOptions(threads=endpoint.threads)
    return desired_pb2.RuntimeOptions(threads=measured.threads, extra=dict(measured.extra))


def _envelope(facts: EnvelopeFacts) -> desired_pb2.Envelope:
    tolerance = LATENCY_TOLERANCE
    if facts.latency_p95_ms > 0:
        tolerance = max(tolerance, 1.0 + LATENCY_ALLOWANCE_MS / facts.latency_p95_ms)
    return desired_pb2.Envelope(
        latency_p95_ms=facts.latency_p95_ms,
        latency_tolerance=tolerance,
        memory_bytes=_memory_limit(facts.memory_bytes),
        accuracy=facts.accuracy,
    )


def _memory_limit(measured: int) -> int:
    return int(measured * MEMORY_TOLERANCE) + MEMORY_ALLOWANCE_BYTES if measured else 0


def _kept(inputs: DeviceInputs, endpoint: EndpointFacts) -> set[str]:
    """Both sides of a rollout stay on disk until it ends, so that no way back needs a download."""
    rollout = endpoint.rollout
    if rollout is None or rollout.state not in ACTIVE or kept_variant(inputs, endpoint.name) is not None:
        return set()
    sides = (inputs.assignments.get(key) for key in (rollout.from_assignment, rollout.to_assignment))
    found = (variant_for(inputs, side) for side in sides if side is not None)
    return {variant.bundle for variant, _ in (pair for pair in found if pair is not None)}


def _trial(trial: TrialFacts) -> desired_pb2.Trial:
    kinds = {"timing": desired_pb2.TRIAL_KIND_TIMING, "outputs": desired_pb2.TRIAL_KIND_OUTPUTS}
    return desired_pb2.Trial(
        id=trial.id,
        bundle=trial.bundle,
        kind=kinds[trial.kind],
        dataset=trial.dataset,
        incumbent=trial.incumbent,
        not_after_ms=trial.not_after_ms,
        max_bytes=trial.max_bytes,
        options=desired_pb2.RuntimeOptions(threads=trial.threads, extra=dict(trial.extra)),
    )


def _request(request: RequestFacts) -> desired_pb2.Request:
    kinds = {
        "logs": desired_pb2.REQUEST_KIND_LOGS,
        "diagnose": desired_pb2.REQUEST_KIND_DIAGNOSE,
        "profile": desired_pb2.REQUEST_KIND_PROFILE,
    }
    return desired_pb2.Request(id=request.id, kind=kinds[request.kind], not_after_ms=request.not_after_ms)


def _requirements(state: DesiredContent) -> list[desired_pb2.Requirement]:
    """Only what the state uses, so that an older agent is refused nothing it can do."""
    needed = [
        ("placements.v1", bool(state.placements)),
        ("requests.v1", bool(state.requests)),
        ("samples.v1", any(p.settings.sampling.share > 0 for p in state.placements)),
        ("trials.v1", bool(state.trials)),
    ]
    return [desired_pb2.Requirement(feature=feature, since_version=SINCE) for feature, used in needed if used]


def _agent_settings(facts: AgentFacts) -> desired_pb2.AgentSettings:
    return desired_pb2.AgentSettings(
        controllers=[
            desired_pb2.ControllerAddress(carrier="grpc", address=address) for address in facts.addresses
        ],
        telemetry_seconds=facts.telemetry_seconds,
        heartbeat_seconds=facts.heartbeat_seconds,
    )
