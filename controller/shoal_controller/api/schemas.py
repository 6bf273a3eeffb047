"""What the REST API says and takes. Routes (all below `/api/v1`):

    GET    /status                                  -> Status
    GET    /devices?filter=&sort=&offset=&limit=    -> Page[Device]
    GET    /devices/{id}                            -> DeviceDetail
    PATCH  /devices/{id}           DevicePatch      -> Device
    DELETE /devices/{id}           (revokes)        -> Device
    GET    /devices/{id}/requests                   -> list[DeviceRequest]
    POST   /devices/{id}/requests  DeviceRequestCreate -> DeviceRequest
    GET    /classes                                 -> list[ClassSummary]
    GET    /fleet/map?filter=                       -> FleetMap
    GET    /fleet/latency?minutes=                  -> FleetLatency
    GET    /tokens  POST /tokens TokenCreate -> TokenCreated  DELETE /tokens/{id}
    GET    /models                                  -> list[Model]
    GET    /models/{name}                           -> ModelDetail
    POST   /models/{name}/versions (multipart: source=tar | upload=digest, note)  -> Version
    GET    /uploads/{digest}                        -> Upload (how much of it is here)
    PUT    /uploads/{digest}?offset=&size= (bytes)  -> Upload; 409 names the offset to go on from
    GET    /wheels                                  -> list[WheelSet]
    GET    /models/{name}/versions/{number}         -> Version
    GET    /variants?model=&version=&class=         -> list[Variant]
    GET    /variants/{id}                           -> Variant
    GET    /releases?model=  GET /releases/{id}     -> Release
    POST   /releases               ReleaseCreate    -> Release
    GET    /endpoints GET /endpoints/{name} POST /endpoints EndpointCreate
    PATCH  /endpoints/{name}       EndpointPatch    -> Endpoint
    GET    /optimizations GET /optimizations/{id} POST /optimizations OptimizationCreate
    POST   /optimizations/{id}/cancel
    GET    /optimizations/{id}/report               (HTML)
    GET    /rollouts GET /rollouts/{id} POST /rollouts RolloutCreate
    POST   /rollouts/{id}/pause | resume | abort | promote      Reason
    GET    /findings?state= GET /findings/{id} POST /findings/{id}/dismiss Reason
    GET    /events?kind=&object=&after=&limit=      -> list[Event]
    GET    /story?endpoint=                         -> list[StoryItem]
    GET    /stream?topics=                          server-sent events
    GET    /blobs/{digest}                          bytes (ranges)
    GET    /prometheus/devices                      Prometheus http_sd

Ids accept a unique prefix or a name. Times are Unix milliseconds, latencies milliseconds, sizes bytes.
"""

from __future__ import annotations

from typing import Any, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

T = TypeVar("T")


class Schema(BaseModel):
    model_config = ConfigDict(from_attributes=True, extra="forbid")


class Page(Schema, Generic[T]):
    items: list[T]
    total: int
    offset: int = 0


class Problem(Schema):
    """RFC 9457 problem details."""

    type: str = "about:blank"
    title: str
    status: int
    code: str
    detail: str
    remedy: str = ""
    request_id: str = ""


# ------------------------------------------------------------------ fleet


class Status(Schema):
    fleet: str
    version: str
    devices: dict[str, int]  # by status: healthy, updating, degraded, drifting, offline
    findings_open: int
    rollouts_running: int
    optimizations_running: int
    endpoints: list[dict[str, Any]]  # name, objective, met, p95_ms, error_share, accuracy
    sentence: str
    next_step: str
    needs_attention: bool


class PlacementView(Schema):
    endpoint: str
    wanted: str  # variant name or bundle prefix: what it should have now
    serving: str
    variant: str = ""
    step: str
    reason: str = ""
    detail: str = ""
    fallback: bool = False
    pinned: bool = False
    current: bool = True  # the device's report is about what it should have now


class Device(Schema):
    id: str
    name: str
    project: str
    profile_class: str
    status: str  # healthy, updating, degraded, drifting, offline, revoked
    status_reason: str = ""
    labels: dict[str, str] = Field(default_factory=dict)
    version: str = ""  # what it serves: "digits v1"
    p95_ms: float | None = None
    temperature_celsius: float | None = None
    emulated: bool = False
    quarantined: bool = False
    pins: dict[str, str] = Field(default_factory=dict)
    last_seen_ms: int
    joined_ms: int
    agent_version: str = ""
    placements: list[PlacementView] = Field(default_factory=list)
    class_reason: str = ""


class Drift(Schema):
    """How far a placement's inputs lie from its variant's reference; 1.0 = the furthest clean window."""

    endpoint: str
    score: float
    psi: float | None = None
    statistic: str = ""  # the one that moved most
    n: int  # inputs judged
    end_ms: int


