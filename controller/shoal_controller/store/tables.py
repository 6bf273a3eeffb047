"""All tables. Times are Unix milliseconds on the controller's clock; JSON columns hold plain values.

Every named object carries its project. Ids are short and readable (`r-0007`), given by
`repositories.new_id`. Migrations live in `store/migrations`; a test compares them with this file.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import JSON, BigInteger, ForeignKey, Index, Integer, LargeBinary, UniqueConstraint
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column


class Base(DeclarativeBase):
    type_annotation_map = {dict[str, Any]: JSON, list[Any]: JSON, int: BigInteger, bytes: LargeBinary}  # noqa: RUF012


class Meta(Base):
    """Facts about the installation: fleet name, epoch, counters."""

    __tablename__ = "meta"
    key: Mapped[str] = mapped_column(primary_key=True)
    value: Mapped[str]


class Event(Base):
    """One change of state, written in the transaction that made it."""

    __tablename__ = "events"
    # SQLite autoincrements only an INTEGER PRIMARY KEY.
    id: Mapped[int] = mapped_column(BigInteger().with_variant(Integer, "sqlite"), primary_key=True)
    time_ms: Mapped[int]
    project: Mapped[str]
    actor: Mapped[str]  # "person:NAME", "loop", "device:ID", "worker", "controller"
    verb: Mapped[str]  # "created", "promoted", "rolled_back"...
    kind: Mapped[str]  # "device", "model", "version", "release", "endpoint", "rollout", ...
    object: Mapped[str]  # id of that kind
    before: Mapped[dict[str, Any] | None] = mapped_column(JSON)
    after: Mapped[dict[str, Any] | None] = mapped_column(JSON)
    reason: Mapped[str] = mapped_column(default="")
    __table_args__ = (Index("events_object", "kind", "object"),)


class JoinToken(Base):
    __tablename__ = "join_tokens"
    id: Mapped[str] = mapped_column(primary_key=True)
    project: Mapped[str] = mapped_column(default="default")
    secret_hash: Mapped[str] = mapped_column(unique=True)  # SHA-256; the secret is shown once
    uses: Mapped[int]
    uses_left: Mapped[int]
    created_ms: Mapped[int]
    expires_ms: Mapped[int]
    revoked: Mapped[bool] = mapped_column(default=False)
    labels: Mapped[dict[str, Any]] = mapped_column(default=dict)


class Device(Base):
    __tablename__ = "devices"
    id: Mapped[str] = mapped_column(primary_key=True)
    project: Mapped[str] = mapped_column(default="default")
    name: Mapped[str] = mapped_column(unique=True)
    profile_class: Mapped[str] = mapped_column(index=True)
    profile: Mapped[bytes]  # serialized shoal.v1.Profile
    labels: Mapped[dict[str, Any]] = mapped_column(default=dict)
    public_key_hash: Mapped[str] = mapped_column(unique=True)  # same key joins once
    # The key before: a renewal whose answer got lost is asked again with it.
    previous_key_hash: Mapped[str] = mapped_column(default="")
    certificate_serial: Mapped[str] = mapped_column(index=True)
    certificate_not_after_ms: Mapped[int]
    revoked: Mapped[bool] = mapped_column(default=False)
    quarantined: Mapped[bool] = mapped_column(default=False)  # gets no rollout, counts in no verdict
    pins: Mapped[dict[str, Any]] = mapped_column(default=dict)  # endpoint name -> variant id it keeps
    held: Mapped[dict[str, Any]] = mapped_column(default=dict)  # the same while quarantined: what it had then
    joined_ms: Mapped[int]
    last_seen_ms: Mapped[int] = mapped_column(default=0)
    connected: Mapped[bool] = mapped_column(default=False)
    boot_id: Mapped[str] = mapped_column(default="")
    agent_version: Mapped[str] = mapped_column(default="")
    features: Mapped[list[Any]] = mapped_column(default=list)
    reported: Mapped[bytes | None]  # serialized shoal.v1.Reported, latest
    system: Mapped[dict[str, Any]] = mapped_column(default=dict)  # latest shoal.v1.System as JSON
    # Latest window with requests: {"endpoint", "p50_ms", "p95_ms", "requests", "errors", "seconds", "end_ms"}
    figures: Mapped[dict[str, Any]] = mapped_column(default=dict)
    # boot id -> controller's Unix ms at that boot's monotonic zero, of the last few boots
    clocks: Mapped[dict[str, Any]] = mapped_column(default=dict)


class Desired(Base):
    """The signed desired state last published to a device."""

    __tablename__ = "desired"
    device: Mapped[str] = mapped_column(ForeignKey("devices.id"), primary_key=True)
    epoch: Mapped[int]
    generation: Mapped[int]
    content: Mapped[str]  # SHA-256 of the content without generation and dates
    signed: Mapped[bytes]  # serialized shoal.v1.Signed
    issued_ms: Mapped[int]
    not_after_ms: Mapped[int]


class DeviceRequest(Base):
    """Logs or a diagnosis asked of one device; it answers when it is there."""

    __tablename__ = "device_requests"
    id: Mapped[str] = mapped_column(primary_key=True)  # q-0001
    device: Mapped[str] = mapped_column(ForeignKey("devices.id"), index=True)
    kind: Mapped[str]  # "logs", "diagnose", "profile"
    state: Mapped[str] = mapped_column(index=True)  # open, answered, expired
    body: Mapped[bytes | None]
    created_ms: Mapped[int]
    not_after_ms: Mapped[int]
    answered_ms: Mapped[int] = mapped_column(default=0)


class Blob(Base):
    """A blob on disk or in S3. It lives while a row refers to it or its lease holds."""

    __tablename__ = "blobs"
    digest: Mapped[str] = mapped_column(primary_key=True)
    size: Mapped[int]
    purpose: Mapped[str]  # "bundle", "source", "weights", "data", "samples", "outputs", "report"
    owner: Mapped[str] = mapped_column(default="")  # device id for what devices pushed
    created_ms: Mapped[int]
    lease_until_ms: Mapped[int] = mapped_column(default=0)


class Model(Base):
    __tablename__ = "models"
    id: Mapped[str] = mapped_column(primary_key=True)  # m-0001
    project: Mapped[str] = mapped_column(default="default")
    name: Mapped[str]
    created_ms: Mapped[int]
    __table_args__ = (UniqueConstraint("project", "name"),)


class Version(Base):
    """One immutable pushed state of a model, or one that the loop adapted from another."""

    __tablename__ = "versions"
    id: Mapped[str] = mapped_column(primary_key=True)  # v-0001
    model: Mapped[str] = mapped_column(ForeignKey("models.id"), index=True)
    number: Mapped[int]
    state: Mapped[str]  # "ingesting", "ready", "failed"
    error: Mapped[str] = mapped_column(default="")
    parent: Mapped[str] = mapped_column(default="")  # version id it was adapted from
    note: Mapped[str] = mapped_column(default="")
    source_blob: Mapped[str]  # tar of the task file and its files
    weights_blob: Mapped[str] = mapped_column(default="")
    data_blob: Mapped[str] = mapped_column(default="")
    signature: Mapped[dict[str, Any]] = mapped_column(default=dict)  # shoal_protos.bundle.Signature as JSON
    metric: Mapped[str] = mapped_column(default="")
    baseline: Mapped[dict[str, Any]] = mapped_column(
        default=dict
    )  # {"value","low","high","n"} of the original
    analysis: Mapped[dict[str, Any]] = mapped_column(default=dict)
    created_ms: Mapped[int]
    __table_args__ = (UniqueConstraint("model", "number"),)


class Variant(Base):
    __tablename__ = "variants"
    id: Mapped[str] = mapped_column(primary_key=True)  # k-0001
    version: Mapped[str] = mapped_column(ForeignKey("versions.id"), index=True)
    bundle: Mapped[str] = mapped_column(index=True)  # manifest digest
    name: Mapped[str]  # "pruned50-int8-onnxruntime"
    target: Mapped[str]  # runtime name
    precision: Mapped[str]
    recipe: Mapped[list[Any]]
    size_bytes: Mapped[int]  # model file
    wire_bytes: Mapped[int]  # compressed
    plain: Mapped[bool] = mapped_column(default=False)  # converted only, before any search
    created_ms: Mapped[int]
    __table_args__ = (UniqueConstraint("version", "bundle"),)


class Measurement(Base):
    """Figures of one variant for one class with error bars and context; the newest of a kind counts."""

    __tablename__ = "measurements"
    id: Mapped[str] = mapped_column(primary_key=True)
    variant: Mapped[str] = mapped_column(ForeignKey("variants.id"), index=True)
    profile_class: Mapped[str]
    # "accuracy" {"value","low","high","n"}; "latency" {"p50_ms","p95_ms","p95_low_ms","p95_high_ms","n"};
    # "memory" {"bytes"}; "int8_share" {"value"}; "probe" (ProbeReport as JSON)
    kind: Mapped[str]
    source: Mapped[str]  # "local", "trial", "probe"
    device: Mapped[str] = mapped_column(default="")
    figures: Mapped[dict[str, Any]]
    context: Mapped[dict[str, Any]] = mapped_column(default=dict)
    time_ms: Mapped[int]


class Release(Base):
    """Immutable: class -> variant ids ordered along that class's Pareto front, best choice first."""

    __tablename__ = "releases"
    id: Mapped[str] = mapped_column(primary_key=True)  # l-0001
    project: Mapped[str] = mapped_column(default="default")
    version: Mapped[str] = mapped_column(ForeignKey("versions.id"), index=True)
    number: Mapped[int]  # within the model
    fronts: Mapped[dict[str, Any]]
    note: Mapped[str] = mapped_column(default="")
    created_ms: Mapped[int]