class DeviceDetail(Device):
    profile: dict[str, Any]
    system: dict[str, Any]
    generation: int
    reported_generation: int
    desired_ms: int = 0  # when what it should have was published last
    connected: bool = False
    expected_ms: int = 0  # when it should be heard next; 0 = not known
    windows: list[dict[str, Any]]  # time_ms, requests, errors, p50_ms, p95_ms, temperature_celsius per window
    drift: list[Drift] = Field(default_factory=list)
    events: list[Event]
    logs: str = ""  # that its last failed step carried
    next_step: str = ""  # what a person can do when something is wrong
    causes: list[str] = Field(default_factory=list)  # likely ones, where it never reported


class DevicePatch(Schema):
    labels: dict[str, str] | None = None
    name: str | None = None
    quarantined: bool | None = None  # serves on; gets no rollout and counts in no verdict
    pins: dict[str, str] | None = None  # endpoint -> variant id or name that this device keeps, {} = none
    reason: str = ""  # why; kept with the event


class DeviceRequestCreate(Schema):
    kind: Literal["logs", "diagnose", "profile"]


class DeviceRequest(Schema):
    """Logs or a diagnosis asked of a device."""

    id: str
    device: str
    kind: str
    state: str  # open, answered, expired
    body: str = ""
    created_ms: int
    answered_ms: int = 0


class ClassSummary(Schema):
    name: str
    devices: int
    by_status: dict[str, int]
    p95_ms: float | None = None
    requests_per_s: float = 0.0


class FleetMap(Schema):
    """One character a device: h healthy, u updating, d degraded, r drifting, o offline, x revoked."""

    classes: list[str]
    states: list[str]  # one string per class
    names: list[list[str]] | None = None  # only for fleets under 2,000 devices


class FleetLatency(Schema):
    times_ms: list[int]
    series: dict[str, list[float | None]]  # class -> p95 ms


class TokenCreate(Schema):
    uses: int = Field(default=1, ge=1, le=100_000)
    ttl_s: int = Field(default=3600, ge=1, le=90 * 86400)
    labels: dict[str, str] = Field(default_factory=dict)


class Token(Schema):
    id: str
    uses: int
    uses_left: int
    created_ms: int
    expires_ms: int
    revoked: bool
    labels: dict[str, str]


class TokenCreated(Token):
    token: str  # shown once: what `shoal-agent join` takes
    join_line: str = ""  # shown once: the one line for a bare device; "" where the installer's door is closed
    installer_sha256: str = ""  # what that line checks before it runs anything
    note: str = ""  # what is missing for the line to work, and the command that mends it


# ------------------------------------------------------------------ models


class Figure(Schema):
    """A value with its 95 % interval; value None = unmeasured."""

    value: float | None
    low: float | None = None
    high: float | None = None
    n: int | None = None
    # local, trial, probe, telemetry, emulated (accuracy only), unmeasured, "unmeasured (emulated)"
    source: str = ""


class Upload(Schema):
    """One resumable upload, named by the SHA-256 of the whole."""

    digest: str
    received: int  # bytes, contiguous from the start
    size: int
    complete: bool


class WheelSet(Schema):
    """What devices of one platform and Python install from."""

    platform: str  # aarch64, x86_64
    python: str  # 3.13
    extras: list[str]
    files: int
    size: int  # bytes
    glibc: str  # the newest that any wheel asks for: "2.28"
    added_ms: int
    name: str = ""  # aarch64-cp313
    installed_bytes: int = 0  # on a device's disk


class Version(Schema):
    id: str
    model: str
    number: int
    state: str
    error: str = ""
    parent: str = ""
    note: str = ""
    metric: str = ""
    baseline: Figure | None = None
    signature: dict[str, Any] = Field(default_factory=dict)
    analysis: dict[str, Any] = Field(default_factory=dict)
    created_ms: int
    optimization: str = ""  # the ingest job


class VariantFigures(Schema):
    profile_class: str
    accuracy: Figure | None = None
    latency_p50_ms: Figure | None = None
    latency_p95_ms: Figure | None = None
    memory_bytes: Figure | None = None
    int8_share: Figure | None = None
    device: str = ""
    on_front: bool = False
    chosen: bool = False
    serving: int = 0  # devices that serve it now


class Variant(Schema):
    id: str
    model: str
    version: int
    name: str
    bundle: str
    target: str
    precision: str
    recipe: list[dict[str, Any]]
    size_bytes: int
    wire_bytes: int
    plain: bool
    created_ms: int
    classes: list[VariantFigures] = Field(default_factory=list)


class Model(Schema):
    id: str
    name: str
    project: str
    versions: int
    latest: int
    state: str
    accuracy: Figure | None = None
    variants: int
    endpoints: list[str]
    findings_open: int = 0
    created_ms: int