class Endpoint(Base):
    __tablename__ = "endpoints"
    id: Mapped[str] = mapped_column(primary_key=True)  # e-0001
    project: Mapped[str] = mapped_column(default="default")
    name: Mapped[str]
    model: Mapped[str] = mapped_column(ForeignKey("models.id"))
    objective: Mapped[str]  # "accuracy>=0.97, latency_p95<=5ms; minimise latency_p95"
    filter: Mapped[str] = mapped_column(default="")  # filter language; "" = every device
    signature: Mapped[dict[str, Any]] = mapped_column(default=dict)  # fixed by the first assignment
    settings: Mapped[dict[str, Any]] = mapped_column(default=dict)  # "sampling", "settle", "policy"
    assignment: Mapped[str] = mapped_column(default="")  # current assignment id, "" = nothing yet
    created_ms: Mapped[int]
    __table_args__ = (UniqueConstraint("project", "name"),)


class Assignment(Base):
    """A release + the variant chosen per class."""

    __tablename__ = "assignments"
    id: Mapped[str] = mapped_column(primary_key=True)  # a-0001
    endpoint: Mapped[str] = mapped_column(ForeignKey("endpoints.id"), index=True)
    release: Mapped[str] = mapped_column(ForeignKey("releases.id"))
    choice: Mapped[dict[str, Any]]  # class -> variant id
    created_ms: Mapped[int]


class Optimization(Base):
    """One queued piece of work for the worker."""

    __tablename__ = "optimizations"
    id: Mapped[str] = mapped_column(primary_key=True)  # o-0001
    project: Mapped[str] = mapped_column(default="default")
    kind: Mapped[str]  # "ingest", "optimize", "adapt"
    version: Mapped[str] = mapped_column(ForeignKey("versions.id"), index=True)
    endpoint: Mapped[str] = mapped_column(default="")
    objective: Mapped[str] = mapped_column(default="")
    state: Mapped[str] = mapped_column(index=True)  # queued, running, waiting, done, failed, cancelled
    spec: Mapped[dict[str, Any]] = mapped_column(default=dict)  # classes, budget, seed, finding, field data
    progress: Mapped[dict[str, Any]] = mapped_column(default=dict)  # {"step","share","message","steps":[...]}
    result: Mapped[dict[str, Any]] = mapped_column(default=dict)
    error: Mapped[str] = mapped_column(default="")
    lease_owner: Mapped[str] = mapped_column(default="")
    lease_until_ms: Mapped[int] = mapped_column(default=0)
    created_ms: Mapped[int]
    started_ms: Mapped[int] = mapped_column(default=0)
    finished_ms: Mapped[int] = mapped_column(default=0)


class Trial(Base):
    __tablename__ = "trials"
    id: Mapped[str] = mapped_column(primary_key=True)  # t-0001
    optimization: Mapped[str] = mapped_column(ForeignKey("optimizations.id"), index=True)
    bundle: Mapped[str]
    profile_class: Mapped[str]
    kind: Mapped[str]  # "timing", "outputs"
    incumbent: Mapped[str] = mapped_column(default="")
    dataset: Mapped[str] = mapped_column(default="")
    options: Mapped[dict[str, Any]] = mapped_column(
        default=dict
    )  # of the runtime: threads, extra; {} = default
    device: Mapped[str] = mapped_column(default="")  # chosen by trials.py
    state: Mapped[str] = mapped_column(index=True)  # pending, published, done, no_data
    result: Mapped[bytes | None]  # serialized shoal.v1.TrialResult
    created_ms: Mapped[int]
    not_after_ms: Mapped[int]


class Rollout(Base):
    __tablename__ = "rollouts"
    id: Mapped[str] = mapped_column(primary_key=True)  # r-0001
    project: Mapped[str] = mapped_column(default="default")
    endpoint: Mapped[str] = mapped_column(ForeignKey("endpoints.id"), index=True)
    from_assignment: Mapped[str] = mapped_column(default="")
    to_assignment: Mapped[str]
    state: Mapped[str] = mapped_column(
        index=True
    )  # running, paused, promoted, stopping, rolled_back, aborted
    wave: Mapped[int] = mapped_column(default=0)
    waves: Mapped[list[Any]]  # [{"name","devices":[id],"state","started_ms","decided_ms","verdict":{...}}]
    gates: Mapped[dict[str, Any]]  # limits and deadlines the verdict uses
    verdict: Mapped[dict[str, Any]] = mapped_column(default=dict)  # latest, with its sentence
    attempt: Mapped[int] = mapped_column(default=1)
    actor: Mapped[str]
    reason: Mapped[str] = mapped_column(default="")
    finding: Mapped[str] = mapped_column(default="")
    created_ms: Mapped[int]
    finished_ms: Mapped[int] = mapped_column(default=0)