class ModelDetail(Model):
    version_list: list[Version]


class Release(Schema):
    id: str
    model: str
    version: int
    number: int
    fronts: dict[str, list[str]]
    note: str
    created_ms: int


class ReleaseCreate(Schema):
    model: str
    version: int
    fronts: dict[str, list[str]] | None = None  # None = the best front known per class
    note: str = ""


class OptimizationCreate(Schema):
    model: str
    version: int | None = None  # None = latest ready
    objective: str = ""  # "" = the endpoint's, else the default
    endpoint: str = ""
    classes: list[str] | None = None  # None = every class in the fleet
    minutes: float = Field(default=3.0, gt=0)
    seed: int = 0


class Optimization(Schema):
    id: str
    kind: str
    model: str
    version: int
    endpoint: str
    objective: str
    state: str
    progress: dict[str, Any]
    result: dict[str, Any]
    error: str = ""
    release: str = ""
    trials: list[dict[str, Any]] = Field(default_factory=list)
    created_ms: int
    started_ms: int
    finished_ms: int


# ------------------------------------------------------------------ endpoints and rollouts


class EndpointCreate(Schema):
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_.-]{0,62}$")
    model: str
    objective: str = "accuracy>=0; minimise latency_p95"
    filter: str = ""
    sampling_share: float = Field(default=0.0, ge=0, le=1)
    settle_s: int = Field(default=10, ge=0, le=86400)
    automatic: bool = True  # policies may act without a person


class EndpointPatch(Schema):
    objective: str | None = None
    filter: str | None = None
    sampling_share: float | None = Field(default=None, ge=0, le=1)
    settle_s: int | None = Field(default=None, ge=0, le=86400)
    automatic: bool | None = None


class Endpoint(Schema):
    id: str
    name: str
    project: str
    model: str
    objective: str
    filter: str
    signature: dict[str, Any]
    settings: dict[str, Any]
    assignment: str
    release: str
    version: int | None
    choice: dict[str, str]  # class -> variant name
    devices: int
    p50_ms: float | None = None
    p95_ms: float | None = None
    error_share: float | None = None
    accuracy: Figure | None = None  # from posted labels
    requests_per_s: float = 0.0
    rollout: str = ""
    created_ms: int


class RolloutCreate(Schema):
    endpoint: str
    release: str = ""  # "" = newest of the endpoint's model
    choice: dict[str, str] | None = None  # class -> variant; None = best by the objective
    waves: list[str] = Field(default_factory=lambda: ["1", "25%", "100%"])
    reason: str = ""
    dry_run: bool = False


class Reason(Schema):
    reason: str = ""


class Effect(Schema):
    """New against old on the same devices, with a 95 % interval, beside its gate."""

    name: str  # latency_p95, error_share, accuracy
    value: float | None
    low: float | None = None
    high: float | None = None
    gate: float | None = None
    unit: str = "%"
    n: int = 0
    sentence: str = ""


class Wave(Schema):
    name: str
    state: str  # waiting, running, passed, stopped, carried
    devices: int
    switched: int
    failed: int
    effects: list[Effect] = Field(default_factory=list)
    decision: str = ""  # go, stop, collecting, waiting
    sentence: str = ""
    started_ms: int = 0
    decided_ms: int = 0


class RolloutDevice(Schema):
    device: str
    name: str
    profile_class: str
    wave: int
    state: str
    reason: str = ""
    detail: str = ""
    logs: str = ""


class Rollout(Schema):
    id: str
    endpoint: str
    from_label: str  # "v1"
    to_label: str
    state: str
    sentence: str
    waves: list[Wave]
    gates: dict[str, Any]
    devices: list[RolloutDevice] = Field(default_factory=list)
    left_out: dict[str, list[str]] = Field(default_factory=dict)  # pinned, quarantined -> names, when planned
    actor: str
    reason: str
    finding: str = ""
    created_ms: int
    finished_ms: int


class Finding(Schema):
    id: str
    kind: str
    subject: str
    endpoint: str
    profile_class: str
    state: str
    severity: str
    sentence: str
    evidence: dict[str, Any]
    action: dict[str, Any]
    opened_ms: int
    closed_ms: int


class Event(Schema):
    id: int
    time_ms: int
    project: str
    actor: str
    verb: str
    kind: str
    object: str
    before: dict[str, Any] | None
    after: dict[str, Any] | None
    reason: str


class StoryItem(Schema):
    """One paragraph of the loop's story."""

    time_ms: int
    kind: str  # finding, optimization, rollout, effect
    title: str
    text: str
    link: str
    actor: str
    figures: dict[str, float | None] = Field(default_factory=dict)


DeviceDetail.model_rebuild()