class RolloutDevice(Base):
    """Per device and wave the outcome is stored, not guessed."""

    __tablename__ = "rollout_devices"
    rollout: Mapped[str] = mapped_column(ForeignKey("rollouts.id"), primary_key=True)
    device: Mapped[str] = mapped_column(ForeignKey("devices.id"), primary_key=True)
    wave: Mapped[int]
    # waiting, updating, settling, switched, failed, silent, no_traffic, rolled_back, left_out
    state: Mapped[str]
    reason: Mapped[str] = mapped_column(default="")
    detail: Mapped[str] = mapped_column(default="")
    baseline: Mapped[dict[str, Any]] = mapped_column(
        default=dict
    )  # before: {"p95_ms","error_share","requests"}
    after: Mapped[dict[str, Any]] = mapped_column(default=dict)
    probe: Mapped[dict[str, Any]] = mapped_column(default=dict)
    logs: Mapped[bytes | None]
    updated_ms: Mapped[int] = mapped_column(default=0)


class Finding(Base):
    """Something monitoring saw; one open at a time per subject and kind."""

    __tablename__ = "findings"
    id: Mapped[str] = mapped_column(primary_key=True)  # f-0001
    project: Mapped[str] = mapped_column(default="default")
    kind: Mapped[str]  # input_drift, latency, error_rate, new_class, device_failed, clock_wrong, ...
    subject: Mapped[str]  # "endpoint:e-0001/CLASS" or "device:ID"
    endpoint: Mapped[str] = mapped_column(default="")
    profile_class: Mapped[str] = mapped_column(default="")
    state: Mapped[str] = mapped_column(index=True)  # open, acting, resolved, dismissed
    severity: Mapped[str] = mapped_column(default="warning")  # info, warning, critical
    sentence: Mapped[str]
    evidence: Mapped[dict[str, Any]] = mapped_column(default=dict)
    action: Mapped[dict[str, Any]] = mapped_column(
        default=dict
    )  # {"policy","optimization","rollout","sentence"}
    opened_ms: Mapped[int]
    closed_ms: Mapped[int] = mapped_column(default=0)


class Spool(Base):
    """Highest contiguous sequence committed per spool file of a device."""

    __tablename__ = "spools"
    id: Mapped[str] = mapped_column(primary_key=True)
    device: Mapped[str] = mapped_column(ForeignKey("devices.id"), index=True)
    through: Mapped[int] = mapped_column(default=0)
    gaps: Mapped[list[Any]] = mapped_column(default=list)  # [{"from","to","reason"}]


class Window(Base):
    """Telemetry of one placement on one device over one span of the controller's time."""

    __tablename__ = "windows"
    device: Mapped[str] = mapped_column(ForeignKey("devices.id"), primary_key=True)
    endpoint: Mapped[str] = mapped_column(primary_key=True)  # endpoint name; "" = the device itself
    bundle: Mapped[str] = mapped_column(primary_key=True)
    start_ms: Mapped[int] = mapped_column(primary_key=True)
    end_ms: Mapped[int]
    resolution: Mapped[str] = mapped_column(default="raw")  # raw, 5m, 1h
    requests: Mapped[int] = mapped_column(default=0)
    errors: Mapped[int] = mapped_column(default=0)
    labelled: Mapped[int] = mapped_column(default=0)
    correct: Mapped[int] = mapped_column(default=0)
    latency: Mapped[bytes | None]  # serialized shoal.v1.Histogram
    inputs: Mapped[bytes | None]  # serialized shoal.v1.SketchSet
    outputs: Mapped[bytes | None]
    system: Mapped[dict[str, Any] | None] = mapped_column(JSON)
    role: Mapped[str] = mapped_column(default="primary")  # primary, shadow
    # {"errors_by_reason": {...}, "label_unmatched": n} of a placement, {"wire_bytes": {...}} of a device
    detail: Mapped[dict[str, Any] | None] = mapped_column(JSON)
    __table_args__ = (Index("windows_time", "endpoint", "end_ms"),)


class Sample(Base):
    __tablename__ = "samples"
    id: Mapped[str] = mapped_column(primary_key=True)
    device: Mapped[str] = mapped_column(ForeignKey("devices.id"), index=True)
    endpoint: Mapped[str] = mapped_column(index=True)  # endpoint name
    bundle: Mapped[str]
    blob: Mapped[str]
    size: Mapped[int]
    count: Mapped[int]
    labelled: Mapped[int]
    received_ms: Mapped[int]
